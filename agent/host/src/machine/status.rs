//! What a machine says of its disks: each is listed once for each process server that it feeds.

use tidemark_base::{DiskId, SECTOR_BYTES, ServerId, Timestamp};
use tidemark_proto::control::{Compared, Failure, FailureKind, NO_RPO, Problem, SourceDisk, SourceMode, SourceState};

use super::{Machine, MachineDisk};
use crate::consumer::Consumer;
use crate::host::failed_disk;
use crate::protected::ProtectedDisk;
use crate::send::{Phase, SenderStatus};
use crate::source::ScanReason;
use crate::state::session::Mode;

impl Machine {
    pub fn status(&self) -> Vec<SourceDisk> {
        let failed = self.unattached().into_iter().map(|disk| {
            let message = format!("disk {} is not attached", disk.path);
            let help = "see the agent's log; it is tried again every few seconds";
            failed_disk(disk.disk, &Failure::new(FailureKind::Unavailable, message, help))
        });
        let servers: Vec<ServerId> = self.spec().servers().map(|endpoint| endpoint.server).collect();
        let opened = self.opened();
        let each = opened.iter().flat_map(|disk| servers.iter().map(|server| self.disk_status(disk, *server)));
        each.chain(failed).collect()
    }

    fn disk_status(&self, disk: &MachineDisk, server: ServerId) -> SourceDisk {
        let sender = disk.sender_status(server);
        let disk = &*disk.disk;
        let logged = disk.log.published();
        let consumer = disk.consumer(server);
        let progress = consumer.as_ref().and_then(|consumer| consumer.progress());
        let cursor = consumer.as_ref().and_then(|consumer| consumer.cursor());
        let covered = consumer.as_ref().and_then(|consumer| consumer.covered());
        let durable = sender.as_ref().and_then(|sender| sender.durable).or(cursor);
        let mut problems: Vec<Problem> = disk.alarms().values().cloned().collect();
        problems.extend(sender.iter().flat_map(problems_of));
        let scan_left = progress.map_or(0, |(done, total, _)| total - done);
        let durable_time = sender.as_ref().and_then(|sender| sender.durable_time);
        let since = durable_time.unwrap_or_else(|| disk.session.lock().expect("no panic while held").current().newest);
        let (mode, mode_reason) = mode_of(disk, consumer.as_deref(), sender.as_ref());
        SourceDisk {
            disk: disk.identity.disk,
            server: Some(server),
            state: state_of(sender.as_ref(), progress.map(|(_, _, reason)| reason)),
            mode,
            mode_reason,
            logged: logged.logged.to_string(),
            sent: sender.as_ref().and_then(|sender| sender.sent).map(|at| at.to_string()).unwrap_or_default(),
            durable: durable.map(|at| at.to_string()).unwrap_or_default(),
            // What the log does not keep for it any more is in its scan.
            pending_bytes: scan_left + disk.pending_bytes(covered.or(durable).as_ref()) + self.unclaimed_bytes(disk),
            written_bytes: disk.written_bytes(),
            sent_bytes: sender.as_ref().map_or(0, |sender| sender.chunk_bytes_sent + sender.question_bytes_sent),
            log_bytes: disk.log.allocated_bytes(),
            rpo: match since {
                Timestamp(0) => NO_RPO,
                since => self.clock.wall_now().saturating_since(since),
            },
            scan: sender
                .as_ref()
                .and_then(|sender| sender.scan.as_ref())
                .map(|scan| (scan.durable_bytes, scan.total_bytes))
                .or(progress.map(|(done, total, _)| (done, total))),
            compare: sender.as_ref().map_or_else(Compared::default, |sender| Compared {
                compared_bytes: sender.compared_bytes,
                differing_bytes: sender.differing_bytes,
                left_bytes: sender
                    .scan
                    .filter(|scan| scan.compares)
                    .map_or(0, |scan| scan.total_bytes.saturating_sub(scan.durable_bytes)),
            }),
            current_bytes: disk.disk.current_bytes().unwrap_or(0),
            problems,
        }
    }

    /// At least: what a tracker saw and nothing else tells of yet. Of one that goes on writing nobody asks this each second.
    fn unclaimed_bytes(&self, disk: &ProtectedDisk) -> u64 {
        if self.spec().fenced && disk.is_dirty() { SECTOR_BYTES } else { 0 }
    }

