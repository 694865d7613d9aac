//! The `tidemark` command under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The command's path: `TIDEMARK_BIN` (`tests/run` builds it once and says where), otherwise built now, with the
/// profile and in the target folder of the running test, so that a stale one is never tested.
pub fn tidemark() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("TIDEMARK_BIN") {
        Some(path) => PathBuf::from(path),
        None => build(),
    })
}

fn build() -> PathBuf {
    // target/PROFILE/deps/TEST, or target/PROFILE/PROGRAM
    let this = std::env::current_exe().expect("this program has a path");
    let mut folder = this.parent().expect("a program is in a folder");
    if folder.ends_with("deps") {
        folder = folder.parent().expect("deps is in the profile's folder");
    }
    let target = folder.parent().expect("the profile's folder is in the target folder");
    let release = folder.ends_with("release");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(repository())
        .args(["build", "--quiet", "--locked", "-p", "tidemark"])
        .env("CARGO_TARGET_DIR", target);
    if release {
        command.arg("--release");
    }
    let status = command.status().expect("cargo runs");
    assert!(status.success(), "the tidemark command does not build");
    folder.join("tidemark")
}

/// The top of the source tree.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository")
}
