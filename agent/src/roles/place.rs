//! Where a role runs: in the folder of an all-in-one, or as the configuration of a machine says.

#[cfg(unix)]
mod folder;

use std::fs::{File, TryLockError};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tidemark_base::storage::{RealStorage, Storage, create_private_folder};
use tidemark_transport::{Identity, Role};

use super::RoleError;
use super::link::Address;

/// In a role's own folder.
pub const IDENTITY_FILE: &str = "identity.pem";

/// `/etc/tidemark/tidemark.toml`: only the sections of the roles that run on a machine are read.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    pub agent: Option<RoleConfig>,
    pub process_server: Option<RoleConfig>,
    pub config_server: Option<RoleConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RoleConfig {
    /// State of the role; for agents and process servers with their `identity.pem`.
    pub dir: PathBuf,
    /// Where it listens: process servers for hosts, configuration servers for their API.
    #[serde(default)]
    pub listen: Option<SocketAddr>,
    /// Configuration servers: where agents and process servers dial.
    #[serde(default)]
    pub control_listen: Option<SocketAddr>,
    /// Configuration servers: names and addresses under which they are reached, for their certificate.
    #[serde(default)]
    pub names: Vec<String>,
    /// Configuration servers: `host=/run/postgresql user=tidemark dbname=tidemark` instead of the embedded database.
    #[serde(default)]
    pub database: Option<String>,
    /// The others: where metrics and health are told over plain HTTP, such as `127.0.0.1:7324`; absent: nowhere.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// The others: as people know it; absent: as it registered.
    #[serde(default)]
    pub name: Option<String>,
    /// The others: where that is, HOST:PORT, or several of them with commas between; absent: where they registered.
    #[serde(default)]
    pub config_server: Option<String>,
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, RoleError> {
        let wrong = |reason: String| RoleError {
            message: format!("cannot use the configuration {}: {reason}", path.display()),
            help: "write it as packaging/tidemark.toml shows, or run a role of an all-in-one with --dir".to_owned(),
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        toml::from_str(&text).map_err(|error| wrong(super::settings_in_words(&text, &error)))
    }

    pub fn of(self, role: Role) -> Option<RoleConfig> {
        match role {
            Role::Agent => self.agent,
            Role::ProcessServer => self.process_server,
            Role::ConfigServer => self.config_server,
        }
    }
}

/// What an agent or a process server needs to know of its surroundings.
pub struct Place {
    pub identity: Identity,
    /// As people know it.
    pub name: String,
    /// The role's own folder.
    pub state: PathBuf,
    /// A short path of mode 0700 for sockets.
    pub run: PathBuf,
    /// Where it should listen, if it does; port 0: any.
    pub listen: SocketAddr,
    pub config_server: Address,
    /// Where metrics and health are told.
    pub metrics: Option<SocketAddr>,
    /// Notes the address that was bound; `None`: it is as configured.
    note: Option<Note>,
    /// Held while the role runs.
    _lock: Option<Box<dyn Send + Sync>>,
}

type Note = Box<dyn Fn(SocketAddr) -> Result<(), RoleError> + Send + Sync>;

impl Place {
    pub fn configured(config: RoleConfig, role: Role) -> Result<Self, RoleError> {
        let missing = |what: &str| RoleError {
            message: format!("the section of the {role} does not say {what}"),
            help: "add it; packaging/tidemark.toml shows every setting".to_owned(),
        };
        let registered = super::register::registered(&config.dir);
        let (control, name) = registered.map_or((None, None), |registered| (Some(registered.control), registered.name));
        let address = config
            .config_server
            .or(control)
            .ok_or_else(|| missing("where the configuration server is (config-server), and it is not registered"))?;
        let unusable = |error: std::io::Error| RoleError {
            message: format!("cannot use the folder {}: {error}", config.dir.display()),
            help: "name a folder of its own that this user can write".to_owned(),
        };
        create_private_folder(&config.dir).map_err(unusable)?;
        let storage: Arc<dyn Storage> = RealStorage::open_folder(&config.dir);
        let identity =
            Identity::load(&*storage, IDENTITY_FILE).map_err(|error| RoleError::new(&error, error.help()))?;
        if identity.peer().role() != role {
            return Err(RoleError {
                message: format!("the identity in {} is {}, which is no {role}", config.dir.display(), identity.peer()),
                help: "give each role a folder and an identity of its own".to_owned(),
            });
        }
        let lock = lock(&config.dir, role)?;
        let run = config.dir.join("run");
        create_private_folder(&run).map_err(unusable)?;
        Ok(Self {
            identity,
            name: config.name.or(name).unwrap_or_else(super::host_name),
            run,
            state: config.dir,
            listen: config.listen.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 7320)),
            metrics: config.metrics_listen,
            config_server: Arc::new(move || Some(address.clone())),
            note: None,
            _lock: Some(Box::new(lock)),
        })
    }

    /// The role's own folder.
    pub fn storage(&self) -> Arc<dyn Storage> {
        RealStorage::open_folder(&self.state)
    }

    /// What its link keeps; blocks.
    pub fn kept(&self) -> Arc<super::link::Kept> {
        super::link::Kept::open(self.storage())
    }

    /// The address that a process server listens on, for its next start.
    pub fn note_process_server(&self, address: SocketAddr) -> Result<(), RoleError> {
        self.note.as_ref().map_or(Ok(()), |note| note(address))
    }

    /// Whether another port will do, when the one that was used before is taken.
    pub fn may_move(&self) -> bool {
        self.note.is_some() && self.listen.port() != 0
    }
}

/// One process at a time: two would both write the logs and cursors of the same disks.
fn lock(folder: &Path, role: Role) -> Result<File, RoleError> {
    // A process server locks its folder itself, for offline verbs as well.
    let path = folder.join("running.lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let locked = file.map_err(TryLockError::Error).and_then(|file| file.try_lock().map(|()| file));
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => RoleError {
            message: format!("another process runs the {role} in {}", folder.display()),
            help: "stop that one first; where two are meant, give each a folder and an identity of its own".to_owned(),
        },
        TryLockError::Error(error) => RoleError {
            message: format!("cannot lock {}: {error}", path.display()),
            help: "name a folder of its own that this user can write".to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_are_wrong_are_said_in_plain_words_with_their_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tidemark.toml");
        for (text, words) in [
            ("[agent]\ndir = \"/x\"\nlistn = \"[::]:1\"\n", "line 3: `listn` is not known there; known: dir, listen"),
            ("[agent]\ndir = 7\n", "line 2: it is the number 7, and must be"),
            ("\n[agent]\n", "line 2: `dir` is missing"),
        ] {
            std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), text.as_bytes()).unwrap();
            let said = Config::read(&path).err().unwrap().message;
            assert!(said.contains(words) && !said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn the_configuration_that_is_installed_is_sound() {
        let config: Config = toml::from_str(include_str!("../../../packaging/tidemark.toml")).unwrap();
        assert!(config.agent.unwrap().config_server.is_none());
        assert_eq!(config.process_server.unwrap().listen.unwrap().port(), 7320);
        let config_server = config.config_server.unwrap();
        assert_eq!((config_server.listen.unwrap().port(), config_server.control_listen.unwrap().port()), (7321, 7322));
    }

    #[test]
    fn a_role_runs_once_in_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path(), Role::Agent).unwrap();
        let error = lock(folder.path(), Role::Agent).unwrap_err();
        assert!(error.message.contains("another process runs the agent in"), "{error:?}");
        drop(first);
        lock(folder.path(), Role::Agent).unwrap();
    }
}
