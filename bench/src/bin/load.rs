//! One configuration server under a thousand simulated agents with four disks each: real gRPC, real TLS, the product's own
//! control stream at both ends. Only disks and replication are not there.
//!
//! `cargo build --release && cargo run --release -p tidemark-bench --bin load -- [--agents N] [--disks N] [--seconds N] [--json FILE]`
//!
//! In the order of a run: all agents register at once, each with a key of its own; all connect; each machine is protected;
//! then requests of operators are timed while reports come in; then the server is restarted and all come back. The server is
//! a process of its own, whose memory is what is measured. `TIDEMARK_BIN` names the command.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidemark::client::Client;
use tidemark::folder::Folder;
use tidemark::roles::link::{self, Command, Handler, Kept};
use tidemark::roles::place::Place;
use tidemark::roles::register::{Outcome, Registration, register};
use tidemark_base::storage::RealStorage;
use tidemark_base::{Clock, DiskId, SystemClock};
use tidemark_proto::control::*;
use tidemark_transport::{Identity, PeerIdentity, Role};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Registrations and protections under way at once: what an operator's script would do.
const AT_ONCE: usize = 32;
/// Between two requests of an operator.
const ASK_EVERY: Duration = Duration::from_millis(20);
const START_LIMIT: Duration = Duration::from_secs(60);
const ALL_LIMIT: Duration = Duration::from_secs(600);

/// The goals of the issue that asked for this.
const REGISTRATION_SECONDS_MAX: f64 = 60.0;
const RECONNECTION_SECONDS_MAX: f64 = 30.0;
const P99_MS_MAX: f64 = 100.0;
const MEMORY_MIB_MAX: f64 = 512.0;

struct Options {
    agents: usize,
    disks: usize,
    seconds: u64,
    json: Option<PathBuf>,
}

