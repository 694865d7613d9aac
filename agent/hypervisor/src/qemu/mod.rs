//! QEMU, run by us: each machine a process of its own, driven over QMP.
//!
//! The folder of machines, one folder a machine, named by its id:
//!
//! | file | is |
//! |---|---|
//! | `lock` | locked by the one process that drives these machines |
//! | `accelerator.json` | what was found about KVM, for this boot |
//! | `ID/machine.json` | the machine as it was defined, and where its disks are now |
//! | `ID/pid` | locked by QEMU while it lives ([`process`]) |
//! | `ID/qmp.sock`, `ID/agent.sock` | QEMU's and the guest agent's channels |
//! | `ID/console.log` | what came on the first serial line, of the last start |
//! | `ID/uefi-variables.fd` | UEFI's memory |
//!
//! *Consistency.* `machine.json` is durable before QEMU starts. Whether a machine runs is asked of the kernel (the lock of its
//! pid file), never remembered; a QEMU is spoken to only after it said this machine's id. *Retries.* None. *Cancellation.* A
//! start that is dropped may leave a QEMU whose guest never ran; stopping or deleting the machine ends it. *Crash.* QEMU makes
//! itself a process of its own, so it goes on without us and is found again. Under systemd this needs `KillMode=process`.
//!
//! **Moving a disk** (`move_disk`): 1. the new place becomes a node, 2. a mirror copies to it, and writes of the guest go to
//! both before they are done, 3. when both are the same, `machine.json` names the new place, durably, 4. the mirror ends and
//! the guest's disk is the new node alone. Crash of ours before 3: the mirror goes on and is cancelled when the machine is
//! found again; the old place has everything. Between 3 and 4: both have everything; the mirror is ended when the machine is
//! found again. After 4: the new one has. A new place that fails between 3 and 4 takes the step back: 3 is undone. Where QEMU does
//! not say how 4 went, 3 stands: both have everything, and the next connection ends the mirror.

pub mod accelerator;
pub mod command;
pub mod process;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::storage::{OpenMode, RealStorage, Storage, read_file, replace_file};
use tidemark_qemu::QmpError;
use tidemark_qemu::qmp::{self, Qmp};
use tokio::process::Command;
use tokio::sync::{OnceCell, broadcast};
use uuid::Uuid;

use self::accelerator::{Accelerator, Finding};
use self::command::{AGENT, CONSOLE, PID, QMP, VARIABLES};
use self::process::Process;
use crate::error::{HypervisorError, store};
use crate::guest;
use crate::hypervisor::{About, Console, Event, Hypervisor, Listed, Power, Question, Started, Stopped};
use crate::machine::{Firmware, Machine, Place};
use crate::run::run;

type Result<T> = std::result::Result<T, HypervisorError>;

const FILE: &str = "machine.json";
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How long QEMU may take to open a machine's disks and listen.
const START_LIMIT: Duration = Duration::from_secs(60);
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Nobody else connects there: on a busy machine a QEMU takes its time to begin.
const GREETING_LIMIT: Duration = Duration::from_secs(45);
/// How long a QEMU that was told to end may take before it is killed, and after.
const QUIT_LIMIT: Duration = Duration::from_secs(10);
/// What is kept of a console; a guest that says more loses the beginning.
const CONSOLE_BYTES_MAX: u64 = 64 << 20;
const CONSOLE_READ_MAX: u64 = 1 << 20;
const EVENTS_MAX: usize = 256;

pub struct QemuSettings {
    /// Where machines are kept.
    pub folder: PathBuf,
    pub program: PathBuf,
    /// Instead of finding out.
    pub accelerator: Option<Accelerator>,
}

impl QemuSettings {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), program: "qemu-system-x86_64".into(), accelerator: None }
    }
}

pub struct Qemu {
    storage: Arc<dyn Storage>,
    program: PathBuf,
    forced: Option<Accelerator>,
    finding: OnceCell<Finding>,
    connections: Mutex<HashMap<Uuid, Arc<Qmp>>>,
    /// Goes with this.
    _lock: Flock<std::fs::File>,
}

/// `machine.json`.
#[derive(Serialize, Deserialize)]
struct Kept {
    machine: Machine,
    /// How often each disk moved: the names of its nodes.
    moves: Vec<u32>,
}

/// Where a program is, as a shell would find it.
pub fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

