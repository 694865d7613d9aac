//! How many streams were refused, for figures.

use std::collections::BTreeMap;

use tidemark_base::DiskId;
use tidemark_base::sync::Mutex;
use tidemark_proto::replication::RefusalReason;

/// Disks that are told apart: whoever shows a certificate may name any.
const DISKS_MAX: usize = 16_384;

#[derive(Default)]
pub struct RefusedStreams(Mutex<BTreeMap<(Option<DiskId>, &'static str), u64>>);

impl RefusedStreams {
    pub fn add(&self, disk: DiskId, reason: RefusalReason) {
        let mut counts = self.0.lock().expect("no panic while held");
        let key = (Some(disk), name(reason));
        let key = if counts.contains_key(&key) || counts.len() < DISKS_MAX { key } else { (None, key.1) };
        *counts.entry(key).or_default() += 1;
    }

    /// Since the start, by disk and reason; no disk: further ones.
    pub fn all(&self) -> Vec<(Option<DiskId>, &'static str, u64)> {
        let counts = self.0.lock().expect("no panic while held");
        counts.iter().map(|((disk, reason), count)| (*disk, *reason, *count)).collect()
    }
}

fn name(reason: RefusalReason) -> &'static str {
    match reason {
        RefusalReason::NotAuthorised => "not_authorised",
        RefusalReason::UnknownDisk => "unknown_disk",
        RefusalReason::Generation => "generation",
        RefusalReason::Fenced => "fenced",
        RefusalReason::Gap => "gap",
        RefusalReason::Damaged => "damaged",
        RefusalReason::SizeChanged => "size_changed",
        RefusalReason::NoRoom => "no_room",
        RefusalReason::StoreFailed => "store_failed",
        RefusalReason::Version => "version",
        RefusalReason::Protocol => "protocol",
        RefusalReason::Stopping => "stopping",
        RefusalReason::History => "history",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_by_disk_and_reason_and_those_of_too_many_disks_together() {
        let refused = RefusedStreams::default();
        let disk = DiskId::random();
        refused.add(disk, RefusalReason::Generation);
        refused.add(disk, RefusalReason::Generation);
        refused.add(disk, RefusalReason::Fenced);
        assert_eq!(refused.all(), [(Some(disk), "fenced", 1), (Some(disk), "generation", 2)]);
        for _ in 0..DISKS_MAX {
            refused.add(DiskId::random(), RefusalReason::UnknownDisk);
        }
        refused.add(disk, RefusalReason::Fenced);
        let all = refused.all();
        assert_eq!(all.len(), DISKS_MAX + 1);
        assert!(all.contains(&(Some(disk), "fenced", 2)) && all.contains(&(None, "unknown_disk", 2)));
    }
}
