//! What only Linux has, and what only Windows has, stays in modules of its own, which the other system does not build: so the agent goes on
//! building for Windows although few who change it build it there (`tests/windows` does).

use std::path::Path;

use tidemark_tests::binary::repository;

use crate::{files, name};

/// What is built for Windows, as `tests/windows` says.
const BUILT_FOR_WINDOWS: [&str; 9] = [
    "agent/base/src",
    "agent/hrl/src",
    "agent/nbd/src",
    "agent/transport/src",
    "agent/vsphere/src",
    "agent/rct/src",
    "agent/host/src",
    "agent/src",
    "proto/src",
];

/// Files and folders that Linux alone builds. The line that names the module stands behind `#[cfg(unix)]`.
const OF_LINUX: [&str; 34] = [
    "agent/base/src/platform/unix.rs",
    "agent/base/src/disk/file.rs",
    "agent/nbd/src/cached/unix.rs",
    "agent/nbd/src/client",
    "agent/nbd/src/image.rs",
    "agent/nbd/src/qemu.rs",
    "agent/nbd/src/remote.rs",
    "agent/nbd/src/server",
    "agent/nbd/src/stream.rs",
    "agent/nbd/src/wire.rs",
    "agent/host/src/platform/unix.rs",
    "agent/host/src/inventory",
    "agent/host/src/host/inventory.rs",
    "agent/host/src/freeze/guard.rs",
    "agent/host/src/freeze/scripts.rs",
    "agent/host/src/capture/bpf.rs",
    "agent/host/src/capture/freezer.rs",
    "agent/host/src/capture/fuse.rs",
    "agent/host/src/capture/nbd.rs",
    "agent/host/src/capture/qemu.rs",
    "agent/host/src/capture/images.rs",
    "agent/host/src/capture/providers/unix.rs",
    "agent/src/cli",
    "agent/src/demo",
    "agent/src/folder.rs",
    "agent/src/roles/config_server.rs",
    "agent/src/roles/machines.rs",
    "agent/src/roles/notify.rs",
    "agent/src/roles/owner.rs",
    "agent/src/roles/process_server.rs",
    "agent/src/roles/quiet.rs",
    "agent/src/roles/up.rs",
    "agent/src/roles/place/folder.rs",
    "agent/src/roles/system/unix.rs",
];

const OF_WINDOWS: [&str; 8] = [
    "agent/base/src/platform/windows.rs",
    "agent/base/src/disk/windows.rs",
    "agent/nbd/src/cached/windows.rs",
    "agent/rct/src/windows",
    "agent/host/src/platform/windows.rs",
    "agent/host/src/capture/providers/windows.rs",
    "agent/src/windows",
    "agent/src/roles/system/windows.rs",
];

/// Single functions of a file that is built on both, each behind a condition of its own.
const WITHIN_A_FILE: [(&str, &str); 2] = [
    ("agent/vsphere/src/settings.rs", "who may change a file that names a password"),
    ("agent/src/main.rs", "how the C library of Linux keeps memory"),
];

/// Names of its system, and our own crates that nothing else builds.
const NAMES_OF_LINUX: [&str; 12] = [
    "nix::",
    "libc::",
    "std::os::unix",
    "std::os::fd",
    "std::os::linux",
    "tokio::signal::unix",
    "tidemark_bpf::",
    "tidemark_config_server::",
    "tidemark_fuse::",
    "tidemark_hypervisor::",
    "tidemark_process_server::",
    "tidemark_qemu::",
];
const NAMES_OF_WINDOWS: [&str; 3] = ["windows_sys::", "windows_service::", "std::os::windows"];

/// Without comments, and without the tests at the end.
fn code(text: &str) -> String {
    let mut tests = text.match_indices("\n#[cfg(").filter(|(at, _)| {
        let mut lines = text[at + 1..].lines();
        let is_of_tests = lines.next().is_some_and(|condition| condition.contains("test"));
        is_of_tests && lines.next().is_some_and(|module| module.starts_with("mod ") && module.ends_with('{'))
    });
    let end = tests.next().map_or(text.len(), |(at, _)| at);
    let lines = text[..end].lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether one of the names stands there as a path of its own.
fn mentions<'a>(code: &str, names: &[&'a str]) -> Option<&'a str> {
    names.iter().copied().find(|name| {
        code.match_indices(name)
            .any(|(at, _)| !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_'))
    })
}

