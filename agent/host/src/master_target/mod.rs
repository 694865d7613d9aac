#![doc = include_str!("FORMAT.md")]

mod check;
mod rounds;
mod source;
mod undo;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{Storage, read_file, remove_if_there, replace_file};
use tidemark_base::sync::Mutex;
use tidemark_base::thread::JoinHandle;
use tidemark_base::{DiskId, Generation, MachineId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_proto::failback::{Method, Obstacle, Stage, TargetCall, TargetReport};
use uuid::Uuid;

use crate::Host;
pub use source::{Source, SourceFactory, grpc};

const STATE: &str = "state";
const STATE_BYTES_MAX: u64 = 1 << 20;
/// Longer calls are not ours.
const CALL_BYTES_MAX: usize = 64 << 10;

/// The machines of this host that are on their way home.
pub struct MasterTargets {
    host: Arc<Host>,
    storage: Arc<dyn Storage>,
    source: SourceFactory,
    targets: Mutex<BTreeMap<MachineId, Arc<Target>>>,
}

/// What is durable of one.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct State {
    failover: Uuid,
    method: Method,
    wanted: Wanted,
    stage: Stage,
    /// A pass over everything that may differ is durable on the disks.
    whole: bool,
    /// Until then the pass before that: each disk is durable up to here, but for what was written at the other side since.
    #[serde(default)]
    done: BTreeMap<DiskId, u64>,
    /// Each disk's undo file is durable up to here, at least.
    undo: BTreeMap<DiskId, u64>,
    spool: Option<Spool>,
    consistent_at: Option<Timestamp>,
    rounds: u64,
    compared_bytes: u64,
    received_bytes: u64,
    wire_bytes: u64,
}

/// A round that came whole.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Spool {
    bytes: u64,
    at: Timestamp,
    generations: BTreeMap<DiskId, Generation>,
    /// The machine was off.
    last: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Wanted {
    Sync,
    Finish,
    /// As they are, without where the machine ran.
    TakeOver,
    Undo,
}

/// One machine on its way home: its state, and the thread that works on it.
struct Target {
    machine: MachineId,
    storage: Arc<dyn Storage>,
    state: Mutex<State>,
    progress: Mutex<Progress>,
    wake: rounds::Wake,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is known while it runs.
#[derive(Clone, Default)]
struct Progress {
    done_bytes: u64,
    total_bytes: u64,
    behind_bytes: u64,
    kept_bytes: u64,
    problem: Option<(String, String)>,
}

impl MasterTargets {
    /// Goes on with what was under way when the agent ended. `storage` is a folder of its own, never on a protected disk.
    pub fn open(host: Arc<Host>, storage: Arc<dyn Storage>, source: SourceFactory) -> io::Result<Arc<Self>> {
        let targets = Arc::new(Self { host, storage, source, targets: Mutex::default() });
        for name in targets.storage.list("")? {
            let Ok(machine) = name.parse::<MachineId>() else { continue };
            let folder = targets.storage.folder(&name);
            if !folder.exists(STATE)? {
                // It was let go, or never began.
                targets.storage.remove_folder(&name)?;
                continue;
            }
            let content = read_file(&*folder, STATE, STATE_BYTES_MAX)?;
            match serde_json::from_slice(&content) {
                Ok(state) => drop(targets.run(machine, folder, state)?),
                Err(error) => tracing::error!(
                    %machine, %error, help = "move the folder away, then ask for the reprotect again",
                    "what a master target was doing cannot be read"
                ),
            }
        }
        Ok(targets)
    }

    /// The answer to a call of the control plane. Blocks.
    pub fn execute(&self, call: &str) -> Result<String, Failure> {
        let not_understood = |what: String| {
            let message = format!("what came about a master target is not understood: {what}");
            Failure::new(FailureKind::BadRequest, message, "let both ends be of the same version")
        };
        if call.len() > CALL_BYTES_MAX {
            return Err(not_understood(format!("{} bytes", call.len())));
        }
        let call: TargetCall = serde_json::from_str(call).map_err(|error| not_understood(error.to_string()))?;
        let report = match call {
            TargetCall::Check { machine } => {
                TargetReport { obstacles: check::obstacles(&self.host, machine), ..self.report(machine) }
            }
            TargetCall::Room { disks } => {
                check::room(&disks)?;
                TargetReport::default()
            }
            TargetCall::Make { disks } => {
                check::room(&disks)?;
                disks.iter().try_for_each(check::make)?;
                TargetReport::default()
            }
            TargetCall::Report { machine } => self.report(machine),
            TargetCall::Sync { machine, failover, method } => self.want(machine, failover, method, Wanted::Sync)?,
            TargetCall::Finish { machine, failover, method } => self.want(machine, failover, method, Wanted::Finish)?,
            TargetCall::TakeOver { machine, failover } => self.take_over(machine, failover)?,
            TargetCall::Undo { machine, failover } => self.undo(machine, failover)?,
            TargetCall::LetGo { machine, failover } => self.let_go(machine, failover)?,
        };
        serde_json::to_string(&report).map_err(|error| not_understood(error.to_string()))
    }