impl Options {
    fn parse() -> Result<Self, Failure> {
        let mut options = Self { agents: 1000, disks: 4, seconds: 60, json: None };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
            match word.as_str() {
                "--agents" => options.agents = value.parse()?,
                "--disks" => options.disks = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--json" => options.json = Some(value.into()),
                _ => return Err(format!("unknown option {word}").into()),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(run()));
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// An agent or a process server that does at once whatever it is told.
struct Simulated {
    register: Register,
    disks: std::sync::Mutex<Vec<DiskId>>,
}

impl Simulated {
    fn new(peer: Peer, name: String) -> Arc<Self> {
        let register =
            Register { peer, name, software: String::new(), boot: String::new(), instance: None, time: None };
        Arc::new(Self { register, disks: std::sync::Mutex::default() })
    }

    fn report(&self) -> AgentReport {
        let disks = self.disks.lock().expect("no panic while held");
        let disk = |disk: &DiskId| SourceDisk {
            disk: *disk,
            server: None,
            state: SourceState::Replicating,
            mode: SourceMode::Data,
            mode_reason: String::new(),
            logged: "0123456789abcdef0123456789abcdef:1234567".to_owned(),
            sent: "0123456789abcdef0123456789abcdef:1234566".to_owned(),
            durable: "0123456789abcdef0123456789abcdef:1234560".to_owned(),
            pending_bytes: 4096,
            written_bytes: 1 << 40,
            sent_bytes: 1 << 39,
            log_bytes: 1 << 20,
            rpo: Duration::from_millis(900),
            scan: None,
            problems: Vec::new(),
            compare: Compared::default(),
            current_bytes: 0,
        };
        AgentReport { time: SystemClock::new().wall_now(), disks: disks.iter().map(disk).collect() }
    }

    fn agent(&self, command: AgentCommand) -> Reply {
        match command {
            AgentCommand::Probe { paths, .. } => {
                let probed = |path| ProbedDisk { path, bytes: 1 << 30, occupied_bytes: None, log: None };
                Reply::Probed(paths.into_iter().map(probed).collect())
            }
            AgentCommand::Protect(spec) => {
                *self.disks.lock().expect("no panic while held") = spec.disks.iter().map(|disk| disk.disk).collect();
                let attached = |disk: &DiskSpec| AttachedDisk {
                    id: disk.disk,
                    nbd: Some(format!("nbd+unix:///{}?socket=/run/agent.sock", disk.export)),
                    nbds: None,
                    file: None,
                    bytes: disk.bytes,
                };
                Reply::Attached(spec.disks.iter().map(attached).collect())
            }
            AgentCommand::Status => Reply::Agent(self.report()),
            _ => Reply::Done,
        }
    }
}

#[tonic::async_trait]
impl Handler for Simulated {
    fn register(&self) -> Register {
        self.register.clone()
    }

    async fn execute(&self, command: Command) -> Result<Reply, tidemark_proto::control::Failure> {
        Ok(match command {
            Command::Agent(command) => self.agent(command),
            Command::Server(command) if *command == ServerCommand::Status => Reply::Server(ServerReport {
                time: SystemClock::new().wall_now(),
                disks: Vec::new(),
                serves: Vec::new(),
                machines: Vec::new(),
                storage_encrypted: None,
                volume: None,
            }),
            Command::Server(_) => Reply::Done,
        })
    }
}

struct Server {
    child: Child,
    dir: PathBuf,
}

impl Server {
    async fn start(dir: &Path) -> Result<Self, Failure> {
        let binary = std::env::var_os("TIDEMARK_BIN").map_or_else(beside_us, PathBuf::from);
        let mut program = Program::new(binary);
        program.args(["config-server", "run", "--dir"]).arg(dir).env("TIDEMARK_LOG", "error").stdin(Stdio::null());
        let server = Self { child: program.spawn()?, dir: dir.to_owned() };
        let began = Instant::now();
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        while began.elapsed() < START_LIMIT {
            ticks.tick().await;
            if let Ok(client) = Client::of_folder(dir)
                && client.get("/health").await.is_ok()
            {
                return Ok(server);
            }
        }
        Err("the configuration server does not answer".into())
    }

    fn client(&self) -> Result<Client, Failure> {
        Ok(Client::of_folder(&self.dir)?)
    }

    /// What it occupies now and did at most since it was asked before, in MiB.
    fn memory(&self) -> Result<(f64, f64), Failure> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / 1024.0)
        };
        let found = (of("VmRSS:").ok_or("no VmRSS")?, of("VmHWM:").ok_or("no VmHWM")?);
        // 5: the peak begins anew.
        std::fs::File::create(format!("/proc/{}/clear_refs", self.child.id()))?.write_all(b"5")?;
        Ok(found)
    }

    fn stop(&mut self) -> Result<(), Failure> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command that was built with this.
fn beside_us() -> PathBuf {
    std::env::current_exe().ok().and_then(|this| Some(this.parent()?.join("tidemark"))).unwrap_or("tidemark".into())
}

