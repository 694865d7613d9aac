//! The Debian package: built, installed into a root of its own, upgraded, removed and purged; and its units.

mod root;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tidemark_tests::block::Loop;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::{Site, binary, need, need_root, site, tools, wait};

const ROLES: [&str; 3] = ["agent", "process-server", "config-server"];
/// systemd's own measure, of ten: 1 for who may do nothing, 9.6 for who may do all.
const EXPOSURE_MAX: [(&str, u32); 3] = [("agent", 40), ("process-server", 15), ("config-server", 15)];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&stderr));
    text
}

fn package(out: &Path, version: &str) -> PathBuf {
    let mut build = Command::new(repository().join("packaging/deb"));
    build.arg("--binary").arg(binary::tidemark()).arg("--out").arg(out).args(["--version", version]);
    // Nobody downloads this one.
    build.env("DPKG_DEB_COMPRESSOR_TYPE", "none");
    PathBuf::from(succeeds(&mut build).trim())
}

/// dpkg's view of a machine, without a machine: its scripts run here and are told where the root is.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "etc", "usr", "tmp"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        std::fs::File::create(root.path().join("var/lib/dpkg/status")).unwrap();
        Self(root)
    }

    fn dpkg(&self) -> Command {
        let mut dpkg = tools::command("dpkg");
        dpkg.arg(format!("--root={}", self.0.path().display()));
        dpkg.args(["--force-script-chrootless", "--force-depends", "--force-confold", "--force-not-root"]);
        dpkg
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::File::create(path).unwrap().write_all(text.as_bytes()).unwrap();
    }
}

