//! A test failover as a drill: boot, wait for a sign of life, keep the evidence, clean up.
//!
//! The caller serves a point with a scratch layer and gives its places; nothing here touches a replica. Any number run side
//! by side: each machine has an id, a folder and a network of its own.
//!
//! *Consistency.* The machine is isolated or the drill is refused. *Retries.* None. *Cancellation.* Dropping the future leaves
//! the machine; [`clean_up`] of its id ends it, also by another process. *Crash.* The same.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{RealStorage, replace_file};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::error::{HypervisorError, store};
use crate::hypervisor::{Event, Hypervisor, Question};
use crate::machine::{Machine, Purpose};

/// The longest that a drill waits for a sign of life.
pub const LIMIT_MAX: Duration = Duration::from_secs(3600);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// How long the guest is waited for when a drill's machine is turned off: nothing of it is kept.
const STOP_AT_ONCE: Option<Duration> = None;
/// What is kept of a console as evidence.
const EVIDENCE_BYTES_MAX: usize = 1 << 20;

/// What shows that a guest lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Sign {
    /// Its agent answers.
    Agent,
    /// A program behind this port answers, at once or after it was sent something.
    Port {
        port: u16,
        #[serde(default)]
        send: String,
    },
    /// It says this on its first serial line.
    Console { text: String },
}

impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Sign::Agent => write!(f, "the guest's agent"),
            Sign::Port { port, .. } => write!(f, "an answer from port {port}"),
            Sign::Console { text } => write!(f, "{text:?} on the serial console"),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Drill {
    pub machine: Machine,
    /// None: that the machine runs is enough.
    pub sign: Option<Sign>,
    /// For the sign, from the guest's first instruction.
    pub limit: Duration,
    /// Where console and screen are kept; made when it is absent.
    pub evidence: PathBuf,
    /// A machine that shows its sign is left running for people, until [`clean_up`].
    pub keep: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub outcome: Outcome,
    /// Why it is not [`Outcome::Alive`], and what to do.
    pub reason: Option<String>,
    pub help: Option<String>,
    pub hypervisor: String,
    /// From the command to the guest's first instruction.
    pub first_instruction_seconds: Option<f64>,
    /// From the command to the sign of life.
    pub sign_seconds: Option<f64>,
    pub sign: Option<Sign>,
    pub console: Option<PathBuf>,
    pub screen: Option<PathBuf>,
    /// What could not be cleaned up, and why.
    pub left: Option<String>,
    pub running: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The sign came; without one to wait for, the guest was started.
    Alive,
    /// It ran until the limit without one.
    NoSign,
    /// It did not start, or ended, or its disk failed.
    Failed,
}

/// Runs a drill to its end. `began` is when the command was given, for the figures.
pub async fn run(hypervisor: &dyn Hypervisor, drill: &Drill, began: Instant, tell: &(dyn Fn(&str) + Sync)) -> Report {
    let mut report = Report {
        outcome: Outcome::Failed,
        reason: None,
        help: None,
        hypervisor: hypervisor.name().to_owned(),
        first_instruction_seconds: None,
        sign_seconds: None,
        sign: drill.sign.clone(),
        console: None,
        screen: None,
        left: None,
        running: false,
    };
    let id = drill.machine.id;
    match attempt(hypervisor, drill, began, &mut report, tell).await {
        Ok(()) => report.outcome = Outcome::Alive,
        Err(End::NoSign(reason)) => {
            report.outcome = Outcome::NoSign;
            report.reason = Some(reason);
            report.help = Some("look at the console and the screen that were kept; a longer limit may help".to_owned());
        }
        Err(End::Failed(error)) => {
            report.reason = Some(error.to_string());
            report.help = Some(error.help());
        }
    }
    tell("keep the evidence");
    keep_evidence(hypervisor, drill, &mut report).await;
    report.running = drill.keep && report.outcome == Outcome::Alive;
    if !report.running {
        tell("clean up");
        if let Err(error) = clean_up(hypervisor, id).await {
            tracing::error!(machine = %id, %error, "the machine of a drill is left");
            report.left = Some(error.to_string());
        }
    }
    report
}

/// Ends a drill's machine and forgets it. Repeating it changes nothing.
pub async fn clean_up(hypervisor: &dyn Hypervisor, id: Uuid) -> Result<(), HypervisorError> {
    match hypervisor.stop(id, STOP_AT_ONCE).await {
        Ok(_) | Err(HypervisorError::Unknown { .. } | HypervisorError::Off { .. }) => {}
        Err(error) => return Err(error),
    }
    hypervisor.delete(id).await
}

enum End {
    NoSign(String),
    Failed(HypervisorError),
}

impl From<HypervisorError> for End {
    fn from(error: HypervisorError) -> Self {
        End::Failed(error)
    }
}

