//! One barrier over machines of several hosts: hold everywhere, and only when all hold, release as a group.
//!
//! *Consistency.* The verdict `group` is sent when every host said that it holds, and to no one before. A host that confirms it
//! held at that instant (`host/src/mark/group.rs`); where one does not confirm, its machines have no flagged mark, and the instant
//! is none of the group. *Retries.* Whoever asks makes another round. *Cancellation*, *Crash.* Hosts let go by themselves when their
//! limit is over, and make marks of their own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use tidemark_base::{HostId, MachineId, MarkId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, GroupReleased, HoldGroup, Verdict};

/// Who holds: agents over their streams, or a test's.
#[tonic::async_trait]
pub trait Hosts: Send + Sync {
    /// Returns when the host holds.
    async fn hold(&self, host: HostId, hold: &HoldGroup) -> Result<(), Failure>;
    async fn release(&self, host: HostId, round: MarkId, verdict: Verdict) -> Result<GroupReleased, Failure>;
    /// As people know it, with its machines.
    fn name(&self, host: HostId) -> String;
}

/// A host that kept a barrier from being one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Missed {
    /// Its name, with its machines of the group.
    pub host: String,
    pub reason: String,
    pub help: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Round {
    pub id: MarkId,
    /// None: the marks are one instant of all machines.
    pub missed: Vec<Missed>,
    /// When each machine's mark was made, flagged or not; those without one are not here.
    pub marks: BTreeMap<MachineId, Timestamp>,
    /// The longest that any host held.
    pub held: Duration,
}

/// What is asked of a round.
pub struct Asked<'a> {
    pub group: &'a str,
    /// Which machines each host holds.
    pub hosts: BTreeMap<HostId, Vec<MachineId>>,
    pub limit: Duration,
    pub label: &'a str,
    /// Where somebody misses it: marks of each machine by itself, or none because it is tried again.
    pub otherwise: Verdict,
}

pub async fn run(hosts: &dyn Hosts, asked: &Asked<'_>) -> Round {
    let id = MarkId::random();
    let mut missed: BTreeMap<HostId, Failure> = BTreeMap::new();
    let mut held: Vec<HostId> = Vec::new();
    // Whoever holds already is released before its own limit, whatever becomes of the others.
    let patience = asked.limit / 2;
    let deadline = Instant::now() + patience;
    let mut holding: FuturesUnordered<_> = asked
        .hosts
        .iter()
        .map(|(&host, machines)| async move {
            let hold = HoldGroup {
                round: id,
                group: asked.group.to_owned(),
                machines: machines.clone(),
                limit: asked.limit,
                label: asked.label.to_owned(),
            };
            (host, hosts.hold(host, &hold).await)
        })
        .collect();
    // The first that cannot hold ends it: nobody is held for longer than it is of use.
    while held.len() < asked.hosts.len() && missed.is_empty() {
        match tokio::time::timeout(deadline.saturating_duration_since(Instant::now()), holding.next()).await {
            Ok(Some((host, Ok(())))) => held.push(host),
            Ok(Some((host, Err(failure)))) => drop(missed.insert(host, failure)),
            Ok(None) => break,
            Err(_) => {
                for host in asked.hosts.keys().filter(|host| !held.contains(host)) {
                    missed.insert(*host, not_in_time("did not hold", patience));
                }
            }
        }
    }
    let verdict = if missed.is_empty() { Verdict::Group } else { asked.otherwise };
    // Those that were asked and did not answer yet may hold by now: they are told as well, and not waited for past their own limit.
    let told =
        asked.hosts.keys().filter(|host| missed.get(host).is_none_or(|failure| failure.kind == FailureKind::TimedOut));
    let mut releasing: FuturesUnordered<_> = told
        .map(|&host| {
            let is_missed = missed.contains_key(&host);
            async move {
                let released = hosts.release(host, id, verdict);
                match is_missed {
                    true => {
                        let late = Err(not_in_time("did not hold", patience));
                        (host, tokio::time::timeout(patience, released).await.unwrap_or(late))
                    }
                    false => (host, released.await),
                }
            }
        })
        .collect();
    let mut marks = BTreeMap::new();
    let mut longest = Duration::ZERO;
    while let Some((host, released)) = releasing.next().await {
        let outcome = match released {
            Ok(released) => {
                longest = longest.max(released.held);
                let failed = released.machines.iter().find_map(|of| of.failure.clone());
                marks.extend(released.machines.iter().filter_map(|of| Some((of.machine, of.time?))));
                match (released.in_time, failed) {
                    (true, _) => Ok(()),
                    (false, Some(failure)) => Err(failure),
                    (false, None) => Err(not_in_time("was not released", asked.limit)),
                }
            }
            Err(failure) => Err(failure),
        };
        // Where somebody did not even hold, the others are not to blame for what follows.
        if let Err(failure) = outcome
            && verdict == Verdict::Group
        {
            missed.entry(host).or_insert(failure);
        }
    }
    let missed = missed.into_iter().map(|(host, failure)| Missed {
        host: hosts.name(host),
        reason: failure.message,
        help: failure.help,
    });
    Round { id, missed: missed.collect(), marks, held: longest }
}

