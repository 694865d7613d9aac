//! The configuration server as a process runs it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tidemark_base::storage::replace_file;
use tidemark_base::{Clock, SystemClock, Timestamp};
use tidemark_config_server::backup::{self, Head};
use tidemark_config_server::database::DatabaseSetting;
use tidemark_config_server::{ConfigServer, Options, StartError};
use tidemark_transport::recovery::RecoveryKey;
use tidemark_transport::{Identity, Role};

use super::RoleError;
use crate::folder::{ConfigServerAddresses, Folder, FolderError, RoleLock};

impl From<tidemark_config_server::StartError> for RoleError {
    fn from(error: tidemark_config_server::StartError) -> Self {
        RoleError::new(&error, error.help())
    }
}

pub struct RunningConfigServer {
    pub server: ConfigServer,
    pub addresses: ConfigServerAddresses,
    _lock: RoleLock,
}

/// What a configuration server is told beside its folder.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub listen: Option<SocketAddr>,
    pub control_listen: Option<SocketAddr>,
    /// Names and addresses under which it is reached.
    pub names: Vec<String>,
    /// Of PostgreSQL; absent: the embedded database.
    pub database: Option<String>,
}

impl Settings {
    fn database(&self, folder: &Folder) -> DatabaseSetting {
        match &self.database {
            Some(text) => DatabaseSetting::Postgres(text.clone()),
            None => DatabaseSetting::Sqlite(folder.role_path(Role::ConfigServer).join(DATABASE_FILE)),
        }
    }
}

impl Settings {
    /// Under which names and addresses agents and process servers find it; none: where it listens.
    fn reached_at(&self, listens: IpAddr) -> Vec<String> {
        let own = if listens.is_unspecified() { super::host_name() } else { listens.to_string() };
        match listens.is_unspecified() || !self.names.is_empty() {
            true => self.names.iter().cloned().chain([own]).filter(|name| is_host(name)).collect(),
            false => Vec::new(),
        }
    }
}

const DATABASE_FILE: &str = "config.db";

/// What the first set-up made, to be shown once.
pub struct Initialised {
    /// When there was one before this one, which changed nothing of it.
    pub before: Option<Timestamp>,
    pub fingerprint: String,
    /// For an agent and for a process server; `None`: it runs, and makes them itself.
    pub passphrases: Option<[String; 2]>,
    /// `None`: there was one already.
    pub recovery_key: Option<RecoveryKey>,
}

/// The first set-up: authority, token, database, and a passphrase for each role. One that was made before stays as it is, and is told.
pub async fn init(folder: &Folder, settings: &Settings) -> Result<Initialised, RoleError> {
    let before = folder.in_use_since()?;
    let _lock = match folder.lock(Role::ConfigServer) {
        Err(FolderError::InUse { .. }) if before.is_some() => {
            let fingerprint = folder.authority()?.fingerprint();
            return Ok(Initialised { before, fingerprint, passphrases: None, recovery_key: None });
        }
        lock => lock?,
    };
    folder.token()?;
    let (authority, database) = (folder.authority()?, settings.database(folder));
    let fingerprint = authority.fingerprint();
    let storage = folder.role(Role::ConfigServer);
    let recovery_key = match backup::keeper(&*storage)? {
        Some(_) => None,
        None => Some(backup::new_recovery_key(&*storage)?),
    };
    let passphrases =
        tokio::task::spawn_blocking(move || tidemark_config_server::init(&*storage, &database, authority))
            .await
            .map_err(|error| RoleError { message: error.to_string(), help: "see the log".to_owned() })?
            .map_err(RoleError::from)?;
    Ok(Initialised { before, fingerprint, passphrases: Some(passphrases), recovery_key })
}

/// Another recovery key: backups are sealed for it from now on, older ones are opened by the one before.
pub fn new_recovery_key(folder: &Folder) -> Result<RecoveryKey, RoleError> {
    let _lock = folder.lock(Role::ConfigServer)?;
    Ok(backup::new_recovery_key(&*folder.role(Role::ConfigServer))?)
}

/// What a restore made.
pub struct Restored {
    pub head: Head,
    /// Of the configuration server that will run here.
    pub incarnation: u64,
    pub fingerprint: String,
    /// Hosts that must be told by hand where it is.
    pub hosts_untold: Vec<String>,
}

