//! PostgreSQL as a judge: it finds out by itself whether the blocks under it are a state that they once had.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use nix::unistd::User;

use crate::process::Owned;
use crate::wait;

/// How long a start with recovery may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Small and with real fsyncs; its write-ahead log in segments of 1 MiB, so that a load reuses many.
const SETTINGS: [&str; 8] = [
    "shared_buffers=8MB",
    "max_connections=8",
    "min_wal_size=2MB",
    "max_wal_size=6MB",
    "checkpoint_timeout=30s",
    "listen_addresses=",
    "autovacuum_naptime=2s",
    "wal_recycle=on",
];

/// Where the programs are: the newest version under Debian's folder, or the `PATH`.
pub fn find(program: &str) -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin").join(program)))
        .filter(|path| path.is_file())
        .collect();
    versions.sort();
    versions.pop().or_else(|| crate::tools::find(program))
}

/// Returns from the test, which then counts as skipped, unless PostgreSQL is there with its checkers.
#[macro_export]
macro_rules! need_postgres {
    () => {
        for program in ["postgres", "initdb", "psql", "pg_amcheck"] {
            if $crate::postgres::find(program).is_none() {
                let test = std::thread::current().name().unwrap_or("test").to_owned();
                $crate::tools::skipped(&test, &format!("{program} of PostgreSQL is not installed"));
                return;
            }
        }
    };
}

/// PostgreSQL refuses to run as root: its own user, where there is one.
fn user() -> User {
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .expect("the system has a user that is not root")
}

fn program(name: &str) -> Command {
    let user = user();
    let mut command = Command::new(find(name).unwrap_or_else(|| panic!("{name} of PostgreSQL is not installed")));
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).current_dir("/");
    command.env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    command
}

/// A folder for PostgreSQL's user.
pub fn own(folder: &Path) {
    let user = user();
    std::fs::create_dir_all(folder).expect("a folder can be made");
    std::os::unix::fs::chown(folder, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
        .expect("root can give a folder away");
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(folder, private).expect("a folder's mode can be set");
}

/// A running server on `data`; its socket and log are in `run`. Killed on drop.
pub struct Server {
    process: Owned,
    run: PathBuf,
}

impl Server {
    /// A new cluster, with checksums over its pages.
    #[track_caller]
    pub fn create(data: &Path) {
        own(data);
        let mut initdb = program("initdb");
        initdb.args(["--data-checksums", "--auth=trust", "--wal-segsize=1", "--username=judge", "--pgdata"]);
        finish("initdb", initdb.arg(data).output().expect("initdb runs"));
    }

    /// Starts on what is there; a crash is recovered from. `run` must be reachable by everybody.
    #[track_caller]
    pub fn start(data: &Path, run: &Path) -> Self {
        own(run);
        // A lock file that came with the disk names a process of another time.
        let _ = std::fs::remove_file(data.join("postmaster.pid"));
        let mut command = program("postgres");
        command.arg("-D").arg(data).arg("-k").arg(run).stdout(Stdio::null());
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        let process = Owned::start("postgres", command, Some(&run.join("log")));
        let mut server = Self { process, run: run.to_owned() };
        wait::until("PostgreSQL takes connections", LIMIT, || {
            assert!(server.process.is_running(), "it ended; its log:\n{}", server.process.log_tail());
            server.psql(&["-Atqc", "select 1"]).status.success().then_some(())
        });
        server
    }

    fn psql(&self, arguments: &[&str]) -> Output {
        let mut command = program("psql");
        command.arg("-h").arg(&self.run).args(["-U", "judge", "-d", "postgres", "-v", "ON_ERROR_STOP=1"]);
        command.args(arguments).output().expect("psql runs")
    }

    /// The answer to a query, as psql prints it without decoration.
    #[track_caller]
    pub fn query(&self, query: &str) -> String {
        finish(query, self.psql(&["-Atqc", query])).trim().to_owned()
    }

    /// Every index and every page against its checksum, and every row against its index.
    #[track_caller]
    pub fn check(&self) {
        let mut command = program("pg_amcheck");
        command.arg("-h").arg(&self.run).args(["-U", "judge", "-d", "postgres", "--heapallindexed"]);
        finish("pg_amcheck", command.output().expect("pg_amcheck runs"));
    }

    /// A session that stays, for a load.
    pub fn session(&self) -> Session {
        let mut command = program("psql");
        command.arg("-h").arg(&self.run).args(["-qAt", "-U", "judge", "-d", "postgres", "-v", "ON_ERROR_STOP=1"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Owned::start("psql", command, Some(&self.run.join("psql.log")));
        let input = process.child().stdin.take().expect("stdin is piped");
        let output = BufReader::new(process.child().stdout.take().expect("stdout is piped"));
        Session { input, output, process }
    }

    /// What the server said since it was started by [`Server::start`].
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.run.join("log")).unwrap_or_default()
    }

    /// Without a checkpoint, as a crash would end it.
    pub fn stop_at_once(mut self) {
        self.process.signal(nix::sys::signal::Signal::SIGQUIT);
        self.process.wait();
    }
}

/// Ends whatever server runs on a data folder, also one that somebody else started there.
pub struct EndOnDrop(pub PathBuf);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        let mut command = program("pg_ctl");
        let _ = command.arg("-D").arg(&self.0).args(["stop", "-m", "immediate", "-s"]).output();
    }
}

/// Statements, one after another; each is committed when it returns.
pub struct Session {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    process: Owned,
}

impl Session {
    /// Whether the server said that it is done.
    pub fn execute(&mut self, statement: &str) -> bool {
        let mut line = String::new();
        writeln!(self.input, "{statement}\n\\echo done").is_ok()
            && self.output.read_line(&mut line).is_ok()
            && line.trim() == "done"
    }

    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

#[track_caller]
fn finish(what: &str, output: Output) -> String {
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what} ended with {}\n{said}{error}", output.status);
    said.into_owned()
}
