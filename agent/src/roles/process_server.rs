//! The process server as a process runs it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use prometheus_client::registry::Unit;
use tidemark_base::DiskId;
use tidemark_base::meter::Meter;
use tidemark_process_server::{Directory, ProcessServer, ProcessServerConfig};
use tidemark_proto::control::{
    Failure, Peer, Problem, Register, Reply, ServerCommand, ServerReport, Severity, Whereabouts,
};
use tidemark_transport::PeerIdentity;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::errors::Errors;
use super::known::Known;
use super::link::{self, Command, Handler, not_mine};
use super::machines::Machines;
use super::metrics::{self, Figures, Sheet};
use super::outbox::Draft;
use super::place::Place;
use super::{RoleError, boot_id, host_name};

impl Directory for Known {
    fn locate(&self) -> Option<Whereabouts> {
        self.get()
    }

    fn announce(&self, whereabouts: Whereabouts) -> Result<(), String> {
        self.take(whereabouts)
    }
}

pub struct RunningProcessServer {
    server: ProcessServer,
    stop: CancellationToken,
    link: JoinHandle<()>,
    machines: Arc<Machines>,
    _place: Place,
}

pub async fn start(place: Place) -> Result<RunningProcessServer, RoleError> {
    let kept = place.kept();
    let server = match open(&place, place.listen, kept.known.clone()).await {
        // Someone else took the port meanwhile: agents are told the new one.
        Err(_) if place.may_move() => open(&place, SocketAddr::new(place.listen.ip(), 0), kept.known.clone()).await?,
        other => other?,
    };
    place.note_process_server(server.address())?;
    let stop = CancellationToken::new();
    let machines = Machines::open(server.clone(), place.state.join("hypervisor"));
    let handler = Arc::new(ServerHandler {
        server: server.clone(),
        machines: machines.clone(),
        peer: peer(&place, server.address())?,
        name: place.name.clone(),
        heard: Mutex::default(),
        errors: Errors::default(),
    });
    if let Some(listen) = place.metrics {
        metrics::serve(listen, handler.clone(), stop.clone()).await?;
    }
    let link = link::run(place.identity.clone(), place.config_server.clone(), handler, kept, stop.clone());
    let link = tokio::spawn(link);
    Ok(RunningProcessServer { server, stop, link, machines, _place: place })
}

async fn open(place: &Place, listen: SocketAddr, directory: Arc<Known>) -> Result<ProcessServer, Failure> {
    let mut config = ProcessServerConfig::new(&place.state, listen, place.identity.clone());
    config.socket = place.run.join("points.sock");
    config.directory = directory;
    ProcessServer::start(config).await
}

/// Where agents reach it: an address that is everywhere is told by the host's name.
fn peer(place: &Place, address: SocketAddr) -> Result<Peer, RoleError> {
    let PeerIdentity::ProcessServer(id) = place.identity.peer() else {
        return Err(RoleError {
            message: format!("{} is no process server", place.identity.peer()),
            help: "give each role an identity of its own".to_owned(),
        });
    };
    let address = match address.ip().is_unspecified() {
        true => format!("{}:{}", host_name(), address.port()),
        false => address.to_string(),
    };
    Ok(Peer::ProcessServer { id, address })
}

impl RunningProcessServer {
    pub async fn stop(self) {
        self.stop.cancel();
        self.machines.stop().await;
        self.server.stop().await;
        let _ = self.link.await;
    }
}

struct ServerHandler {
    server: ProcessServer,
    machines: Arc<Machines>,
    peer: Peer,
    name: String,
    heard: Mutex<Heard>,
    errors: Errors,
}

/// Problems as they were reported last, and what is to be told of their coming and going.
#[derive(Default)]
struct Heard {
    problems: BTreeMap<(DiskId, String), Problem>,
    drafts: Vec<Draft>,
}

impl Heard {
    fn hear(&mut self, report: &ServerReport) {
        let now: BTreeMap<(DiskId, String), Problem> = report
            .disks
            .iter()
            .flat_map(|disk| disk.problems.iter().map(|problem| (told_apart(disk.disk, problem), problem.clone())))
            .collect();
        let draft = |disk, severity, kind: &str, message: String, help: String| Draft {
            time: report.time,
            severity,
            machine: None,
            disk: Some(disk),
            kind: kind.to_owned(),
            message,
            help,
        };
        for ((disk, _), problem) in now.iter().filter(|(key, _)| !self.problems.contains_key(*key)) {
            let severity = if problem.critical { Severity::Critical } else { Severity::Warning };
            self.drafts.push(draft(*disk, severity, "problem", problem.message.clone(), problem.help.clone()));
        }
        for ((disk, _), problem) in self.problems.iter().filter(|(key, _)| !now.contains_key(*key)) {
            let message = format!("no more: {}", problem.message);
            self.drafts.push(draft(*disk, Severity::Info, "problem_ended", message, String::new()));
        }
        self.problems = now;
    }
}

