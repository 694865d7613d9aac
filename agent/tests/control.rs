//! The control plane from end to end, over real TLS: the command line and the REST client on one side, an agent and a
//! process server without disks on the other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemark::client::{Client, ClientError};
use tidemark::folder::Folder;
use tidemark::roles::config_server::{self, RunningConfigServer};
use tidemark::roles::link::{self, Command, Handler};
use tidemark::roles::place::Place;
use tidemark_base::disk::{Access, Disk, FileDisk};
use tidemark_base::{DiskId, MachineId, MarkId, Timestamp};
use tidemark_proto::control::*;
use tidemark_transport::{PeerIdentity, Role};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(20);

/// An agent or a process server that remembers what it was told.
struct Fake {
    register: Register,
    told: Mutex<Vec<String>>,
    machines: Mutex<BTreeMap<MachineId, Vec<DiskSpec>>>,
    points: Mutex<Vec<PointInfo>>,
    serves: Mutex<Vec<Serving>>,
    /// Answers Protect with this.
    refuses: Mutex<Option<Failure>>,
    policy: Mutex<Option<ReplicationPolicy>>,
}

impl Fake {
    fn note(&self, what: &str) {
        self.told.lock().unwrap().push(what.to_owned());
    }

    fn was_told(&self, what: &str) -> usize {
        self.told.lock().unwrap().iter().filter(|told| *told == what).count()
    }

    fn attached(spec: &MachineSpec) -> Vec<AttachedDisk> {
        let address = |disk: &DiskSpec| format!("nbd+unix:///{}?socket=/run/agent.sock", disk.export);
        let attached = |disk: &DiskSpec| AttachedDisk {
            id: disk.disk,
            nbd: Some(address(disk)),
            nbds: None,
            file: None,
            bytes: disk.bytes,
        };
        spec.disks.iter().map(attached).collect()
    }

    fn agent(&self, command: AgentCommand) -> Result<Reply, Failure> {
        match command {
            AgentCommand::Probe { paths } => {
                let probe = |path: &String| match FileDisk::open(Path::new(path), Access::Exclusive) {
                    Ok(disk) => Ok(ProbedDisk { path: path.clone(), bytes: disk.bytes() }),
                    Err(error) => Err(Failure::from_error(FailureKind::Conflict, &error, error.help())),
                };
                paths.iter().map(probe).collect::<Result<_, _>>().map(Reply::Probed)
            }
            AgentCommand::Protect(spec) => {
                self.note("protect");
                if let Some(failure) = self.refuses.lock().unwrap().clone() {
                    return Err(failure);
                }
                *self.policy.lock().unwrap() = Some(spec.policy);
                self.machines.lock().unwrap().insert(spec.machine, spec.disks.clone());
                Ok(Reply::Attached(Self::attached(&spec)))
            }
            AgentCommand::Unprotect(machine) => {
                self.note("unprotect");
                self.machines.lock().unwrap().remove(&machine);
                Ok(Reply::Done)
            }
            AgentCommand::Pause(_) => {
                self.note("pause");
                Ok(Reply::Done)
            }
            AgentCommand::Resume(_) => {
                self.note("resume");
                Ok(Reply::Done)
            }
            AgentCommand::Resync(_) => {
                self.note("resync");
                Ok(Reply::Done)
            }
            AgentCommand::Mark(_) => Ok(Reply::Marked { mark: MarkId::random(), time: Timestamp(1) }),
            AgentCommand::Status => {
                let machines = self.machines.lock().unwrap();
                let disks = machines.values().flatten().map(|disk| source_disk(disk.disk)).collect();
                Ok(Reply::Agent(AgentReport { time: Timestamp(1), disks }))
            }
        }
    }

