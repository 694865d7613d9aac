//! The package in a real root: made by mmdebstrap, installed by its own dpkg, roles run from the installed files by what their
//! units say. There is no systemd in it: what it does of a unit that counts here (owner of the state, user, command) is
//! done by this test.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tidemark_tests::process::Owned;
use tidemark_tests::{need, need_root, tools, wait};

use super::{ROLES, package, succeeds};

/// Debian's packages come over a network that may be slow.
const LIMIT: Duration = Duration::from_secs(60);

struct Root {
    folder: tempfile::TempDir,
    running: BTreeMap<&'static str, Owned>,
}

/// `None`: no root can be made here.
fn debian(test: &str) -> Option<Root> {
    let folder = tempfile::tempdir().unwrap();
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("stable").to_owned();
    let made = tools::command("mmdebstrap")
        .args(["--quiet", "--variant=essential", "--include=systemd", &suite])
        .arg(folder.path().join("root"))
        .output()
        .unwrap();
    if !made.status.success() {
        let why = String::from_utf8_lossy(&made.stderr);
        tools::skipped(test, &format!("no root can be made: {}", why.lines().last().unwrap_or_default()));
        return None;
    }
    Some(Root { folder, running: BTreeMap::new() })
}

impl Root {
    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("root").join(path.trim_start_matches('/'))
    }

    /// A command in the root, in a mount namespace of its own with what every process needs.
    fn inside(&self, user: Option<(u32, u32)>, command: &[&str]) -> Command {
        let script = "mount -t proc proc \"$0/proc\" && mount --rbind /dev \"$0/dev\" && exec chroot \"$@\"";
        let mut run = tools::command("unshare");
        run.args(["--mount", "sh", "-c", script]).arg(self.path(""));
        if let Some((user, group)) = user {
            run.arg(format!("--userspec={user}:{group}"));
        }
        run.arg(self.path("")).args(command).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        run
    }

    #[track_caller]
    fn run(&self, command: &[&str]) -> String {
        succeeds(&mut self.inside(None, command))
    }

    fn owner(&self) -> (u32, u32) {
        let users = std::fs::read_to_string(self.path("etc/passwd")).unwrap();
        let line = users.lines().find(|line| line.starts_with("tidemark:")).expect("the package's user").to_owned();
        let mut ids = line.split(':').skip(2).map(|id| id.parse().unwrap());
        (ids.next().unwrap(), ids.next().unwrap())
    }

    /// What the installed unit of a role says.
    fn unit(&self, role: &str) -> BTreeMap<String, String> {
        let text =
            std::fs::read_to_string(self.path(&format!("usr/lib/systemd/system/tidemark-{role}.service"))).unwrap();
        text.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect()
    }

    /// As systemd does it: the state belongs to the unit's user, then the command.
    fn start(&mut self, role: &'static str) {
        let unit = self.unit(role);
        let user = unit.contains_key("User").then(|| self.owner());
        let state = self.path("var/lib").join(&unit["StateDirectory"]);
        std::fs::create_dir_all(&state).unwrap();
        if let Some((user, group)) = user {
            give(&state, user, group);
        }
        let command: Vec<&str> = unit["ExecStart"].split(' ').collect();
        let mut run = self.inside(user, &command);
        run.stdin(Stdio::null()).stdout(Stdio::null());
        let log = self.folder.path().join(format!("{role}.log"));
        self.running.insert(role, Owned::start(role, run, Some(&log)));
    }

    fn stop(&mut self, role: &str) {
        let ended = self.running.remove(role).expect("it runs").stop(LIMIT);
        assert!(ended.success(), "{role}: {}", self.log(role));
    }

    fn log(&self, role: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("{role}.log"))).unwrap_or_default()
    }
}

fn give(path: &Path, user: u32, group: u32) {
    chown(path, Some(user), Some(group)).unwrap();
    if path.is_dir() {
        std::fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), user, group));
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Status and text of an answer.
fn asked(port: u16, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, answer)
}

