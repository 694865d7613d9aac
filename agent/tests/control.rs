//! The control plane from end to end, over real TLS: the command line and the REST client on one side, an agent and a
//! process server without disks on the other.

#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemark::client::{Client, ClientError};
use tidemark::folder::Folder;
use tidemark::roles::config_server::{self, RunningConfigServer, Settings};
use tidemark::roles::link::{self, Command, Handler};
use tidemark::roles::outbox::Draft;
use tidemark::roles::place::Place;
use tidemark_base::disk::{Access, Disk, FileDisk};
use tidemark_base::meter::Meter;
use tidemark_base::{DiskId, MachineId, MarkId, Timestamp};
use tidemark_proto::control::*;
use tidemark_transport::{PeerIdentity, Role};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(60);

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
    denied: Mutex<DenyList>,
    storage_encrypted: Mutex<Option<bool>>,
    volume: Mutex<Volume>,
    log_room: Mutex<Option<LogRoom>>,
    retention: Mutex<Option<Retention>>,
    /// What happened since it was asked last.
    news: Mutex<Vec<Draft>>,
    log_bytes: Mutex<u64>,
    /// What an agent says of each of its disks.
    problems: Mutex<Vec<Problem>>,
    /// How new what a process server has of each disk is.
    durable: Mutex<Option<Timestamp>>,
    /// The last backup of the configuration that came.
    backup: Mutex<Vec<u8>>,
    /// Answers what is asked of whoever runs machines there.
    hypervisor: Mutex<Option<Box<dyn Fn(&str) -> String + Send>>>,
    /// What disks its host has.
    inventory: Mutex<Option<Inventory>>,
    /// An export stops in the middle until this is told to go on.
    halfway: Mutex<Option<Arc<tokio::sync::Notify>>>,
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
            AgentCommand::Probe { paths, .. } => {
                let probe = |path: &String| match FileDisk::open(Path::new(path), Access::Exclusive) {
                    Ok(disk) => Ok(ProbedDisk {
                        path: path.clone(),
                        bytes: disk.bytes(),
                        occupied_bytes: None,
                        log: self.log_room.lock().unwrap().clone(),
                    }),
                    Err(error) => Err(Failure::from_error(FailureKind::Conflict, &error, error.help())),
                };
                paths.iter().map(probe).collect::<Result<_, _>>().map(Reply::Probed)
            }
            AgentCommand::Protect(spec) => {
                self.note("protect");
                if let Some(failure) = self.refuses.lock().unwrap().clone() {
                    return Err(failure);
                }
                *self.policy.lock().unwrap() = Some(spec.policy.clone());
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
            AgentCommand::CancelResync(_) => {
                self.note("cancel_resync");
                Ok(Reply::Done)
            }
            AgentCommand::HoldGroup(_) => Ok(Reply::Done),
            AgentCommand::ReleaseGroup { .. } => Ok(Reply::GroupReleased(GroupReleased {
                in_time: true,
                held: Duration::from_millis(1),
                machines: Vec::new(),
            })),
            AgentCommand::Mark(_) => Ok(Reply::Marked { mark: MarkId::random(), time: Timestamp(1) }),
            AgentCommand::MasterTarget(_) => Ok(Reply::MasterTarget("{}".into())),
            AgentCommand::Owner(_) => Ok(Reply::Owner("{}".into())),
            AgentCommand::Deny(list) => {
                *self.denied.lock().unwrap() = list;
                Ok(Reply::Done)
            }
            AgentCommand::Status => {
                let machines = self.machines.lock().unwrap();
                let disks = machines.values().flatten().map(|disk| SourceDisk {
                    log_bytes: *self.log_bytes.lock().unwrap(),
                    problems: self.problems.lock().unwrap().clone(),
                    ..source_disk(disk.disk)
                });
                let disks = disks.collect();
                Ok(Reply::Agent(AgentReport { time: Timestamp(1), disks }))
            }
        }
    }

    fn replicas(&self) -> Vec<ReplicaDisk> {
        let Some(time) = *self.durable.lock().unwrap() else { return Vec::new() };
        let replica = |disk: &DiskSpec| ReplicaDisk {
            disk: disk.disk,
            consistent: true,
            durable: "e:1".into(),
            folded: String::new(),
            durable_time: Some(time),
            stored_bytes: 4096,
            problems: Vec::new(),
            scrubbed_time: None,
            scrub_started: None,
            scrub_bytes: 0,
        };
        self.machines.lock().unwrap().values().flatten().map(replica).collect()
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
                *self.retention.lock().unwrap() = Some(grant.retention);
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
            ServerCommand::Serve { machine, point, writable, .. } => {
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
            ServerCommand::Hypervisor(call) => {
                let hypervisor = self.hypervisor.lock().unwrap();
                hypervisor.as_ref().map(|answer| Reply::Hypervisor(answer(&call))).ok_or_else(link::not_mine)
            }
            ServerCommand::ConfirmPoint { .. } => Ok(Reply::Done),
            ServerCommand::KeepBackup(part) => {
                let mut backup = self.backup.lock().unwrap();
                if part.offset == 0 {
                    backup.clear();
                }
                backup.extend_from_slice(&part.data);
                Ok(Reply::Done)
            }
            ServerCommand::Deny(list) => {
                *self.denied.lock().unwrap() = list;
                Ok(Reply::Done)
            }
            ServerCommand::Status => Ok(Reply::Server(ServerReport {
                storage_encrypted: *self.storage_encrypted.lock().unwrap(),
                volume: Some(*self.volume.lock().unwrap()),
                time: Timestamp(1),
                disks: self.replicas(),
                serves: self.serves.lock().unwrap().clone(),
                machines: Vec::new(),
            })),
        }
    }
}

fn source_disk(disk: DiskId) -> SourceDisk {
    SourceDisk {
        disk,
        server: None,
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
        compare: Default::default(),
        current_bytes: 0,
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
            Command::Server(command) => self.server(*command),
        }
    }

    async fn execute_metered(&self, command: Command, meter: &Arc<Meter>) -> Result<Reply, Failure> {
        let halfway = self.halfway.lock().unwrap().clone();
        if let (Command::Server(server), Some(go_on)) = (&command, halfway)
            && matches!(**server, ServerCommand::Export { .. })
        {
            meter.expect(100);
            meter.reach(40);
            go_on.notified().await;
        }
        self.execute(command).await
    }

    fn inventory(&self) -> Option<Inventory> {
        self.inventory.lock().unwrap().clone()
    }

    fn look_every(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn events(&self) -> Vec<Draft> {
        std::mem::take(&mut self.news.lock().unwrap())
    }
}

/// A role that dials, until it is dropped.
struct Dialling {
    fake: Arc<Fake>,
    stop: CancellationToken,
    place: Place,
}

impl Dialling {
    fn start(folder: &Folder, role: Role) -> Self {
        Self::at(Place::in_folder(folder, role).unwrap(), &format!("fake-{role}"))
    }