fn lies_in(file: &str, places: &[&str]) -> bool {
    places.iter().any(|place| {
        // A module's own folder belongs to it.
        Path::new(file).starts_with(place) || Path::new(file).starts_with(place.strip_suffix(".rs").unwrap_or(place))
    })
}

#[test]
fn what_only_one_system_has_stays_in_its_modules() {
    let mut seen = 0;
    for path in files() {
        let file = name(&path);
        let is_built = BUILT_FOR_WINDOWS.iter().any(|folder| Path::new(&file).starts_with(folder));
        let is_of_tests = Path::new(&file).components().any(|part| part.as_os_str() == "tests");
        if !is_built || is_of_tests || path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        if WITHIN_A_FILE.iter().any(|(exception, _)| *exception == file) {
            continue;
        }
        seen += 1;
        let code = code(&std::fs::read_to_string(&path).unwrap());
        if !lies_in(&file, &OF_LINUX)
            && let Some(found) = mentions(&code, &NAMES_OF_LINUX)
        {
            panic!(
                "{file} uses {found}, which Windows does not have: put it into a module of Linux's (`OF_LINUX` here)"
            );
        }
        if !lies_in(&file, &OF_WINDOWS)
            && let Some(found) = mentions(&code, &NAMES_OF_WINDOWS)
        {
            panic!(
                "{file} uses {found}, which Linux does not have: put it into a module of Windows's (`OF_WINDOWS` here)"
            );
        }
    }
    assert!(seen > 150, "{seen} files");
}

#[test]
fn modules_of_one_system_are_built_for_it_alone() {
    let all = OF_LINUX.iter().map(|place| (place, "unix")).chain(OF_WINDOWS.iter().map(|place| (place, "windows")));
    for (place, system) in all {
        let path = repository().join(place);
        assert!(path.exists(), "{place} is not there any more");
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let folder = path.parent().unwrap();
        let parents = [folder.join("mod.rs"), folder.join("lib.rs"), folder.with_extension("rs")];
        let texts = parents.iter().filter_map(|parent| std::fs::read_to_string(parent).ok());
        let is_behind = texts.into_iter().any(|text| {
            let lines: Vec<&str> = text.lines().collect();
            lines.iter().enumerate().any(|(at, line)| {
                let attributes: Vec<&&str> =
                    lines[..at].iter().rev().take_while(|line| line.starts_with("#[")).collect();
                let is_named = line.ends_with(&format!("mod {module};"))
                    || line.contains("mod ") && attributes.iter().any(|of| of.ends_with(&format!("/{module}.rs\"]")));
                is_named && attributes.iter().any(|attribute| **attribute == format!("#[cfg({system})]"))
            })
        });
        assert!(is_behind, "{place} is not behind #[cfg({system})] where it is named");
    }
}

#[test]
fn uses_are_seen_and_tests_and_comments_are_not() {
    let found = |text: &str| mentions(&code(text), &NAMES_OF_LINUX);
    assert_eq!(found("use nix::fcntl::Flock;\n"), Some("nix::"));
    assert_eq!(found("fn a() {\n    let x = libc::ENOENT;\n}\n"), Some("libc::"));
    assert_eq!(found("use tidemark_config_server::tally::Tally;\n"), Some("tidemark_config_server::"));
    assert_eq!(found("use unix::thing;\nuse phoenix::x;\n// nix::x\n"), None);
    assert_eq!(found("fn a() {}\n\n#[cfg(test)]\nmod tests {\n    use nix::x;\n}\n"), None);
    assert_eq!(found("fn a() {}\n\n#[cfg(all(test, unix))]\nmod tests {\n    use std::os::unix::x;\n}\n"), None);
    assert_eq!(found("#[cfg(test)]\nmod tests;\nuse std::os::unix::x;\n"), Some("std::os::unix"));
}
