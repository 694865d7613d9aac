//! What makes the applications of a machine quiet for a mark, as an administrator of its host wrote down in `freeze.d/<machine>/`.
//!
//! | there is | does |
//! |---|---|
//! | `freeze`, `thaw` | scripts, run before everything else and after it |
//! | `application.toml`: `[postgresql]` | stops a PostgreSQL cleanly and starts it again: a point of it opens without recovery |
//! | `application.toml`: `[guest-agent]` | asks the QEMU guest agent of the machine to freeze its file systems |
//! | `application.toml`: `file-systems` | freezes file systems that are mounted on this host (`FIFREEZE`) |
//!
//! ```toml
//! file-systems = ["/srv/shop"]
//! [postgresql]
//! data = "/srv/shop/data"
//! unit = "postgresql@15-main.service"   # where systemd runs it: started by us it would end with the agent
//! [guest-agent]
//! socket = "/run/shop/guest-agent.sock"
//! ```
//!
//! *Cancellation.* What was frozen thaws in the opposite order, also where a later one could not be frozen. *Crash.* Each thaws without the agent, and
//! when its limit is over ([`tidemark_host::freeze::guard`]). *Retries.* None here: the next point.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tidemark_host::capture::freezer::FileSystemFreezer;
use tidemark_host::freeze::guard::{Commands, Guard};
use tidemark_host::freeze::{AllFrozen, FreezeError, Freezer, Frozen, ScriptFreezer, check_owner, limits};
use tidemark_host::mark::FROZEN_MAX;

