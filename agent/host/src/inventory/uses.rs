//! Who uses a block device: mounts, swap, what is made of it, and its partitions.

use std::collections::BTreeMap;
use std::io;

use tidemark_proto::control::DiskUse;

use super::{Device, Number, Places};

pub const FILE_SYSTEM: &str = "file_system";
pub const SWAP: &str = "swap";
pub const PARTITION: &str = "partition";
pub const HOLDER: &str = "holder";

/// Notes the uses of each, and who is in use for that.
pub(super) fn note(places: &Places, devices: &mut BTreeMap<String, Device>) -> io::Result<()> {
    let mut uses: BTreeMap<String, Vec<DiskUse>> = BTreeMap::new();
    let mut add = |name: &str, kind: &str, at: &str| {
        let of = uses.entry(name.to_owned()).or_default();
        let new = DiskUse { kind: kind.to_owned(), at: at.to_owned() };
        if !of.contains(&new) {
            of.push(new);
        }
    };
    let numbers: BTreeMap<Number, &str> =
        devices.values().map(|device| (device.number, device.name.as_str())).collect();
    let by_path = by_path(places, devices);
    for mount in mounts(&read(places.mounts.as_path())?) {
        // File systems over several devices have a number of their own, and name one of them.
        let device = numbers.get(&mount.number).copied().or_else(|| by_path.get(&mount.source).map(String::as_str));
        if let Some(name) = device {
            add(name, FILE_SYSTEM, &mount.place);
        }
    }
    for line in read(places.swaps.as_path())?.lines().skip(1) {
        let path = unescaped(line.split_whitespace().next().unwrap_or_default());
        if let Some(name) = by_path.get(&path) {
            add(name, SWAP, "");
        }
    }
    for device in devices.values() {
        let holders = std::fs::read_dir(device.folder.join("holders")).into_iter().flatten().flatten();
        for holder in holders.filter_map(|holder| holder.file_name().into_string().ok()) {
            let shown = devices.get(&holder).map_or_else(|| holder.clone(), |of| of.disk.path.clone());
            add(&device.name, HOLDER, &shown);
        }
        if let Some(parent) = &device.parent {
            add(parent, PARTITION, &device.disk.path);
        }
    }
    let is_used = |of: &[DiskUse]| of.iter().any(|of| of.kind != PARTITION);
    let mut used: Vec<String> = uses.iter().filter(|(_, of)| is_used(of)).map(|(name, _)| name.clone()).collect();
    let parents: Vec<String> = used.iter().filter_map(|name| devices.get(name.as_str())?.parent.clone()).collect();
    used.extend(parents);
    for (name, device) in devices.iter_mut() {
        device.disk.in_use = used.contains(name);
        let mut of = uses.remove(name).unwrap_or_default();
        // What keeps others away comes first: it is what is told where not everything is.
        of.sort_by_key(|of| of.kind == PARTITION);
        device.disk.uses = of;
    }
    Ok(())
}

/// By the path that is shown, and the kernel's own.
fn by_path(places: &Places, devices: &BTreeMap<String, Device>) -> BTreeMap<String, String> {
    let own = |device: &Device| places.nodes.join(device.name.replace('!', "/")).to_string_lossy().into_owned();
    devices
        .values()
        .flat_map(|device| [own(device), device.disk.path.clone()].map(|path| (path, device.name.clone())))
        .collect()
}

/// A system that has no such file tells nothing this way.
fn read(path: &std::path::Path) -> io::Result<String> {
    match std::fs::read(path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

struct Mount {
    number: Number,
    place: String,
    source: String,
}

/// Lines of mountinfo (proc_pid_mountinfo(5)): `36 35 8:1 /root /place options optional… - type source options`.
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(2);
        let (major, minor) = fields.next()?.split_once(':')?;
        let number = (major.parse().ok()?, minor.parse().ok()?);
        let place = unescaped(fields.nth(1)?);
        let source = unescaped(after.split(' ').nth(1)?);
        Some(Mount { number, place, source })
    };
    text.lines().filter_map(mount).collect()
}

/// Blanks and the like are octal there.
fn unescaped(text: &str) -> String {
    let codes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    codes.iter().fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}
