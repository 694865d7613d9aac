//! What keeps home disks from being overwritten.

use std::collections::BTreeMap;
use std::path::Path;

use tidemark_base::storage::{self, RealStorage};
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
    if !matches!(spec.via, Via::Nbd | Via::Fuse | Via::Bpf) {
        add(
            None,
            format!(
                "the disks of machine {} are tracked by whoever runs it (--via {}), and are not written by the agent",
                spec.name,
                spec.via.name()
            ),
            "let it stay (`tidemark failover promote NAME`, `tidemark migrate NAME`) and protect it anew where it runs; one that is to come home is \
             protected via nbd, fuse or bpf",
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

/// Room that one volume needs, and where it is.
struct Needed<'a> {
    folder: &'a Path,
    bytes: u64,
    disks: usize,
}

/// Whether all of these disks can be made, and each volume has room for what they will hold.
pub fn room(disks: &[NewDisk]) -> Result<(), Failure> {
    let mut volumes: BTreeMap<u64, Needed> = BTreeMap::new();
    for disk in disks {
        let path = Path::new(&disk.path);
        if path.exists() {
            match disk.fresh {
                true => refuse_filled(path, disk.bytes)?,
                // Written over.
                false => continue,
            }
        }
        let (folder, _) = place_of(disk)?;
        let volume = storage::volume_of(folder).map_err(|error| unreadable(folder, &error))?;
        let needed = volumes.entry(volume).or_insert(Needed { folder, bytes: 0, disks: 0 });
        needed.bytes += disk.data_bytes;
        needed.disks += 1;
    }
    for Needed { folder, bytes, disks } in volumes.into_values() {
        let free = RealStorage::open_folder(folder).available_bytes().map_err(|error| unreadable(folder, &error))?;
        if free < bytes {
            let what = if disks == 1 { "a new disk".to_owned() } else { format!("{disks} new disks") };
            let message = format!(
                "the volume of {} lacks room: {bytes} bytes are needed for {what}, {free} are free",
                folder.display()
            );
            let help = "free or add room there, or choose another folder with --store; nothing was made";
            return Err(Failure::new(FailureKind::Conflict, message, help));
        }
    }
    Ok(())
}

fn unreadable(folder: &Path, error: &std::io::Error) -> Failure {
    let message = format!("the room at {} is not known: {error}", folder.display());
    Failure::new(FailureKind::Conflict, message, "look at the volume there, then ask again")
}

/// The folder must be there: a volume that is not mounted is no place for a disk.
fn place_of(disk: &NewDisk) -> Result<(&Path, &str), Failure> {
    let refuse = |message: String, help: &str| Err(Failure::new(FailureKind::Conflict, message, help));
    let path = Path::new(&disk.path);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return refuse(format!("{} is no place for a disk", disk.path), "name a file in a folder");
    };
    if !folder.is_dir() {
        let message = format!("the folder of disk {} is not there", disk.path);
        return refuse(message, "mount or make it, then ask again");
    }
    Ok((folder, name))
}

/// Makes an empty disk where there is none.
pub fn make(disk: &NewDisk) -> Result<(), Failure> {
    let path = Path::new(&disk.path);
    let refuse = |message: String, help: &str| Failure::new(FailureKind::Conflict, message, help);
    if path.exists() {
        return if disk.fresh { refuse_filled(path, disk.bytes) } else { Ok(()) };
    }
    place_of(disk)?;
    crate::capture::images::make(path, disk.bytes)
        .map_err(|error| refuse(format!("disk {} cannot be made: {error}", disk.path), &error.help()))
}

/// An empty file of the disk's size is what an attempt that was cut off left.
fn refuse_filled(path: &Path, bytes: u64) -> Result<(), Failure> {
    let is_of_size = path.metadata().is_ok_and(|of| of.is_file() && of.len() == bytes);
    let is_empty = is_of_size && storage::allocated_bytes(path).is_ok_and(|allocated| allocated == 0);
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
    if !path.is_file() {
        return None;
    }
    let file = std::fs::File::open(path).ok()?;
    let mut header = [0; 20];
    storage::read_exact_at(&file, &mut header, 0).ok()?;
    if header[..4] != *QCOW2_MAGIC {
        return None;
    }
    let at = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(header[16..20].try_into().expect("four bytes")) as usize;
    if at == 0 || length == 0 || length > NAME_BYTES_MAX {
        return None;
    }
    let mut name = vec![0; length];
    storage::read_exact_at(&file, &mut name, at).ok()?;
    String::from_utf8(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What several disks need of one volume counts together; what is there already needs none.
    #[test]
    fn f8_new_disks_need_room_for_all_that_they_will_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let free = RealStorage::open_folder(folder.path()).available_bytes().unwrap();
        let disk = |name: &str, data_bytes, fresh| NewDisk { path: path(name), bytes: 1 << 20, fresh, data_bytes };
        let two = [disk("one.img", free / 8 * 5, true), disk("two.img", free / 8 * 5, true)];
        two.iter().for_each(|one| room(std::slice::from_ref(one)).unwrap());
        let refused = room(&two).unwrap_err();
        assert!(refused.message.contains("lacks room") && refused.message.contains("2 new disks"), "{refused}");
        assert!(refused.message.contains(&format!("{} bytes are needed", free / 8 * 5 * 2)), "{refused}");
        std::fs::File::create(path("there.img")).unwrap();
        room(&[disk("there.img", u64::MAX, false), disk("one.img", 0, true)]).unwrap();
        let mounted = room(&[NewDisk { path: path("gone/one.img"), ..disk("", 0, true) }]).unwrap_err();
        assert!(mounted.message.contains("is not there"), "{mounted}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is made");
    }
}