    fn at(place: Place, name: &str) -> Self {
        let peer = match place.identity.peer() {
            PeerIdentity::Agent(id) => Peer::Agent { id },
            PeerIdentity::ProcessServer(id) => Peer::ProcessServer { id, address: "127.0.0.1:1".into() },
            PeerIdentity::ConfigServer(_) => unreachable!(),
        };
        let name = name.to_owned();
        let fake = Arc::new(Fake {
            register: Register { peer, name, software: "test".into(), boot: String::new(), instance: None, time: None },
            told: Mutex::default(),
            machines: Mutex::default(),
            points: Mutex::default(),
            serves: Mutex::default(),
            refuses: Mutex::default(),
            policy: Mutex::default(),
            denied: Mutex::default(),
            storage_encrypted: Mutex::default(),
            volume: Mutex::new(Volume { bytes: 10 << 30, free_bytes: 4 << 30 }),
            log_room: Mutex::default(),
            retention: Mutex::default(),
            news: Mutex::default(),
            log_bytes: Mutex::new(40),
            problems: Mutex::default(),
            durable: Mutex::default(),
            backup: Mutex::default(),
            hypervisor: Mutex::default(),
            inventory: Mutex::default(),
            halfway: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let handler: Arc<dyn Handler> = fake.clone();
        let link = link_until(place.identity.clone(), place.config_server.clone(), handler, place.kept(), stop.clone());
        tokio::spawn(link);
        Self { fake, stop, place }
    }
}

/// Dials until `stop`, and then hangs up at once, as a killed process does.
async fn link_until(
    identity: tidemark_transport::Identity,
    address: link::Address,
    handler: Arc<dyn Handler>,
    kept: Arc<link::Kept>,
    stop: CancellationToken,
) {
    tokio::select! {
        () = link::run(identity, address, handler, kept, CancellationToken::new()) => {}
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
        // Without one there would be an alert about it.
        config_server::new_recovery_key(&folder).unwrap();
        // The order of start does not matter: those who dial come first.
        let agent = Some(Dialling::start(&folder, Role::Agent));
        let server = Some(Dialling::start(&folder, Role::ProcessServer));
        let mut site = Self { top, folder, config_server: None, agent, server };
        site.start_config_server().await;
        site.settled(2).await;
        site
    }

    async fn start_config_server(&mut self) {
        self.config_server = Some(config_server::start(&self.folder, Settings::default()).await.unwrap());
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
    assert_eq!(point["process_servers"], json!(["fake-process-server"]), "who has it");
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
    let count = async |of: &[&str]| json_of(&[&["job", "list"], of].concat()).await.as_array().unwrap().len();
    assert!(count(&[]).await > 1);
    assert_eq!(count(&["--state", "succeeded", "--limit", "1"]).await, 1);
    assert_eq!(count(&["--machine", "nobody"]).await + count(&["--state", "cancelled"]).await, 0);
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
    let policy = site.agent().policy.lock().unwrap().clone().unwrap();
    assert_eq!((policy.cycle, policy.compression), (Some(Duration::from_secs(300)), Compression::Off));
    let change = json!({ "frequency": "continuous", "point_interval_seconds": 60 });
    client.request(hyper::Method::PATCH, "/policies/slow", Some(&change)).await.unwrap();
    let policy = site.agent().policy.lock().unwrap().clone().unwrap();
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

fn draft(message: &str) -> Draft {
    Draft {
        time: Timestamp(1),
        severity: Severity::Warning,
        machine: None,
        disk: None,
        kind: "test".into(),
        message: message.into(),
        help: "do".into(),
    }
}

/// Texts of the events of the fakes, in order.
async fn told(client: &Client) -> Vec<String> {
    let events = client.get("/events?limit=1000").await.unwrap();
    let of_fakes = events.as_array().unwrap().iter().filter(|event| event["kind"] == "test");
    of_fakes.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

async fn until_told(client: &Client, expected: &[&str]) {
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let waiting = async {
        while told(client).await != expected {
            ticks.tick().await;
        }
    };
    if tokio::time::timeout(SOON, waiting).await.is_err() {
        panic!("{:?}, not {expected:?}", told(client).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_once_over_restarts_of_both_ends() {
    let mut site = Site::start().await;
    site.agent().news.lock().unwrap().push(draft("one"));
    until_told(&site.client(), &["one"]).await;

    // The command follows them, from now on and filtered, until it is told to stop.
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidemark"));
    command
        .args(["events", "--watch", "--severity", "warning", "--json"])
        .env("TIDEMARK_DIR", site.folder.path())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
    // It says nothing when it is ready: events go on until it shows one.
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    let mut sent = vec!["one".to_owned()];
    let line = loop {
        tokio::select! {
            line = lines.next_line() => break line.unwrap().unwrap(),
            _ = ticks.tick() => {
                let message = format!("more {}", sent.len());
                site.agent().news.lock().unwrap().push(draft(&message));
                sent.push(message);
            }
        }
        assert!(sent.len() < 200, "the watch shows nothing");
    };
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&event["severity"], &event["kind"], &event["help"]), (&json!("warning"), &json!("test"), &json!("do")));
    assert!(event["source"].as_str().unwrap().contains("fake-agent"), "{event}");
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(tokio::time::timeout(SOON, child.wait()).await.unwrap().unwrap().success());

    // While the configuration server is away they wait; over the agent's restart too.
    site.stop_config_server().await;
    site.agent().news.lock().unwrap().push(draft("while it was away"));
    until("collecting", || site.agent().news.lock().unwrap().is_empty()).await;
    let kept = site.folder.role_path(Role::Agent).join("events.json");
    let is_kept = || std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("while it was away"));
    until("keeping", is_kept).await;
    site.agent = None;
    site.start_config_server().await;
    site.agent = Some(Dialling::start(&site.folder, Role::Agent));
    site.settled(2).await;
    site.agent().news.lock().unwrap().push(draft("last"));
    sent.extend(["while it was away".to_owned(), "last".to_owned()]);
    until_told(&site.client(), &sent.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_of_events_goes_on_after_the_last_one_that_was_seen() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let site = Site::start().await;
    site.agent().news.lock().unwrap().extend([draft("one"), draft("two")]);
    until_told(&site.client(), &["one", "two"]).await;
    let events = site.client().get("/events?limit=1000").await.unwrap();
    let first = events.as_array().unwrap().iter().find(|event| event["message"] == "one").unwrap()["id"].clone();
    let api = site.folder.config_server().unwrap().unwrap().api;
    let authority = std::fs::read(site.folder.ca_file()).unwrap();
    let authority = rustls_pki_types_pem(&authority);
    let tls = tidemark_transport::tls::api_client(&authority).unwrap();
    let stream = tidemark_transport::client::dial(&api.to_string(), tls).await.unwrap();
    let (reader, mut writer) = tokio::io::split(stream);
    let token = site.folder.token().unwrap();
    let request = format!(
        "GET /api/v1/events/stream HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\nLast-Event-ID: {first}\r\n\r\n"
    );
    writer.write_all(request.as_bytes()).await.unwrap();
    let mut lines = BufReader::new(reader).lines();
    let mut seen = Vec::new();
    let reading = async {
        while seen.len() < 2 {
            let line = lines.next_line().await.unwrap().expect("the stream goes on");
            if let Some(event) = line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok())
                && event["kind"] == "test"
            {
                seen.push(event["message"].as_str().unwrap().to_owned());
                // What happens while it is followed comes as well.
                site.agent().news.lock().unwrap().push(draft("three"));
            }
        }
    };
    tokio::time::timeout(SOON, reading).await.unwrap();
    assert_eq!(seen, ["two", "three"]);
}

fn rustls_pki_types_pem(pem: &[u8]) -> tokio_rustls::rustls::pki_types::CertificateDer<'static> {
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    tokio_rustls::rustls::pki_types::CertificateDer::from_pem_slice(pem).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_register_with_passphrase_fingerprint_and_approval() {
    let site = Site::start().await;
    let json_of = async |arguments: &[&str]| -> Value {
        let output = site.run(&[arguments, &["--json"]].concat()).await;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
    };
    let server = format!("https://{}", site.folder.config_server().unwrap().unwrap().api);
    let fingerprint = site.folder.authority().unwrap().fingerprint();
    let file = site.top.path().join("passphrase");
    let write = |text: &str| File::create(&file).unwrap().write_all(text.as_bytes()).unwrap();
    let dir = |name: &str| site.top.path().join(name).to_str().unwrap().to_owned();
    let (file_name, agent_dir, server_dir) = (file.to_str().unwrap(), dir("agent-2"), dir("server-2"));
    fn register<'a>(role: &'a str, dir: &'a str, server: &'a str, file: &'a str, print: &'a str) -> Vec<&'a str> {
        let more = ["--server", server, "--passphrase-file", file, "--ca-fingerprint", print, "--name", "second"];
        [&[role, "register", "--dir", dir, "--no-wait"][..], &more].concat()
    }

    let made = json_of(&["passphrase", "create", "--role", "agent"]).await;
    write(made["passphrase"].as_str().unwrap());
    let other = "0".repeat(64);
    site.refused(&register("agent", &agent_dir, &server, file_name, &other), "fingerprint").await;
    assert_eq!(json_of(&["passphrase", "list"]).await[0]["uses_left"], 1, "the passphrase went to nobody");
    let registered = json_of(&register("agent", &agent_dir, &server, file_name, &fingerprint)).await;
    let identity = registered["identity"].as_str().unwrap().to_owned();
    assert!(identity.starts_with("tidemark://agent/"), "{registered}");
    site.refused(&register("agent", &agent_dir, &server, file_name, &fingerprint), "registered already").await;
    let third = dir("agent-3");
    site.refused(&register("agent", &third, &server, file_name, &fingerprint), "used up").await;

    // A process server gets nothing before somebody approved it.
    let made = json_of(&["passphrase", "create", "--role", "process-server"]).await;
    write(made["passphrase"].as_str().unwrap());
    let waiting = json_of(&register("process-server", &server_dir, &server, file_name, &fingerprint)).await;
    assert_eq!(waiting["state"], "waiting");
    assert!(!Path::new(&server_dir).join("identity.pem").exists());
    let listed = json_of(&["process-server", "list"]).await;
    assert_eq!((&listed[0]["name"], &listed[0]["approval"]), (&json!("second"), &json!("waiting")), "{listed}");
    assert_eq!((&listed[0]["id"], listed.as_array().unwrap().len()), (&waiting["registration"], 2), "{listed}");
    json_of(&["process-server", "approve", waiting["registration"].as_str().unwrap()]).await;
    let registered = json_of(&register("process-server", &server_dir, &server, file_name, &fingerprint)).await;
    assert!(registered["identity"].as_str().unwrap().starts_with("tidemark://process-server/"));

    // What was registered runs with what the registration left there.
    let config = tidemark::roles::place::RoleConfig {
        dir: agent_dir.clone().into(),
        listen: None,
        control_listen: None,
        names: Vec::new(),
        database: None,
        metrics_listen: None,
        config_server: None,
        name: None,
    };
    let place = Place::configured(config, Role::Agent).unwrap();
    assert_eq!(place.name, "second", "as it registered");
    let second = Dialling::at(place, "second");
    site.settled(3).await;
    // Revoked: its stream ends, others are told, it does not come back.
    json_of(&["identity", "revoke", &identity, "--reason", "stolen"]).await;
    until("telling", || site.server().denied.lock().unwrap().identities == [identity.clone()]).await;
    let client = site.client();
    let is_gone = async || {
        let peers = client.get("/peers").await.unwrap();
        peers["connected"].as_array().unwrap().iter().all(|peer| peer["name"] != "second")
    };
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let going = async {
        while !is_gone().await {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, going).await.expect("its stream ends");
    json_of(&["identity", "restore", &identity]).await;
    site.settled(3).await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_over_the_stream_and_kept() {
    let top = tempfile::tempdir().unwrap();
    let folder = Folder::create(&top.path().join("site")).unwrap();
    // Issued so long ago that a third of its life is over.
    let authority = folder.authority().unwrap();
    let id = tidemark_base::HostId::random();
    let request = tidemark_transport::KeyRequest::new().unwrap();
    let day = Duration::from_secs(86_400);
    let now = Duration::from_nanos(tidemark_base::time::Clock::wall_now(&tidemark_base::SystemClock::new()).0);
    let certificate = authority.sign_for(PeerIdentity::Agent(id), request.request(), now - 31 * day, 90 * day).unwrap();
    let identity = request.complete(&certificate, authority.certificate()).unwrap();
    let before = identity.expires();
    identity.save(&*folder.role(Role::Agent), "identity.pem").unwrap();

    let config_server = config_server::start(&folder, Settings::default()).await.unwrap();
    let config = tidemark::roles::place::RoleConfig {
        dir: folder.role_path(Role::Agent),
        listen: None,
        control_listen: None,
        names: Vec::new(),
        database: None,
        metrics_listen: None,
        config_server: Some(config_server.addresses.control.to_string()),
        name: None,
    };
    let place = Place::configured(config, Role::Agent).unwrap();
    let agent = Dialling::at(place, "old");
    let saved = || tidemark_transport::Identity::load(&*folder.role(Role::Agent), "identity.pem").unwrap().expires();
    until("renewing", || saved() > before).await;
    let renewed = agent.place.identity.expires();
    assert_eq!(
        (renewed, agent.place.identity.peer()),
        (saved(), PeerIdentity::Agent(id)),
        "running connections use it"
    );
    drop(agent);
    config_server.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_allow_what_their_role_does() {
    let site = Site::start().await;
    let admin = site.client();
    let api = site.folder.config_server().unwrap().unwrap().api;
    let mut clients = Vec::new();
    for role in ["reader", "operator"] {
        admin.post("/users", &json!({ "name": role, "role": role })).await.unwrap();
        let token = admin.post("/tokens", &json!({ "user": role })).await.unwrap();
        let file = site.top.path().join(role);
        File::create(&file).unwrap().write_all(token["token"].as_str().unwrap().as_bytes()).unwrap();
        clients.push(Client::new(&format!("https://{api}"), &file, &site.folder.ca_file()).unwrap());
        let listed = admin.get("/tokens").await.unwrap().to_string();
        assert!(!listed.contains(token["token"].as_str().unwrap()), "it is shown once");
    }
    let [reader, operator] = &clients[..] else { unreachable!() };
    let forbidden = |outcome: Result<Value, ClientError>| match outcome {
        Err(ClientError::Refused { status: 403, message, help }) => {
            assert!(message.contains("role") && !help.is_empty())
        }
        other => panic!("{other:?}"),
    };
    reader.get("/machines").await.unwrap();
    forbidden(reader.post("/policies", &json!({ "name": "p" })).await);
    operator.post("/policies", &json!({ "name": "p" })).await.unwrap();
    forbidden(operator.post("/passphrases", &json!({ "role": "agent" })).await);
    forbidden(operator.get("/tokens").await);
    // Whoever may approve sees what waits.
    assert_eq!(operator.get("/registrations").await.unwrap(), json!([]));
    forbidden(reader.get("/registrations").await);
    admin.request(hyper::Method::DELETE, "/users/reader", None).await.unwrap();
    assert!(matches!(reader.get("/machines").await, Err(ClientError::Refused { status: 401, .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_of_the_api_is_complete() {
    let site = Site::start().await;
    let document = site.client().get("/openapi.json").await.unwrap();
    let paths = document["paths"].as_object().unwrap();
    for path in ["/machines", "/machines/{name}/points/{point}/serve", "/events/stream", "/alerts", "/register"] {
        assert!(paths.contains_key(path), "{path}");
    }
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    // What is answered has the fields that are told, and no others.
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    site.job("/machines/web/points", json!({})).await.unwrap();
    let client = site.client();
    for (path, schema) in [
        ("/machines/web", "MachineStatus"),
        ("/machines/web/points/latest", "Point"),
        ("/policies/continuous", "NamedPolicy"),
    ] {
        let answer = client.get(path).await.unwrap();
        let schema = &document["components"]["schemas"][schema];
        let parts = schema["allOf"].as_array().cloned().unwrap_or_else(|| vec![schema.clone()]);
        let told: std::collections::BTreeSet<&String> =
            parts.iter().filter_map(|part| part["properties"].as_object()).flat_map(|of| of.keys()).collect();
        let have: std::collections::BTreeSet<&String> = answer.as_object().unwrap().keys().collect();
        assert_eq!(have, told, "{path}");
    }
}

/// A request with headers of its own: status, headers as text, and body.
async fn raw(site: &Site, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String, Value) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let api = site.folder.config_server().unwrap().unwrap().api;
    let authority = rustls_pki_types_pem(&std::fs::read(site.folder.ca_file()).unwrap());
    let tls = tidemark_transport::tls::api_client(&authority).unwrap();
    let mut stream = tidemark_transport::client::dial(&api.to_string(), tls).await.unwrap();
    let token = site.folder.token().unwrap();
    let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    let request = format!(
        "{method} /api/v1{path} HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\
         Content-Length: {length}\r\n{more}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), serde_json::from_str(body).unwrap_or(Value::Null))
}

fn header(head: &str, name: &str) -> String {
    let found = head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
    found.unwrap_or_else(|| panic!("{name} in {head}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_is_repeated_with_its_key_happens_once() {
    let mut site = Site::start().await;
    let key = [("Idempotency-Key", "0190-a")];
    let body = r#"{"name":"gold","compression":3}"#;
    let (status, head, first) = raw(&site, "POST", "/policies", &key, body).await;
    assert!(status == 200 && !head.contains("idempotency-replayed"), "{head} {first}");
    // The answer may have been lost, and the server restarted since.
    site.stop_config_server().await;
    site.start_config_server().await;
    let (status, head, again) = raw(&site, "POST", "/policies", &key, body).await;
    assert_eq!((status, &again), (200, &first));
    assert_eq!(header(&head, "idempotency-replayed"), "true");
    let (status, _, refused) = raw(&site, "POST", "/policies", &key, r#"{"name":"silver"}"#).await;
    assert!(status == 422 && refused["help"].as_str().unwrap().contains("key"), "{refused}");
    let (status, _, _) = raw(&site, "POST", "/policies", &[], body).await;
    assert_eq!(status, 409, "without the key it is another request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_meant_for_another_version_is_refused() {
    let site = Site::start().await;
    let (_, head, _) = raw(&site, "POST", "/policies", &[], r#"{"name":"gold"}"#).await;
    let first = header(&head, "etag");
    let mine = [("If-Match", first.as_str())];
    let (status, head, _) = raw(&site, "PATCH", "/policies/gold", &mine, r#"{"compression":3}"#).await;
    assert_eq!(status, 200);
    let second = header(&head, "etag");
    assert_ne!(first, second);
    let (status, _, refused) = raw(&site, "PATCH", "/policies/gold", &mine, r#"{"compression":4}"#).await;
    assert!(status == 412 && refused["error"].as_str().unwrap().contains("changed meanwhile"), "{refused}");
    let (_, head, shown) = raw(&site, "GET", "/policies/gold", &[], "").await;
    assert_eq!((header(&head, "etag"), &shown["compression"]), (second.clone(), &json!(3)));
    assert_eq!(raw(&site, "DELETE", "/policies/gold", &mine, "").await.0, 412);
    assert_eq!(raw(&site, "DELETE", "/policies/gold", &[("If-Match", "gold")], "").await.0, 400);
    assert_eq!(raw(&site, "DELETE", "/policies/gold", &[("If-Match", &second)], "").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_is_in_the_way_is_named_before_anything_is_touched() {
    let site = Site::start().await;
    let good = site.disk("good.img", 1 << 20);
    let odd = site.disk("odd.img", 1000);
    let absent = site.top.path().join("absent.img");
    site.protect("first", &[&good]).await.unwrap();
    let told = (site.agent().was_told("protect"), site.server().was_told("authorise"));
    match site.protect("web", &[&good, &odd, &absent]).await {
        Err(ClientError::Refused { message, help, .. }) => {
            for part in ["3 things", "first", "1000 bytes", "absent.img"] {
                assert!(message.contains(part), "{part}: {message}");
            }
            assert!(help.contains("1. ") && help.contains("3. "), "{help}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((site.agent().was_told("protect"), site.server().was_told("authorise")), told);
    assert_eq!(site.client().get("/machines").await.unwrap().as_array().unwrap().len(), 1);
    // Looking only.
    let request = json!({ "name": "web", "disks": [odd], "check_only": true });
    let looked = site.job("/machines", request).await.unwrap();
    let failing: Vec<&Value> =
        looked["checks"].as_array().unwrap().iter().filter(|check| check["ok"] == false).collect();
    assert!(failing.len() == 1 && failing[0]["check"] == "disk" && failing[0]["help"].is_string(), "{looked}");
    let output = site.run(&["protect", "web", "--disk", odd.to_str().unwrap(), "--check", "--json"]).await;
    let looked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &looked["machine"]), (Some(1), &json!("web")), "what fails is an exit code");
    let jobs = site.client().get("/jobs?machine=web").await.unwrap();
    let is_check: Vec<bool> = jobs.as_array().unwrap().iter().map(|job| job["check"] == true).collect();
    assert_eq!(is_check, [true, true, false], "two looked, and one was to protect: {jobs}");
    let output = site.run(&["job", "list", "--machine", "web"]).await;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(listed.matches("protect (check only)").count(), 2, "{listed}");
    // What is left out is not looked at.
    let other = site.disk("other.img", 1 << 20);
    let request = json!({ "name": "web", "disks": [other, odd], "exclude": [odd] });
    assert_eq!(site.job("/machines", request).await.unwrap()["disks"].as_array().unwrap().len(), 1);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    site.refused(&["protect", "x", "--disk", &text(&other), "--exclude", &text(&odd)], "left out").await;
}

/// F18: nothing is planned with a machine whose health is critical, though it is replicated: what is wrong is said.
#[tokio::test(flavor = "multi_thread")]
async fn f18_a_planned_failover_of_a_machine_that_is_not_well_is_refused() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    let client = site.client();
    let problem = Problem { critical: true, message: "the disk is on fire".into(), help: "extinguish it".into() };
    site.agent().problems.lock().unwrap().push(problem);
    let status = client.get("/machines/web").await.unwrap();
    assert_eq!((&status["state"], &status["health"]), (&json!("protected"), &json!("critical")), "{status}");
    for check in [&["--check"][..], &[]] {
        let planned = [&["failover", "planned", "web", "--disks-only"][..], check].concat();
        site.refused(&planned, "is not OK: the disk is on fire").await;
    }
    assert_eq!(client.get("/machines/web").await.unwrap()["state"], "protected", "nothing was begun");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lasts_is_an_alert_and_metrics_tell_it() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    let client = site.client();
    client.post("/policies", &json!({ "name": "strict", "log_limit_bytes": 1 << 20 })).await.unwrap();
    site.job("/machines", json!({ "name": "web", "disks": [disk], "policy": "strict" })).await.unwrap();
    assert_eq!(client.get("/machines/web").await.unwrap()["health"], "ok");
    *site.agent().log_bytes.lock().unwrap() = 900_000;
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let raised = async {
        loop {
            let alerts = client.get("/alerts").await.unwrap();
            if let Some(alert) = alerts.as_array().unwrap().first() {
                return alert.clone();
            }
            ticks.tick().await;
        }
    };
    let alert = tokio::time::timeout(SOON, raised).await.expect("an alert is raised");
    assert_eq!(
        (&alert["kind"], &alert["machine"], &alert["severity"]),
        (&json!("log"), &json!("web"), &json!("warning"))
    );
    let status = client.get("/machines/web").await.unwrap();
    assert_eq!((&status["health"], &status["reasons"][0]["kind"]), (&json!("warning"), &json!("log")));
    let (_, head, _) = raw(&site, "GET", "/metrics", &[], "").await;
    assert!(header(&head, "content-type").contains("openmetrics"));
    let output = site.run(&["alert", "list"]).await;
    assert!(String::from_utf8_lossy(&output.stdout).contains("of its limit"));
    // The policy allows more: no alert any more, and both are events.
    client.request(hyper::Method::PATCH, "/policies/strict", Some(&json!({ "alarm_log_percent": 95 }))).await.unwrap();
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let cleared = async {
        while client.get("/alerts").await.unwrap() != json!([]) {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, cleared).await.expect("the alert ends");
    let events = client.get("/events?machine=web&limit=1000").await.unwrap();
    let kinds: Vec<&str> = events.as_array().unwrap().iter().map(|event| event["kind"].as_str().unwrap()).collect();
    let at = |kind| kinds.iter().position(|known| *known == kind).unwrap_or_else(|| panic!("{kind} in {kinds:?}"));
    assert!(at("alert_raised") < at("alert_cleared"));
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_that_contradict_themselves_are_refused_and_short_retention_shortens_the_rest() {
    let site = Site::start().await;
    for (settings, part) in [
        (json!({ "retention_seconds": 600, "any_time_seconds": 7200 }), "any_time_seconds"),
        (json!({ "retention_seconds": 600, "point_interval_seconds": 3600 }), "point_interval_seconds"),
        (json!({ "throttle_bytes_per_second": 0 }), "throttle"),
        (json!({ "throttle_bytes_per_second": 1023 }), "throttle"),
        (json!({ "throttle_schedule": [{ "bytes_per_second": 1 }] }), "next to nothing"),
        (json!({ "retention_seconds": 0 }), "retention_seconds"),
        (json!({ "any_time_seconds": 1u64 << 60, "retention_seconds": null }), "any_time_seconds"),
        (json!({ "log_limit_bytes": 1 }), "log"),
        (json!({ "alarm_log_percent": 101 }), "alarm_log_percent"),
        (json!({ "throttle_schedule": [{ "from": "9", "to": "10:00" }] }), "time of a day"),
        (json!({ "throttle_schedule": [{ "network": "10.0.0/8" }] }), "range of addresses"),
        (json!({ "throttle_schedule": [{}, { "from": "08:00", "to": "09:00" }] }), "never counts"),
        (json!({ "compression": 99 }), "compression"),
        (json!({ "compression": "fast" }), "compression"),
        (json!({ "frequency": "15m", "point_interval_seconds": 300 }), "point_interval_seconds"),
        (json!({ "frequency": "15m", "app_point_interval_seconds": 60 }), "app_point_interval_seconds"),
        (json!({ "frequency": "5m", "alarm_rpo_seconds": 60 }), "alarm_rpo_seconds"),
        (json!({ "alarm_missed_percent": 0 }), "alarm_missed_percent"),
        (json!({ "alarm_no_contact_seconds": 0 }), "alarm_no_contact_seconds"),
        (json!({ "retention_count": 0 }), "retention_count"),
        (json!({ "encryption": "none" }), "encryption"),
        (
            json!({ "retention_grid": [{ "within_seconds": 9, "every_seconds": 0 }, { "within_seconds": 9, "every_seconds": 1 }] }),
            "retention_grid",
        ),
        (
            json!({ "retention_grid": [{ "within_seconds": 7200, "every_seconds": 60 }, { "every_seconds": 0 }] }),
            "retention_grid",
        ),
        (json!({ "retention_grid": [{ "within_seconds": 60, "every_seconds": 61 }] }), "retention_grid"),
        (
            json!({ "retention_seconds": 86400, "retention_grid": [{ "within_seconds": 86400, "every_seconds": 0 }, { "every_seconds": 7200 }] }),
            "retention_seconds",
        ),
    ] {
        let mut body = settings.clone();
        body["name"] = json!("p");
        match site.client().post("/policies", &body).await {
            Err(ClientError::Refused { status: 400, message, help }) => {
                assert!(message.contains(part) && !help.is_empty(), "{message}");
            }
            other => panic!("{settings}: {other:?}"),
        }
    }
    let output = site.run(&["policy", "create", "short", "--retention", "30m", "--json"]).await;
    let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&policy["retention_seconds"], &policy["any_time_seconds"]), (&json!(1800), &json!(1800)));
    let window = ["--throttle-window", "1-5,7 08:00-18:00 10M", "--throttle-window", "22:00-06:00 none"];
    let output = site.run(&[&["policy", "set", "short", "--json"][..], &window].concat()).await;
    let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(policy["throttle_schedule"][0]["days"], json!([1, 2, 3, 4, 5, 7]));
    assert_eq!(policy["throttle_schedule"][1]["bytes_per_second"], Value::Null);
    let output = site.run(&["policy", "create", "slow", "--frequency", "15m", "--compression", "off", "--json"]).await;
    let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&policy["point_interval_seconds"], &policy["compression"]), (&json!(900), &json!("off")));
    let grid = ["--grid", "1h:all,12h:1h,rest:6h", "--compression", "auto", "--alarm-missed", "50"];
    let output = site.run(&[&["policy", "set", "slow", "--json"][..], &grid].concat()).await;
    let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(policy["retention_grid"][2], json!({ "within_seconds": null, "every_seconds": 21600 }));
    assert_eq!((&policy["alarm_missed_percent"], &policy["compression"]), (&json!(50), &json!("auto")));
    // Limits that were set are lifted, and what a new policy does not name is as in the default one.
    let limits = ["--retention", "--retention-count", "--log-limit", "--throttle", "--throttle-window"];
    let given = ["2days", "9", "5G", "9M", "22:00-06:00 1M"];
    let all =
        |values: [&'static str; 5]| -> Vec<&str> { limits.into_iter().zip(values).flat_map(<[_; 2]>::from).collect() };
    for (arguments, expected) in [
        (all(given), json!([172_800, 9, 5u64 << 30, 9 << 20, 1])),
        (all(["none"; 5]), json!([null, null, null, null, 0])),
    ] {
        let set = [&["policy", "set", "continuous", "--json"][..], &arguments].concat();
        let output = site.run(&set).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = site.run(&["policy", "create", expected[1].as_u64().map_or("free", |_| "bound"), "--json"]).await;
        let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
        let windows = policy["throttle_schedule"].as_array().unwrap().len();
        let names = ["retention_seconds", "retention_count", "log_limit_bytes", "throttle_bytes_per_second"];
        let mut found: Vec<Value> = names.iter().map(|name| policy[name].clone()).collect();
        found.push(json!(windows));
        assert_eq!(json!(found), expected);
    }
}

/// Grid, throttle and intervals reach those who follow them, at once and without anything being restarted.
#[tokio::test(flavor = "multi_thread")]
async fn every_setting_of_a_policy_reaches_who_follows_it() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    let every =
        |days: u64| site.server().retention.lock().unwrap().unwrap().grid.every(Duration::from_secs(days * 86_400));
    let hours = |hours: u64| Duration::from_secs(hours * 3600);
    assert_eq!((every(0), every(1), every(7), every(8)), (hours(0), hours(1), hours(2), hours(4)), "as the field's");
    assert_eq!(site.agent().policy.lock().unwrap().clone().unwrap().compression, Compression::Auto);
    let told = (site.agent().was_told("protect"), site.agent().was_told("unprotect"));
    let set = [
        "policy",
        "set",
        "continuous",
        "--grid",
        "1h:all,rest:6h",
        "--app-interval",
        "1h",
        "--compression",
        "7",
        "--throttle",
        "9M",
        "--throttle-window",
        "1-5 08:00-18:00 10.1.0.0/16 1M",
    ];
    let output = site.run(&set).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((every(0), every(1)), (hours(0), hours(6)));
    let policy = site.agent().policy.lock().unwrap().clone().unwrap();
    assert_eq!((policy.compression, policy.app_point_interval), (Compression::Level(7), Some(hours(1))));
    let monday = Timestamp::parse("2026-11-23T09:00:00Z").unwrap();
    let limit = |to: &str| policy.throttle.limit(monday, Some(to.parse().unwrap()));
    assert_eq!((limit("10.1.2.3"), limit("10.2.2.3")), (Some(1 << 20), Some(9 << 20)));
    assert_eq!((site.agent().was_told("protect"), site.agent().was_told("unprotect")), (told.0 + 1, told.1));
}

#[tokio::test(flavor = "multi_thread")]
async fn encryption_at_rest_takes_only_process_servers_with_an_encrypted_volume() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.client().post("/policies", &json!({ "name": "sealed", "encryption": "at_rest" })).await.unwrap();
    let body = json!({ "name": "web", "disks": [disk], "policy": "sealed" });
    for (told, part) in [(Some(false), "is not encrypted"), (None, "whether it is encrypted")] {
        *site.server().storage_encrypted.lock().unwrap() = told;
        let refused = format!("{:?}", site.job("/machines", body.clone()).await.unwrap_err());
        assert!(refused.contains(part) && refused.contains("at_rest"), "{refused}");
    }
    assert_eq!(site.client().get("/machines").await.unwrap(), json!([]));
    *site.server().storage_encrypted.lock().unwrap() = Some(true);
    site.job("/machines", body).await.unwrap();
    // It was moved to another volume: that is critical.
    *site.server().storage_encrypted.lock().unwrap() = Some(false);
    let status = site.client().get("/machines/web").await.unwrap();
    assert_eq!((&status["health"], &status["reasons"][0]["kind"]), (&json!("critical"), &json!("encryption")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_set_up_prints_what_registering_needs_and_the_pages_are_made() {
    let top = tempfile::tempdir().unwrap();
    let run = async |arguments: &[&str]| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidemark"));
        let output = command.args(arguments).output().await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let dir = top.path().join("cs");
    let made: Value =
        serde_json::from_str(&run(&["config-server", "init", "--dir", dir.to_str().unwrap(), "--json"]).await).unwrap();
    let folder = Folder::create(&dir).unwrap();
    assert_eq!(made["ca_fingerprint"], json!(folder.authority().unwrap().fingerprint()));
    assert!(Path::new(made["token_file"].as_str().unwrap()).exists() && made["initialised_before"].is_null());
    // Whoever does it twice is told so, and how another recovery key is made.
    let init = ["config-server", "init", "--dir", dir.to_str().unwrap()];
    let again = run(&init).await;
    let fingerprint = made["ca_fingerprint"].as_str().unwrap();
    for part in ["initialised already, at 20", fingerprint, "config-server recovery-key --dir", "an agent"] {
        assert!(again.contains(part), "{part}: {again}");
    }
    let key = run(&["config-server", "recovery-key", "--dir", dir.to_str().unwrap(), "--json"]).await;
    let key: Value = serde_json::from_str(&key).unwrap();
    assert!(key["recovery_key"].is_string() && key["recovery_key"] != made["recovery_key"]);
    // The passphrase that it printed registers an agent once the server runs.
    let config_server = config_server::start(&folder, Settings::default()).await.unwrap();
    let registration = tidemark::roles::register::Registration {
        role: Role::Agent,
        server: format!("https://{}", config_server.addresses.api),
        passphrase: made["agent_passphrase"].as_str().unwrap().to_owned(),
        fingerprint: made["ca_fingerprint"].as_str().unwrap().to_owned(),
        name: "web-1".to_owned(),
        dir: top.path().join("agent"),
        wait: true,
    };
    let outcome = tidemark::roles::register::register(registration, |_| ()).await.unwrap();
    assert!(matches!(outcome, tidemark::roles::register::Outcome::Registered { .. }));
    let while_it_runs = run(&init).await;
    for part in ["initialised already", fingerprint, "tidemark passphrase create"] {
        assert!(while_it_runs.contains(part), "{part}: {while_it_runs}");
    }
    config_server.server.stop().await;

    assert!(run(&["completions", "bash"]).await.contains("tidemark"));
    let pages = top.path().join("man");
    run(&["man", "--dir", pages.to_str().unwrap()]).await;
    assert!(std::fs::read_to_string(pages.join("tidemark-protect.1")).unwrap().contains("protect"));
}

#[path = "control/access.rs"]
mod access;
#[path = "control/audit.rs"]
mod audit;
#[path = "control/document.rs"]
mod document;
#[path = "control/inventory.rs"]
mod inventory;
#[path = "control/recovery.rs"]
mod recovery;
#[path = "control/room.rs"]
mod room;
#[path = "control/silence.rs"]
mod silence;
#[path = "control/streams.rs"]
mod streams;
#[path = "control/watch.rs"]
mod watch;
#[tokio::test(flavor = "multi_thread")]
async fn machines_come_into_groups_and_leave_them_while_they_are_protected() {
    let site = Site::start().await;
    let (first, second) = (site.disk("a.img", 1 << 20), site.disk("b.img", 1 << 20));
    let first = first.to_str().unwrap();
    let run = async |arguments: &[&str]| -> Value {
        let output = site.run(&[arguments, &["--json"]].concat()).await;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    run(&["group", "create", "shop"]).await;
    run(&["protect", "web", "--disk", first, "--group", "shop"]).await;
    site.protect("db", &[&second]).await.unwrap();
    assert_eq!(run(&["group", "add", "shop", "db"]).await["machines"], json!(["db", "web"]));
    assert_eq!(run(&["group", "show", "shop"]).await["health"], "ok");
    assert_eq!(run(&["status", "web"]).await["group"], "shop");
    site.refused(&["group", "create", "other", "web"], "is in group \"shop\"").await;
    assert_eq!(run(&["group", "list"]).await.as_array().unwrap().len(), 1, "nothing half made");
    site.refused(&["group", "create", "shop"], "already").await;
    site.refused(&["group", "create", "a/b"], "a/b").await;
    site.refused(&["group", "add", "shop", "nobody"], "nobody").await;
    site.refused(&["group", "remove", "shop", "nobody"], "nobody").await;
    site.refused(&["group", "show", "none"], "none").await;
    site.refused(&["protect", "x", "--disk", first, "--group", "nogroup"], "nogroup").await;
    let told = site.agent().was_told("unprotect");
    assert_eq!(run(&["group", "remove", "shop", "db"]).await["machines"], json!(["web"]));
    run(&["protect", "web", "--disk", first, "--group", "none"]).await;
    assert_eq!(run(&["group", "show", "shop"]).await["machines"], json!([]));
    run(&["group", "add", "shop", "web"]).await;
    run(&["group", "delete", "shop"]).await;
    assert_eq!(
        (run(&["status", "web"]).await["group"].clone(), run(&["group", "list"]).await),
        (Value::Null, json!([]))
    );
    assert_eq!(site.agent().was_told("unprotect"), told, "protection goes on");
}

/// Answers each connection by `answer`, and hands over what was asked.
async fn hook(statuses: Vec<u16>) -> (String, tokio::sync::mpsc::UnboundedReceiver<(String, String)>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/alerts?x=1", listener.local_addr().unwrap());
    let (asked, asks) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut statuses = statuses.into_iter();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = tokio::io::BufReader::new(stream);
            let (mut head, mut bytes) = (String::new(), 0);
            loop {
                let mut line = String::new();
                tokio::io::AsyncBufReadExt::read_line(&mut stream, &mut line).await.unwrap();
                if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    bytes = length.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
                head.push_str(&line);
            }
            let mut body = vec![0; bytes];
            tokio::io::AsyncReadExt::read_exact(&mut stream, &mut body).await.unwrap();
            let _ = asked.send((head, String::from_utf8(body).unwrap()));
            let status = statuses.next().unwrap_or(200);
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n");
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, answer.as_bytes()).await;
        }
    });
    (url, asks)
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_posted_signed_once_each_and_none_of_before() {
    let site = Site::start().await;
    let client = site.client();
    let (url, mut asks) = hook(Vec::new()).await;
    let secret = site.top.path().join("secret");
    File::create(&secret).unwrap().write_all(b"0123456789abcdef\n").unwrap();
    let secret = secret.to_str().unwrap();
    let output = site.run(&["channel", "create", "ops", "--webhook", &url, "--secret-file", secret, "--json"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("\"signed\":true") && !shown.contains("0123456789"), "{shown}");
    let next = async |asks: &mut tokio::sync::mpsc::UnboundedReceiver<(String, String)>| {
        tokio::time::timeout(SOON, asks.recv()).await.expect("it is told").unwrap()
    };
    assert!(site.run(&["channel", "test", "ops"]).await.status.success());
    let (head, body) = next(&mut asks).await;
    assert!(head.starts_with("POST /alerts?x=1 HTTP/1.1") && body.contains("channel_test"), "{head}{body}");
    // The agent's log is near its limit: an alert begins, and ends.
    let disk = site.disk("a.img", 1 << 20);
    client.post("/policies", &json!({ "name": "strict", "log_limit_bytes": 1 << 20 })).await.unwrap();
    *site.agent().log_bytes.lock().unwrap() = 900 << 10;
    site.job("/machines", json!({ "name": "web", "disks": [disk], "policy": "strict" })).await.unwrap();
    let (head, body) = next(&mut asks).await;
    let event: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&event["kind"], &event["machine"]), (&json!("alert_raised"), &json!("web")), "{body}");
    let listed = client.get("/alerts").await.unwrap()[0].clone();
    let raised = event["alert"].clone();
    assert_eq!(
        raised,
        json!({ "id": listed["id"], "kind": "log", "state": "raised", "severity": "warning", "since": listed["since"] })
    );
    let signed = header(&head, "tidemark-signature");
    assert!(signed.starts_with("t=") && signed.contains(",v1="), "{head}");
    assert_eq!(header(&head, "tidemark-event"), event["id"].to_string());
    client.request(hyper::Method::PATCH, "/policies/strict", Some(&json!({ "alarm_log_percent": 95 }))).await.unwrap();
    let (_, body) = next(&mut asks).await;
    assert!(body.contains("alert_cleared"), "{body}");
    let cleared = serde_json::from_str::<Value>(&body).unwrap()["alert"].clone();
    let expected = json!({ "id": raised["id"], "kind": "log", "state": "cleared", "severity": "warning", "since": raised["since"] });
    assert_eq!(cleared, expected, "the same alert, with the severity that it had");
    let done = serde_json::from_str::<Value>(&body).unwrap()["id"].as_u64().unwrap();
    let is_done = async || client.get("/channels/ops").await.unwrap()["done"].as_u64().unwrap() >= done;
    tokio::time::timeout(SOON, async { while !is_done().await {} }).await.unwrap();
    // Made later, it hears nothing of what was before; restarted, it hears nothing twice.
    let (late, mut late_asks) = hook(Vec::new()).await;
    client.post("/channels", &json!({ "name": "late", "webhook": { "url": late } })).await.unwrap();
    let mut site = site;
    site.stop_config_server().await;
    site.start_config_server().await;
    site.settled(2).await;
    assert!(site.run(&["channel", "test", "late"]).await.status.success());
    assert!(next(&mut late_asks).await.1.contains("channel_test"));
    // What happens next is the next thing that both hear.
    client.request(hyper::Method::PATCH, "/policies/strict", Some(&json!({ "alarm_log_percent": 80 }))).await.unwrap();
    for (name, asks) in [("ops", &mut asks), ("late", &mut late_asks)] {
        let (_, body) = next(asks).await;
        let event: Value = serde_json::from_str(&body).unwrap();
        let id = event["id"].as_u64().unwrap();
        assert!(event["kind"] == "alert_raised" && id > done, "{name}: {body}");
        // Behind this one it went through all that there is.
        let path = format!("/channels/{name}");
        let is_done = async || client.get(&path).await.unwrap()["done"].as_u64().unwrap() >= id;
        tokio::time::timeout(SOON, async { while !is_done().await {} }).await.unwrap();
        assert!(asks.try_recv().is_err(), "{name} is told something else");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_refuses_shows_why_and_channels_that_make_no_sense_are_refused() {
    let site = Site::start().await;
    let client = site.client();
    let (url, _asks) = hook(vec![503]).await;
    client.post("/channels", &json!({ "name": "ops", "webhook": { "url": url } })).await.unwrap();
    site.refused(&["channel", "test", "ops"], "503").await;
    let mail =
        |server: &str, from: &str, tls: &str| json!({ "server": server, "from": from, "to": ["b@x"], "tls": tls });
    for (channel, part) in [
        (json!({}), "webhook or mail"),
        (json!({ "webhook": { "url": "http://a.example/" } }), "not encrypted"),
        (json!({ "webhook": { "url": "https://a.example/", "secret": "short" } }), "secret"),
        (json!({ "webhook": { "url": "https://a.example/", "ca": "none" } }), "ca"),
        (json!({ "mail": mail("a.example:25", "a@x", "none") }), "not be encrypted"),
        (json!({ "mail": mail("a.example", "a@x", "tls") }), "mail server"),
        (json!({ "mail": mail("a.example:25", "a@x>\r\nDATA", "tls") }), "mailbox"),
    ] {
        let mut body = channel.clone();
        body["name"] = json!("c");
        match client.post("/channels", &body).await {
            Err(ClientError::Refused { status: 400, message, help }) => {
                assert!(message.contains(part) && !help.is_empty(), "{message}");
            }
            other => panic!("{channel}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_mailed() {
    let site = Site::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap().to_string();
    let taking = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = tokio::io::BufReader::new(stream);
        let mut said = Vec::new();
        let mut answer = "220 here".to_owned();
        loop {
            tokio::io::AsyncWriteExt::write_all(&mut stream, format!("{answer}\r\n").as_bytes()).await.unwrap();
            let mut line = String::new();
            if tokio::io::AsyncBufReadExt::read_line(&mut stream, &mut line).await.unwrap() == 0 {
                return said;
            }
            let word = line.split_whitespace().next().unwrap_or_default().to_owned();
            said.push(line.trim_end().to_owned());
            answer = match word.as_str() {
                "EHLO" => "250-here\r\n250 AUTH PLAIN".to_owned(),
                "AUTH" => "235 yes".to_owned(),
                "QUIT" => "221 bye".to_owned(),
                "DATA" => {
                    tokio::io::AsyncWriteExt::write_all(&mut stream, b"354 go\r\n").await.unwrap();
                    loop {
                        let mut line = String::new();
                        tokio::io::AsyncBufReadExt::read_line(&mut stream, &mut line).await.unwrap();
                        if line == ".\r\n" {
                            break;
                        }
                        said.push(line.trim_end().to_owned());
                    }
                    "250 taken".to_owned()
                }
                _ => "250 ok".to_owned(),
            };
        }
    });
    let mail = json!({ "server": server, "tls": "none", "user": "u", "password": "p", "from": "t@x.example", "to": ["a@y.example", "b@y.example"] });
    site.client().post("/channels", &json!({ "name": "mail", "mail": mail })).await.unwrap();
    let output = site.run(&["channel", "test", "mail"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = tokio::time::timeout(SOON, taking).await.unwrap().unwrap();
    let has = |line: &str| said.iter().any(|said| said == line);
    // `\0u\0p`
    assert!(has("AUTH PLAIN AHUAcA==") && has("MAIL FROM:<t@x.example>") && has("RCPT TO:<b@y.example>"), "{said:?}");
    assert!(has("To: a@y.example, b@y.example") && has("Content-Transfer-Encoding: base64"), "{said:?}");
    let shown = site.client().get("/channels").await.unwrap().to_string();
    assert!(!shown.contains("password") && shown.contains("b@y.example"), "{shown}");
    // STARTTLS is never given up for a server that does not offer it.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 256];
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"220 here\r\n").await.unwrap();
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"250 here\r\n").await.unwrap();
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await;
    });
    let mail = json!({ "server": server, "from": "t@x.example", "to": ["a@y.example"] });
    site.client().post("/channels", &json!({ "name": "plain", "mail": mail })).await.unwrap();
    site.refused(&["channel", "test", "plain"], "STARTTLS").await;
}
