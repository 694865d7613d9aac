//! Events that are warnings or worse, counted for figures as they are told.

use tidemark_base::tally::Tally;
use tidemark_base::{DiskId, MachineId};
use tidemark_proto::control::Severity;

use super::metrics::Sheet;
use super::outbox::Draft;

/// Those of a role since it started.
#[derive(Default)]
pub struct Errors(Tally);

const MACHINE: &str = "machine";
const DISK: &str = "disk";

impl Errors {
    pub fn note(&self, drafts: &[Draft]) {
        for draft in drafts.iter().filter(|draft| draft.severity != Severity::Info) {
            let severity = if draft.severity == Severity::Critical { "critical" } else { "warning" };
            let id = |id: Option<String>| id.unwrap_or_default();
            let (machine, disk) = (id(draft.machine.map(|id| id.to_string())), id(draft.disk.map(|id| id.to_string())));
            self.0.add(&[(MACHINE, &machine), (DISK, &disk), ("kind", &draft.kind), ("severity", severity)]);
        }
    }

    /// `name`: of the machine that an event was about, from what it said.
    pub fn fill(&self, sheet: &mut Sheet, name: impl Fn(Option<MachineId>, Option<DiskId>) -> Option<String>) {
        for (labels, count) in self.0.all() {
            let text = |of: &str| {
                labels.iter().find(|(name, _)| *name == of).map(|(_, text)| text.clone()).unwrap_or_default()
            };
            let machine = name(text(MACHINE).parse().ok(), text(DISK).parse().ok()).unwrap_or_else(|| text(MACHINE));
            // Those of several disks of a machine are added up.
            let labels = vec![(MACHINE, machine), ("kind", text("kind")), ("severity", text("severity"))];
            sheet.count("errors", "Events that are warnings or worse, since the start", &labels, count);
        }
    }
}
