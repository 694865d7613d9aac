//! The agent as a process runs it.

use std::path::Path;
use std::sync::{Arc, Mutex};

use prometheus_client::registry::Unit;
use tidemark_base::storage::{RealStorage, Storage, read_file, replace_file};
use tidemark_base::{HostId, ServerId};
use tidemark_host::events::Subscriber;
use tidemark_host::{Host, HostConfig, HostError, MasterTargets, master_target};
use tidemark_proto::control::{
    AgentCommand, DenyList, Failure, FailureKind, Peer, ProbedDisk, Register, Reply, Severity, SourceDisk, SourceState,
    Via,
};
use tidemark_transport::{Identity, PeerIdentity};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::errors::Errors;
use super::link::{self, Command, Handler, not_mine};
use super::metrics::{self, Figures, Sheet};
use super::outbox::Draft;
use super::place::Place;
use super::system::{self, Owners};
use super::{RoleError, boot_id};

/// A folder for each machine, with what makes its applications quiet.
const FREEZE_FOLDER: &str = "freeze.d";
/// A folder for each machine, with who runs it.
const OWNER_FOLDER: &str = "owner.d";
/// A folder for each machine on its way home.
const TARGET_FOLDER: &str = "master-target";

pub struct RunningAgent {
    host: Arc<Host>,
    targets: Arc<MasterTargets>,
    stop: CancellationToken,
    link: JoinHandle<()>,
    _place: Place,
}

pub async fn start(place: Place) -> Result<RunningAgent, RoleError> {
    let PeerIdentity::Agent(id) = place.identity.peer() else {
        return Err(RoleError {
            message: format!("{} is no agent", place.identity.peer()),
            help: "give each role an identity of its own".to_owned(),
        });
    };
    let runtime = tokio::runtime::Handle::current();
    let (state, run, identity) = (place.state.clone(), place.run.clone(), place.identity.clone());
    let memory = system::memory_folder(&state);
    let host = blocking(move || {
        let mut config = HostConfig::new(state.clone(), run, None, identity, runtime)?;
        config.freezer = system::applications(state.join(FREEZE_FOLDER));
        config.memory_folder = memory;
        Host::start(config)
    })
    .await
    .map_err(RoleError::from)?;
    let host = Arc::new(host);
    let (folder, home) = (place.state.join(TARGET_FOLDER), host.clone());
    let source = master_target::grpc(place.identity.clone(), tokio::runtime::Handle::current());
    let targets = blocking(move || {
        let opened = RealStorage::create(folder).and_then(|storage| MasterTargets::open(home, storage, source));
        opened.map_err(|source| HostError::Io { what: "read which machines are on their way home", source })
    });
    let targets = targets.await.map_err(RoleError::from)?;
    let stop = CancellationToken::new();
    // Events of before this process began are in the outbox or lost.
    let heard = Mutex::new(host.events().subscribe(0));
    let denied = Denied::open(place.identity.clone(), place.storage());
    let owners = Owners::new(place.state.join(OWNER_FOLDER));
    let handler = Arc::new(AgentHandler {
        id,
        name: place.name.clone(),
        host: host.clone(),
        targets: targets.clone(),
        owners,
        heard,
        errors: Errors::default(),
        denied,
        #[cfg(unix)]
        unseen: Mutex::default(),
    });
    if let Some(listen) = place.metrics {
        metrics::serve(listen, handler.clone(), stop.clone()).await?;
    }
    let link = link::run(place.identity.clone(), place.config_server.clone(), handler, place.kept(), stop.clone());
    let link = tokio::spawn(link);
    Ok(RunningAgent { host, targets, stop, link, _place: place })
}

impl RunningAgent {
    pub async fn stop(self) {
        self.stop.cancel();
        let _ = self.link.await;
        let (host, targets) = (self.host, self.targets);
        let stopping = tokio::task::spawn_blocking(move || {
            targets.stop();
            host.stop();
        });
        if let Err(error) = stopping.await {
            tracing::error!(%error, "the agent did not stop cleanly");
        }
    }
}

struct AgentHandler {
    id: HostId,
    name: String,
    host: Arc<Host>,
    targets: Arc<MasterTargets>,
    owners: Owners,
    heard: Mutex<Subscriber>,
    errors: Errors,
    denied: Arc<Denied>,
    /// Why the last look at the host's disks failed.
    #[cfg(unix)]
    unseen: Mutex<Option<String>>,
}

/// Process servers that are not dialled; kept, so that a restart without the configuration server forgets none.
struct Denied {
    identity: Identity,
    storage: Arc<dyn Storage>,
}

const DENIED_FILE: &str = "denied.json";
const DENIED_BYTES_MAX: u64 = 64 << 20;