impl Qemu {
    /// Opens the folder of machines; those that run go on. Blocks.
    pub fn open(settings: QemuSettings) -> Result<Self> {
        let storage = RealStorage::create(&settings.folder).map_err(store("the folder of machines"))?;
        let file = storage.open("lock", OpenMode::OpenOrCreate).map_err(store("the folder of machines"))?;
        let file = file.as_file().map(std::fs::File::try_clone).transpose().map_err(store("the lock of machines"))?;
        let file = file.ok_or(HypervisorError::InUse)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| HypervisorError::InUse)?;
        Ok(Self {
            storage,
            program: settings.program,
            forced: settings.accelerator,
            finding: OnceCell::new(),
            connections: Mutex::default(),
            _lock: lock,
        })
    }

    /// What machines run under. The first time it takes seconds where KVM is there and does not work.
    pub async fn accelerator(&self) -> Result<(Accelerator, Option<String>)> {
        if let Some(forced) = self.forced {
            return Ok((forced, Some("it is configured so".to_owned())));
        }
        let finding = self.finding.get_or_try_init(|| accelerator::find(&*self.storage, &self.program)).await?;
        Ok((finding.accelerator, finding.why.clone()))
    }

    fn folder(&self, id: Uuid) -> PathBuf {
        self.storage.path(&id.to_string())
    }

    fn kept(&self, id: Uuid) -> Result<Kept> {
        let name = format!("{id}/{FILE}");
        let content = match read_file(&*self.storage, &name, FILE_BYTES_MAX) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(HypervisorError::Unknown { id }),
            other => other.map_err(store(format!("machine {id} cannot be read")))?,
        };
        serde_json::from_slice(&content).map_err(|error| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            store(format!("machine {id} cannot be read"))(source)
        })
    }

    fn keep(&self, kept: &Kept) -> Result<()> {
        let content = serde_json::to_vec_pretty(kept).expect("plain data");
        replace_file(&*self.storage, &format!("{}/{FILE}", kept.machine.id), &content)
            .map_err(store(format!("machine {} cannot be kept", kept.machine.id)))
    }

    fn process(&self, id: Uuid) -> Result<Option<Process>> {
        process::find(&self.folder(id).join(PID)).map_err(store(format!("the process of machine {id}")))
    }

    /// Every machine's id.
    fn ids(&self) -> Result<Vec<Uuid>> {
        let names = self.storage.list("").map_err(store("the folder of machines"))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The channel to a machine that runs. It said that it is this machine.
    async fn qmp(&self, id: Uuid) -> Result<Arc<Qmp>> {
        let known = self.connections.lock().expect("no panic while held").get(&id).cloned();
        if let Some(qmp) = known.filter(|qmp| qmp.is_open()) {
            return Ok(qmp);
        }
        let Some(process) = self.process(id)? else {
            self.kept(id)?;
            return Err(HypervisorError::Off { id });
        };
        let qmp = Arc::new(Qmp::connect_own(&self.folder(id), QMP, GREETING_LIMIT).await?);
        let said = qmp.execute("query-uuid", json!({}), ANSWER_LIMIT).await?;
        if said["UUID"].as_str() != Some(&id.to_string()) {
            return Err(HypervisorError::Stranger { id, pid: process.pid });
        }
        self.connections.lock().expect("no panic while held").insert(id, qmp.clone());
        self.settle_moves(id, &qmp).await?;
        Ok(qmp)
    }

    fn forget(&self, id: Uuid) {
        self.connections.lock().expect("no panic while held").remove(&id);
    }

    /// Ends mirrors that an earlier process of ours began: those whose new place is kept go on there, others are given up.
    async fn settle_moves(&self, id: Uuid, qmp: &Qmp) -> Result<()> {
        let jobs = qmp.execute("query-block-jobs", json!({}), ANSWER_LIMIT).await?;
        for job in jobs.as_array().into_iter().flatten().filter(|job| job["type"] == "mirror") {
            let Some(name) = job["device"].as_str() else { continue };
            let Some((disk, moves)) = parse_job(name) else { continue };
            let kept = self.kept(id)?;
            let complete = kept.moves.get(disk).is_some_and(|now| *now >= moves);
            let command = if complete { "job-complete" } else { "block-job-cancel" };
            let arguments = if complete { json!({ "id": name }) } else { json!({ "device": name, "force": true }) };
            tracing::warn!(machine = %id, disk, complete, "a disk was being moved when this process began");
            qmp.execute(command, arguments, ANSWER_LIMIT).await?;
        }
        Ok(())
    }

    async fn prepare_start(&self, id: Uuid, kept: &Kept) -> Result<Command> {
        let folder = self.folder(id);
        let uefi = match kept.machine.hardware.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(uefi()?),
        };
        if let Some((_, variables)) = &uefi
            && !self.storage.exists(&format!("{id}/{VARIABLES}")).map_err(store("UEFI's variables"))?
        {
            let template = std::fs::read(variables).map_err(store(variables.display().to_string()))?;
            replace_file(&*self.storage, &format!("{id}/{VARIABLES}"), &template).map_err(store("UEFI's variables"))?;
        }
        // The console is the last start's.
        let name = format!("{id}/{CONSOLE}");
        let console = self.storage.open(&name, OpenMode::OpenOrCreate).map_err(store("the console's log"))?;
        console.set_bytes(0).map_err(store("the console's log"))?;
        for socket in [QMP, AGENT] {
            match std::fs::remove_file(folder.join(socket)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(store("a socket")(error)),
                _ => {}
            }
        }
        let (accelerator, _) = self.accelerator().await?;
        let code = uefi.as_ref().map(|(code, _)| code.as_path());
        let mut command = Command::new(&self.program);
        command.args(command::arguments(&kept.machine, &kept.moves, accelerator, code)).current_dir(&folder);
        Ok(command)
    }

    /// Waits until the process has ended.
    async fn wait_ended(&self, id: Uuid, process: &Process, limit: Duration) -> Result<bool> {
        match tokio::time::timeout(limit, process.ended()).await {
            Ok(ended) => {
                ended.map_err(store(format!("the process of machine {id}")))?;
                self.forget(id);
                Ok(true)
            }
            Err(_) => Ok(false),
        }
    }

    async fn turn_off(&self, id: Uuid, process: &Process) -> Result<()> {
        // Told to end, it flushes what it holds; one that does not listen is killed.
        let told = async {
            let qmp = self.qmp(id).await?;
            Ok::<_, HypervisorError>(qmp.execute("quit", json!({}), ANSWER_LIMIT).await?)
        };
        let told = tokio::time::timeout(QUIT_LIMIT, told).await.is_ok_and(|told| told.is_ok());
        if told && self.wait_ended(id, process, QUIT_LIMIT).await? {
            return Ok(());
        }
        process.kill().map_err(store(format!("machine {id} cannot be killed")))?;
        if self.wait_ended(id, process, QUIT_LIMIT).await? || self.process(id)?.is_none() {
            return Ok(());
        }
        Err(HypervisorError::TimedOut { what: format!("the end of machine {id}"), limit: QUIT_LIMIT })
    }

    /// `sync`: `full`, or `none` for a place that has the content already.
    async fn mirror(&self, id: Uuid, sync: &str, disk: usize, to: &Place, limit: Duration) -> Result<()> {
        let qmp = &*self.qmp(id).await?;
        let mut kept = self.kept(id)?;
        let Some(before) = kept.machine.disks.get(disk).cloned() else {
            let reason = format!("it has {} disks", kept.machine.disks.len());
            return Err(HypervisorError::Refused { what: format!("the move of disk {disk}"), reason });
        };
        let moves = kept.moves[disk];
        let (old, new) = (command::node(disk, moves), command::node(disk, moves + 1));
        let job = job_name(disk, moves + 1);
        // Before anything begins, so that no event is missed.
        let mut events = qmp.events();
        qmp.execute("blockdev-add", command::blockdev(&new, to), ANSWER_LIMIT).await?;
        let outcome = async {
            let arguments = json!({
                "job-id": job, "device": old, "target": new, "sync": sync, "copy-mode": "write-blocking",
                "on-target-error": "report", "on-source-error": "report",
            });
            qmp.execute("blockdev-mirror", arguments, ANSWER_LIMIT).await?;
            let what = format!("the copy of disk {disk}");
            match tokio::time::timeout(limit, job_event(&mut events, &job)).await {
                Ok(Ok(Ready::Same)) => {}
                Ok(Ok(Ready::Ended(reason))) => {
                    let reason = reason.unwrap_or_else(|| "the copy was cancelled".to_owned());
                    return Err(HypervisorError::Refused { what, reason });
                }
                Ok(Err(())) => return Err(HypervisorError::Off { id }),
                Err(_) => {
                    let cancel = json!({ "device": job, "force": true });
                    qmp.execute("block-job-cancel", cancel, ANSWER_LIMIT).await?;
                    let _ = tokio::time::timeout(ANSWER_LIMIT, job_event(&mut events, &job)).await;
                    return Err(HypervisorError::TimedOut { what, limit });
                }
            }
            kept.machine.disks[disk] = to.clone();
            kept.moves[disk] = moves + 1;
            self.keep(&kept)?;
            let told = qmp.execute("job-complete", json!({ "id": job }), ANSWER_LIMIT).await;
            let reason = match told {
                Ok(_) => match tokio::time::timeout(ANSWER_LIMIT, job_event(&mut events, &job)).await {
                    Ok(Ok(Ready::Ended(None))) => return Ok(()),
                    Ok(Ok(Ready::Ended(Some(reason)))) => reason,
                    // It ended, or hangs, with both places the same: the kept one is right.
                    Ok(Ok(Ready::Same) | Err(())) | Err(_) => return Err(self.unsettled(id, what)),
                },
                Err(QmpError::Refused { reason, .. }) => reason,
                // Nobody knows whether it was heard.
                Err(_) => return Err(self.unsettled(id, what)),
            };
            kept.machine.disks[disk] = before;
            kept.moves[disk] = moves;
            self.keep(&kept)?;
            Err(HypervisorError::Refused { what: format!("the move of disk {disk}"), reason })
        }
        .await;
        // What is not the disk's any more.
        let unused = if outcome.is_ok() { &old } else { &new };
        for node in [unused.clone(), format!("{unused}-file")] {
            if let Err(error) = qmp.execute("blockdev-del", json!({ "node-name": node }), ANSWER_LIMIT).await {
                // A node that was made with the one above it goes with it.
                tracing::debug!(machine = %id, node, %error, "a node is not there to be removed");
            }
        }
        outcome
    }
}