async fn run() -> Result<bool, Failure> {
    let options = Options::parse()?;
    // A socket an agent, here and there.
    let files = (options.agents * 4 + 1000) as u64;
    let limit = libc::rlimit { rlim_cur: files, rlim_max: files };
    // SAFETY: reads the structure, and nothing else.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(format!("{files} open files are not allowed here").into());
    }
    let top = tempfile::tempdir()?;
    let dir = top.path().join("site");
    let folder = Folder::create(&dir)?;
    let mut server = Server::start(&dir).await?;
    let stop = CancellationToken::new();

    eprintln!("{} agents register", options.agents);
    let began = Instant::now();
    let identities = register_all(&server, &folder, &options, top.path()).await?;
    let registration = began.elapsed().as_secs_f64();
    let (_, peak_of_registration) = server.memory()?;

    let began = Instant::now();
    let address = addresses(&folder);
    let mut links = JoinSet::new();
    for (number, identity) in identities.into_iter().enumerate() {
        let PeerIdentity::Agent(id) = identity.peer() else { return Err("an agent has another identity".into()) };
        let handler = Simulated::new(Peer::Agent { id }, agent_name(number));
        let kept = Kept::open(RealStorage::open_folder(agent_folder(top.path(), number)));
        links.spawn(link::run(identity, address.clone(), handler, kept, stop.clone()));
    }
    let place = Place::in_folder(&folder, Role::ProcessServer)?;
    if let PeerIdentity::ProcessServer(id) = place.identity.peer() {
        let handler = Simulated::new(Peer::ProcessServer { id, address: "127.0.0.1:1".into() }, "replicas".to_owned());
        links.spawn(link::run(place.identity.clone(), address.clone(), handler, place.kept(), stop.clone()));
    }
    wait_connected(&server, options.agents + 1).await?;
    let connection = began.elapsed().as_secs_f64();
    let (_, peak_of_connection) = server.memory()?;

    eprintln!("{} machines are protected", options.agents);
    let began = Instant::now();
    protect_all(&server, &options).await?;
    let protection = began.elapsed().as_secs_f64();
    let (_, peak_of_protection) = server.memory()?;

    eprintln!("requests are timed for {} s", options.seconds);
    let mut times = ask(&server, &options).await?;
    let (resident, peak_of_load) = server.memory()?;

    eprintln!("the server is restarted");
    server.stop()?;
    let began = Instant::now();
    server = Server::start(&dir).await?;
    wait_connected(&server, options.agents + 1).await?;
    let reconnection = began.elapsed().as_secs_f64();
    let (_, peak_of_reconnection) = server.memory()?;
    stop.cancel();
    links.abort_all();
    server.stop()?;

    times.sort();
    let at = |share: f64| {
        let index = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
    };
    let peaks = [
        ("peak of it while all register, MiB", peak_of_registration),
        ("peak of it while all connect, MiB", peak_of_connection),
        ("peak of it while all are protected, MiB", peak_of_protection),
        ("peak of it under load, MiB", peak_of_load),
        ("peak of it while all come back, MiB", peak_of_reconnection),
    ];
    let memory = peaks.iter().fold(0.0, |highest: f64, (_, peak)| highest.max(*peak));
    let mut rows = vec![
        ("registration of all, s", registration, Some(REGISTRATION_SECONDS_MAX)),
        ("connection of all, s", connection, None),
        ("protection of all, s", protection, None),
        ("API p50, ms", at(0.5), None),
        ("API p99, ms", at(0.99), Some(P99_MS_MAX)),
        ("resident memory under load, MiB", resident, None),
        ("peak of resident memory, MiB", memory, Some(MEMORY_MIB_MAX)),
        ("reconnection of all after a restart, s", reconnection, Some(RECONNECTION_SECONDS_MAX)),
    ];
    rows.extend(peaks.map(|(name, peak)| (name, peak, None)));
    println!("{} agents × {} disks, {} requests\n", options.agents, options.disks, times.len());
    println!("| figure | measured | goal |\n|---|---|---|");
    for (name, value, goal) in &rows {
        let goal = goal.map_or("–".to_owned(), |goal| format!("≤ {goal}"));
        println!("| {name} | {value:.1} | {goal} |");
    }
    if let Some(path) = &options.json {
        let values: serde_json::Map<String, Value> = rows
            .iter()
            .map(|(name, value, goal)| ((*name).to_owned(), json!({ "value": value, "goal": goal })))
            .collect();
        serde_json::to_writer_pretty(std::fs::File::create(path)?, &values)?;
    }
    Ok(rows.iter().all(|(_, value, goal)| goal.is_none_or(|goal| *value <= goal)))
}

fn agent_name(number: usize) -> String {
    format!("host-{number:04}")
}

fn agent_folder(top: &Path, number: usize) -> PathBuf {
    top.join(agent_name(number))
}

fn addresses(folder: &Folder) -> link::Address {
    let folder = folder.clone();
    Arc::new(move || Some(folder.config_server().ok()??.control.to_string()))
}