impl Denied {
    fn open(identity: Identity, storage: Arc<dyn Storage>) -> Arc<Self> {
        let denied = Self { identity, storage };
        match read_file(&*denied.storage, DENIED_FILE, DENIED_BYTES_MAX) {
            Ok(content) => match serde_json::from_slice(&content) {
                Ok(list) => denied.apply(&list),
                Err(error) => tracing::warn!(%error, "who is denied cannot be read; it is told on connecting"),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, "who is denied cannot be read; it is told on connecting"),
        }
        Arc::new(denied)
    }

    fn apply(&self, list: &DenyList) {
        self.identity.refuse(list.identities.iter().cloned(), list.certificates.iter().copied());
    }

    /// Blocks.
    fn set(&self, list: &DenyList) -> Result<(), HostError> {
        self.apply(list);
        let content = serde_json::to_vec(list).unwrap_or_default();
        let kept = replace_file(&*self.storage, DENIED_FILE, &content);
        // It counts from now on; only a restart would forget it until it connects.
        kept.unwrap_or_else(|error| tracing::warn!(%error, "who is denied cannot be kept"));
        Ok(())
    }
}

#[tonic::async_trait]
impl Handler for AgentHandler {
    fn register(&self) -> Register {
        Register {
            peer: Peer::Agent { id: self.id },
            name: self.name.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            boot: boot_id(),
            instance: None,
            time: None,
        }
    }

    async fn execute(&self, command: Command) -> Result<Reply, Failure> {
        let Command::Agent(command) = command else { return Err(not_mine()) };
        if let AgentCommand::Deny(list) = command {
            let denied = self.denied.clone();
            return blocking(move || denied.set(&list).map(|()| Reply::Done)).await;
        }
        if let AgentCommand::MasterTarget(call) = command {
            let targets = self.targets.clone();
            let answer = tokio::task::spawn_blocking(move || targets.execute(&call)).await;
            return answer.unwrap_or_else(|error| Err(abrupt(&error))).map(Reply::MasterTarget);
        }
        if let AgentCommand::Owner(call) = command {
            return self.owners.execute(&call).await.map(Reply::Owner);
        }
        let host = self.host.clone();
        blocking(move || execute(&host, command)).await
    }

    fn neighbours(&self) -> Vec<(ServerId, String)> {
        let machines = self.host.status().into_iter().filter_map(|status| self.host.machine(status.machine).ok());
        let endpoints = machines.flat_map(|machine| machine.spec().servers().cloned().collect::<Vec<_>>());
        let mut servers: Vec<(ServerId, String)> = endpoints.map(|of| (of.server, of.address)).collect();
        servers.sort();
        servers.dedup();
        servers
    }

    #[cfg(unix)]
    fn inventory(&self) -> Option<tidemark_proto::control::Inventory> {
        let found = self.host.inventory();
        let failure = found.as_ref().err().map(ToString::to_string);
        let mut unseen = self.unseen.lock().expect("no panic while held");
        // Looks are many: what stays the same is said once.
        if *unseen != failure {
            if let Some(error) = &failure {
                tracing::warn!(error, "it is not known which disks this host has");
            }
            *unseen = failure;
        }
        found.ok()
    }

    fn events(&self) -> Vec<Draft> {
        let heard = self.heard.lock().expect("no panic while held").take();
        let drafts: Vec<Draft> = heard.into_iter().map(draft).collect();
        self.errors.note(&drafts);
        drafts
    }
}

#[tonic::async_trait]
impl Figures for AgentHandler {
    async fn fill(&self, sheet: &mut Sheet) -> Result<(), Failure> {
        let host = self.host.clone();
        let machines = blocking(move || Ok(host.status())).await?;
        sheet.gauge("machines", "Machines that are protected here", None, &Vec::new(), machines.len() as f64);
        self.errors.fill(sheet, |id, _| machines.iter().find(|of| Some(of.machine) == id).map(|of| of.name.clone()));
        for machine in machines {
            let labels = vec![("machine", machine.name.clone())];
            let seconds = machine.disks.iter().map(|disk| disk.rpo.as_secs_f64()).fold(0.0, f64::max);
            sheet.gauge("rpo", "Age of the oldest write that is not durable", Some(Unit::Seconds), &labels, seconds);
            let sum = |of: fn(&SourceDisk) -> u64| machine.disks.iter().map(of).sum::<u64>();
            // A disk that feeds several process servers is there once for each; it is written, and logged, once.
            let first = machine.disks.first().and_then(|disk| disk.server);
            let once = |of: fn(&SourceDisk) -> u64| {
                machine.disks.iter().filter(|disk| disk.server.is_none() || disk.server == first).map(of).sum::<u64>()
            };
            let bytes = Some(Unit::Bytes);
            let pending = sum(|disk| disk.pending_bytes) as f64;
            sheet.gauge("pending", "Written and not durable yet", bytes.clone(), &labels, pending);
            sheet.gauge("log", "What the logs take", bytes, &labels, once(|disk| disk.log_bytes) as f64);
            let errors = machine.disks.iter().flat_map(|disk| &disk.problems);
            for (name, critical) in [("warning", false), ("critical", true)] {
                let count = errors.clone().filter(|problem| problem.critical == critical).count() as f64;
                let labels = vec![("machine", machine.name.clone()), ("severity", name.to_owned())];
                sheet.gauge("problems", "What is wrong now", None, &labels, count);
            }
            for disk in &machine.disks {
                let mode = serde_json::to_value(disk.mode).ok().and_then(|mode| Some(mode.as_str()?.to_owned()));
                let labels = [("machine", machine.name.clone()), ("disk", disk.disk.to_string())];
                let server = disk.server.map(|server| ("process_server", server.to_string()));
                let labels = labels.into_iter().chain(server).chain([("mode", mode.unwrap_or_default())]).collect();
                sheet.gauge("mode", "1 for the mode of a disk", None, &labels, 1.0);
            }
            sheet.counter("written", "Written since the agent started", &labels, once(|disk| disk.written_bytes));
            sheet.counter("sent", "Sent since the agent started", &labels, sum(|disk| disk.sent_bytes));
        }
        Ok(())
    }