    fn server(&self, command: ServerCommand) -> Result<Reply, Failure> {
        let find = |selector: Selector| {
            let points = self.points.lock().unwrap();
            let found = match selector {
                Selector::Point(id) => points.iter().find(|point| point.id == id),
                _ => points.last(),
            };
            found
                .cloned()
                .ok_or_else(|| Failure::new(FailureKind::NotFound, format!("no point {selector}"), "make one"))
        };
        match command {
            ServerCommand::Authorise(grant) => {
                self.note("authorise");
                self.machines.lock().unwrap().insert(grant.machine, grant.disks);
                Ok(Reply::Done)
            }
            ServerCommand::Deauthorise { machine, .. } => {
                self.note("deauthorise");
                self.machines.lock().unwrap().remove(&machine);
                Ok(Reply::Done)
            }
            ServerCommand::Retention { .. } => Ok(Reply::Done),
            ServerCommand::Points(_) => Ok(Reply::Points(self.points.lock().unwrap().clone())),
            ServerCommand::Resolve { point, .. } => find(point).map(Reply::Point),
            ServerCommand::Lock { point, locked, .. } => {
                let id = find(point)?.id;
                let mut points = self.points.lock().unwrap();
                let point = points.iter_mut().find(|point| point.id == id).unwrap();
                point.locked = locked;
                Ok(Reply::Point(point.clone()))
            }
            ServerCommand::Verify { point, .. } => {
                let point = find(point)?;
                let defects = if point.label == "rotten" { vec!["block 7 is damaged".to_owned()] } else { vec![] };
                Ok(Reply::Verified(Verified { point: point.id, time: point.time, bytes: 4096, defects }))
            }
            ServerCommand::WaitPoint { mark, .. } => {
                let point = PointInfo {
                    id: mark,
                    time: Timestamp(1_000_000_000),
                    consistency: Consistency::Crash,
                    label: String::new(),
                    locked: false,
                    change_bytes: 7,
                    flags: Vec::new(),
                };
                self.points.lock().unwrap().push(point.clone());
                Ok(Reply::Point(point))
            }
            ServerCommand::Serve { machine, point, writable } => {
                let point = find(point)?;
                let serve = ServeId::random();
                let disks = self.machines.lock().unwrap()[&machine]
                    .iter()
                    .map(|disk| AttachedDisk {
                        id: disk.disk,
                        nbd: Some(format!("nbd+unix:///{serve}?socket=/run/points.sock")),
                        nbds: None,
                        file: None,
                        bytes: disk.bytes,
                    })
                    .collect();
                let serving = Serving { serve, machine, point: point.id, time: point.time, writable, disks };
                self.serves.lock().unwrap().push(serving.clone());
                Ok(Reply::Serving(serving))
            }
            ServerCommand::StopServe(id) => {
                self.serves.lock().unwrap().retain(|serving| serving.serve != id);
                Ok(Reply::Done)
            }
            ServerCommand::Export { machine, to, .. } => {
                let files = self.machines.lock().unwrap()[&machine]
                    .iter()
                    .map(|disk| ExportedFile { id: disk.disk, path: to.clone(), bytes: disk.bytes })
                    .collect();
                Ok(Reply::Exported(Exported { point: MarkId::random(), time: Timestamp(1), files }))
            }
            ServerCommand::Status => Ok(Reply::Server(ServerReport {
                time: Timestamp(1),
                disks: Vec::new(),
                serves: self.serves.lock().unwrap().clone(),
                machines: Vec::new(),
            })),
        }
    }
}

fn source_disk(disk: DiskId) -> SourceDisk {
    SourceDisk {
        disk,
        state: SourceState::Replicating,
        mode: SourceMode::Data,
        mode_reason: String::new(),
        logged: "e:3".into(),
        sent: "e:2".into(),
        durable: "e:1".into(),
        pending_bytes: 10,
        written_bytes: 20,
        sent_bytes: 30,
        log_bytes: 40,
        rpo: Duration::from_millis(250),
        scan: None,
        problems: Vec::new(),
    }
}

#[tonic::async_trait]
impl Handler for Fake {
    fn register(&self) -> Register {
        self.register.clone()
    }

    async fn execute(&self, command: Command) -> Result<Reply, Failure> {
        match command {
            Command::Agent(command) => self.agent(command),
            Command::Server(command) => self.server(command),
        }
    }
}

/// A role that dials, until it is dropped.
struct Dialling {
    fake: Arc<Fake>,
    stop: CancellationToken,
    _place: Place,
}