    /// Ends the threads; what they were at goes on at the next start.
    pub fn stop(&self) {
        let targets = std::mem::take(&mut *self.targets.lock().expect("no panic while held"));
        targets.into_values().for_each(|target| target.stop());
    }

    fn get(&self, machine: MachineId) -> Option<Arc<Target>> {
        self.targets.lock().expect("no panic while held").get(&machine).cloned()
    }

    fn report(&self, machine: MachineId) -> TargetReport {
        self.get(machine).map(|target| target.report()).unwrap_or_default()
    }

    fn run(&self, machine: MachineId, storage: Arc<dyn Storage>, state: State) -> io::Result<Arc<Target>> {
        let target = Arc::new(Target {
            machine,
            storage,
            state: Mutex::new(state),
            progress: Mutex::default(),
            wake: rounds::Wake::default(),
            thread: Mutex::default(),
        });
        let worker = rounds::Worker::new(target.clone(), self.host.clone(), self.source.clone());
        let thread =
            tidemark_base::thread::Builder::new().name("master target".to_owned()).spawn(move || worker.run())?;
        *target.thread.lock().expect("no panic while held") = Some(thread);
        self.targets.lock().expect("no panic while held").insert(machine, target.clone());
        Ok(target)
    }

    fn want(
        &self,
        machine: MachineId,
        failover: Uuid,
        method: Method,
        wanted: Wanted,
    ) -> Result<TargetReport, Failure> {
        if let Some(target) = self.get(machine) {
            let state = target.state();
            if state.failover != failover {
                return Err(Failure::new(
                    FailureKind::Conflict,
                    format!(
                        "the home disks of machine {machine} are on their way home from failover {}",
                        state.failover
                    ),
                    "cancel that reprotect first: `tidemark reprotect cancel NAME`",
                ));
            }
            if !matches!(state.stage, Stage::Undoing | Stage::Undone) {
                target.change(|state| {
                    state.wanted = wanted;
                    // The machine goes on at the other side after all.
                    if (state.stage, wanted) == (Stage::Finished, Wanted::Sync) {
                        state.stage = Stage::Consistent;
                    }
                    // Everything once more, whatever is there.
                    if method == Method::Full && state.method != Method::Full {
                        (state.method, state.whole) = (method, false);
                        state.done.clear();
                    }
                })?;
                target.wake.ring();
                return Ok(target.report());
            }
            if state.stage == Stage::Undoing {
                return Err(Failure::new(
                    FailureKind::Conflict,
                    format!("the home disks of machine {machine} are just being given back what they had"),
                    "wait until that is done: `tidemark failover show NAME`",
                ));
            }
            self.forget(machine, &target)?;
        }
        if let Some(obstacle) = check::obstacles(&self.host, machine).into_iter().next() {
            return Err(Failure::new(FailureKind::Conflict, obstacle.message, obstacle.help));
        }
        let name = machine.to_string();
        let begun = self.storage.create_folder(&name).and_then(|()| self.storage.sync_folder("")).and_then(|()| {
            let state = State {
                failover,
                method,
                wanted,
                stage: Stage::Syncing,
                whole: false,
                done: BTreeMap::new(),
                undo: BTreeMap::new(),
                spool: None,
                consistent_at: None,
                rounds: 0,
                compared_bytes: 0,
                received_bytes: 0,
                wire_bytes: 0,
            };
            let folder = self.storage.folder(&name);
            store(&*folder, &state)?;
            self.run(machine, folder, state)
        });
        Ok(begun.map_err(|error| state_failed(&error))?.report())
    }

