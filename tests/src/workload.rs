//! What a workload does with its protected disk, and what is read of a disk by who has it open: helpers of many tests.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::Value;

use crate::image::{self, MIB};
use crate::nbd::Client;
use crate::site::text;
use crate::{Machine, Site};

/// Protects a disk with content, in the file `disk` of the site's folder.
#[track_caller]
pub fn protected(site: &Site, name: &str, disk: &str, bytes: u64, seed: u64) -> Machine {
    let disk = site.path(disk);
    image::make_mixed(&disk, bytes, seed);
    let machine = site.protect(name, &[&disk], &[]);
    site.wait_protected(name);
    machine
}

/// Writes the same byte all over a range.
#[track_caller]
pub fn write(nbd: &str, at: u64, length: u64, byte: u8) {
    let mut client = Client::connect(nbd).expect("the disk can be opened");
    client.write(at, &vec![byte; length as usize]).expect("it can be written");
    client.disconnect().expect("it can be left");
}

/// What an NBD client reads of a disk, in a file of the site's folder.
#[track_caller]
pub fn content(site: &Site, nbd: &str, name: &str) -> PathBuf {
    let mut client = Client::connect(nbd).expect("the disk can be opened");
    let path = site.path(name);
    let file = std::fs::File::create(&path).expect("a file can be made");
    let mut part = vec![0; MIB as usize];
    for at in (0..client.bytes).step_by(part.len()) {
        let part = &mut part[..MIB.min(client.bytes - at) as usize];
        client.read(at, part).expect("it can be read");
        file.write_all_at(part, at).expect("it can be written");
    }
    path
}

/// Where the first disk of a machine that failed over can be opened.
#[track_caller]
pub fn nbd(result: &Value) -> String {
    text(&result["disks"][0]["nbd"])
}
