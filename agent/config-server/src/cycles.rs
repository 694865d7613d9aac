//! How many cycles of an interval policy were missed: at whose end what was written before the one before was not yet
//! durable at the process server.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use tidemark_base::MachineId;

/// The field's monitoring interval.
const WINDOW: Duration = Duration::from_secs(3600);
/// For long cycles more than the window, so that one of them is not a large share.
const CYCLES_MIN: usize = 10;
/// Before so many ended there is no share to tell.
const CYCLES_TOLD_MIN: usize = 5;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Missed {
    pub missed: usize,
    pub cycles: usize,
}

impl Missed {
    pub fn percent(&self) -> u64 {
        (self.missed * 100 / self.cycles.max(1)) as u64
    }
}

/// By machine.
#[derive(Default)]
pub struct Cycles(Mutex<BTreeMap<MachineId, Seen>>);

struct Seen {
    cycle: Duration,
    /// When the one that runs began.
    began: Duration,
    worst_rpo: Option<Duration>,
    /// Whether each was missed, the newest last.
    ended: VecDeque<bool>,
}

impl Cycles {
    /// What is known of a machine now. Without a cycle, or an RPO that the agent told, nothing is counted.
    pub fn note(&self, machine: MachineId, now: Duration, cycle: Option<Duration>, rpo: Option<Duration>) {
        let mut all = self.0.lock().expect("no panic while held");
        let Some(cycle) = cycle else {
            all.remove(&machine);
            return;
        };
        let new = || Seen { cycle, began: now, worst_rpo: None, ended: VecDeque::new() };
        let seen = all.entry(machine).or_insert_with(new);
        if seen.cycle != cycle {
            *seen = new();
        }
        seen.worst_rpo = seen.worst_rpo.max(rpo);
        if now.saturating_sub(seen.began) < cycle {
            return;
        }
        seen.began = now;
        if let Some(rpo) = seen.worst_rpo.take() {
            seen.ended.push_back(rpo > cycle * 2);
            let kept = CYCLES_MIN.max((WINDOW.as_secs() / cycle.as_secs().max(1)) as usize);
            while seen.ended.len() > kept {
                seen.ended.pop_front();
            }
        }
    }

    pub fn missed(&self, machine: MachineId) -> Option<Missed> {
        let all = self.0.lock().expect("no panic while held");
        let ended = &all.get(&machine)?.ended;
        let missed = ended.iter().filter(|missed| **missed).count();
        (ended.len() >= CYCLES_TOLD_MIN).then_some(Missed { missed, cycles: ended.len() })
    }

    /// Forgets machines that are gone.
    pub fn retain(&self, is_there: impl Fn(MachineId) -> bool) {
        self.0.lock().expect("no panic while held").retain(|machine, _| is_there(*machine));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_is_missed_when_what_was_written_before_the_last_is_not_there() {
        let (cycles, machine) = (Cycles::default(), MachineId::random());
        let seconds = Duration::from_secs;
        let mut now = 0;
        let mut run = |count: u64, rpo: u64| {
            for _ in 0..count * 15 {
                now += 2;
                cycles.note(machine, seconds(now), Some(seconds(30)), Some(seconds(rpo)));
            }
        };
        run(4, 45);
        assert_eq!(cycles.missed(machine), None);
        run(4, 45);
        assert_eq!(cycles.missed(machine).unwrap().percent(), 0);
        run(2, 70);
        let missed = cycles.missed(machine).unwrap();
        assert!(missed.missed == 2 && missed.percent() > 20, "{missed:?}");
        // An hour later they are forgotten.
        run(121, 1);
        assert_eq!(cycles.missed(machine), Some(Missed { missed: 0, cycles: 120 }));
        // Another frequency begins again, and none has no cycles.
        cycles.note(machine, seconds(now), Some(seconds(300)), None);
        assert_eq!(cycles.missed(machine), None);
        cycles.note(machine, seconds(now), None, None);
        cycles.retain(|_| false);
        assert_eq!(cycles.missed(machine), None);
    }
}