    async fn is_ready(&self) -> Result<(), String> {
        let host = self.host.clone();
        let machines = blocking(move || Ok(host.status())).await.map_err(|failure| failure.message)?;
        let failed = machines.into_iter().flat_map(|machine| machine.disks).find_map(|disk| {
            (disk.state == SourceState::Failed).then(|| disk.problems.first().map(|problem| problem.message.clone()))
        });
        failed.map_or(Ok(()), |reason| Err(reason.unwrap_or_else(|| "a disk cannot be attached".to_owned())))
    }
}

fn draft(event: tidemark_host::events::Event) -> Draft {
    use tidemark_host::events::Severity as Host;
    Draft {
        time: event.time,
        severity: match event.severity {
            Host::Information => Severity::Info,
            Host::Warning => Severity::Warning,
            Host::Critical => Severity::Critical,
        },
        machine: event.machine,
        disk: event.disk,
        kind: event.kind.name().to_owned(),
        message: event.message,
        help: event.help,
    }
}

fn execute(host: &Host, command: AgentCommand) -> Result<Reply, HostError> {
    match command {
        AgentCommand::Probe { paths, via } => probe(host, &paths, via).map(Reply::Probed),
        AgentCommand::Protect(spec) => host.protect(*spec).map(Reply::Attached),
        AgentCommand::Unprotect(machine) => host.unprotect(machine).map(|()| Reply::Done),
        AgentCommand::Pause(machine) => host.pause(machine).map(|()| Reply::Done),
        AgentCommand::Resume(machine) => host.resume(machine).map(|()| Reply::Done),
        AgentCommand::Resync(machine) => host.resync(machine).map(|()| Reply::Done),
        AgentCommand::CancelResync(machine) => host.cancel_resync(machine).map(|()| Reply::Done),
        AgentCommand::Mark(request) => {
            host.mark(&request).map(|outcome| Reply::Marked { mark: outcome.id, time: outcome.time })
        }
        AgentCommand::Status => Ok(Reply::Agent(host.report())),
        AgentCommand::HoldGroup(request) => host.hold_group(&request).map(|()| Reply::Done),
        AgentCommand::ReleaseGroup { round, verdict } => host.release_group(round, verdict).map(Reply::GroupReleased),
        // Taken before: they are not the host's.
        AgentCommand::Deny(_) | AgentCommand::MasterTarget(_) | AgentCommand::Owner(_) => Ok(Reply::Done),
    }
}

/// A disk that is attached here is locked by ourselves: what is known of it answers, by the path that it is known by.
fn probe(host: &Host, paths: &[String], via: Via) -> Result<Vec<ProbedDisk>, HostError> {
    let attached: Vec<_> = host
        .status()
        .into_iter()
        .filter_map(|status| host.machine(status.machine).ok())
        .flat_map(|machine| machine.disks().collect::<Vec<_>>())
        .collect();
    paths
        .iter()
        .map(|path| match attached.iter().find(|disk| is_same(disk.path(), path.as_ref())) {
            Some(disk) => {
                let bytes =
                    disk.disk_bytes_now().map_err(|source| HostError::Io { what: "examine the disk", source })?;
                Ok(ProbedDisk { path: disk.path().display().to_string(), bytes, occupied_bytes: None, log: None })
            }
            None => host.probe(std::slice::from_ref(path), via).map(|mut disks| disks.remove(0)),
        })
        .collect()
}

/// Also by another link to it. What is no file here has one name.
fn is_same(known: &Path, named: &Path) -> bool {
    known == named || known.canonicalize().is_ok_and(|known| named.canonicalize().is_ok_and(|named| known == named))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(|error| Failure::from(&error)),
        Err(error) => Err(abrupt(&error)),
    }
}

fn abrupt(error: &tokio::task::JoinError) -> Failure {
    Failure::new(FailureKind::Failed, format!("the agent could not finish: {error}"), "see the agent's log")
}
