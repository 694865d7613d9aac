//! What an administrator of a machine's host writes down of who runs it.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::Site;

fn folder(site: &Site, machine: &str) -> PathBuf {
    let top = site.state().join("agent/owner.d");
    let folder = top.join(machine);
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    for folder in [&top, &folder] {
        std::fs::set_permissions(folder, Permissions::from_mode(0o700)).expect("it is ours");
    }
    folder
}

fn put(path: &Path, content: &str) {
    let file = std::fs::File::create(path);
    file.and_then(|mut file| file.write_all(content.as_bytes())).expect("it can be written");
}

/// `owner.toml`.
pub fn settings(site: &Site, machine: &str, content: &str) {
    put(&folder(site, machine).join("owner.toml"), content);
}

/// A program: `stop`, `power` or `start`.
pub fn program(site: &Site, machine: &str, verb: &str, script: &str) {
    let path = folder(site, machine).join(verb);
    put(&path, &format!("#!/bin/sh\n{script}\n"));
    std::fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("it is ours");
}

/// Programs that shut a machine down and start it, which is a file: it is on while that is there.
pub fn switch(site: &Site, machine: &str) -> PathBuf {
    let on = site.path(&format!("{machine}.on"));
    let file = on.display();
    put(&on, "");
    program(
        site,
        machine,
        "power",
        &format!(r#"[ -e {file} ] && echo '{{"power": "on"}}' || echo '{{"power": "off"}}'"#),
    );
    let stop = format!(r#"[ -e {file} ] && echo '{{"stopped": "by_guest"}}' || echo '{{"stopped": "was_off"}}'"#);
    program(site, machine, "stop", &format!("{stop}; rm -f {file}"));
    program(site, machine, "start", &format!("touch {file}"));
    on
}
