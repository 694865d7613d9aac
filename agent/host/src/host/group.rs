//! Barriers over machines of a group, as far as they are of this host: [`crate::mark::Barriers`].

use std::sync::Arc;

use tidemark_base::MarkId;
use tidemark_proto::control::{Failure, GroupMark, GroupReleased, HoldGroup, Verdict};

use super::Host;
use crate::error::HostError;
use crate::events::{EventKind, News, Severity};
use crate::machine::Machine;

impl Host {
    /// Holds all disks of these machines, so that they stand at one instant with those of other hosts. Blocks until they are held.
    pub fn hold_group(&self, request: &HoldGroup) -> Result<(), HostError> {
        let machines: Vec<Arc<Machine>> =
            request.machines.iter().map(|id| self.machine(*id)).collect::<Result<_, _>>()?;
        let joining = machines.iter().map(Machine::joining).collect();
        let events = self.shared.config.events.clone();
        let (group, limit) = (request.group.clone(), request.limit);
        let expired = move || {
            for machine in machines {
                let name = machine.spec().name;
                events.publish(News {
                    severity: Severity::Warning,
                    kind: EventKind::BarrierMissed,
                    machine: Some(machine.spec().machine),
                    disk: None,
                    message: format!(
                        "the barrier of group {group} was not released within {} ms: the writes of machine {name} were let go on, and its \
                         point is not one of the group",
                        limit.as_millis()
                    ),
                    help: "see which host missed it in the events of the group; a longer limit is set by `tidemark group set`"
                        .to_owned(),
                });
            }
        };
        self.barriers.hold(joining, request, expired)
    }

    /// Ends a barrier. Blocks for as long as the marks take.
    pub fn release_group(&self, round: MarkId, verdict: Verdict) -> Result<GroupReleased, HostError> {
        let outcome = self.barriers.release(round, verdict)?;
        let machines = outcome.marks.into_iter().map(|(machine, mark)| match mark {
            None => GroupMark { machine, time: None, failure: None },
            Some(Ok(mark)) => GroupMark { machine, time: Some(mark.time), failure: None },
            Some(Err(error)) => GroupMark { machine, time: None, failure: Some(Failure::from(&error)) },
        });
        Ok(GroupReleased { in_time: outcome.in_time, held: outcome.held, machines: machines.collect() })
    }
}
