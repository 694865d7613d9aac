//! The commands that documents tell a reader to type are there.

use std::os::unix::fs::PermissionsExt;

use tidemark_tests::binary::repository;
use tidemark_tests::site::offline;

/// The lines of ```sh blocks of a document, without comments.
fn commands(document: &str) -> Vec<String> {
    let text = std::fs::read_to_string(repository().join(document)).unwrap();
    let mut commands = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.trim() {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside && !line.starts_with('#') && !line.is_empty() => {
                commands.push(line.split(" #").next().unwrap_or_default().trim().to_owned());
            }
            _ => {}
        }
    }
    commands
}

#[test]
fn commands_in_documents_exist() {
    let mut checked = 0;
    for document in ["README.md", "packaging/README.md", "bench/README.md"] {
        for command in commands(document) {
            let words: Vec<&str> = command.split_whitespace().collect();
            let verbs: Vec<&str> = match words[..] {
                ["cargo", "run", "--release", "--", ref verbs @ ..] => verbs.to_vec(),
                ["tidemark", ref verbs @ ..] => verbs.to_vec(),
                ["cargo", "run", "--release", "-p", package, ..] => {
                    assert_eq!(package, "tidemark-bench", "{document}: {command}");
                    continue;
                }
                ["cargo" | "git" | "cd" | "sudo" | "export" | "apt-get" | "install" | "systemctl", ..] => continue,
                [program, ..] => {
                    let file = repository().join(program);
                    let mode =
                        std::fs::metadata(&file).unwrap_or_else(|_| panic!("{document}: {program} is not there"));
                    assert!(mode.permissions().mode() & 0o111 != 0, "{document}: {program} is not executable");
                    checked += 1;
                    continue;
                }
                [] => continue,
            };
            // The verb and, where there is one, its second word: names in capitals and options are the reader's.
            let verb: Vec<&str> = verbs.iter().copied().take(2).take_while(|word| is_verb(word)).collect();
            let known = verb.is_empty() || help(&verb) || help(&verb[..1]);
            assert!(known, "{document}: {command}: tidemark does not know {verb:?}");
            checked += 1;
        }
    }
    assert!(checked >= 2, "the README shows its two commands");
}

fn is_verb(word: &str) -> bool {
    word.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-') && !word.starts_with('-')
}

fn help(verb: &[&str]) -> bool {
    let mut arguments = verb.to_vec();
    arguments.push("--help");
    offline(&arguments).code == 0
}
