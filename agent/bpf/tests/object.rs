//! The committed object is what its source compiles to.

use std::process::Command;

#[test]
fn the_object_is_what_the_source_compiles_to() {
    let version = Command::new("clang").arg("--version").output();
    let is_there = version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("clang version 14."));
    if !is_there {
        eprintln!("skipped: clang 14 is not here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let made = folder.path().join("made.o");
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    assert!(Command::new(here.join("build-object")).arg(&made).status().unwrap().success());
    let committed = std::fs::read(here.join("src/track.bpf.o")).unwrap();
    assert!(std::fs::read(made).unwrap() == committed, "run agent/bpf/build-object and commit what it makes");
}