async fn register_all(
    server: &Server,
    folder: &Folder,
    options: &Options,
    top: &Path,
) -> Result<Vec<Identity>, Failure> {
    let request = json!({ "role": "agent", "lifetime_seconds": 3600, "uses": options.agents });
    let made = server.client()?.post("/passphrases", &request).await?;
    let passphrase = made["passphrase"].as_str().ok_or("no passphrase")?.to_owned();
    let fingerprint = folder.authority()?.fingerprint();
    let api = folder.config_server()?.ok_or("no address")?.api;
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut registering = JoinSet::new();
    for number in 0..options.agents {
        let registration = Registration {
            role: Role::Agent,
            server: format!("https://{api}"),
            passphrase: passphrase.clone(),
            fingerprint: fingerprint.clone(),
            name: agent_name(number),
            dir: agent_folder(top, number),
            wait: true,
        };
        let permits = permits.clone();
        registering.spawn(async move {
            let _permit = permits.acquire().await?;
            let dir = registration.dir.clone();
            match register(registration, |_| {}).await? {
                Outcome::Registered { .. } => {
                    let storage = RealStorage::open_folder(&dir);
                    Ok::<_, Failure>((number, Identity::load(&*storage, tidemark::roles::place::IDENTITY_FILE)?))
                }
                Outcome::Waiting { .. } => Err("an agent waits for approval".into()),
            }
        });
    }
    let mut identities = Vec::new();
    while let Some(registered) = registering.join_next().await {
        identities.push(registered??);
    }
    identities.sort_by_key(|(number, _)| *number);
    Ok(identities.into_iter().map(|(_, identity)| identity).collect())
}

async fn wait_connected(server: &Server, peers: usize) -> Result<(), Failure> {
    let client = server.client()?;
    let began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    while began.elapsed() < ALL_LIMIT {
        ticks.tick().await;
        let known = client.get("/peers").await?;
        let noted = known["hosts"].as_object().map_or(0, |hosts| hosts.len()) + 1;
        if known["connected"].as_array().is_some_and(|connected| connected.len() >= peers) && noted >= peers {
            return Ok(());
        }
    }
    Err(format!("not all of {peers} are connected after {} s", ALL_LIMIT.as_secs()).into())
}

async fn protect_all(server: &Server, options: &Options) -> Result<(), Failure> {
    let (client, permits) = (server.client()?, Arc::new(Semaphore::new(AT_ONCE)));
    let mut protecting = JoinSet::new();
    for number in 0..options.agents {
        let disks: Vec<String> = (0..options.disks).map(|disk| format!("/disks/{disk}.img")).collect();
        let body = json!({ "name": format!("machine-{number:04}"), "host": agent_name(number), "disks": disks });
        let (client, permits) = (client.clone(), permits.clone());
        protecting.spawn(async move {
            let _permit = permits.acquire().await?;
            let job = client.post("/machines", &body).await?;
            client.finish(job, |_| {}).await?;
            Ok::<_, Failure>(())
        });
    }
    while let Some(protected) = protecting.join_next().await {
        protected??;
    }
    Ok(())
}

/// One machine, its events, a policy, jobs: what a console and scripts ask for; each request on a connection of its own.
async fn ask(server: &Server, options: &Options) -> Result<Vec<Duration>, Failure> {
    let client = server.client()?;
    let mut times = Vec::new();
    let mut ticks = tokio::time::interval(ASK_EVERY);
    let (began, length) = (Instant::now(), Duration::from_secs(options.seconds));
    let mut number = 0usize;
    while began.elapsed() < length {
        ticks.tick().await;
        number += 1;
        let machine = number * 7919 % options.agents;
        let path = match number % 4 {
            0 => format!("/machines/machine-{machine:04}"),
            1 => format!("/events?limit=20&machine=machine-{machine:04}"),
            2 => "/policies/continuous".to_owned(),
            _ => "/alerts".to_owned(),
        };
        let asked = Instant::now();
        client.get(&path).await?;
        times.push(asked.elapsed());
    }
    Ok(times)
}