impl Dialling {
    fn start(folder: &Folder, role: Role) -> Self {
        let place = Place::in_folder(folder, role).unwrap();
        let peer = match place.identity.peer() {
            PeerIdentity::Agent(id) => Peer::Agent { id },
            PeerIdentity::ProcessServer(id) => Peer::ProcessServer { id, address: "127.0.0.1:1".into() },
            PeerIdentity::ConfigServer(_) => unreachable!(),
        };
        let name = format!("fake-{role}");
        let fake = Arc::new(Fake {
            register: Register { peer, name, software: "test".into(), boot: String::new() },
            told: Mutex::default(),
            machines: Mutex::default(),
            points: Mutex::default(),
            serves: Mutex::default(),
            refuses: Mutex::default(),
            policy: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let handler: Arc<dyn Handler> = fake.clone();
        tokio::spawn(link_until(place.identity.clone(), place.config_server.clone(), handler, stop.clone()));
        Self { fake, stop, _place: place }
    }
}

/// Dials until `stop`, and then hangs up at once, as a killed process does.
async fn link_until(
    identity: tidemark_transport::Identity,
    address: link::Address,
    handler: Arc<dyn Handler>,
    stop: CancellationToken,
) {
    tokio::select! {
        () = link::run(identity, address, handler, CancellationToken::new()) => {}
        () = stop.cancelled() => {}
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Site {
    top: TempDir,
    folder: Folder,
    config_server: Option<RunningConfigServer>,
    agent: Option<Dialling>,
    server: Option<Dialling>,
}

impl Site {
    async fn start() -> Self {
        let top = tempfile::tempdir().unwrap();
        let folder = Folder::create(&top.path().join("site")).unwrap();
        // The order of start does not matter: those who dial come first.
        let agent = Some(Dialling::start(&folder, Role::Agent));
        let server = Some(Dialling::start(&folder, Role::ProcessServer));
        let mut site = Self { top, folder, config_server: None, agent, server };
        site.start_config_server().await;
        site.settled(2).await;
        site
    }

    async fn start_config_server(&mut self) {
        self.config_server = Some(config_server::start(&self.folder, None, None).await.unwrap());
    }

    async fn stop_config_server(&mut self) {
        self.config_server.take().unwrap().server.stop().await;
    }

    async fn settled(&self, peers: usize) {
        let server = &self.config_server.as_ref().unwrap().server;
        tokio::time::timeout(SOON, server.wait_settled(peers)).await.expect("the peers connect");
    }

    fn client(&self) -> Client {
        Client::of_folder(self.folder.path()).unwrap()
    }

    fn agent(&self) -> &Fake {
        &self.agent.as_ref().unwrap().fake
    }

    fn server(&self) -> &Fake {
        &self.server.as_ref().unwrap().fake
    }

    fn disk(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.top.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    async fn job(&self, path: &str, body: Value) -> Result<Value, ClientError> {
        let client = self.client();
        let job = client.post(path, &body).await?;
        client.finish(job, |_| {}).await
    }

    async fn protect(&self, name: &str, disks: &[&Path]) -> Result<Value, ClientError> {
        self.job("/machines", json!({ "name": name, "disks": disks })).await
    }

    /// The command itself.
    async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidemark"));
        command.args(arguments).env("TIDEMARK_DIR", self.folder.path()).stdin(std::process::Stdio::null());
        tokio::time::timeout(SOON, command.output()).await.expect("the command ends").unwrap()
    }

    /// Exit 1 with an error that holds `part`, and help.
    async fn refused(&self, arguments: &[&str], part: &str) {
        let output = self.run(arguments).await;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        let error = stderr.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or_else(|| panic!("{stderr}"));
        assert!(error.contains(part) && error.len() < 400, "{error}");
        assert!(stderr.lines().any(|line| line.starts_with("help: ")), "{stderr}");
        assert!(output.stdout.is_empty(), "errors do not go to stdout");
    }
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let waiting = async {
        while !is() {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("{what} did not happen"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_protected_marked_served_and_let_go() {
    let site = Site::start().await;
    let (first, second) = (site.disk("a.img", 1 << 20), site.disk("b.img", 2 << 20));
    let protected = site.protect("web", &[&first, &second]).await.unwrap();
    assert_eq!(protected["machine"], "web");
    assert_eq!(protected["disks"][1]["path"], json!(second));
    assert_eq!(protected["disks"][1]["attach"]["nbd"], "nbd+unix:///web-1?socket=/run/agent.sock");
    assert_eq!(site.protect("web", &[&first, &second]).await.unwrap(), protected, "the same again answers the same");

    let client = site.client();
    let status = client.get("/machines/web").await.unwrap();
    assert_eq!(
        (&status["state"], &status["health"], &status["mode"]),
        (&json!("protected"), &json!("ok"), &json!("data"))
    );
    assert_eq!((&status["rpo_seconds"], &status["pending_bytes"]), (&json!(0.25), &json!(20)));
    assert_eq!(status["disks"][0]["positions"]["logged"], "e:3");
    assert_eq!(client.get("/machines").await.unwrap().as_array().unwrap().len(), 1);

    let point = site.job("/machines/web/points", json!({ "label": "x" })).await.unwrap();
    assert_eq!(point["consistency"], "crash");
    assert_eq!(client.get("/machines/web/points").await.unwrap()[0], point);
    let id = point["id"].as_str().unwrap();
    let lock = format!("/machines/web/points/{id}/lock");
    assert_eq!(client.request(hyper::Method::PUT, &lock, None).await.unwrap()["locked"], true);
    assert_eq!(client.request(hyper::Method::DELETE, &lock, None).await.unwrap()["locked"], false);

    let serving = client.post("/machines/web/points/latest/serve", &json!({ "writable": true })).await.unwrap();
    assert_eq!(serving["disks"].as_array().unwrap().len(), 2);
    let serve = serving["serve"].as_str().unwrap();
    client.post(&format!("/serves/{serve}/renew"), &json!({})).await.unwrap();
    client.request(hyper::Method::DELETE, &format!("/serves/{serve}"), None).await.unwrap();
    assert!(site.server().serves.lock().unwrap().is_empty());

    for verb in ["pause", "resume", "resync"] {
        site.job(&format!("/machines/web/{verb}"), json!({})).await.unwrap();
        assert_eq!(site.agent().was_told(verb), 1);
    }
    let job = client.request(hyper::Method::DELETE, "/machines/web", None).await.unwrap();
    client.finish(job, |_| {}).await.unwrap();
    assert_eq!((site.agent().was_told("unprotect"), site.server().was_told("deauthorise")), (1, 1));
    assert_eq!(client.get("/machines").await.unwrap(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_answered_without_the_token() {
    let site = Site::start().await;
    let wrong = site.top.path().join("wrong-token");
    std::fs::copy(site.folder.ca_file(), &wrong).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(&wrong)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"guess"))
        .unwrap();
    let api = site.folder.config_server().unwrap().unwrap().api;
    let client = Client::new(&format!("https://{api}/api/v1"), &wrong, &site.folder.ca_file()).unwrap();
    for path in ["/machines", "/health", "/jobs", "/nonesuch"] {
        match client.get(path).await {
            Err(ClientError::Refused { status: 401, message, help }) => {
                assert!(message.contains("token") && !help.is_empty());
            }
            other => panic!("{path}: {other:?}"),
        }
    }
    // Another authority's server is not talked to.
    let other = Site::start().await;
    let client = Client::new(&format!("https://{api}"), &site.folder.token_file(), &other.folder.ca_file()).unwrap();
    assert!(matches!(client.get("/health").await, Err(ClientError::Unreachable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_an_error_that_names_it_and_help() {
    let site = Site::start().await;
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let good = text(&site.disk("good.img", 1 << 20));
    let odd = text(&site.disk("odd.img", 1000));
    let used = text(&site.disk("used.img", 1 << 20));
    let _holder = FileDisk::open(Path::new(&used), Access::Exclusive).unwrap();
    let absent = text(&site.top.path().join("absent.img"));
    site.refused(&["protect", "web", "--disk", &absent], "absent.img").await;
    site.refused(&["protect", "web", "--disk", &odd], "1000 bytes").await;
    site.refused(&["protect", "web", "--disk", &used], "in use").await;
    site.refused(&["protect", "web", "--disk", &good, &good], "twice").await;
    site.refused(&["protect", "a/b", "--disk", &good], "a/b").await;
    site.refused(&["protect", "", "--disk", &good], "no name").await;
    site.refused(&["protect", &"x".repeat(10_000), "--disk", &good], "10000 bytes").await;
    site.refused(&["protect", "web", "--disk", &good, "--policy", "none"], "none").await;
    site.refused(&["protect", "web", "--disk", &good, "--host", "elsewhere"], "elsewhere").await;
    assert_eq!(site.client().get("/machines").await.unwrap(), json!([]), "nothing of a refused machine stays");

    for verb in [&["status", "ghost"][..], &["point", "list", "ghost"], &["unprotect", "ghost"], &["status", "../x"]] {
        site.refused(verb, verb.last().unwrap()).await;
    }
    site.protect("web", &[Path::new(&good)]).await.unwrap();
    site.refused(&["protect", "other", "--disk", &good], "web").await;
    site.refused(&["protect", "web", "--disk", &text(&site.disk("c.img", 512))], "other disks").await;
    site.refused(&["point", "verify", "web", "yesterday"], "yesterday").await;
    site.refused(&["point", "create", "web", "--label", &"l".repeat(300)], "label").await;
    site.refused(&["policy", "create", "p", "--frequency", "7s"], "7s").await;
    site.refused(&["policy", "delete", "continuous"], "default").await;
    site.refused(&["job", "show", "1"], "job").await;

    for usage in [&["nonesuch"][..], &["protect", "web"], &["point", "create"], &["status", "--nonesuch"], &[]] {
        let output = site.run(usage).await;
        assert_eq!(output.status.code(), Some(2), "{usage:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_prints_one_document() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    let json_of = async |arguments: &[&str]| -> Value {
        let output = site.run(&[arguments, &["--json"]].concat()).await;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
    };
    let protected = json_of(&["protect", "web", "--disk", disk.to_str().unwrap()]).await;
    assert_eq!(protected["disks"][0]["path"], json!(disk));
    assert_eq!(json_of(&["status", "web"]).await["name"], "web");
    assert_eq!(json_of(&["status"]).await.as_array().unwrap().len(), 1);
    let point = json_of(&["point", "create", "web"]).await;
    assert_eq!(json_of(&["point", "list", "web"]).await, json!([point]));
    let exported = json_of(&["point", "export", "web", "latest", "--to", "image.raw"]).await;
    assert!(exported["files"][0]["path"].as_str().unwrap().starts_with('/'), "paths are made absolute: {exported}");
    assert_eq!(json_of(&["point", "verify", "web"]).await["defects"], json!([]));
    assert_eq!(json_of(&["policy", "show", "continuous"]).await["frequency"], "continuous");
    assert_eq!(json_of(&["job", "list"]).await[0]["state"], "succeeded");
    let started = json_of(&["pause", "web", "--no-wait"]).await;
    assert_eq!(json_of(&["job", "watch", started["job"].as_str().unwrap()]).await["state"], "succeeded");

    site.refused(&["point", "create", "web"], "paused").await;

    // A damaged point: the document says so, and the exit code too.
    site.server().points.lock().unwrap()[0].label = "rotten".into();
    let output = site.run(&["point", "verify", "web", "--json"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["defects"][0], "block 7 is damaged");
    // Tables are for people.
    let output = site.run(&["status"]).await;
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("MACHINE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wanted_survives_a_restart_and_is_told_again() {
    let mut site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    let protected = site.protect("web", &[&disk]).await.unwrap();
    let before = site.folder.config_server().unwrap().unwrap();
    let told = (site.agent().was_told("protect"), site.server().was_told("authorise"));
    site.stop_config_server().await;
    assert!(matches!(site.client().get("/machines").await, Err(ClientError::Unreachable { .. })));
    site.start_config_server().await;
    site.settled(2).await;
    assert_eq!(site.folder.config_server().unwrap().unwrap(), before, "the addresses stay");
    assert_eq!((site.agent().was_told("protect"), site.server().was_told("authorise")), (told.0 + 1, told.1 + 1));
    assert_eq!(site.protect("web", &[&disk]).await.unwrap(), protected);
    let jobs = site.client().get("/jobs").await.unwrap();
    assert_eq!(jobs.as_array().unwrap().len(), 2, "the history of jobs stays: {jobs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_away_is_named_and_told_when_it_is_back() {
    let mut site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    site.agent = None;
    let client = site.client();
    let deadline = tokio::time::Instant::now() + SOON;
    let status = loop {
        let status = client.get("/machines/web").await.unwrap();
        if status["host"]["connected"] == false {
            break status;
        }
        assert!(tokio::time::Instant::now() < deadline, "{status}");
    };
    assert_eq!((&status["health"], &status["state"]), (&json!("warning"), &json!("unknown")));
    assert_eq!(status["rpo_seconds"], Value::Null, "nobody says how old the oldest write is");
    site.refused(&["point", "create", "web"], "fake-agent is not connected since").await;

    // Unprotecting waits for it; its other half is done.
    site.refused(&["unprotect", "web"], "is not connected").await;
    assert_eq!(site.server().was_told("deauthorise"), 1);
    assert_eq!(client.get("/machines/web").await.unwrap()["state"], "unprotecting");
    site.agent = Some(Dialling::start(&site.folder, Role::Agent));
    site.settled(2).await;
    until("unprotecting", || site.agent().was_told("unprotect") == 1).await;
    assert!(matches!(client.get("/machines/web").await, Err(ClientError::Refused { status: 404, .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protect_that_fails_leaves_nothing() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    *site.agent().refuses.lock().unwrap() =
        Some(Failure::new(FailureKind::Conflict, "the log folder is full", "free it"));
    match site.protect("web", &[&disk]).await {
        Err(ClientError::Refused { message, help, .. }) => {
            assert_eq!((message.as_str(), help.as_str()), ("the log folder is full", "free it"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(site.client().get("/machines").await.unwrap(), json!([]));
    assert_eq!((site.agent().was_told("unprotect"), site.server().was_told("deauthorise")), (1, 1));
    *site.agent().refuses.lock().unwrap() = None;
    site.protect("web", &[&disk]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_policy_reaches_those_that_it_concerns() {
    let site = Site::start().await;
    let client = site.client();
    let created =
        client.post("/policies", &json!({ "name": "slow", "frequency": "5m", "compression": 0 })).await.unwrap();
    assert_eq!((&created["frequency"], &created["any_time_seconds"]), (&json!("5m"), &json!(7200)));
    let disk = site.disk("a.img", 1 << 20);
    site.job("/machines", json!({ "name": "web", "disks": [disk], "policy": "slow" })).await.unwrap();
    let policy = site.agent().policy.lock().unwrap().unwrap();
    assert_eq!((policy.cycle, policy.compression), (Some(Duration::from_secs(300)), None));
    let change = json!({ "frequency": "continuous", "point_interval_seconds": 60 });
    client.request(hyper::Method::PATCH, "/policies/slow", Some(&change)).await.unwrap();
    let policy = site.agent().policy.lock().unwrap().unwrap();
    assert_eq!((policy.cycle, policy.point_interval), (None, Some(Duration::from_secs(60))));
    assert!(matches!(
        client.request(hyper::Method::DELETE, "/policies/slow", None).await,
        Err(ClientError::Refused { status: 409, .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serve_that_is_stopped_leaves_nothing() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    site.job("/machines/web/points", json!({})).await.unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidemark"));
    command
        .args(["point", "serve", "web", "latest", "--json"])
        .env("TIDEMARK_DIR", site.folder.path())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
    let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
    let serving: Value = serde_json::from_str(&line).unwrap();
    assert!(serving["disks"][0]["nbd"].as_str().unwrap().starts_with("nbd+unix:"));
    assert_eq!(site.server().serves.lock().unwrap().len(), 1);
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = tokio::time::timeout(SOON, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    assert!(site.server().serves.lock().unwrap().is_empty());
}