    /// A disk that marks cover and that is being scanned for every process server that could have a point of it now: of those
    /// that streams are open to, or of all where there is none. How much is done, and of how much.
    pub(super) fn scanned(&self) -> Option<(DiskId, u64, u64)> {
        let covered = self.marker.covered();
        let mut disks = self.opened();
        disks.retain(|disk| covered.contains(&disk.disk.identity.disk));
        let of = |server: ServerId| {
            let phase = |disk: &MachineDisk| disk.sender_status(server).map(|status| status.phase);
            let is_open = |phase| matches!(phase, Some(Phase::Live | Phase::Scanning));
            let is_connected = disks.iter().all(|disk| is_open(phase(disk)));
            (is_connected, disks.iter().find_map(|disk| disk.scanned_for(server)))
        };
        let servers: Vec<_> = self.spec().servers().map(|endpoint| of(endpoint.server)).collect();
        let is_any_connected = servers.iter().any(|(is_connected, _)| *is_connected);
        let there = servers.into_iter().filter(|(is_connected, _)| *is_connected || !is_any_connected);
        let scans: Vec<Option<(DiskId, u64, u64)>> = there.map(|(_, scanned)| scanned).collect();
        if scans.iter().any(Option::is_none) { None } else { scans.into_iter().flatten().next() }
    }
}

impl MachineDisk {
    fn scanned_for(&self, server: ServerId) -> Option<(DiskId, u64, u64)> {
        let status = self.sender_status(server);
        let is_open = status.is_some_and(|status| status.scan_open || status.phase == Phase::Scanning);
        let consumer = self.disk.consumer(server);
        let progress = consumer.as_ref().and_then(|consumer| consumer.progress());
        // An epoch begins with a scan, also where that has nothing to read: a mark that is made before it is never a point.
        let epoch = self.disk.log.published().logged.epoch;
        let cursor = consumer.and_then(|consumer| consumer.cursor());
        let is_due = cursor.is_some_and(|cursor| cursor.epoch != epoch);
        let (done, total) = progress.map_or((0, 0), |(done, total, _)| (done, total));
        (is_open || is_due || progress.is_some()).then_some((self.disk.identity.disk, done, total))
    }
}

/// How changes are kept for one process server, and why so where that is not `data`.
fn mode_of(disk: &ProtectedDisk, consumer: Option<&Consumer>, sender: Option<&SenderStatus>) -> (SourceMode, String) {
    let mode = disk.mode();
    let is_tracked = disk.tracker().is_some();
    let progress = consumer.and_then(|consumer| consumer.progress());
    let is_covered = consumer.is_some_and(|consumer| consumer.covered().is_some());
    let is_routine = progress.is_some_and(|(_, _, reason)| reason == ScanReason::Tracked);
    let kind = match mode {
        _ if disk.alarms().contains_key("size") => SourceMode::Compare,
        Mode::Data if is_covered => SourceMode::Bitmap,
        // What is being compared is told before how changes are kept meanwhile, but for what a tracker has compared all day.
        Mode::Data if sender.is_some_and(|sender| sender.compares()) && !is_routine => SourceMode::Compare,
        Mode::Data if is_tracked => SourceMode::Bitmap,
        Mode::Data => SourceMode::Data,
        Mode::Bitmap { .. } => SourceMode::Bitmap,
    };
    let reason = match mode.reason() {
        Some(reason) => reason,
        None if is_covered => "this process server is too far behind: it gets the changed blocks when it takes them",
        None if is_tracked => "changed blocks are tracked, and read when a point is made",
        None => "",
    };
    (kind, reason.to_owned())
}

fn problems_of(sender: &SenderStatus) -> impl Iterator<Item = Problem> {
    let stops = matches!(sender.phase, Phase::Halted);
    let problem = sender.problem.iter().map(move |problem| Problem {
        critical: stops,
        message: problem.message.clone(),
        help: problem.help.clone(),
    });
    problem.chain(sender.alarm.iter().map(|alarm| Problem {
        critical: true,
        message: alarm.message().to_owned(),
        help: alarm.help().to_owned(),
    }))
}

fn state_of(sender: Option<&SenderStatus>, scan: Option<ScanReason>) -> SourceState {
    match sender.map(|sender| sender.phase) {
        None | Some(Phase::Paused | Phase::Stopped) => SourceState::Paused,
        Some(Phase::Halted) => SourceState::Failed,
        Some(Phase::Connecting | Phase::Retrying) => SourceState::Connecting,
        Some(Phase::Live) => SourceState::Replicating,
        Some(Phase::Scanning) => match scan {
            Some(ScanReason::Initial) => SourceState::InitialReplication,
            Some(ScanReason::Tracked) => SourceState::Replicating,
            _ => SourceState::Resynchronising,
        },
    }
}
