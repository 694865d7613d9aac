//! What disks the host has, and how each could be protected: [`crate::inventory`].

use std::path::Path;

use tidemark_base::DiskId;
use tidemark_base::error::with_causes;
use tidemark_proto::control::{DiskWay, HostDisk, Inventory, Via};

use super::Host;
use crate::error::HostError;
use crate::inventory::{Found, Number, Places, look};

impl Host {
    /// Every disk of this host with who uses it, and by which ways of capture it could be protected now. Nothing is opened.
    pub fn inventory(&self) -> Result<Inventory, HostError> {
        let failed = |source| HostError::Io { what: "look which disks there are", source };
        let found = look(&Places::default()).map_err(failed)?;
        let protected = self.protected();
        let fuse = obstacle_of_fuse();
        let disks: Vec<HostDisk> = found
            .iter()
            .map(|Found { number, disk }| {
                let own = protected.iter().find(|(protected, _)| protected == number).map(|(_, id)| *id);
                let ways = if own.is_some() { Vec::new() } else { self.ways(disk, &found, &fuse) };
                HostDisk { disk: own, ways, ..disk.clone() }
            })
            .collect();
        let mut inventory = Inventory { time: self.shared.config.clock.wall_now(), disks, left_out: 0 };
        inventory.fit();
        Ok(inventory)
    }

    /// The block devices that are protected here.
    fn protected(&self) -> Vec<(Number, DiskId)> {
        let specs: Vec<_> = self.shared.machines().values().map(|entry| entry.spec()).collect();
        let disks = specs.iter().flat_map(|spec| &spec.disks);
        disks.filter_map(|disk| Some((number_of(disk.path.as_ref())?, disk.disk))).collect()
    }

    /// Those that take block devices. Others name images and machines, which are no disks of this host.
    fn ways(&self, disk: &HostDisk, all: &[Found], fuse: &str) -> Vec<DiskWay> {
        let taken = taken(disk, all);
        let splitter = |needs: &str| if taken.is_empty() { needs.to_owned() } else { taken.clone() };
        let provider = self.shared.provider(Via::Bpf);
        let state = self.shared.config.state_of(&**provider, [&*disk.path].into_iter());
        let tracker = provider.probe(disk.path.as_ref(), state);
        let tracker = tracker.err().map_or_else(String::new, |error| with_causes(&error));
        [(Via::Nbd, splitter("")), (Via::Fuse, splitter(fuse)), (Via::Bpf, tracker)]
            .map(|(via, obstacle)| DiskWay { via: via.name().to_owned(), obstacle })
            .into()
    }
}

/// Why the workload cannot open it through us; empty: it can.
fn taken(disk: &HostDisk, all: &[Found]) -> String {
    if disk.read_only {
        return "it is read-only".to_owned();
    }
    if !disk.in_use {
        return String::new();
    }
    let says = |disk: &HostDisk| {
        let used = disk.uses.iter().find(|used| used.kind != "partition")?;
        Some(match used.kind.as_str() {
            "file_system" => format!("a file system on it is mounted at {}", used.at),
            "swap" => "it is swap space".to_owned(),
            _ => format!("{} is made of it", used.at),
        })
    };
    let of_partition = || {
        let parts = disk.uses.iter().filter(|used| used.kind == "partition");
        let mut parts = parts.filter_map(|part| all.iter().find(|found| found.disk.path == part.at));
        parts.find_map(|part| Some(format!("its partition {} is in use: {}", part.disk.path, says(&part.disk)?)))
    };
    let reason = says(disk).or_else(of_partition).unwrap_or_else(|| "it is in use".to_owned());
    format!("{reason}; end that first, for the workload opens it at the agent from then on")
}

#[cfg(target_os = "linux")]
fn obstacle_of_fuse() -> String {
    tidemark_fuse::probe().err().map_or_else(String::new, |error| with_causes(&error))
}

#[cfg(not(target_os = "linux"))]
fn obstacle_of_fuse() -> String {
    "this system has no FUSE".to_owned()
}

/// `None`: no block device.
#[cfg(unix)]
fn number_of(path: &Path) -> Option<Number> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let metadata = path.metadata().ok().filter(|metadata| metadata.file_type().is_block_device())?;
    let number = metadata.rdev();
    Some((u32::try_from(nix::sys::stat::major(number)).ok()?, u32::try_from(nix::sys::stat::minor(number)).ok()?))
}

#[cfg(not(unix))]
fn number_of(_: &Path) -> Option<Number> {
    None
}

#[cfg(test)]
mod tests {
    use tidemark_proto::control::DiskUse;

    use super::*;

    fn found(path: &str, uses: &[(&str, &str)]) -> Found {
        let uses: Vec<DiskUse> =
            uses.iter().map(|(kind, at)| DiskUse { kind: (*kind).to_owned(), at: (*at).to_owned() }).collect();
        let in_use = !uses.is_empty();
        Found { number: (8, 0), disk: HostDisk { path: path.to_owned(), uses, in_use, ..HostDisk::default() } }
    }

    #[test]
    fn what_keeps_a_workload_from_opening_a_disk_through_us_is_named() {
        let all = [
            found("/dev/sda", &[("partition", "/dev/sda1"), ("partition", "/dev/sda2")]),
            found("/dev/sda1", &[]),
            found("/dev/sda2", &[("holder", "/dev/md0")]),
            found("/dev/sdb", &[("file_system", "/srv"), ("partition", "/dev/sdb1")]),
            found("/dev/sdc", &[("swap", "")]),
        ];
        for (at, part) in [
            (0, "its partition /dev/sda2 is in use: /dev/md0 is made of it"),
            (2, "/dev/md0 is made of it"),
            (3, "mounted at /srv"),
            (4, "it is swap space"),
        ] {
            assert!(taken(&all[at].disk, &all).contains(part), "{}", taken(&all[at].disk, &all));
        }
        assert_eq!(taken(&all[1].disk, &all), "");
        let read_only = HostDisk { read_only: true, ..all[1].disk.clone() };
        assert_eq!(taken(&read_only, &all), "it is read-only");
    }
}