impl Qemu {
    /// How a mirror ended is not known: the next connection looks for it, and ends it.
    fn unsettled(&self, id: Uuid, what: String) -> HypervisorError {
        self.forget(id);
        HypervisorError::TimedOut { what, limit: ANSWER_LIMIT }
    }
}

fn uefi() -> Result<(PathBuf, PathBuf)> {
    command::find_uefi()
        .ok_or_else(|| HypervisorError::Missing { what: "the firmware for UEFI".to_owned(), package: "ovmf" })
}

fn job_name(disk: usize, moves: u32) -> String {
    format!("move-{disk}-{moves}")
}

fn parse_job(name: &str) -> Option<(usize, u32)> {
    let (disk, moves) = name.strip_prefix("move-")?.split_once('-')?;
    Some((disk.parse().ok()?, moves.parse().ok()?))
}

enum Ready {
    /// Both places have everything.
    Same,
    /// The job has ended; why, when it failed.
    Ended(Option<String>),
}

/// The next thing of weight that a job says. An error: nothing is heard any more.
async fn job_event(events: &mut broadcast::Receiver<Value>, job: &str) -> std::result::Result<Ready, ()> {
    loop {
        let event = match events.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return Err(()),
        };
        if event["data"]["device"] != job {
            continue;
        }
        match event["event"].as_str() {
            Some("BLOCK_JOB_READY") => return Ok(Ready::Same),
            Some("BLOCK_JOB_COMPLETED") => {
                return Ok(Ready::Ended(event["data"]["error"].as_str().map(str::to_owned)));
            }
            Some("BLOCK_JOB_CANCELLED") => return Ok(Ready::Ended(Some("it was cancelled".to_owned()))),
            _ => {}
        }
    }
}