#[test]
fn a_machine_that_is_protected_by_the_installed_package_is_upgraded_without_comparing_a_byte() {
    need!("mmdebstrap", "dpkg-deb", "python3", "unshare", "chroot");
    need_root!("a root of its own is made and entered");
    let Some(mut root) =
        debian("a_machine_that_is_protected_by_the_installed_package_is_upgraded_without_comparing_a_byte")
    else {
        return;
    };
    let [first, second] = ["1.0-1", "1.1-1"].map(|version| {
        let made = package(&root.path("tmp"), version);
        format!("/tmp/{}", made.file_name().unwrap().to_str().unwrap())
    });
    root.run(&["dpkg", "-i", &first]);
    // What an administrator changes: where it listens.
    let [api, control, data, of_agent, of_server] = [(); 5].map(|()| free_port());
    let config = root.path("etc/tidemark/tidemark.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text
        .replace("0.0.0.0:7321", &format!("127.0.0.1:{api}"))
        .replace("0.0.0.0:7322", &format!("127.0.0.1:{control}"))
        .replace("0.0.0.0:7320", &format!("127.0.0.1:{data}"))
        .replace("# metrics-listen = \"127.0.0.1:7324\"", &format!("metrics-listen = \"127.0.0.1:{of_agent}\""))
        .replace("# metrics-listen = \"127.0.0.1:7325\"", &format!("metrics-listen = \"127.0.0.1:{of_server}\""));
    std::io::Write::write_all(&mut std::fs::File::create(&config).unwrap(), text.as_bytes()).unwrap();

    let made: Value = serde_json::from_str(&root.run(&["tidemark", "config-server", "init", "--json"])).unwrap();
    root.start("config-server");
    let server = format!("https://127.0.0.1:{api}");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (token, ca) = (text(&made["token_file"]), text(&made["ca_file"]));
    let client = |root: &Root, arguments: &[&str]| -> Option<Value> {
        let place = ["--server", &server, "--token-file", &token, "--ca-file", &ca, "--json"];
        let output = root.inside(None, &[&["tidemark"], arguments, &place].concat()).output().unwrap();
        output.status.success().then(|| serde_json::from_slice(&output.stdout).ok())?
    };
    wait::until("the configuration server answers", LIMIT, || client(&root, &["status"]));
    for (role, passphrase) in [("agent", "agent_passphrase"), ("process-server", "process_server_passphrase")] {
        let file = root.path("tmp/passphrase");
        std::io::Write::write_all(&mut std::fs::File::create(&file).unwrap(), text(&made[passphrase]).as_bytes())
            .unwrap();
        let fingerprint = text(&made["ca_fingerprint"]);
        let register = ["tidemark", role, "register", "--server", &server, "--no-wait", "--passphrase-file"];
        let register = [&register[..], &["/tmp/passphrase", "--ca-fingerprint", &fingerprint, "--json"]].concat();
        let answer = root.inside(None, &register).output().unwrap();
        if role == "process-server" {
            let waiting = client(&root, &["process-server", "list"]).unwrap();
            client(&root, &["process-server", "approve", waiting[0]["id"].as_str().unwrap()]).expect("approved");
            root.run(&register);
        } else {
            assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        }
        root.start(role);
    }
    std::fs::create_dir_all(root.path("srv")).unwrap();
    tidemark_tests::image::make_mixed(&root.path("srv/disk.img"), 8 << 20, 1);
    wait::until("the machine is protected", LIMIT, || client(&root, &["protect", "web", "--disk", "/srv/disk.img"]));
    let replicated = |root: &Root| {
        let status = client(root, &["status", "web"])?;
        (status["state"] == "protected" && status["health"] == "ok").then_some(status)
    };
    wait::until("it is replicated", LIMIT, || replicated(&root));
    let point = client(&root, &["point", "create", "web"]).expect("a point");

    // What somebody who collects figures and asks for health gets.
    for (port, figures) in [
        (of_agent, &["tidemark_rpo_seconds{machine=\"web\"", "tidemark_sent_bytes_total{", "tidemark_problems{"][..]),
        (
            of_server,
            &[
                "tidemark_recovery_points{machine=\"web\"} ",
                "tidemark_received_bytes_total{} ",
                "tidemark_stored_bytes{",
            ],
        ),
    ] {
        let (status, text) = asked(port, "/metrics");
        assert!(status == 200 && figures.iter().all(|line| text.contains(line)), "{figures:?} in {status} {text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
        let (status, text) = asked(port, "/ready");
        assert!(status == 200 && text.contains("\"ready\""), "{status} {text}");
    }

    // The files are replaced under the roles that run; then each is restarted, as the package's script has systemd do it.
    root.run(&["dpkg", "-i", "--force-confold", &second]);
    for role in ["config-server", "process-server", "agent"] {
        root.stop(role);
        root.start(role);
    }
    let status = wait::until("it is replicated again", LIMIT, || {
        // Said by the agent that runs now.
        replicated(&root).filter(|status| status["disks"][0]["positions"]["durable"].is_string())
    });
    let compared = &status["disks"][0]["compare"]["compared_bytes"];
    assert_eq!(compared, 0, "{status}\n{}", root.log("agent"));
    assert_eq!(root.log("agent").matches("ScanWhole").count(), 1, "only when it was protected: {}", root.log("agent"));
    let id = text(&point["id"]);
    client(&root, &["point", "verify", "web", &id]).expect("the point of before is whole");
    client(&root, &["point", "create", "web"]).expect("a point after the upgrade");
    for role in ["agent", "process-server", "config-server"] {
        root.stop(role);
    }
    root.run(&["dpkg", "--purge", "tidemark"]);
    assert!(!root.path("usr/bin/tidemark").exists() && !config.exists());
    for role in ROLES {
        assert!(
            root.path(&format!("var/lib/tidemark/{role}")).is_dir(),
            "the state of the {role} went with the package"
        );
    }
}
