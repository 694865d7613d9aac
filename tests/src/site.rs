//! A running Tidemark on a temporary folder, and its verbs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::distance::Distance;
use crate::process::Owned;
use crate::{binary, wait};

/// How long a start may take: a loaded machine builds other tests meanwhile.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long anything else may take. A test that needs longer is too large for this suite.
pub const LIMIT: Duration = Duration::from_secs(90);

/// How long a verb may take that waits for its job; below the runner's own limit, which names nothing.
const VERB_LIMIT: Duration = Duration::from_secs(150);

/// The roles as they run apart.
pub const ROLES: [&str; 3] = ["config-server", "process-server", "agent"];

/// Where the configuration server writes down where it is found, in its folder.
const ADDRESSES: &str = "run/config-server.json";

/// `tidemark up`, or each role as a process of its own, on a folder of its own. Everything ends with it.
pub struct Site {
    folder: TempDir,
    processes: Vec<Owned>,
    /// Of hosts that are far away.
    distant: BTreeMap<String, Distance>,
    /// Where the configuration server's own folder is now.
    moved: Option<PathBuf>,
    pub ready: Value,
}

/// A protected machine: its disks, and where its workload opens them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    pub name: String,
    pub disks: Vec<AttachedDisk>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachedDisk {
    pub id: String,
    pub path: PathBuf,
    pub nbd: String,
}

/// How a verb ended.
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    command: String,
}

impl Site {
    /// A new site in the system's temporary folder.
    pub fn start() -> Self {
        Self::start_in(&std::env::temp_dir())
    }

    /// A new site in a new folder of `parent`.
    pub fn start_in(parent: &Path) -> Self {
        let mut site = Self::new_in(parent);
        site.up();
        site
    }

    fn new_in(parent: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("tidemark-").tempdir_in(parent).expect("a folder can be made");
        Self { folder, processes: Vec::new(), distant: BTreeMap::new(), moved: None, ready: Value::Null }
    }

    /// A new site whose roles are three processes, so that each can be killed alone.
    pub fn start_roles() -> Self {
        let mut site = Self::prepare();
        site.start_roles_here();
        site
    }

    /// The folders of a site that does not run yet, for tests that put something else beneath them.
    pub fn prepare() -> Self {
        let site = Self::new_in(&std::env::temp_dir());
        for name in ["", "agent", "process-server"] {
            std::fs::create_dir(site.state().join(name)).expect("a folder can be made");
        }
        site
    }

    /// Starts the roles, each as a process of its own.
    pub fn start_roles_here(&mut self) {
        for role in ROLES {
            self.start_role(role);
        }
        self.wait_connected();
    }

    /// Starts the agent of one host more, in a folder of its own beside the site's; returns the host's id. Its process is a role
    /// of this name.
    #[track_caller]
    pub fn start_host(&mut self, name: &str) -> String {
        self.start_one_more("agent", name)
    }

    /// The same, where what the configuration server says and hears takes so long each way.
    #[track_caller]
    pub fn start_distant_host(&mut self, name: &str, delay: Duration) -> String {
        let control = text(&self.addresses().expect("the site is up")["control"]).parse().expect("it is an address");
        self.distant.insert(name.to_owned(), Distance::start(control, delay));
        self.start_one_more("agent", name)
    }

    /// The configuration server runs in another folder from now on.
    pub fn move_control(&mut self, folder: &Path) {
        self.moved = Some(folder.to_owned());
    }

    fn control(&self) -> PathBuf {
        self.moved.clone().unwrap_or_else(|| self.state())
    }

