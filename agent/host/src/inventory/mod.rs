//! What disks this host has, protected or not, and who uses them: read from what the kernel and udev tell. No device is opened.
//!
//! *Consistency.* Devices come and go while this looks: one that went is left out, and the next look is another one. *Retries.* The next
//! look. *Cancellation.* None: it reads small files of virtual file systems. *Crash.* Nothing is kept here.

#[cfg(all(test, unix))]
mod tests;
mod uses;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use tidemark_base::SECTOR_BYTES;
use tidemark_proto::control::HostDisk;

/// Block devices that are looked at; a host with more is a mistake of ours or of its.
const DEVICES_MAX: usize = 16_384;

/// Where the system tells of its disks.
#[derive(Clone, Debug)]
pub struct Places {
    /// A folder for each block device.
    pub devices: PathBuf,
    /// Where programs open them.
    pub nodes: PathBuf,
    pub mounts: PathBuf,
    pub swaps: PathBuf,
    /// What udev found on them.
    pub found: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            devices: "/sys/class/block".into(),
            nodes: "/dev".into(),
            mounts: "/proc/self/mountinfo".into(),
            swaps: "/proc/swaps".into(),
            found: "/run/udev/data".into(),
        }
    }
}

/// Major and minor, as the kernel counts devices.
pub type Number = (u32, u32);

/// A block device as it is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub number: Number,
    pub disk: HostDisk,
}

/// Every block device that has a size, partitions after their disk. A system that tells of none this way has none.
pub fn look(places: &Places) -> io::Result<Vec<Found>> {
    let mut devices = BTreeMap::new();
    let entries = match std::fs::read_dir(&places.devices) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    for entry in entries.take(DEVICES_MAX) {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        if let Some(device) = Device::read(places, &name) {
            devices.insert(name, device);
        }
    }
    uses::note(places, &mut devices)?;
    let mut found: Vec<Device> = devices.into_values().collect();
    found.sort_by(|one, other| one.order().cmp(&other.order()));
    Ok(found.into_iter().map(|device| Found { number: device.number, disk: device.disk }).collect())
}

/// A block device while it is looked at.
struct Device {
    /// As the kernel calls it.
    name: String,
    folder: PathBuf,
    number: Number,
    /// Of a partition: its disk.
    parent: Option<String>,
    disk: HostDisk,
}

impl Device {
    /// `None`: it went, holds nothing, or is not for programs.
    fn read(places: &Places, name: &str) -> Option<Self> {
        let folder = places.devices.join(name).canonicalize().ok()?;
        let bytes = text(&folder, "size")?.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)?;
        // A path of a disk that has several is hidden behind the one that counts.
        if bytes == 0 || is_set(&folder, "hidden") {
            return None;
        }
        let number = text(&folder, "dev")?;
        let number =
            number.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))?;
        let is_partition = folder.join("partition").exists();
        let whole = if is_partition { folder.parent()? } else { &folder };
        let parent = is_partition.then(|| whole.file_name()?.to_str().map(str::to_owned)).flatten();
        let found = udev(places, number);
        let disk = HostDisk {
            path: path(places, name, &folder)?,
            bytes,
            kind: kind(name, &folder).to_owned(),
            description: description(whole),
            serial: serial(whole),
            content: found.unwrap_or_default(),
            read_only: is_set(&folder, "ro"),
            removable: is_set(whole, "removable"),
            ..HostDisk::default()
        };
        Some(Self { name: name.to_owned(), folder, number, parent, disk })
    }

    /// Disks by their name, each before its partitions; those in the order of their numbers.
    fn order(&self) -> (&str, bool, u32, &str) {
        (self.parent.as_deref().unwrap_or(&self.name), self.parent.is_some(), self.number.1, &self.name)
    }
}

/// The first line of a small file; `None`: it is not there, or says nothing.
fn text(folder: &Path, name: &str) -> Option<String> {
    let text = String::from_utf8_lossy(&std::fs::read(folder.join(name)).ok()?).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

fn is_set(folder: &Path, name: &str) -> bool {
    text(folder, name).is_some_and(|text| text == "1")
}

fn path(places: &Places, name: &str, folder: &Path) -> Option<String> {
    // A device mapper's number changes with the order of starts; its name is somebody's choice, and stays.
    let mapped =
        text(folder, "dm/name").map(|name| places.nodes.join("mapper").join(name)).filter(|path| path.exists());
    let path = mapped.unwrap_or_else(|| places.nodes.join(name.replace('!', "/")));
    path.into_os_string().into_string().ok()
}

fn kind(name: &str, folder: &Path) -> &'static str {
    if folder.join("partition").exists() {
        return "partition";
    }
    if let Some(uuid) = text(folder, "dm/uuid") {
        let made_by = uuid.split('-').next().unwrap_or_default();
        return match made_by {
            "LVM" => "logical_volume",
            "CRYPT" => "crypt",
            "mpath" => "multipath",
            part if part.starts_with("part") => "partition",
            _ => "mapped",
        };
    }
    let begins = |with: &[&str]| with.iter().any(|with| name.starts_with(with));
    match () {
        () if folder.join("dm").exists() => "mapped",
        () if folder.join("md").exists() => "raid",
        () if begins(&["loop"]) => "loop",
        () if begins(&["nbd"]) => "nbd",
        () if begins(&["ram", "zram"]) => "memory",
        () if begins(&["sr"]) => "optical",
        () => "disk",
    }
}

/// For people: what is behind it.
fn description(whole: &Path) -> String {
    let vendor = text(whole, "device/vendor").filter(|vendor| !vendor.starts_with("0x"));
    let model = text(whole, "device/model").map(|model| match vendor {
        Some(vendor) if vendor != "ATA" => format!("{vendor} {model}"),
        _ => model,
    });
    let others = ["loop/backing_file", "md/level"];
    model.or_else(|| others.iter().find_map(|name| text(whole, name))).unwrap_or_default()
}

fn serial(whole: &Path) -> String {
    let names = ["serial", "device/serial", "wwid", "device/wwid", "dm/uuid"];
    names.iter().find_map(|name| text(whole, name)).unwrap_or_default()
}

/// What udev found on it, which read it when it came.
fn udev(places: &Places, (major, minor): Number) -> Option<String> {
    let text = std::fs::read(places.found.join(format!("b{major}:{minor}"))).ok()?;
    let text = String::from_utf8_lossy(&text);
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix("E:")?.strip_prefix(key)?.strip_prefix('='));
    value("ID_FS_TYPE").or_else(|| value("ID_PART_TABLE_TYPE")).map(str::to_owned)
}