/// Without its figures, which change all the time.
fn told_apart(disk: DiskId, problem: &Problem) -> (DiskId, String) {
    (disk, problem.message.chars().filter(|letter| !letter.is_ascii_digit()).collect())
}

#[tonic::async_trait]
impl Figures for ServerHandler {
    async fn fill(&self, sheet: &mut Sheet) -> Result<(), Failure> {
        let report = self.server.status().await?;
        let name = |machine| self.server.machine_name(machine);
        let now = report.time;
        let none = Vec::new();
        sheet.counter("received", "Received since the process server started", &none, self.server.appended_bytes());
        let of_disk = |disk: DiskId| self.server.machine_of(disk).map(name);
        self.errors.fill(sheet, |_, disk| disk.and_then(of_disk));
        for (disk, reason, count) in self.server.refused_streams() {
            let machine = disk.and_then(of_disk).unwrap_or_default();
            let labels = vec![("machine", machine), ("reason", reason.to_owned())];
            sheet.count("streams_refused", "Replication streams that were refused", &labels, count);
        }
        sheet.gauge("serves", "Points that are served", None, &none, report.serves.len() as f64);
        for of in &report.machines {
            let labels = vec![("machine", name(of.machine))];
            sheet.gauge("recovery_points", "Listed recovery points", None, &labels, of.points as f64);
            if let Some(latest) = &of.latest {
                let age = now.saturating_since(latest.time).as_secs_f64();
                sheet.gauge("recovery_point_age", "Age of the newest one", Some(Unit::Seconds), &labels, age);
            }
        }
        for disk in &report.disks {
            let machine = self.server.machine_of(disk.disk).map(name).unwrap_or_default();
            let labels = vec![("machine", machine), ("disk", disk.disk.to_string())];
            let bytes = Some(Unit::Bytes);
            sheet.gauge("stored", "What the replica takes", bytes, &labels, disk.stored_bytes as f64);
            let consistent = if disk.consistent { 1.0 } else { 0.0 };
            sheet.gauge("consistent", "1 while the replica is consistent", None, &labels, consistent);
            if let Some(time) = disk.durable_time {
                let age = now.saturating_since(time).as_secs_f64();
                sheet.gauge("durable_age", "Since the newest durable cut", Some(Unit::Seconds), &labels, age);
            }
            for (severity, critical) in [("warning", false), ("critical", true)] {
                let count = disk.problems.iter().filter(|problem| problem.critical == critical).count() as f64;
                let labels = labels.iter().cloned().chain([("severity", severity.to_owned())]).collect();
                sheet.gauge("problems", "What is wrong now", None, &labels, count);
            }
        }
        Ok(())
    }

    async fn is_ready(&self) -> Result<(), String> {
        self.server.is_ready().await
    }
}

#[tonic::async_trait]
impl Handler for ServerHandler {
    fn register(&self) -> Register {
        Register {
            peer: self.peer.clone(),
            name: self.name.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            boot: boot_id(),
            instance: None,
            time: None,
        }
    }

    async fn execute(&self, command: Command) -> Result<Reply, Failure> {
        self.execute_metered(command, &Arc::default()).await
    }

    async fn execute_metered(&self, command: Command, meter: &Arc<Meter>) -> Result<Reply, Failure> {
        let Command::Server(command) = command else { return Err(not_mine()) };
        match *command {
            ServerCommand::Hypervisor(call) => self.machines.execute(&call).await,
            command => {
                let reply = self.server.execute_metered(command, meter).await;
                if let Ok(Reply::Server(report)) = &reply {
                    self.heard.lock().expect("no panic while held").hear(report);
                }
                reply
            }
        }
    }

    fn events(&self) -> Vec<Draft> {
        let drafts = std::mem::take(&mut self.heard.lock().expect("no panic while held").drafts);
        self.errors.note(&drafts);
        drafts
    }
}
