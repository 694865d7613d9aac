//! Room for what is replicated: on a process server's volume, and where a host keeps its logs.
//!
//! What a replica will take is not known beforehand: what is zero takes nothing, and the rest is compressed. So only a volume on
//! which nothing can be stored is in the way; one that is smaller than what the disks hold is a warning.

use tidemark_base::size;
use tidemark_proto::control::{Failure, FailureKind, LogRoom, ProbedDisk, VOLUME_RESERVE_BYTES, Volume};

use crate::status::Health;

/// A volume with less than this part of it free is a warning,
const LOW_PERCENT: u64 = 5;
/// unless so much is free that it lasts for a while.
const LOW_BYTES: u64 = 16 << 30;
/// Changes are about to be refused.
const CRITICAL_BYTES: u64 = 2 * VOLUME_RESERVE_BYTES;

/// How a process server's volume fills up: how bad it is, what, and what helps.
pub fn alarm(server: &str, volume: Volume) -> Option<(Health, String, &'static str)> {
    let health = match volume.free_bytes {
        free if free < CRITICAL_BYTES => Health::Critical,
        free if free < LOW_BYTES && free < volume.bytes / 100 * LOW_PERCENT => Health::Warning,
        _ => return None,
    };
    let message = format!("process server {server}: {}", free_text(volume));
    Some((
        health,
        message,
        "enlarge the volume, shorten the retention of policies, or delete replicas that nobody needs",
    ))
}

/// Whether anything can be stored there.
pub fn check_volume(server: &str, volume: Volume) -> Result<(), Failure> {
    if volume.free_bytes >= VOLUME_RESERVE_BYTES {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Conflict,
        format!("the volume of process server {server} is full: {}", free_text(volume)),
        "free or add room there, or choose another process server",
    ))
}

/// What to say where the disks hold more than the volume has room for.
pub fn volume_warning(server: &str, volume: Volume, disks: &[ProbedDisk]) -> Option<String> {
    let held: u64 = disks.iter().map(|disk| disk.occupied_bytes.unwrap_or(disk.bytes)).sum();
    let room = volume.free_bytes.saturating_sub(VOLUME_RESERVE_BYTES);
    (held > room).then(|| {
        format!(
            "the disks hold up to {}, and of process server {server} {}: it may fill up, unless much of it is zero or compresses well",
            size::text(held),
            free_text(volume),
        )
    })
}

/// What to say where no log can be kept.
pub fn log_warning(disk: &ProbedDisk) -> Option<String> {
    let LogRoom { folder, free_bytes, needed_bytes } = disk.log.as_ref()?;
    (free_bytes < needed_bytes).then(|| {
        format!(
            "{} are free in {folder}, where its log is kept, and {} are needed: without a log changed blocks are tracked in a \
             bitmap, and points hold blocks instead of their history",
            size::text(*free_bytes),
            size::text(*needed_bytes),
        )
    })
}

fn free_text(volume: Volume) -> String {
    format!("{} of {} are free", size::text(volume.free_bytes), size::text(volume.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn disk(bytes: u64, occupied_bytes: Option<u64>) -> ProbedDisk {
        ProbedDisk { path: "/a".into(), bytes, occupied_bytes, log: None }
    }

    #[test]
    fn a_volume_is_a_warning_before_it_is_full() {
        let health = |bytes, free_bytes| alarm("here", Volume { bytes, free_bytes }).map(|(health, ..)| health);
        assert_eq!(health(100 * GIB, 6 * GIB), None);
        assert_eq!(health(100 * GIB, 4 * GIB), Some(Health::Warning));
        assert_eq!(health(1000 * GIB, 17 * GIB), None, "much, though it is a small part");
        assert_eq!(health(1000 * GIB, 100 << 20), Some(Health::Critical));
        let (_, message, _) = alarm("here", Volume { bytes: 100 * GIB, free_bytes: GIB }).unwrap();
        assert_eq!(message, "process server here: 1.0 GiB of 100.0 GiB are free");
    }

    #[test]
    fn what_disks_may_hold_is_compared_with_what_is_free() {
        let volume = Volume { bytes: 10 * GIB, free_bytes: 2 * GIB };
        assert!(check_volume("here", volume).is_ok());
        assert!(check_volume("here", Volume { free_bytes: VOLUME_RESERVE_BYTES - 1, ..volume }).is_err());
        assert_eq!(volume_warning("here", volume, &[disk(8 * GIB, Some(GIB))]), None, "a sparse file");
        let told = volume_warning("here", volume, &[disk(8 * GIB, Some(GIB)), disk(GIB, None)]).unwrap();
        assert!(told.contains("up to 2.0 GiB") && told.contains("2.0 GiB of 10.0 GiB"), "{told}");
    }

    #[test]
    fn a_log_without_room_is_named() {
        let log = LogRoom { folder: "/images".into(), free_bytes: 1 << 20, needed_bytes: 128 << 20 };
        let told = log_warning(&ProbedDisk { log: Some(log.clone()), ..disk(GIB, None) }).unwrap();
        assert!(told.contains("1.0 MiB are free in /images") && told.contains("128.0 MiB"), "{told}");
        let log = LogRoom { free_bytes: 128 << 20, ..log };
        assert_eq!(log_warning(&ProbedDisk { log: Some(log), ..disk(GIB, None) }), None);
        assert_eq!(log_warning(&disk(GIB, None)), None);
    }
}
