//! What keeps home disks from being overwritten.

use std::path::Path;

use tidemark_base::storage::{OpenMode, RealStorage};
use tidemark_base::{DiskId, MachineId};
use tidemark_proto::control::{Failure, FailureKind, Via};
use tidemark_proto::failback::{NewDisk, Obstacle};

use crate::Host;
use crate::protected::ProtectedDisk;

const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";
/// Files beside a disk that are looked into.
const NEIGHBOURS_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 1023;

pub fn obstacles(host: &Host, machine: MachineId) -> Vec<Obstacle> {
    let found = match host.machine(machine) {
        Ok(found) => found,
        Err(_) => {
            let status = host.status().into_iter().find(|status| status.machine == machine);
            let Some(status) = status else {
                let message = format!("machine {machine} is not known to this host");
                let help = "the agent is told of it when it connects; where its disks are gone, choose `--method full`";
                return vec![Obstacle { disk: None, message, help: help.to_owned() }];
            };
            let problems = status.disks.into_iter().flat_map(|disk| {
                let of = disk.disk;
                disk.problems.into_iter().map(move |problem| Obstacle {
                    disk: Some(of),
                    message: problem.message,
                    help: problem.help,
                })
            });
            return problems.collect();
        }
    };
    let spec = found.spec();
    let mut obstacles = Vec::new();
    let mut add = |disk: Option<DiskId>, message: String, help: &str| {
        obstacles.push(Obstacle { disk, message, help: help.to_owned() });
    };
    if !spec.fenced {
        add(
            None,
            format!("machine {} may be on at home: nobody is kept from its disks there", spec.name),
            "it is fenced when its agent has heard of the failover; see `tidemark status`",
        );
    }
    if !matches!(spec.via, Via::Nbd | Via::Fuse) {
        add(
            None,
            format!(
                "the disks of machine {} are tracked where others write them, and are not written by the agent",
                spec.name
            ),
            "unprotect the machine and protect the disk via nbd, or reprotect to another place",
        );
    }
    for missing in found.unattached() {
        add(Some(missing.disk), format!("disk {} is not attached", missing.path), "see the agent's log");
    }
    for disk in found.disks() {
        let id = disk.identity.disk;
        if disk.alarms().contains_key("size") {
            let message = format!("disk {} has another size than the one that failed over", disk.path().display());
            add(Some(id), message, "give it its size back");
        }
        if let Some(snapshot) = snapshot_of(&disk) {
            let message = format!("disk {} has a snapshot: {snapshot}", disk.path().display());
            add(Some(id), message, "remove or merge the snapshot: what is below one must not change");
        }
    }
    obstacles
}

/// Makes an empty disk where there is none. The folder must be there: a volume that is not mounted is no place for a disk.
pub fn make(disk: &NewDisk) -> Result<(), Failure> {
    let path = Path::new(&disk.path);
    let refuse = |message: String, help: &str| Failure::new(FailureKind::Conflict, message, help);
    if path.exists() {
        return if disk.fresh { refuse_filled(path, disk.bytes) } else { Ok(()) };
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(refuse(format!("{} is no place for a disk", disk.path), "name a file in a folder"));
    };
    if !folder.is_dir() {
        let message = format!("the folder of disk {} is not there", disk.path);
        return Err(refuse(message, "mount or make it, then ask again"));
    }
    let storage = RealStorage::open_folder(folder);
    let made = storage.open(name, OpenMode::OpenOrCreate).and_then(|file| {
        file.set_bytes(disk.bytes)?;
        file.sync()?;
        storage.sync_folder("")
    });
    made.map_err(|error| refuse(format!("disk {} cannot be made: {error}", disk.path), "see the system's message"))
}

/// An empty file of the disk's size is what an attempt that was cut off left.
fn refuse_filled(path: &Path, bytes: u64) -> Result<(), Failure> {
    use std::os::unix::fs::MetadataExt;
    let is_empty = path.metadata().is_ok_and(|of| of.is_file() && of.len() == bytes && of.blocks() == 0);
    if is_empty {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Conflict,
        format!("{} is there already: no new disk is made over it", path.display()),
        "move it away, or choose another folder with --store",
    ))
}

/// Whatever shows the disk's content through itself, and would show nonsense when that changes below it.
fn snapshot_of(disk: &ProtectedDisk) -> Option<String> {
    if disk.disk.is_block_device() {
        return holder_of(disk.path());
    }
    let folder = disk.path().parent()?;
    let entries = std::fs::read_dir(folder).ok()?;
    entries.take(NEIGHBOURS_MAX).filter_map(Result::ok).map(|entry| entry.path()).find_map(|path| {
        let backing = backing_file(&path)?;
        let below = tidemark_base::storage::canonical(&folder.join(backing)).ok()?;
        (below == tidemark_base::storage::canonical(disk.path()).ok()?).then(|| path.display().to_string())
    })
}

/// A device-mapper or md device that lies on a block device: an LVM snapshot is one.
fn holder_of(path: &Path) -> Option<String> {
    let real = tidemark_base::storage::canonical(path).ok()?;
    let name = real.file_name()?.to_str()?.to_owned();
    let holder = std::fs::read_dir(format!("/sys/class/block/{name}/holders")).ok()?.next()?.ok()?;
    Some(format!("device {}", holder.file_name().to_string_lossy()))
}

/// The image that a qcow2 overlay lies on: its header has the name's place at 8 and its length at 16, big end first.
fn backing_file(path: &Path) -> Option<String> {
    use std::os::unix::fs::FileExt;
    if !path.is_file() {
        return None;
    }
    let file = std::fs::File::open(path).ok()?;
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).ok()?;
    if header[..4] != *QCOW2_MAGIC {
        return None;
    }
    let at = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(header[16..20].try_into().expect("four bytes")) as usize;
    if at == 0 || length == 0 || length > NAME_BYTES_MAX {
        return None;
    }
    let mut name = vec![0; length];
    file.read_exact_at(&mut name, at).ok()?;
    String::from_utf8(name).ok()
}
