//! The import table of `agent/ARCHITECTURE.md` is what the `Cargo.toml` files say.

use std::collections::{BTreeMap, BTreeSet};

use tidemark_tests::binary::repository;

/// Folder of a crate → the short names of ours that it may import; `None`: all.
fn allowed() -> BTreeMap<String, Option<BTreeSet<String>>> {
    let text = std::fs::read_to_string(repository().join("agent/ARCHITECTURE.md")).unwrap();
    let header = text.lines().position(|line| line.starts_with("| crate |")).expect("a table of crates");
    let mut table = BTreeMap::new();
    for row in text.lines().skip(header + 2).take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [crates, _, imports] = cells[..] else { panic!("three cells in {row:?}") };
        let imports = match imports {
            "all" => None,
            "–" => Some(BTreeSet::new()),
            names => Some(names.split_whitespace().map(str::to_owned).collect()),
        };
        for folder in crates.split(',') {
            let folder = folder.split('(').next().unwrap_or_default().trim().trim_matches('`').to_owned();
            table.insert(folder, imports.clone());
        }
    }
    table
}

#[test]
fn crates_import_only_what_the_architecture_allows() {
    let workspace: toml::Table = std::fs::read_to_string(repository().join("Cargo.toml")).unwrap().parse().unwrap();
    let members = workspace["workspace"]["members"].as_array().unwrap();
    let mut allowed = allowed();
    for member in members.iter().map(|member| member.as_str().unwrap()) {
        let imports = allowed.remove(member).unwrap_or_else(|| panic!("ARCHITECTURE.md does not name {member}"));
        let path = repository().join(member).join("Cargo.toml");
        let manifest: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        // Tests of a crate may use what they like: only what it is built from counts.
        let Some(dependencies) = manifest.get("dependencies").and_then(toml::Value::as_table) else { continue };
        for ours in dependencies.keys().filter_map(|name| name.strip_prefix("tidemark-")) {
            let fine = imports.as_ref().is_none_or(|imports| imports.contains(ours));
            assert!(fine, "{member} imports {ours}, which ARCHITECTURE.md does not allow");
        }
        assert!(
            imports.is_none() || !dependencies.contains_key("tidemark"),
            "{member} imports the composition, which nothing but whole-system tests may"
        );
    }
    assert!(allowed.is_empty(), "ARCHITECTURE.md names crates that are no members: {:?}", allowed.keys());
}

#[test]
fn dependencies_are_named_in_one_place() {
    let workspace: toml::Table = std::fs::read_to_string(repository().join("Cargo.toml")).unwrap().parse().unwrap();
    for member in workspace["workspace"]["members"].as_array().unwrap() {
        let member = member.as_str().unwrap();
        let path = repository().join(member).join("Cargo.toml");
        let manifest: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (name, value) in manifest.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                let inherited = value.get("workspace").and_then(toml::Value::as_bool) == Some(true);
                assert!(inherited, "{member}: {name} has a version of its own; name it in the workspace's Cargo.toml");
            }
        }
    }
}