async fn attempt(
    hypervisor: &dyn Hypervisor,
    drill: &Drill,
    began: Instant,
    report: &mut Report,
    tell: &(dyn Fn(&str) + Sync),
) -> Result<(), End> {
    let id = drill.machine.id;
    let mut machine = drill.machine.clone();
    // Checked by `define`: a drill's machine is isolated.
    machine.purpose = Purpose::Drill;
    if let Some(Sign::Port { port, .. }) = &drill.sign
        && !machine.ports.contains(port)
    {
        machine.ports.push(*port);
    }
    tell("define the machine");
    hypervisor.define(&machine).await?;
    tell("start the machine");
    let started = hypervisor.start(id).await?;
    report.first_instruction_seconds = Some(started.first_instruction.saturating_duration_since(began).as_secs_f64());
    let Some(sign) = &drill.sign else { return Ok(()) };
    tell(&format!("wait for {sign}"));
    let mut watch = Watch { hypervisor, id, text: Vec::new(), position: 0, address: None };
    let mut events = hypervisor.events(id).await.ok();
    let limit = drill.limit.min(LIMIT_MAX);
    let deadline = tokio::time::Instant::from_std(started.first_instruction + limit);
    let mut again = tokio::time::interval(LOOK_AGAIN);
    again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut trouble = String::new();
    let mut gone = None;
    loop {
        tokio::select! {
            _ = again.tick() => {}
            () = tokio::time::sleep_until(deadline) => {
                return Err(End::NoSign(format!("no sign of life ({sign}) within {}{trouble}", seconds(limit))));
            }
            event = next_event(&mut events) => match event {
                Event::Ended { by_guest } => gone = Some(if by_guest { "it shut itself down" } else { "it was ended" }),
                Event::Panicked => trouble = "; the guest's kernel panicked".to_owned(),
                Event::DiskFailed { node, write, reason, .. } => {
                    let what = if write { "write" } else { "read" };
                    trouble = format!("; disk {node} failed to {what}: {reason}");
                }
                Event::Paused | Event::Resumed | Event::Restarted => {}
            },
        }
        // What it said last is heard although it has ended.
        if watch.sees(sign).await {
            report.sign_seconds = Some(began.elapsed().as_secs_f64());
            return Ok(());
        }
        if let Some(how) = gone {
            let reason = format!("{how} before its sign of life ({sign}){trouble}");
            return Err(End::Failed(HypervisorError::Refused { what: "the drill".to_owned(), reason }));
        }
    }
}

/// The next event; waits for ever when nothing is heard.
async fn next_event(events: &mut Option<broadcast::Receiver<Event>>) -> Event {
    while let Some(receiver) = events {
        match receiver.recv().await {
            Ok(event) => return event,
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => {
                *events = None;
                return Event::Ended { by_guest: false };
            }
        }
    }
    std::future::pending().await
}

fn seconds(limit: Duration) -> String {
    format!("{} s", limit.as_secs_f64())
}

struct Watch<'a> {
    hypervisor: &'a dyn Hypervisor,
    id: Uuid,
    /// The end of what was seen of the console: a text may come in two parts.
    text: Vec<u8>,
    position: u64,
    address: Option<std::net::SocketAddr>,
}

impl Watch<'_> {
    async fn sees(&mut self, sign: &Sign) -> bool {
        match sign {
            Sign::Agent => self.hypervisor.ask_guest(self.id, Question::Ping, ASK_LIMIT).await.is_ok(),
            Sign::Console { text } => self.reads(text.as_bytes()).await,
            Sign::Port { port, send } => {
                if self.address.is_none() {
                    self.address = self.hypervisor.reach(self.id, *port).await.ok();
                }
                match self.address {
                    Some(address) => {
                        let answers = answers(address, send.as_bytes());
                        tokio::time::timeout(ASK_LIMIT, answers).await.unwrap_or(false)
                    }
                    None => false,
                }
            }
        }
    }

    async fn reads(&mut self, text: &[u8]) -> bool {
        if let Ok(console) = self.hypervisor.console(self.id, self.position).await {
            self.position = console.end();
            self.text.extend(console.bytes);
        }
        let found = contains(&self.text, text);
        let keep = text.len().saturating_sub(1).min(self.text.len());
        self.text.drain(..self.text.len() - keep);
        found
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    !part.is_empty() && text.windows(part.len()).any(|window| window == part)
}

/// Whether anything comes back. A connection alone shows nothing: a forwarder takes it before the guest is asked.
async fn answers(address: std::net::SocketAddr, send: &[u8]) -> bool {
    let Ok(mut stream) = tokio::net::TcpStream::connect(address).await else { return false };
    if stream.write_all(send).await.is_err() {
        return false;
    }
    matches!(stream.read(&mut [0; 1]).await, Ok(1))
}

/// Console and screen, as far as they can be had: a drill's outcome does not hang on them.
async fn keep_evidence(hypervisor: &dyn Hypervisor, drill: &Drill, report: &mut Report) {
    let id = drill.machine.id;
    if let Err(error) = keep_console(hypervisor, drill, report).await {
        tracing::warn!(machine = %id, %error, "the console of a drill cannot be kept");
    }
    let screen = drill.evidence.join(format!("{id}-screen.png"));
    match hypervisor.screenshot(id, &screen).await {
        Ok(()) => report.screen = Some(screen),
        Err(error) => tracing::info!(machine = %id, %error, "a drill's machine shows no screen"),
    }
}

async fn keep_console(hypervisor: &dyn Hypervisor, drill: &Drill, report: &mut Report) -> Result<(), HypervisorError> {
    let id = drill.machine.id;
    let storage = folder(&drill.evidence)?;
    let mut console = hypervisor.console(id, 0).await?.bytes;
    let surplus = console.len().saturating_sub(EVIDENCE_BYTES_MAX);
    console.drain(..surplus);
    let name = format!("{id}-console.log");
    replace_file(&*storage, &name, &console).map_err(store("the console's log"))?;
    report.console = Some(drill.evidence.join(name));
    Ok(())
}

fn folder(path: &Path) -> Result<std::sync::Arc<dyn tidemark_base::storage::Storage>, HypervisorError> {
    RealStorage::create(path).map_err(store("the folder of evidence"))
}