    /// Where the configuration server is found; `None`: it never said so.
    pub fn addresses(&self) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(self.control().join(ADDRESSES)).ok()?).ok()
    }

    /// The same, a process server.
    #[track_caller]
    pub fn start_process_server(&mut self, name: &str) -> String {
        self.start_one_more("process-server", name)
    }

    #[track_caller]
    fn start_one_more(&mut self, role: &str, name: &str) -> String {
        let before = self.peer_ids(role);
        let folder = self.path(name);
        for part in ["authority", "run"] {
            let private = std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700)
                .create(folder.join(part));
            private.expect("a folder can be made");
        }
        for file in std::fs::read_dir(self.state().join("authority")).expect("the site has an authority").flatten() {
            std::fs::copy(file.path(), folder.join("authority").join(file.file_name())).expect("it can be copied");
        }
        self.start_again(role, name);
        let new = || self.peer_ids(role).into_iter().find(|id| !before.contains(id));
        wait::until(&format!("{name} is connected"), LIMIT, new)
    }

    /// Starts the agent of such a host again, and does not wait for it.
    pub fn start_host_again(&mut self, name: &str) {
        self.start_again("agent", name);
    }

    /// The same, a process server.
    pub fn start_process_server_again(&mut self, name: &str) {
        self.start_again("process-server", name);
    }

    fn start_again(&mut self, role: &str, name: &str) {
        let (mut addresses, folder) = (self.addresses().expect("the site is up"), self.path(name));
        if let Some(distance) = self.distant.get(name) {
            addresses["control"] = distance.address().to_string().into();
        }
        let known = std::fs::File::create(folder.join(ADDRESSES)).expect("a file can be made");
        serde_json::to_writer(known, &addresses).expect("it can be written");
        let mut command = Command::new(binary::tidemark());
        command.args([role, "run", "--dir"]).arg(folder).stdin(Stdio::null()).stdout(Stdio::null());
        self.processes.push(Owned::start(name, command, Some(&self.path("site.log"))));
    }

    /// The hosts whose agents are connected.
    pub fn host_ids(&self) -> Vec<String> {
        self.peer_ids("agent")
    }

    /// Whoever of that role is connected.
    pub fn peer_ids(&self, role: &str) -> Vec<String> {
        let ready = self.api_address().expect("the site is up");
        let peers = crate::api::Api::connect(&ready).get("peers");
        let connected = peers["connected"].as_array().expect("it is a list");
        connected
            .iter()
            .filter(|peer| peer["role"].as_str().is_some_and(|of| of.replace(' ', "-") == role))
            .map(|peer| text(&peer["id"]))
            .collect()
    }

    fn api_address(&self) -> Option<Value> {
        Some(serde_json::json!({
            "api": format!("https://{}/api/v1", self.addresses()?["api"].as_str()?),
            "token_file": self.control().join("config-server/token"),
            "ca_file": self.control().join("ca.pem"),
        }))
    }

    /// Starts one role and does not wait for it.
    pub fn start_role(&mut self, role: &str) {
        self.start_role_as(role, Command::new(binary::tidemark()));
    }

    /// Starts one role by a command that runs `tidemark` with the arguments that it is given here.
    pub fn start_role_as(&mut self, role: &str, mut command: Command) {
        command.args([role, "run", "--dir"]).arg(self.state()).stdin(Stdio::null()).stdout(Stdio::null());
        self.processes.push(Owned::start(role, command, Some(&self.path("site.log"))));
    }

    /// Takes a process in that somebody else started as one of its roles.
    pub fn adopt(&mut self, process: Owned) {
        self.processes.push(process);
    }

    /// The process of a role that runs, or ran until it was killed by something else.
    #[track_caller]
    pub fn role(&mut self, role: &str) -> &mut Owned {
        let found = self.processes.iter_mut().find(|process| process.name == role);
        found.unwrap_or_else(|| panic!("{role} does not run"))
    }

    /// Takes a role's process, to be ended or waited for.
    #[track_caller]
    pub fn take_role(&mut self, role: &str) -> Owned {
        let index = self.processes.iter().position(|process| process.name == role);
        self.processes.remove(index.unwrap_or_else(|| panic!("{role} does not run")))
    }

    /// `kill -9` of one role.
    #[track_caller]
    pub fn kill_role(&mut self, role: &str) {
        self.take_role(role).kill_9();
    }

    /// Waits until every agent and process server of the site that runs has found the configuration server. A stream of one that was
    /// killed counts until its end is seen.
    #[track_caller]
    pub fn wait_connected(&self) {
        let peers_of = |process: &Owned| match process.name.as_str() {
            "tidemark up" => 2,
            "config-server" => 0,
            _ => 1,
        };
        let peers: usize = self.processes.iter().map(peers_of).sum();
        let connected = wait::until("the roles find each other", LIMIT, || {
            self.connected().filter(|connected| *connected >= peers)
        });
        assert_eq!(connected, peers, "whoever runs is connected, once");
    }

    /// How many roles have a stream to the configuration server; `None` while that cannot be asked.
    pub fn connected(&self) -> Option<usize> {
        // An address from before a restart may be there before its server is.
        std::net::TcpStream::connect(self.addresses()?["api"].as_str()?).ok()?;
        let peers = crate::api::Api::connect(&self.api_address()?).get("peers");
        Some(peers["connected"].as_array()?.len())
    }

    /// Where the site and its disks are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the site's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder that `up` keeps its state in.
    pub fn state(&self) -> PathBuf {
        self.path("site")
    }

    /// Starts `tidemark up` and waits for its ready line.
    #[track_caller]
    pub fn up(&mut self) {
        assert!(self.processes.is_empty(), "the site is up");
        let mut command = Command::new(binary::tidemark());
        command
            .args(["up", "--listen", "127.0.0.1:0", "--dir"])
            .arg(self.state())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut up = Owned::start("tidemark up", command, Some(&self.path("site.log")));
        let (sender, receiver) = mpsc::channel();
        let stdout = up.child().stdout.take().expect("stdout is piped");
        // Reads on after the ready line, so that the pipe never fills.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(ready) = line.strip_prefix("ready ") {
                    let _ = sender.send(ready.to_owned());
                }
            }
        });
        let Ok(ready) = receiver.recv_timeout(READY_LIMIT) else {
            panic!("tidemark up says nothing; its log ends with\n{}", up.log_tail());
        };
        self.ready = serde_json::from_str(&ready).unwrap_or_else(|error| panic!("ready line {ready:?}: {error}"));
        self.processes.push(up);
    }

    /// SIGTERM; the site must end cleanly. Agents first: what they hold is flushed while the others still listen.
    #[track_caller]
    pub fn down(&mut self) {
        assert!(!self.processes.is_empty(), "the site is up");
        while let Some(mut process) = self.processes.pop() {
            let status = process.stop(Duration::from_secs(30));
            let name = &process.name;
            assert!(status.success(), "{name} ended with {status}; its log ends with\n{}", process.log_tail());
        }
    }

    /// `kill -9` of everything.
    pub fn kill_9(&mut self) {
        assert!(!self.processes.is_empty(), "the site is up");
        for process in &self.processes {
            process.signal(nix::sys::signal::Signal::SIGKILL);
        }
        self.processes.clear();
    }

    /// Of the first process; of the only one of `up`.
    pub fn pid(&self) -> i32 {
        self.processes.first().expect("the site is up").pid()
    }

    /// Runs a verb to its end, which must come within a limit: a test that hangs says in what.
    #[track_caller]
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        let mut command = self.command();
        command.args(arguments);
        let text = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Owned::start("verb", command, None);
        let stdout = read_all(child.child().stdout.take().expect("stdout is piped"));
        let stderr = read_all(child.child().stderr.take().expect("stderr is piped"));
        let begin = Instant::now();
        let status = wait::until("a verb ends", 2 * VERB_LIMIT, || {
            assert!(begin.elapsed() < VERB_LIMIT, "{text} does not end; the site's log ends with\n{}", self.log_tail());
            child.ending()
        });
        Outcome {
            code: status.code().unwrap_or(-1),
            stdout: stdout.join().expect("stdout can be read"),
            stderr: stderr.join().expect("stderr can be read"),
            command: text,
        }
    }

    /// Runs the command without this site's address, which the arguments name themselves.
    pub fn run_bare(&self, arguments: &[&str]) -> Outcome {
        offline(arguments)
    }

    /// The command with this site's address, for arguments of the caller's own.
    pub fn command(&self) -> Command {
        let mut command = Command::new(binary::tidemark());
        command.env("TIDEMARK_DIR", self.control());
        command
    }

    /// Runs a verb with `--json`; its one document.
    #[track_caller]
    pub fn json<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Value {
        let mut all: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
        all.push(OsStr::new("--json"));
        let outcome = self.run(&all);
        if outcome.code != 0 {
            panic!("{}\n--- log of the site\n{}", outcome.describe(), self.log_tail());
        }
        outcome.json()
    }

    /// The end of what the site wrote to stderr.
    pub fn log_tail(&self) -> String {
        self.processes.first().map(Owned::log_tail).unwrap_or_default()
    }

    /// Protects disks as one machine. `extra` are further arguments.
    #[track_caller]
    pub fn protect(&self, name: &str, disks: &[&Path], extra: &[&str]) -> Machine {
        let mut arguments: Vec<&OsStr> = vec![OsStr::new("protect"), OsStr::new(name)];
        for disk in disks {
            arguments.extend([OsStr::new("--disk"), disk.as_os_str()]);
        }
        arguments.extend(extra.iter().map(OsStr::new));
        Machine::from_json(&self.json(&arguments))
    }

    #[track_caller]
    pub fn status(&self, name: &str) -> Value {
        self.json(&["status", name])
    }

    /// Waits until the initial replication (or a resync) is over.
    #[track_caller]
    pub fn wait_protected(&self, name: &str) -> Value {
        wait::until(&format!("{name} is protected"), LIMIT, || {
            let status = self.status(name);
            (status["state"] == "protected").then_some(status)
        })
    }

    /// Waits until nothing waits to be sent.
    #[track_caller]
    pub fn wait_sent(&self, name: &str) -> Value {
        wait::until(&format!("everything of {name} was sent"), LIMIT, || {
            let status = self.status(name);
            (status["pending_bytes"] == 0).then_some(status)
        })
    }

    /// Makes a point now; returns its JSON.
    #[track_caller]
    pub fn point(&self, name: &str) -> Value {
        self.json(&["point", "create", name])
    }

    /// Exports a point to a new file; returns the file.
    #[track_caller]
    pub fn export(&self, name: &str, point: &str, file: &str, format: &str) -> PathBuf {
        let to = self.path(file);
        let text = to.to_str().expect("paths of tests are text").to_owned();
        self.json(&["point", "export", name, point, "--to", &text, "--format", format]);
        to
    }

    /// Serves a point until the returned value is dropped.
    #[track_caller]
    pub fn serve(&self, name: &str, point: &str, extra: &[&str]) -> Served {
        let mut command = self.command();
        command.args(["point", "serve", name, point, "--json"]).args(extra).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Owned::start("point serve", command, Some(&self.path("serve.log")));
        let stdout = process.child().stdout.take().expect("stdout is piped");
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let Ok(line) = receiver.recv_timeout(READY_LIMIT) else {
            panic!("point serve says nothing; its log ends with\n{}", process.log_tail());
        };
        let served: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("serve line {line:?}: {error}"));
        let disks = served["disks"].as_array().expect("disks is a list");
        let nbd = disks.iter().map(|disk| (text(&disk["id"]), text(&disk["nbd"]))).collect();
        let nbds = disks.iter().filter_map(|disk| disk["nbds"].as_str().map(str::to_owned)).collect();
        let files = disks.iter().filter_map(|disk| disk["file"].as_str().map(PathBuf::from)).collect();
        Served { nbd, nbds, files, process }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.processes.clear();
        // Machines that failed over outlive every role; not the test.
        crate::process::end_guests_of(self.folder.path());
        crate::block::unmount_beneath(self.folder.path());
        if std::thread::panicking()
            && let Ok(log) = std::fs::read_to_string(self.path("site.log"))
        {
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- log of the site (end)\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

/// A point being served.
pub struct Served {
    /// An address per disk, with the disk's id.
    nbd: Vec<(String, String)>,
    nbds: Vec<String>,
    files: Vec<PathBuf>,
    pub process: Owned,
}

impl Served {
    /// Of a machine with one disk.
    #[track_caller]
    pub fn nbd(&self) -> &str {
        assert_eq!(self.nbd.len(), 1, "one disk");
        &self.nbd[0].1
    }

    /// Addresses over TLS, of each disk that has one.
    pub fn nbds(&self) -> &[String] {
        &self.nbds
    }

    /// The file of each disk that is one.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Of one of several disks.
    #[track_caller]
    pub fn nbd_of(&self, disk: &AttachedDisk) -> &str {
        let found = self.nbd.iter().find(|(id, _)| *id == disk.id);
        &found.unwrap_or_else(|| panic!("disk {} is not served", disk.id)).1
    }
}

impl Machine {
    pub fn from_json(json: &Value) -> Self {
        let disks = json["disks"].as_array().unwrap_or_else(|| panic!("no disks in {json}"));
        let attached = disks.iter().map(|disk| AttachedDisk {
            id: text(&disk["id"]),
            path: PathBuf::from(text(&disk["path"])),
            nbd: text(&disk["attach"]["nbd"]),
        });
        Self { name: text(&json["machine"]), disks: attached.collect() }
    }

    pub fn nbd(&self) -> &str {
        &self.disks[0].nbd
    }
}

impl Outcome {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.describe()))
    }

    pub fn describe(&self) -> String {
        format!("{} ended with {}\n--- stdout\n{}\n--- stderr\n{}", self.command, self.code, self.stdout, self.stderr)
    }

    /// An input that the command line or the server refuses, with an error and no success.
    #[track_caller]
    pub fn assert_usage_or_refused(&self) {
        assert!(matches!(self.code, 1 | 2), "{}", self.describe());
        assert!(self.stderr.contains("error: "), "no error line: {}", self.describe());
    }

    /// An error as the contract has it: exit 1, `error:` that names every one of `words`, and a `help:` line.
    #[track_caller]
    pub fn assert_refused(&self, words: &[&str]) {
        assert_eq!(self.code, 1, "{}", self.describe());
        let error = self.stderr.lines().find(|line| line.starts_with("error: "));
        let error = error.unwrap_or_else(|| panic!("no error line: {}", self.describe()));
        for word in words {
            assert!(error.contains(word), "the error does not name {word:?}: {}", self.describe());
        }
        assert!(self.stderr.lines().any(|line| line.starts_with("help: ")), "no help line: {}", self.describe());
    }
}

/// A JSON string that must be there.
#[track_caller]
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// A figure of a status; 0 where it is not known yet.
#[track_caller]
pub fn number(value: &Value) -> u64 {
    if value.is_null() {
        return 0;
    }
    value.as_u64().unwrap_or_else(|| panic!("{value} is no whole number"))
}

/// Reads beside, so that a child with much to say does not wait for us.
fn read_all(mut pipe: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What a child that was killed said until then is enough.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs an offline verb, which needs no site.
pub fn offline(arguments: &[&str]) -> Outcome {
    let mut command = Command::new(binary::tidemark());
    command.args(arguments).env_remove("TIDEMARK_DIR").stdin(Stdio::null());
    let output = command.output().expect("the command runs");
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: format!("tidemark {}", arguments.join(" ")),
    }
}