/// An event of QEMU's as ours.
fn event_of(event: &Value) -> Option<Event> {
    let data = &event["data"];
    Some(match event["event"].as_str()? {
        "SHUTDOWN" => Event::Ended { by_guest: data["guest"] == true },
        "STOP" => Event::Paused,
        "RESUME" => Event::Resumed,
        "RESET" => Event::Restarted,
        "GUEST_PANICKED" => Event::Panicked,
        "BLOCK_IO_ERROR" => Event::DiskFailed {
            node: data["node-name"].as_str().unwrap_or_default().to_owned(),
            write: data["operation"] == "write",
            reason: data["reason"].as_str().unwrap_or_default().to_owned(),
            paused: data["action"] == "stop",
        },
        _ => return None,
    })
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    async fn check(&self) -> Result<About> {
        let mut command = Command::new(&self.program);
        command.arg("--version");
        let output = run(command, &[], ANSWER_LIMIT).await?;
        let version = output.stdout.lines().next().unwrap_or_default().to_owned();
        let (accelerator, why) = self.accelerator().await?;
        Ok(About { name: self.name(), version, accelerator: accelerator.name().to_owned(), why })
    }

    async fn inventory(&self) -> Result<Vec<Listed>> {
        let mut all = Vec::new();
        for id in self.ids()? {
            let name = match self.kept(id) {
                Ok(kept) => kept.machine.name,
                // Its definition never became durable.
                Err(HypervisorError::Unknown { .. }) => continue,
                Err(error) => return Err(error),
            };
            all.push(Listed { id, name, power: self.power(id).await?, ours: true });
        }
        Ok(all)
    }

    async fn power(&self, id: Uuid) -> Result<Power> {
        if self.process(id)?.is_none() {
            self.kept(id)?;
            return Ok(Power::Off);
        }
        let status = async { Ok(self.qmp(id).await?.execute("query-status", json!({}), ANSWER_LIMIT).await?) };
        match status.await {
            Ok(status) if status["running"] == true => Ok(Power::On),
            Ok(_) => Ok(Power::Paused),
            // It ended meanwhile.
            Err(HypervisorError::Off { .. } | HypervisorError::Unreachable { .. }) if self.process(id)?.is_none() => {
                Ok(Power::Off)
            }
            Err(error) => Err(error),
        }
    }

    async fn define(&self, machine: &Machine) -> Result<()> {
        machine.check()?;
        if machine.hardware.firmware == Firmware::Uefi {
            uefi()?;
        }
        for id in self.ids()?.into_iter().filter(|id| *id != machine.id) {
            if let Ok(other) = self.kept(id)
                && other.machine.name == machine.name
            {
                return Err(HypervisorError::Exists { name: machine.name.clone(), id });
            }
        }
        if self.process(machine.id)?.is_some() {
            return Err(HypervisorError::Running { id: machine.id });
        }
        self.storage.create_folder(&machine.id.to_string()).map_err(store("the machine's folder cannot be made"))?;
        self.storage.sync_folder("").map_err(store("the machine's folder cannot be made"))?;
        self.keep(&Kept { machine: machine.clone(), moves: vec![0; machine.disks.len()] })
    }

    async fn describe(&self, id: Uuid) -> Result<Machine> {
        Ok(self.kept(id)?.machine)
    }

    async fn start(&self, id: Uuid) -> Result<Started> {
        let kept = self.kept(id)?;
        if self.process(id)?.is_some() {
            return Err(HypervisorError::Running { id });
        }
        let command = self.prepare_start(id, &kept).await?;
        let output = run(command, &[], START_LIMIT).await?;
        if output.code != 0 {
            return Err(HypervisorError::Refused {
                what: format!("the start of machine {id}"),
                reason: output.reason(),
            });
        }
        let qmp = self.qmp(id).await?;
        qmp.execute("cont", json!({}), ANSWER_LIMIT).await?;
        let first_instruction = Instant::now();
        tracing::info!(machine = %id, name = kept.machine.name, "machine started");
        Ok(Started { first_instruction })
    }

    async fn stop(&self, id: Uuid, shutdown: Option<Duration>) -> Result<Stopped> {
        let Some(process) = self.process(id)? else {
            self.kept(id)?;
            return Ok(Stopped::WasOff);
        };
        if let Some(limit) = shutdown {
            let told = match self.qmp(id).await {
                Ok(qmp) => qmp.execute("system_powerdown", json!({}), ANSWER_LIMIT).await.is_ok(),
                Err(_) => false,
            };
            if told && self.wait_ended(id, &process, limit).await? {
                return Ok(Stopped::ByGuest);
            }
            tracing::warn!(machine = %id, ?limit, "the guest did not shut down and is turned off");
        }
        self.turn_off(id, &process).await?;
        Ok(Stopped::TurnedOff)
    }

    async fn delete(&self, id: Uuid) -> Result<()> {
        if let Some(process) = self.process(id)? {
            self.turn_off(id, &process).await?;
        }
        self.forget(id);
        let name = id.to_string();
        if self.storage.exists(&name).map_err(store("the machine's folder"))? {
            self.storage.remove_folder(&name).map_err(store("the machine's folder cannot be removed"))?;
            self.storage.sync_folder("").map_err(store("the machine's folder cannot be removed"))?;
        }
        Ok(())
    }

    async fn networks(&self) -> Result<Vec<String>> {
        let mut all = vec!["isolated".to_owned()];
        let interfaces = std::fs::read_dir("/sys/class/net").map_err(store("the host's networks"))?;
        for interface in interfaces.flatten().filter(|interface| interface.path().join("bridge").exists()) {
            all.push(interface.file_name().to_string_lossy().into_owned());
        }
        Ok(all)
    }

    async fn move_disk(&self, id: Uuid, disk: usize, to: &Place, limit: Duration) -> Result<()> {
        self.mirror(id, "full", disk, to, limit).await
    }

    async fn switch_disk(&self, id: Uuid, disk: usize, to: &Place, limit: Duration) -> Result<()> {
        self.mirror(id, "none", disk, to, limit).await
    }

    async fn events(&self, id: Uuid) -> Result<broadcast::Receiver<Event>> {
        let mut heard = self.qmp(id).await?.events();
        let (sender, receiver) = broadcast::channel(EVENTS_MAX);
        tokio::spawn(async move {
            loop {
                match heard.recv().await {
                    Ok(event) => {
                        if let Some(event) = event_of(&event)
                            && sender.send(event).is_err()
                        {
                            return;
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        Ok(receiver)
    }

    async fn console(&self, id: Uuid, from: u64) -> Result<Console> {
        let name = format!("{id}/{CONSOLE}");
        let file = match self.storage.open(&name, OpenMode::ReadWrite) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.kept(id)?;
                return Ok(Console::default());
            }
            other => other.map_err(store("the console's log"))?,
        };
        let end = file.bytes().map_err(store("the console's log"))?;
        if end > CONSOLE_BYTES_MAX {
            // QEMU appends; what is given back here reads as zeroes, and positions stay.
            let old = end - CONSOLE_READ_MAX;
            file.punch_hole(0, old).map_err(store("the console's log"))?;
        }
        let from = from.max(end.saturating_sub(CONSOLE_READ_MAX)).min(end);
        let mut bytes = vec![0; (end - from) as usize];
        file.read_at(from, &mut bytes).map_err(store("the console's log"))?;
        Ok(Console { from, bytes })
    }

    async fn screenshot(&self, id: Uuid, to: &Path) -> Result<()> {
        let arguments = json!({ "filename": to, "format": "png" });
        self.qmp(id).await?.execute("screendump", arguments, ANSWER_LIMIT).await?;
        Ok(())
    }

    async fn reach(&self, id: Uuid, port: u16) -> Result<SocketAddr> {
        let qmp = self.qmp(id).await?;
        let arguments = json!({ "command-line": "info usernet" });
        let text = qmp.execute("human-monitor-command", arguments, ANSWER_LIMIT).await?;
        let found = text.as_str().unwrap_or_default().lines().find_map(|line| forwarded(line, port));
        found.ok_or_else(|| HypervisorError::Refused {
            what: format!("port {port} of machine {id}"),
            reason: "it is not forwarded: name it in the machine's ports".to_owned(),
        })
    }

    async fn ask_guest(&self, id: Uuid, question: Question, limit: Duration) -> Result<Value> {
        if self.process(id)?.is_none() {
            self.kept(id)?;
            return Err(HypervisorError::Off { id });
        }
        let stream = qmp::connect_in(&self.folder(id), AGENT).await.map_err(store("the guest agent's channel"))?;
        guest::ask(stream, &question, limit).await
    }
}

/// `TCP[HOST_FORWARD] 13 127.0.0.1 40123 10.0.2.15 22 0 0`
fn forwarded(line: &str, port: u16) -> Option<SocketAddr> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [kind, _, host, host_port, _, guest_port, ..] = words[..] else { return None };
    if kind != "TCP[HOST_FORWARD]" || guest_port.parse() != Ok(port) {
        return None;
    }
    Some(SocketAddr::new(host.parse().ok()?, host_port.parse().ok()?))
}
