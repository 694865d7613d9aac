//! Words and links in the source tree.

use std::path::Path;

use tidemark_tests::binary::repository;

use crate::{files, name};

/// Every text file with its content.
fn texts() -> Vec<(std::path::PathBuf, String)> {
    files().into_iter().filter_map(|path| std::fs::read_to_string(&path).ok().map(|text| (path, text))).collect()
}

#[test]
fn no_file_names_the_machine_it_was_written_on() {
    // In two halves, so that this file is not its own finding.
    let forbidden = [("/wo", "rk/"), ("/ro", "ot/"), ("/home", "/"), ("perf-", "tools"), ("TO", "DO"), ("FIX", "ME")];
    for (path, text) in texts() {
        for (number, line) in text.lines().enumerate() {
            for (one, other) in forbidden {
                let word = format!("{one}{other}");
                // A path begins where a word begins: `tidemark://root/…` and `network/…` are none.
                let found = line.match_indices(&word).any(|(at, _)| {
                    !line[..at]
                        .ends_with(|before: char| before.is_alphanumeric() || before == '/' && word.starts_with('/'))
                });
                assert!(!found, "{}:{}: {line}", name(&path), number + 1);
            }
        }
    }
}

#[test]
fn dependencies_come_from_the_public_registry() {
    let lock = std::fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    for line in lock.lines().filter(|line| line.starts_with("source = ")) {
        assert_eq!(line, "source = \"registry+https://github.com/rust-lang/crates.io-index\"");
    }
}

#[test]
fn links_of_documents_lead_to_files() {
    for (path, text) in
        texts().into_iter().filter(|(path, _)| path.extension().is_some_and(|extension| extension == "md"))
    {
        let mut rest = text.as_str();
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            let Some(end) = rest.find(')') else { break };
            let target = rest[..end].split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.contains("::") || target.contains(' ') {
                continue;
            }
            // A format's page is also its module's documentation, where links may name items.
            let is_path = target.contains('/') || target.contains('.');
            let resolved = path.parent().unwrap_or(Path::new("")).join(target);
            assert!(!is_path || resolved.exists(), "{}: the link to {target} leads nowhere", name(&path));
        }
    }
}

#[test]
fn files_that_the_architecture_names_exist() {
    let text = std::fs::read_to_string(repository().join("agent/ARCHITECTURE.md")).unwrap();
    for quoted in text.split('`').skip(1).step_by(2) {
        let is_file = [".rs", ".md", ".proto"].iter().any(|ending| quoted.ends_with(ending))
            && quoted.contains('/')
            && !quoted.contains('{');
        if is_file {
            let found = ["", "agent", "agent/host/src", "agent/process-server/src"]
                .iter()
                .any(|folder| repository().join(folder).join(quoted).exists());
            assert!(found, "ARCHITECTURE.md names {quoted}, which is not there");
        }
    }
}

#[test]
fn formats_are_the_documentation_of_their_module() {
    for path in files().into_iter().filter(|path| path.file_name().is_some_and(|file| file == "FORMAT.md")) {
        let folder = path.parent().unwrap();
        let included = files().into_iter().any(|source| {
            let is_source = source.extension().is_some_and(|extension| extension == "rs");
            is_source && source.starts_with(folder) && {
                let text = std::fs::read_to_string(&source).unwrap_or_default();
                text.contains("include_str!(") && text.contains("FORMAT.md")
            }
        });
        assert!(included, "{} is no module's documentation", name(&path));
    }
}

#[test]
fn the_command_line_shows_sizes_with_their_unit() {
    for (path, text) in texts().into_iter().filter(|(path, _)| name(path).starts_with("agent/src/cli/")) {
        // `text(of, "/x_bytes")` shows a bare number; `bytes_at` shows it as people read it.
        for (at, _) in text.match_indices(" text(").chain(text.match_indices("(text(")) {
            let call = text[at..].split_once("text(").map_or("", |(_, rest)| rest.split(')').next().unwrap_or(""));
            assert!(!call.trim_end().ends_with("bytes\""), "{}: text({call})", name(&path));
        }
    }
}
