//! What the repository itself must keep: who imports whom, that links lead somewhere, that the README's commands exist.

mod arrows;
mod commands;
mod seams;
mod systems;
mod text;

use std::path::{Path, PathBuf};

/// Every file of the source tree, without what is built or fetched.
fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![tidemark_tests::binary::repository().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !matches!(entry.file_name().to_str(), Some("target" | ".git" | "corpus" | "artifacts"))
            {
                folders.push(path);
            } else if kind.is_file() && entry.file_name() != ".git" {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A file's path within the source tree, for messages.
fn name(path: &Path) -> String {
    path.strip_prefix(tidemark_tests::binary::repository()).unwrap_or(path).display().to_string()
}

#[test]
fn the_top_level_is_short() {
    let repository = tidemark_tests::binary::repository();
    let allowed =
        ["Cargo.toml", "Cargo.lock", "LICENSE", "README.md", "agent", "bench", "packaging", "proto", "tests", "target"];
    for entry in std::fs::read_dir(repository).unwrap().map(Result::unwrap) {
        let file_name = entry.file_name().into_string().unwrap();
        assert!(
            file_name.starts_with('.') || allowed.contains(&file_name.as_str()),
            "{file_name} is not of the top level"
        );
    }
}
