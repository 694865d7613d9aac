//! What a sender says of itself, turned into events and into what the disk must know of its consumer.

use super::MachineDisk;
use crate::events::{EventKind, Severity};
use crate::send::resume::Alarm;
use crate::send::{Phase, SenderStatus};
use crate::source::ScanReason;

/// What was told of a sender, so that it is told once.
#[derive(Default)]
pub(super) struct SenderSeen {
    alarm: Option<Alarm>,
    is_scan_open: bool,
    /// The scan is one of those that a tracked disk has all day.
    is_routine: bool,
    is_halted: bool,
}

impl MachineDisk {
    /// To be called about every second.
    pub(super) fn watch_feeds(&self) {
        let feeds = self.feeds();
        for feed in &*feeds {
            let (server, status) = (feed.endpoint.server, feed.sender.status());
            let is_connected = matches!(status.phase, Phase::Live | Phase::Scanning);
            let consumer = self.disk.consumer(server);
            if let Some(consumer) = &consumer {
                consumer.set_connected(is_connected);
            }
            // Where there is one, it needs no name.
            let at = if feeds.len() > 1 { format!(" at process server {server}") } else { String::new() };
            let reason = consumer.and_then(|consumer| consumer.progress()).map(|(_, _, reason)| reason);
            self.tell(&mut feed.seen.lock().expect("no panic while held"), &status, reason, &at);
        }
    }

    fn tell(&self, seen: &mut SenderSeen, status: &SenderStatus, reason: Option<ScanReason>, at: &str) {
        let path = self.disk.path().display();
        let events = &self.disk.events;
        if let Some(alarm) = status.alarm
            && seen.alarm.replace(alarm) != Some(alarm)
        {
            let kind = match alarm {
                Alarm::Diverged => EventKind::HistoryDiverged,
                Alarm::ReplicaLost => EventKind::ReplicaLost,
            };
            events.publish(Severity::Critical, kind, format!("disk {path}{at}: {}", alarm.message()), alarm.help());
        }
        if status.scan_open != seen.is_scan_open {
            seen.is_scan_open = status.scan_open;
            let is_tracked = self.disk.tracker().is_some();
            let is_routine = match status.scan_open {
                true => is_tracked && reason.is_none_or(|reason| reason == ScanReason::Tracked),
                false => seen.is_routine,
            };
            seen.is_routine = is_routine;
            let (kind, message) = match status.scan_open {
                true => {
                    let bytes = status.scan.map_or(0, |scan| scan.total_bytes);
                    let message =
                        format!("{bytes} bytes of disk {path} are read and brought in line with the replica{at}");
                    (EventKind::CompareStarted, message)
                }
                false => (EventKind::CompareEnded, format!("the replica of disk {path}{at} is consistent again")),
            };
            if !is_routine {
                events.publish(Severity::Information, kind, message, "");
            }
        }
        let is_halted = status.phase == Phase::Halted;
        if is_halted != std::mem::replace(&mut seen.is_halted, is_halted) && is_halted {
            let (message, help) = match &status.problem {
                Some(problem) => (problem.message.as_str(), problem.help.as_str()),
                None => ("the process server refuses", ""),
            };
            let message = format!("nothing of disk {path} is sent any more{at}: {message}");
            events.publish(Severity::Critical, EventKind::SendingHalted, message, help);
        }
    }
}