/// Makes this folder, which must be new, that of the configuration server whose backup it is. It runs under any address:
/// process servers are told, agents ask them.
pub async fn restore(
    folder: &Folder,
    settings: &Settings,
    sealed: Vec<u8>,
    key: RecoveryKey,
) -> Result<Restored, RoleError> {
    let _lock = folder.lock(Role::ConfigServer)?;
    if folder.is_in_use()? {
        return Err(RoleError {
            message: format!("{} holds an installation already", folder.path().display()),
            help: "restore into a new folder".to_owned(),
        });
    }
    let (database, storage) = (settings.database(folder), folder.role(Role::ConfigServer));
    let filling = tokio::task::spawn_blocking(move || -> Result<_, RoleError> {
        let (head, content) = backup::open(&key, &sealed)?;
        content
            .restore(&database, SystemClock::new().wall_now())
            .map_err(|error| RoleError::new(&error, error.help()))?;
        let keep = replace_file(&*storage, backup::KEEPER_FILE, content.keeper.as_bytes());
        keep.map_err(|error| RoleError::new(&error, "name a folder that this user can write"))?;
        Ok((head, content))
    });
    let (head, content) =
        filling.await.map_err(|error| RoleError { message: error.to_string(), help: "see the log".to_owned() })??;
    // The authority last: with it the folder is in use.
    folder.install(&content.authority, &content.token)?;
    let fingerprint = folder.authority()?.fingerprint();
    let hosts_untold = content.hosts_untold();
    Ok(Restored { head, incarnation: content.incarnation + 1, fingerprint, hosts_untold })
}

/// Starts the role in an all-in-one's folder. Ports that were used before are used again where they are free.
pub async fn start(folder: &Folder, settings: Settings) -> Result<RunningConfigServer, RoleError> {
    let lock = folder.lock(Role::ConfigServer)?;
    let (listen, control_listen) = (settings.listen, settings.control_listen);
    let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    let (wanted, control_wanted) = (listen.unwrap_or(loopback), control_listen.unwrap_or(loopback));
    let mut hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    if !wanted.ip().is_unspecified() && !hosts.contains(&wanted.ip().to_string()) {
        hosts.push(wanted.ip().to_string());
    }
    let others: Vec<String> =
        settings.names.iter().cloned().chain([super::host_name()]).filter(|name| is_host(name)).collect();
    hosts.extend(others);
    hosts.sort();
    hosts.dedup();
    let identity = folder.identity(Role::ConfigServer, &hosts)?;
    let token = folder.token()?;
    let before = folder.config_server()?;
    let again = |wanted: SocketAddr, before: Option<SocketAddr>| match before {
        Some(before) if wanted.port() == 0 && before.ip() == wanted.ip() => before,
        _ => wanted,
    };
    let api = again(wanted, before.map(|before| before.api));
    let control = again(control_wanted, before.map(|before| before.control));
    let attempt = |api, control| try_start(folder, &settings, &identity, &token, api, control);
    let server = match attempt(api, control).await {
        // Someone else took a port meanwhile.
        Err(error) if error.is_listen() && (api, control) != (wanted, control_wanted) => {
            attempt(wanted, control_wanted).await?
        }
        other => other?,
    };
    let addresses = ConfigServerAddresses { api: server.api_address(), control: server.control_address() };
    folder.note_config_server(&addresses)?;
    Ok(RunningConfigServer { server, addresses, _lock: lock })
}

/// Whether a name can be in a certificate.
fn is_host(name: &str) -> bool {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:".contains(&byte));
    is_plain && !name.is_empty() && name.len() < 254
}

enum Attempt {
    Start(StartError),
    Role(RoleError),
}

impl Attempt {
    fn is_listen(&self) -> bool {
        matches!(self, Attempt::Start(StartError::Listen { .. }))
    }
}

impl From<Attempt> for RoleError {
    fn from(attempt: Attempt) -> Self {
        match attempt {
            Attempt::Start(error) => error.into(),
            Attempt::Role(error) => error,
        }
    }
}

async fn try_start(
    folder: &Folder,
    settings: &Settings,
    identity: &Identity,
    token: &str,
    api: SocketAddr,
    control: SocketAddr,
) -> Result<ConfigServer, Attempt> {
    let authority = folder.authority().map_err(|error| Attempt::Role(error.into()))?;
    let options = Options {
        storage: folder.role(Role::ConfigServer),
        database: settings.database(folder),
        identity: identity.clone(),
        authority,
        name: super::host_name(),
        token: token.to_owned(),
        authority_pem: folder.authority_pem().map_err(|error| Attempt::Role(error.into()))?,
        reached_at: settings.reached_at(control.ip()),
        api,
        control,
    };
    ConfigServer::start(options).await.map_err(Attempt::Start)
}
