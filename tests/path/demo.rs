//! The main job, as a newcomer starts it.

use tidemark_tests::need;
use tidemark_tests::site::offline;

#[test]
fn the_demo_proves_itself() {
    need!("mke2fs", "e2fsck");
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("demo");
    let demo = offline(&["demo", "--json", "--size", "128M", "--dir", folder.to_str().unwrap()]);
    assert_eq!(demo.code, 0, "{}", demo.describe());
    let proofs = demo.json();
    assert!(proofs.is_object(), "one document: {}", demo.describe());
}