const SETTINGS: &str = "application.toml";
/// Debian's and Red Hat's folders of programs, the newest version last.
const PROGRAMS: [&str; 2] = ["/usr/lib/postgresql", "/usr"];

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Settings {
    file_systems: Vec<PathBuf>,
    postgresql: Option<Postgresql>,
    guest_agent: Option<GuestAgent>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Postgresql {
    /// Its data folder.
    data: PathBuf,
    /// The unit of systemd that it runs as; absent: it is stopped and started by `pg_ctl`, and then belongs to whoever runs the agent.
    #[serde(default)]
    unit: Option<String>,
    /// Where `pg_ctl` is; absent: where it is most often.
    #[serde(default)]
    programs: Option<PathBuf>,
    /// Where the server writes what it says after it was started again; absent: nowhere, but for what its own settings say.
    #[serde(default)]
    log: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct GuestAgent {
    /// The channel of the machine's guest agent.
    socket: PathBuf,
}

/// Where nothing is written down for a machine, whoever asks for an app-consistent point vouches that the applications are quiet.
pub struct Applications {
    folder: PathBuf,
    scripts: ScriptFreezer,
}

impl Applications {
    pub fn new(folder: PathBuf) -> Self {
        Self { scripts: ScriptFreezer::new(&folder), folder }
    }
}

impl Freezer for Applications {
    fn is_set_up(&self, machine: &str) -> bool {
        self.scripts.folder_of(machine).is_some_and(|folder| folder.exists())
    }

    fn freeze(&self, machine: &str, limit: Duration) -> Result<Box<dyn Frozen>, FreezeError> {
        let Some(folder) = self.scripts.folder_of(machine) else { return self.scripts.freeze(machine, limit) };
        if !folder.exists() {
            return Ok(Box::new(FrozenByCaller));
        }
        let path = folder.join(SETTINGS);
        let settings = if path.exists() { Some(settings(&self.folder, &folder, &path)?) } else { None };
        let mut frozen = AllFrozen::default();
        if settings.is_none() || folder.join("freeze").exists() || folder.join("thaw").exists() {
            frozen.push(self.scripts.freeze(machine, limit)?);
        }
        let Some(settings) = settings else { return Ok(Box::new(frozen)) };
        if let Some(commands) = settings.postgresql.as_ref().map(|of| postgresql(of, limit)).transpose()?.flatten() {
            frozen.push(Box::new(Guard::freeze(&commands, limits(limit))?));
        }
        if let Some(GuestAgent { socket }) = &settings.guest_agent {
            frozen.push(Box::new(Guard::freeze(&guest_agent(socket)?, limits(limit))?));
        }
        if !settings.file_systems.is_empty() {
            // A little longer than the mark may take, which looks whether it was let go on.
            frozen.push(FileSystemFreezer::freeze(&settings.file_systems, FROZEN_MAX + Duration::from_secs(1))?);
        }
        Ok(Box::new(frozen))
    }
}

struct FrozenByCaller;

impl Frozen for FrozenByCaller {
    fn thaw(self: Box<Self>) -> Result<(), FreezeError> {
        Ok(())
    }
}

/// Whoever can change it can have programs run as the agent.
fn settings(top: &Path, folder: &Path, path: &Path) -> Result<Settings, FreezeError> {
    for path in [top, folder, path] {
        check_owner(path)?;
    }
    let wrong = |reason: String| FreezeError::Settings { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    toml::from_str(&text).map_err(|error| wrong(super::settings_in_words(&text, &error)))
}

/// How a PostgreSQL is stopped cleanly, so that what lies on its disk is a database that was shut down, and started again as it was.
/// `None`: it does not run.
fn postgresql(of: &Postgresql, limit: Duration) -> Result<Option<Commands>, FreezeError> {
    let wrong = |reason: String| FreezeError::Settings { path: of.data.clone(), reason };
    let owner = of.data.metadata().map_err(|error| wrong(error.to_string()))?;
    if !of.data.join("postmaster.pid").exists() {
        return Ok(None);
    }
    if let Some(unit) = &of.unit {
        let asks = |what: &str| ["/usr/bin/systemctl", what, "--", unit].map(OsString::from).to_vec();
        return Ok(Some(Commands { freeze: asks("stop"), thaw: asks("start"), environment: Vec::new() }));
    }
    let pg_ctl = match &of.programs {
        Some(folder) => Some(folder.join("pg_ctl")),
        None => find_pg_ctl(),
    };
    let pg_ctl = pg_ctl.filter(|path| path.is_file());
    let pg_ctl = pg_ctl.ok_or_else(|| wrong("pg_ctl is not found: say where by `programs`".to_owned()))?;
    // As it was started: the program, then its options, quoted for a shell.
    let started = std::fs::read_to_string(of.data.join("postmaster.opts")).map_err(|error| wrong(error.to_string()))?;
    let options = started.trim().split_once(' ').map_or("", |(_, options)| options.trim());
    let mut base: Vec<OsString> = Vec::new();
    if nix::unistd::geteuid().is_root() && owner.uid() != 0 {
        // PostgreSQL refuses to be run by root.
        let (user, group) = (owner.uid().to_string(), owner.gid().to_string());
        base.extend(
            ["/usr/bin/setpriv", "--reuid", &user, "--regid", &group, "--clear-groups", "--"].map(OsString::from),
        );
    }
    base.extend([pg_ctl.into_os_string(), "--pgdata".into(), of.data.clone().into_os_string()]);
    let seconds = limit.as_secs().max(1).to_string();
    let with = |more: &[&str]| base.iter().cloned().chain(more.iter().map(OsString::from)).collect::<Vec<_>>();
    let freeze = with(&["stop", "--mode=fast", "--wait", "--timeout", &seconds, "--silent"]);
    let mut thaw = with(&["start", "--wait", "--timeout", &seconds, "--silent", "-o", options]);
    if let Some(log) = &of.log {
        thaw.extend(["--log".into(), log.clone().into_os_string()]);
    }
    Ok(Some(Commands { freeze, thaw, environment: vec![("LC_ALL".into(), "C".into())] }))
}

fn find_pg_ctl() -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir(PROGRAMS[0])
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin/pg_ctl"))))
        .filter(|(_, path)| path.is_file())
        .collect();
    found.sort();
    found.pop().map(|(_, path)| path).or_else(|| Some(Path::new(PROGRAMS[1]).join("bin/pg_ctl")))
}

/// The guest agent is asked by this program, run by the guard, so that it is asked also when the agent is gone.
fn guest_agent(socket: &Path) -> Result<Commands, FreezeError> {
    let own = std::env::current_exe();
    let own = own.map_err(|source| FreezeError::Run { path: "/proc/self/exe".into(), source })?;
    let asks = |what: &str| {
        let arguments = [own.as_os_str(), "agent".as_ref(), "guest".as_ref(), what.as_ref(), socket.as_os_str()];
        arguments.map(OsString::from).to_vec()
    };
    Ok(Commands { freeze: asks("freeze"), thaw: asks("thaw"), environment: Vec::new() })
}

/// `tidemark agent guest freeze|thaw SOCKET`.
pub async fn ask_guest(socket: &Path, thaw: bool) -> Result<(), super::RoleError> {
    use tidemark_hypervisor::guest;
    use tidemark_hypervisor::hypervisor::Question;
    let question = if thaw { Question::Thaw } else { Question::Freeze };
    let failed = |reason: String| super::RoleError {
        message: format!("the guest agent at {} does not do it: {reason}", socket.display()),
        help: "see that it runs in the guest, and that nobody else has its channel open".to_owned(),
    };
    let stream = tokio::net::UnixStream::connect(socket).await.map_err(|error| failed(error.to_string()))?;
    guest::ask(stream, &question, FROZEN_MAX).await.map(drop).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const LIMIT: Duration = Duration::from_secs(60);

    fn folder(top: &Path) -> PathBuf {
        let folder = top.join("freeze.d").join("web");
        std::fs::create_dir_all(&folder).unwrap();
        for folder in [top.join("freeze.d"), folder.clone()] {
            std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        folder
    }

    fn install(path: &Path, content: &str) {
        std::io::Write::write_all(&mut std::fs::File::create(path).unwrap(), content.as_bytes()).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn scripts_freeze_where_there_are_some_and_the_caller_vouches_elsewhere() {
        let top = tempfile::tempdir().unwrap();
        let freezer = Applications::new(top.path().join("freeze.d"));
        freezer.freeze("web", LIMIT).unwrap().thaw().unwrap();
        let folder = folder(top.path());
        // Scripts that are half there, or that fail, are no vouching.
        assert!(matches!(freezer.freeze("web", LIMIT), Err(FreezeError::NotConfigured { .. })));
        install(&folder.join("freeze"), "#!/bin/sh\nexit 3\n");
        install(&folder.join("thaw"), "#!/bin/sh\n");
        assert!(matches!(freezer.freeze("web", LIMIT), Err(FreezeError::Failed { .. })));
    }

    #[test]
    fn what_is_frozen_first_goes_on_last_also_when_a_later_one_cannot_be() {
        let top = tempfile::tempdir().unwrap();
        let folder = folder(top.path());
        let said = top.path().join("said");
        let line = |what: &str| format!("#!/bin/sh\necho {what} >> {}\n", said.display());
        install(&folder.join("freeze"), &line("frozen"));
        install(&folder.join("thaw"), &line("thawed"));
        let freezer = Applications::new(top.path().join("freeze.d"));
        // A file system that is none.
        install(&folder.join(SETTINGS), "file-systems = [\"/proc/self\"]\n");
        assert!(matches!(freezer.freeze("web", LIMIT), Err(FreezeError::FileSystem { .. })));
        assert_eq!(std::fs::read_to_string(&said).unwrap(), "frozen\nthawed\n");
        // One whose database does not run is quiet.
        install(&folder.join(SETTINGS), &format!("[postgresql]\ndata = \"{}\"\n", top.path().display()));
        freezer.freeze("web", LIMIT).unwrap().thaw().unwrap();
        for wrong in ["data = 3", "[postgresql]\n", "[postgresql]\ndata = \"/nowhere/at/all\"\n"] {
            install(&folder.join(SETTINGS), wrong);
            let error = freezer.freeze("web", LIMIT).map(drop).unwrap_err();
            assert!(matches!(error, FreezeError::Settings { .. }) && !error.help().is_empty(), "{wrong}: {error}");
        }
        std::fs::set_permissions(folder.join(SETTINGS), std::fs::Permissions::from_mode(0o722)).unwrap();
        assert!(matches!(freezer.freeze("web", LIMIT).map(drop), Err(FreezeError::Unsafe { .. })));
        let lines = std::fs::read_to_string(&said).unwrap();
        assert_eq!(lines.matches("frozen").count(), lines.matches("thawed").count(), "{lines}");
    }
}
