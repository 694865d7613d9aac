//! What the simulation runs takes its threads, locks and clocks from `tidemark_base`, where a simulated machine can give its own.

use std::path::Path;

use crate::{files, name};

/// Crates whose code runs in the simulation.
const SIMULATED: [&str; 3] = ["agent/host/src", "agent/process-server/src", "agent/hrl/src"];

/// What only `tidemark_base::{sync, thread, time}` may take from the standard library.
const OF_THE_SEAM: [&str; 11] = [
    "thread",
    "Mutex",
    "MutexGuard",
    "RwLock",
    "RwLockReadGuard",
    "RwLockWriteGuard",
    "Condvar",
    "Barrier",
    "mpsc",
    "Instant",
    "SystemTime",
];

/// Files that the simulation does not reach, and why they need the real machine's.
const EXCEPTIONS: [(&str, &str); 7] = [
    ("agent/host/src/capture/nbd.rs", "sockets of the real machine"),
    ("agent/process-server/src/accept/mod.rs", "asynchronous: shared with tasks of the runtime"),
    ("agent/process-server/src/accept/progress.rs", "asynchronous: shared with tasks of the runtime"),
    ("agent/process-server/src/accept/pool.rs", "asynchronous: shared with tasks of the runtime"),
    ("agent/process-server/src/accept/commit.rs", "asynchronous: threads that tasks of the runtime wait for"),
    ("agent/process-server/src/accept/lane.rs", "asynchronous: shared with tasks of the runtime"),
    ("agent/process-server/src/accept/compare.rs", "asynchronous: shared with tasks of the runtime"),
];

fn is_of_tests(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests")
        || path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .is_some_and(|stem| stem == "testing" || stem == "tests" || stem.starts_with("tests_"))
}

/// Names that the file takes from the standard library and should take from the seam. Its tests at the end do not count.
fn taken_past_the_seam(text: &str) -> Vec<&str> {
    let mut tests = text.match_indices("\n#[cfg(test)]\nmod ").map(|(at, found)| (at, &text[at + found.len()..]));
    let end = tests.find(|(_, rest)| rest.lines().next().is_some_and(|line| line.ends_with('{')));
    let code = &text[..end.map_or(text.len(), |(at, _)| at)];
    let mut found = Vec::new();
    for (at, _) in code.match_indices("std::") {
        let line = code[..at].rsplit('\n').next().unwrap_or_default();
        if line.trim_start().starts_with("//") || line.ends_with(|before: char| before.is_alphanumeric()) {
            continue;
        }
        // One path, or a whole tree of them in braces.
        let mut depth = 0;
        let path = code[at..].split(|letter: char| {
            depth += i32::from(letter == '{') - i32::from(letter == '}');
            depth == 0 && !(letter.is_alphanumeric() || matches!(letter, '_' | ':' | '}'))
        });
        let words =
            path.take(1).flat_map(|path| path.split(|letter: char| !(letter.is_alphanumeric() || letter == '_')));
        found.extend(words.filter(|word| OF_THE_SEAM.contains(word)));
    }
    found
}

#[test]
fn what_is_simulated_takes_threads_locks_and_clocks_from_the_seam() {
    let mut unused: Vec<&str> = EXCEPTIONS.iter().map(|(file, _)| *file).collect();
    let mut seen = 0;
    for path in files() {
        let file = name(&path);
        let is_simulated = SIMULATED.iter().any(|folder| Path::new(&file).starts_with(folder));
        if !is_simulated || path.extension().is_none_or(|extension| extension != "rs") || is_of_tests(Path::new(&file))
        {
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&path).unwrap();
        let found = taken_past_the_seam(&text);
        if EXCEPTIONS.iter().any(|(exception, _)| *exception == file) {
            unused.retain(|exception| *exception != file || found.is_empty());
            continue;
        }
        assert!(
            found.is_empty(),
            "{file} takes {found:?} from std; take it from tidemark_base::{{sync, thread, time}}"
        );
    }
    assert!(unused.is_empty(), "these need no exception: {unused:?}");
    assert!(seen > 60, "{seen} files");
}

#[test]
fn paths_past_the_seam_are_seen_however_they_are_written() {
    let found = |text| taken_past_the_seam(text).len();
    assert_eq!(found("use std::sync::{Arc, Weak};\nuse std::time::Duration;\nuse tidemark_base::sync::Mutex;\n"), 0);
    assert_eq!(found("use std::sync::{\n    Arc, Condvar,\n    Mutex,\n};\n"), 2);
    assert_eq!(found("use std::{io, sync::{Arc, RwLock}, time::Instant};\nstruct Mutex;\n"), 2);
    assert_eq!(found("fn now() { std::thread::yield_now(); }\n// std::sync::Mutex\n"), 1);
    assert_eq!(found("#[cfg(test)]\nmod tests;\nuse std::sync::Mutex;\n"), 1);
    assert_eq!(found("fn some() {}\n\n#[cfg(test)]\nmod tests {\n    use std::sync::Mutex;\n}\n"), 0);
}