    fn take_over(&self, machine: MachineId, failover: Uuid) -> Result<TargetReport, Failure> {
        let target = self.get(machine).filter(|target| target.state().failover == failover);
        let is_whole =
            target.as_ref().is_some_and(|target| matches!(target.state().stage, Stage::Consistent | Stage::Finished));
        let Some(target) = target.filter(|_| is_whole) else {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("the home disks of machine {machine} do not show it at one instant"),
                "they can be finished when where it runs is back, or be given back what they had: `tidemark reprotect cancel NAME`",
            ));
        };
        target.change(|state| state.wanted = Wanted::TakeOver)?;
        target.wake.ring();
        Ok(target.report())
    }

    fn undo(&self, machine: MachineId, failover: Uuid) -> Result<TargetReport, Failure> {
        // Nothing was begun: they have what they had.
        let Some(target) = self.get(machine).filter(|target| target.state().failover == failover) else {
            return Ok(TargetReport { stage: Stage::Undone, ..TargetReport::default() });
        };
        if target.state().stage != Stage::Undone {
            target.change(|state| {
                state.wanted = Wanted::Undo;
                state.stage = Stage::Undoing;
                state.spool = None;
            })?;
            target.wake.ring();
        }
        Ok(target.report())
    }

    fn let_go(&self, machine: MachineId, failover: Uuid) -> Result<TargetReport, Failure> {
        if let Some(target) = self.get(machine).filter(|target| target.state().failover == failover) {
            let stage = target.state().stage;
            if !matches!(stage, Stage::Finished | Stage::Undone) {
                return Err(Failure::new(
                    FailureKind::Conflict,
                    format!(
                        "the home disks of machine {machine} are on their way: neither as the machine is, nor as they were"
                    ),
                    "complete the failback (`tidemark failback complete NAME`), or take the reprotect back (`tidemark reprotect cancel NAME`)",
                ));
            }
            self.forget(machine, &target)?;
        }
        Ok(TargetReport::default())
    }

    fn forget(&self, machine: MachineId, target: &Target) -> Result<(), Failure> {
        target.stop();
        self.targets.lock().expect("no panic while held").remove(&machine);
        // First what says that there is something.
        let name = machine.to_string();
        let removed =
            remove_if_there(&*target.storage, STATE).and_then(|()| target.storage.sync_folder("")).and_then(|()| {
                self.storage.remove_folder(&name)?;
                self.storage.sync_folder("")
            });
        removed.map_err(|error| state_failed(&error))
    }
}

impl Target {
    fn state(&self) -> State {
        self.state.lock().expect("no panic while held").clone()
    }

    /// Durable when it returns.
    fn change(&self, change: impl FnOnce(&mut State)) -> Result<(), Failure> {
        self.change_state(change).map_err(|error| state_failed(&error))
    }

    fn change_state(&self, change: impl FnOnce(&mut State)) -> io::Result<()> {
        let mut state = self.state.lock().expect("no panic while held");
        let mut next = state.clone();
        change(&mut next);
        if next != *state {
            store(&*self.storage, &next)?;
            *state = next;
        }
        Ok(())
    }

    fn stop(&self) {
        self.wake.stop();
        if let Some(thread) = self.thread.lock().expect("no panic while held").take()
            && thread.join().is_err()
        {
            tracing::error!(machine = %self.machine, "a master target panicked");
        }
    }

    fn report(&self) -> TargetReport {
        let state = self.state();
        let progress = self.progress.lock().expect("no panic while held").clone();
        let (problem, help) = progress.problem.unzip();
        TargetReport {
            stage: state.stage,
            failover: Some(state.failover),
            rounds: state.rounds,
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes,
            compared_bytes: state.compared_bytes,
            received_bytes: state.received_bytes,
            wire_bytes: state.wire_bytes,
            consistent_at: state.consistent_at,
            behind_bytes: progress.behind_bytes,
            kept_bytes: progress.kept_bytes,
            problem,
            help,
            obstacles: Vec::<Obstacle>::new(),
        }
    }
}

fn store(storage: &dyn Storage, state: &State) -> io::Result<()> {
    let content = serde_json::to_vec(state).map_err(io::Error::other)?;
    replace_file(storage, STATE, &content)
}

fn state_failed(error: &io::Error) -> Failure {
    let message = format!("what the master target does cannot be stored: {error}");
    Failure::new(FailureKind::Failed, message, "check the volume of the agent's state (free room, kernel log)")
}