#[test]
fn the_package_is_installed_upgraded_removed_and_purged_and_state_stays() {
    need!("dpkg", "dpkg-deb", "python3", "systemd-sysusers");
    need_root!("dpkg sets owners");
    let out = tempfile::tempdir().unwrap();
    let (first, second) = (package(out.path(), "1.0-1"), package(out.path(), "1.1-1"));
    let root = Root::new();
    succeeds(root.dpkg().arg("-i").arg(&first));
    for path in [
        "usr/bin/tidemark",
        "usr/share/bash-completion/completions/tidemark",
        "usr/share/zsh/vendor-completions/_tidemark",
        "usr/share/fish/vendor_completions.d/tidemark.fish",
        "usr/share/man/man1/tidemark.1.gz",
        "usr/share/man/man1/tidemark-agent-run.1.gz",
        "usr/share/doc/tidemark/copyright",
    ] {
        assert!(root.path(path).is_file(), "{path}");
    }
    for role in ROLES {
        assert!(root.text(&format!("usr/lib/systemd/system/tidemark-{role}.service")).contains(&format!("{role} run")));
    }
    assert!(root.text("etc/passwd").contains("tidemark:"), "its user was made");
    let config = root.path("etc/tidemark/tidemark.toml");
    assert_eq!(config.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(
        root.text("etc/tidemark/tidemark.toml"),
        std::fs::read_to_string(repository().join("packaging/tidemark.toml")).unwrap()
    );
    let version = succeeds(Command::new(root.path("usr/bin/tidemark")).arg("--version"));
    assert!(version.starts_with("tidemark "), "{version}");

    // What an administrator wrote and what a role keeps survive an upgrade as they are.
    root.write("etc/tidemark/tidemark.toml", "[agent]\ndir = \"/elsewhere\"\n");
    root.write("var/lib/tidemark/agent/identity.pem", "a key");
    succeeds(root.dpkg().arg("-i").arg(&second));
    assert!(root.text("etc/tidemark/tidemark.toml").contains("/elsewhere"));
    assert_eq!(root.text("var/lib/tidemark/agent/identity.pem"), "a key");
    assert!(root.text("var/lib/dpkg/status").contains("Version: 1.1-1"));

    succeeds(root.dpkg().args(["--remove", "tidemark"]));
    assert!(
        !root.path("usr/bin/tidemark").exists() && !root.path("usr/lib/systemd/system/tidemark-agent.service").exists()
    );
    assert!(root.text("etc/tidemark/tidemark.toml").contains("/elsewhere"), "removed, not purged");
    succeeds(root.dpkg().args(["--purge", "tidemark"]));
    assert!(!config.exists());
    assert_eq!(root.text("var/lib/tidemark/agent/identity.pem"), "a key", "keys and replicas are nobody's to delete");
}

#[test]
fn the_units_are_sound_and_may_do_little() {
    need!("systemd-analyze");
    let folder = tempfile::tempdir().unwrap();
    for (role, exposure) in EXPOSURE_MAX {
        let name = format!("tidemark-{role}.service");
        let text = std::fs::read_to_string(repository().join("packaging/systemd").join(&name)).unwrap();
        assert!(text.contains("\nType=notify\n") && text.contains("\nWatchdogSec="), "{name}");
        let unit = folder.path().join(&name);
        let here = text.replace("/usr/bin/tidemark", binary::tidemark().to_str().unwrap());
        std::fs::File::create(&unit).unwrap().write_all(here.as_bytes()).unwrap();
        let Output { status, stderr, .. } =
            tools::command("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output().unwrap();
        let said = String::from_utf8_lossy(&stderr);
        assert!(status.success() && !said.contains(&name), "{name}: {said}");
        let mut security = tools::command("systemd-analyze");
        security.args(["security", "--offline=true", &format!("--threshold={exposure}")]).arg(&unit);
        succeeds(&mut security);
    }
}

/// System calls that a set of systemd's lets through, with those of the sets in it.
fn calls_of(set: &str) -> BTreeSet<String> {
    if !set.starts_with('@') {
        return BTreeSet::from([set.to_owned()]);
    }
    let listed = succeeds(tools::command("systemd-analyze").args(["syscall-filter", set]));
    let names = listed.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    names.flat_map(calls_of).collect()
}

/// What systemd makes of the agent's unit that counts for a tracked device: capabilities, no new privileges, nothing to write
/// in /sys but what the unit names. Its calls are watched, and compared with those that the unit lets through.
#[test]
fn an_agent_tracks_a_device_with_what_its_unit_gives_it() {
    need!("losetup", "strace", "setpriv", "unshare", "systemd-analyze");
    need_root!("programs in the kernel");
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        let test = "an_agent_tracks_a_device_with_what_its_unit_gives_it";
        return tools::skipped(test, "needs a kernel that describes its types");
    }
    let text = std::fs::read_to_string(repository().join("packaging/systemd/tidemark-agent.service")).unwrap();
    let settings = |name: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        lines.flat_map(|line| line.split(' ').map(str::to_owned)).collect()
    };
    let capabilities: Vec<String> = settings("CapabilityBoundingSet")
        .iter()
        .map(|name| format!("+{}", name.strip_prefix("CAP_").unwrap().to_lowercase()))
        .collect();
    let writable = settings("ReadWritePaths");
    let pins = if writable.iter().any(|path| path == "-/sys/fs/bpf") { "rw" } else { "ro" };

    let mut site = Site::prepare();
    for role in ["config-server", "process-server"] {
        site.start_role(role);
    }
    let calls = site.path("calls");
    let mut agent = tools::command("strace");
    // The tracer is a process beside it, so that a signal reaches the agent.
    agent.args(["-D", "-f", "-q", "-s", "0", "-o"]).arg(&calls).args(["unshare", "--mount", "sh", "-c"]);
    let sandbox = "mount -o remount,bind,ro /sys && mount -o remount,bind,$0 /sys/fs/bpf && exec \"$@\"";
    agent.arg(sandbox).arg(pins).args(["setpriv", "--no-new-privs"]);
    agent.arg(format!("--bounding-set=-all,{}", capabilities.join(","))).arg(binary::tidemark());
    site.start_role_as("agent", agent);
    site.wait_connected();
    let image = site.path("disk.img");
    image::make_mixed(&image, 4 * MIB, 5);
    let device = Loop::attach(&image);
    site.json(&["protect", "web", "--disk", device.path().to_str().unwrap(), "--via", "bpf"]);
    site.wait_protected("web");
    std::fs::OpenOptions::new().write(true).open(device.path()).unwrap().write_all_at(&[7; 4096], MIB).unwrap();
    let point = site.point("web");
    let exported = site.export("web", point["id"].as_str().unwrap(), "exported.raw", "raw");
    image::assert_same(&image, &exported);
    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    site.down();

    let allowed: BTreeSet<String> = settings("SystemCallFilter").iter().flat_map(|set| calls_of(set)).collect();
    let made = wait::until("the tracer wrote everything", site::LIMIT, || {
        std::fs::read_to_string(&calls).ok().filter(|text| text.trim_end().ends_with("+++ exited with 0 +++"))
    });
    // From where it is the agent.
    let made = made.split_once("/tidemark\"").expect("the agent was started").1;
    let name = |line: &str| {
        let call = line.split_once(' ')?.1.trim_start();
        let name = call.split_once('(')?.0;
        name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_').then(|| name.to_owned())
    };
    let used: BTreeSet<String> = made.lines().filter_map(name).collect();
    assert!(used.contains("bpf") && used.contains("fsync") && used.len() > 40, "{used:?}");
    let refused: Vec<&String> = used.difference(&allowed).collect();
    assert!(refused.is_empty(), "the unit does not let through {refused:?}");
}

/// As systemd starts it: a role says when it answers, that it lives, and that it ends.
#[test]
fn a_role_tells_the_service_manager_that_it_is_ready_lives_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let heard = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    heard.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let mut role = Command::new(binary::tidemark());
    role.args(["config-server", "run", "--dir"]).arg(folder.path().join("site"));
    role.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    let mut role = role.spawn().unwrap();
    let next = || {
        let mut buffer = [0; 64];
        let bytes = heard.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..bytes]).into_owned()
    };
    assert_eq!([next(), next(), next()], ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(role.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let mut last = next();
    while last == "WATCHDOG=1" {
        last = next();
    }
    assert_eq!(last, "STOPPING=1");
    assert!(role.wait().unwrap().success());
}