fn not_in_time(what: &str, limit: Duration) -> Failure {
    Failure::new(
        FailureKind::TimedOut,
        format!("it {what} within {} ms", limit.as_millis()),
        "see whether it is overloaded or far away; a longer limit is set by `tidemark group set NAME --hold-limit`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tidemark_proto::control::GroupMark;

    /// How a host of a test behaves.
    #[derive(Clone, Copy, PartialEq)]
    enum Way {
        Good,
        Refuses,
        /// Never answers to the hold.
        Silent,
        /// Holds, and the release comes too late.
        Late,
        Disconnects,
    }

    struct TestHosts {
        ways: BTreeMap<HostId, Way>,
        told: Mutex<Vec<(HostId, Verdict)>>,
        holding: Mutex<Vec<HostId>>,
    }

    fn failure(kind: FailureKind, message: &str) -> Failure {
        Failure::new(kind, message, "help")
    }

    #[tonic::async_trait]
    impl Hosts for TestHosts {
        async fn hold(&self, host: HostId, _: &HoldGroup) -> Result<(), Failure> {
            match self.ways[&host] {
                Way::Refuses => return Err(failure(FailureKind::Unavailable, "busy")),
                Way::Silent => std::future::pending::<()>().await,
                _ => self.holding.lock().unwrap().push(host),
            }
            Ok(())
        }

        async fn release(&self, host: HostId, _: MarkId, verdict: Verdict) -> Result<GroupReleased, Failure> {
            if verdict == Verdict::Group {
                let (holding, all) = (self.holding.lock().unwrap().len(), self.ways.len());
                assert_eq!(holding, all, "released as a group before all held");
            }
            self.told.lock().unwrap().push((host, verdict));
            let (way, machine) = (self.ways[&host], MachineId::random());
            match way {
                Way::Silent => Err(failure(FailureKind::NotFound, "there is no barrier")),
                Way::Disconnects => Err(failure(FailureKind::Unavailable, "disconnected")),
                way => Ok(GroupReleased {
                    in_time: way != Way::Late,
                    held: Duration::from_millis(3),
                    machines: vec![GroupMark { machine, time: Some(Timestamp(5)), failure: None }],
                }),
            }
        }

        fn name(&self, host: HostId) -> String {
            format!("{:?}", host.as_bytes()[0])
        }
    }

    async fn round(ways: &[Way]) -> (Round, Vec<(u8, Verdict)>) {
        let host = |number: usize| HostId::from_bytes([number as u8 + 1; 16]);
        let hosts = TestHosts {
            ways: ways.iter().enumerate().map(|(number, way)| (host(number), *way)).collect(),
            told: Mutex::default(),
            holding: Mutex::default(),
        };
        let asked = Asked {
            group: "shop",
            hosts: hosts.ways.keys().map(|host| (*host, vec![MachineId::random()])).collect(),
            limit: Duration::from_millis(50),
            label: "",
            otherwise: Verdict::Plain,
        };
        let round = run(&hosts, &asked).await;
        let mut told: Vec<_> =
            hosts.told.into_inner().unwrap().into_iter().map(|(host, verdict)| (host.as_bytes()[0], verdict)).collect();
        told.sort_by_key(|(host, _)| *host);
        (round, told)
    }

    fn missed(round: &Round) -> Vec<&str> {
        round.missed.iter().map(|missed| missed.host.as_str()).collect()
    }

    #[tokio::test]
    async fn all_are_released_as_a_group_when_all_hold() {
        let (round, told) = round(&[Way::Good, Way::Good, Way::Good]).await;
        assert!(round.missed.is_empty() && round.marks.len() == 3 && round.held == Duration::from_millis(3));
        assert!(told.len() == 3 && told.iter().all(|(_, verdict)| *verdict == Verdict::Group));
    }

    #[tokio::test]
    async fn whoever_misses_a_barrier_is_named_and_the_others_get_marks_of_their_own() {
        let (refused, told) = round(&[Way::Good, Way::Refuses, Way::Good]).await;
        assert_eq!(missed(&refused), ["2"]);
        assert!(refused.missed[0].reason.contains("busy"));
        assert_eq!(told, [(1, Verdict::Plain), (3, Verdict::Plain)]);
        let (silent, told) = round(&[Way::Good, Way::Silent]).await;
        assert_eq!((missed(&silent), silent.marks.len()), (vec!["2"], 1));
        assert!(silent.missed[0].reason.contains("did not hold within 25 ms"), "{silent:?}");
        assert_eq!(told, [(1, Verdict::Plain), (2, Verdict::Plain)], "who did not answer may hold by now");
        // All held, and the release did not reach one of them: its marks are not of the group.
        for way in [Way::Late, Way::Disconnects] {
            let (late, told) = round(&[Way::Good, way]).await;
            assert_eq!(missed(&late), ["2"]);
            assert!(told.iter().all(|(_, verdict)| *verdict == Verdict::Group));
        }
    }
}
