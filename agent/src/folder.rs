//! The folder of an all-in-one: everything that `tidemark up` keeps, and where its roles find each other.
//!
//! ```text
//! authority/      the certificate authority
//! ca.pem          its certificate, for clients of the REST API
//! recovery-key    what opens backups of the configuration; move it to a safe place
//! agent/          identity and state of each role
//! process-server/
//! config-server/  … and `token`, the bearer token of the REST API
//! run/            sockets, locks, and the addresses of what runs
//! ```
//!
//! *Consistency.* One process a role: each holds a lock while it runs. *Retries.* None. *Cancellation.* Locks go with
//! their process. *Crash.* Files are replaced as a whole; what was not written is made at the next start.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tidemark_base::Timestamp;
use tidemark_base::storage::{RealStorage, Storage, create_private_folder, read_file, replace_file};
use tidemark_base::{HostId, ServerId, SystemClock, time::Clock};
use tidemark_transport::{Authority, Identity, IdentityError, PeerIdentity, Role};

const SMALL_FILE_BYTES_MAX: u64 = 64 << 10;
const IDENTITY_FILE: &str = "identity.pem";
const TOKEN_FILE: &str = "config-server/token";
const CA_FILE: &str = "ca.pem";
const AUTHORITY_FILE: &str = "authority/authority.pem";
/// What is made after an authority, and only by it.
const MADE_AFTER_AUTHORITY: [&str; 3] = ["identity.pem", "config.db", tidemark_config_server::installation::FILE];
const RECOVERY_KEY_FILE: &str = "recovery-key";
const CONFIG_SERVER_ADDRESSES: &str = "run/config-server.json";
const PROCESS_SERVER_ADDRESS: &str = "run/process-server.json";
/// The longest path of a Unix socket, without its final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("cannot use the folder {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is in use: the role {role} runs in process {process}")]
    InUse { path: PathBuf, role: Role, process: String },
    #[error("{path} is no folder of a running `tidemark up`: {reason}")]
    NotUp { path: PathBuf, reason: String },
    #[error("the path {path} is too long for the sockets in it")]
    TooLong { path: PathBuf },
    #[error("{authority} is missing, but {made} is there, which was made with it")]
    AuthorityMissing { authority: PathBuf, made: PathBuf },
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl FolderError {
    pub fn help(&self) -> &'static str {
        match self {
            FolderError::Io { .. } => "name a folder that this user can create and write",
            FolderError::InUse { .. } => "stop that process first, or use another folder",
            FolderError::NotUp { .. } => {
                "start it with `tidemark up --dir DIR`, or set TIDEMARK_DIR to the folder of one that runs"
            }
            FolderError::TooLong { .. } => "use a folder whose full path has at most 90 bytes",
            FolderError::AuthorityMissing { .. } => {
                "put the file back, or restore a backup into a new folder (`tidemark config-server restore`); to begin anew \
                 on purpose, with none of its machines, users and revocations, use another folder"
            }
            FolderError::Identity(error) => error.help(),
        }
    }
}

impl From<FolderError> for crate::roles::RoleError {
    fn from(error: FolderError) -> Self {
        Self::new(&error, error.help())
    }
}

impl From<FolderError> for crate::client::ClientError {
    fn from(error: FolderError) -> Self {
        Self::Folder { message: tidemark_base::error::with_causes(&error), help: error.help() }
    }
}

#[derive(Clone)]
pub struct Folder {
    path: PathBuf,
    storage: Arc<dyn Storage>,
}

/// Where a configuration server answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ConfigServerAddresses {
    pub api: SocketAddr,
    pub control: SocketAddr,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct ProcessServerAddress {
    replication: SocketAddr,
}

/// Held while a role runs in the folder.
pub struct RoleLock {
    _file: Flock<File>,
}

impl Folder {
    /// Makes the folder when it is missing.
    pub fn create(path: &Path) -> Result<Self, FolderError> {
        let failed = |source| FolderError::Io { path: path.to_owned(), source };
        let path = std::path::absolute(path).map_err(failed)?;
        create_private_folder(&path).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        let folder = Self { storage: RealStorage::open_folder(&path), path };
        if folder.socket("process-server-serve.sock").as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(FolderError::TooLong { path: folder.path });
        }
        for name in ["authority", "agent", "process-server", "config-server", "run"] {
            folder.storage.create_folder(name).map_err(failed)?;
        }
        Ok(folder)
    }

    /// For clients: the folder must be there.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        if !path.is_dir() {
            return Err(FolderError::NotUp { path: path.to_owned(), reason: "there is no such folder".to_owned() });
        }
        let path = std::path::absolute(path).map_err(|source| FolderError::Io { path: path.to_owned(), source })?;
        Ok(Self { storage: RealStorage::open_folder(&path), path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn io(&self, source: io::Error) -> FolderError {
        FolderError::Io { path: self.path.clone(), source }
    }

    /// A role's own part.
    pub fn role(&self, role: Role) -> Arc<dyn Storage> {
        self.storage.folder(&role.to_string())
    }

    pub fn role_path(&self, role: Role) -> PathBuf {
        self.path.join(role.to_string())
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.path.join("run").join(name)
    }

    /// Lets one process at a time run a role here.
    pub fn lock(&self, role: Role) -> Result<RoleLock, FolderError> {
        let mut file = self.open_lock(&format!("{role}.lock"))?;
        match Flock::lock(file.try_clone().map_err(|error| self.io(error))?, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => {
                // For the message of whoever comes second.
                let noted = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                noted.map_err(|error| self.io(error))?;
                Ok(RoleLock { _file: locked })
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut process = String::new();
                let _ = file.rewind().and_then(|()| file.read_to_string(&mut process));
                let process = if process.is_empty() { "unknown".to_owned() } else { process };
                Err(FolderError::InUse { path: self.path.clone(), role, process })
            }
            Err((_, error)) => Err(self.io(error.into())),
        }
    }

    fn open_lock(&self, name: &str) -> Result<File, FolderError> {
        use std::os::unix::fs::OpenOptionsExt;
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.path.join("run").join(name))
            .map_err(|error| self.io(error))
    }

    /// The authority of the installation; made at the first start, and never again: nobody would know a second one.
    pub fn authority(&self) -> Result<Authority, FolderError> {
        // Roles that start at the same time make one authority.
        let file = self.open_lock("authority.lock")?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| self.io(error.into()))?;
        if !self.storage.exists(AUTHORITY_FILE).map_err(|error| self.io(error))? {
            self.check_is_new()?;
        }
        let authority = Authority::open_or_create(&*self.storage.folder("authority"))?;
        if !self.storage.exists(CA_FILE).map_err(|error| self.io(error))? {
            replace_file(&*self.storage, CA_FILE, authority.certificate_pem().as_bytes())
                .map_err(|error| self.io(error))?;
        }
        Ok(authority)
    }

    /// Whether nothing is here that an authority was needed for.
    fn check_is_new(&self) -> Result<(), FolderError> {
        let own = self.role(Role::ConfigServer);
        for name in MADE_AFTER_AUTHORITY {
            if own.exists(name).map_err(|error| self.io(error))? {
                let (authority, made) = (self.path.join(AUTHORITY_FILE), own.path(name));
                return Err(FolderError::AuthorityMissing { authority, made });
            }
        }
        Ok(())
    }

    /// Key and certificate of the authority.
    pub fn authority_pem(&self) -> Result<String, FolderError> {
        Ok(self.read(AUTHORITY_FILE)?.unwrap_or_default())
    }

    /// Whether there is an authority or a token here.
    pub fn is_in_use(&self) -> Result<bool, FolderError> {
        let exists = |name| self.storage.exists(name).map_err(|error| self.io(error));
        Ok(exists(AUTHORITY_FILE)? || exists(TOKEN_FILE)?)
    }

    /// Since when; `None`: it is not.
    pub fn in_use_since(&self) -> Result<Option<Timestamp>, FolderError> {
        if !self.is_in_use()? {
            return Ok(None);
        }
        // It is written once.
        let made = self.path.join(AUTHORITY_FILE).metadata().and_then(|of| of.modified()).ok();
        let since = made.and_then(|made| made.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(Some(Timestamp(since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)))))
    }

    /// Puts the authority and the token of another installation here.
    pub fn install(&self, authority_pem: &str, token: &str) -> Result<(), FolderError> {
        let write = |name, content: String| {
            replace_file(&*self.storage, name, content.as_bytes()).map_err(|error| self.io(error))
        };
        write(TOKEN_FILE, format!("{token}\n"))?;
        write(AUTHORITY_FILE, authority_pem.to_owned())
    }

    /// Keeps the recovery key of an all-in-one, of which nobody sees the first start. Whoever is serious moves it away.
    pub fn keep_recovery_key(&self, text: &str) -> Result<(), FolderError> {
        replace_file(&*self.storage, RECOVERY_KEY_FILE, format!("{text}\n").as_bytes()).map_err(|error| self.io(error))
    }

    /// Whether a role has an identity already.
    pub fn has_identity(&self, role: Role) -> Result<bool, FolderError> {
        self.role(role).exists(IDENTITY_FILE).map_err(|error| self.io(error))
    }

    /// The role's certificate; made at the first start, and again when it is about to expire. `hosts` are the names
    /// under which it is reached.
    pub fn identity(&self, role: Role, hosts: &[String]) -> Result<Identity, FolderError> {
        let authority = self.authority()?;
        let own = self.role(role);
        let before = match own.exists(IDENTITY_FILE).map_err(|error| self.io(error))? {
            true => Some(Identity::load(&*own, IDENTITY_FILE)?),
            false => None,
        };
        let peer = match &before {
            Some(identity) => identity.peer(),
            None => match role {
                Role::Agent => PeerIdentity::Agent(HostId::random()),
                Role::ProcessServer => PeerIdentity::ProcessServer(ServerId::random()),
                Role::ConfigServer => PeerIdentity::ConfigServer(ServerId::random()),
            },
        };
        match before {
            // The names of the configuration server's certificate follow its address.
            Some(identity) if role != Role::ConfigServer && !identity.renewal_due(SystemClock::new().wall_now()) => {
                Ok(identity)
            }
            before => {
                let identity = authority.issue(peer, hosts)?;
                match (identity.save(&*own, IDENTITY_FILE), before) {
                    (Ok(()), _) => Ok(identity),
                    // On a full volume the one of before does as long as it holds.
                    (Err(error), Some(before)) if before.expires() > SystemClock::new().wall_now() => {
                        tracing::warn!(%error, "a new certificate cannot be stored; the one of before is used");
                        Ok(before)
                    }
                    (Err(error), _) => Err(error.into()),
                }
            }
        }
    }

    /// The bearer token; made at the first start.
    pub fn token(&self) -> Result<String, FolderError> {
        if let Some(token) = self.read(TOKEN_FILE)? {
            return Ok(token.trim().to_owned());
        }
        tidemark_config_server::write_token(&*self.role(Role::ConfigServer)).map_err(|error| self.io(error))
    }

    /// Another token in the place of the one there is, while no configuration server runs here.
    pub fn rotate_token(&self) -> Result<(), FolderError> {
        let own = self.role(Role::ConfigServer);
        tidemark_config_server::write_token(&*own).map(drop).map_err(|error| self.io(error))
    }

    pub fn token_file(&self) -> PathBuf {
        self.path.join(TOKEN_FILE)
    }

    pub fn ca_file(&self) -> PathBuf {
        self.path.join(CA_FILE)
    }

    pub fn config_server(&self) -> Result<Option<ConfigServerAddresses>, FolderError> {
        self.read_json(CONFIG_SERVER_ADDRESSES)
    }

    pub fn note_config_server(&self, addresses: &ConfigServerAddresses) -> Result<(), FolderError> {
        // A full volume is no reason not to start.
        match self.config_server()? {
            Some(known) if known == *addresses => Ok(()),
            _ => self.write_json(CONFIG_SERVER_ADDRESSES, addresses),
        }
    }

    pub fn process_server(&self) -> Result<Option<SocketAddr>, FolderError> {
        let noted: Option<ProcessServerAddress> = self.read_json(PROCESS_SERVER_ADDRESS)?;
        Ok(noted.map(|noted| noted.replication))
    }

    pub fn note_process_server(&self, replication: SocketAddr) -> Result<(), FolderError> {
        self.write_json(PROCESS_SERVER_ADDRESS, &ProcessServerAddress { replication })
    }

    fn read(&self, name: &str) -> Result<Option<String>, FolderError> {
        if !self.storage.exists(name).map_err(|error| self.io(error))? {
            return Ok(None);
        }
        let content = read_file(&*self.storage, name, SMALL_FILE_BYTES_MAX).map_err(|error| self.io(error))?;
        Ok(Some(String::from_utf8_lossy(&content).into_owned()))
    }

    fn read_json<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<Option<T>, FolderError> {
        let text = self.read(name)?;
        // What cannot be read is written anew at the next start.
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), FolderError> {
        let content = serde_json::to_vec(value).expect("addresses are plain data");
        replace_file(&*self.storage, name, &content).map_err(|error| self.io(error))
    }
}

impl crate::client::Client {
    /// The server of an all-in-one's folder.
    pub fn of_folder(path: &Path) -> Result<Self, crate::client::ClientError> {
        let folder = Folder::open(path)?;
        let addresses = folder.config_server()?.ok_or_else(|| FolderError::NotUp {
            path: path.to_owned(),
            reason: "it names no configuration server".to_owned(),
        })?;
        Self::new(&format!("https://{}", addresses.api), &folder.token_file(), &folder.ca_file())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_a_start_makes_stays_and_is_private() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("a/b");
        let folder = Folder::create(&path).unwrap();
        let first = folder.identity(Role::Agent, &[]).unwrap();
        let token = folder.token().unwrap();
        let again = Folder::create(&path).unwrap();
        assert_eq!(again.identity(Role::Agent, &[]).unwrap().chain(), first.chain());
        assert_eq!(again.token().unwrap(), token);
        let server = again.identity(Role::ConfigServer, &["localhost".into()]).unwrap();
        assert_eq!(
            again.identity(Role::ConfigServer, &[]).unwrap().peer(),
            server.peer(),
            "a new certificate is the same peer"
        );
        let mode = |name: &str| std::fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
        for name in ["", "agent", "run", "authority"] {
            assert_eq!(mode(name), 0o700, "{name}");
        }
        for name in ["config-server/token", "agent/identity.pem", "authority/authority.pem"] {
            assert_eq!(mode(name), 0o600, "{name}");
        }
    }

    #[test]
    fn an_authority_that_is_missing_is_not_made_again() {
        let top = tempfile::tempdir().unwrap();
        let folder = Folder::create(top.path()).unwrap();
        // A crash in the middle of the first set-up: what comes before the authority is no obstacle.
        folder.token().unwrap();
        let before = folder.authority().unwrap().fingerprint();
        for made in MADE_AFTER_AUTHORITY {
            let made = top.path().join("config-server").join(made);
            File::create(&made).unwrap();
            assert_eq!(folder.authority().unwrap().fingerprint(), before);
            let path = top.path().join(AUTHORITY_FILE);
            folder.storage.rename(AUTHORITY_FILE, "aside").unwrap();
            let error = folder.authority().err().expect("it is not made again");
            assert!(matches!(&error, FolderError::AuthorityMissing { made: named, .. } if *named == made), "{error}");
            assert!(!path.exists() && error.help().contains("restore a backup"));
            folder.storage.rename("aside", AUTHORITY_FILE).unwrap();
            std::fs::remove_file(made).unwrap();
        }
    }

    #[test]
    fn a_role_runs_once() {
        let top = tempfile::tempdir().unwrap();
        let folder = Folder::create(top.path()).unwrap();
        let lock = folder.lock(Role::Agent).unwrap();
        let error = folder.lock(Role::Agent).err().unwrap();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        folder.lock(Role::ProcessServer).unwrap();
        drop(lock);
        folder.lock(Role::Agent).unwrap();
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let error = Folder::create(&top.path().join("x".repeat(100))).err().unwrap();
        assert!(matches!(error, FolderError::TooLong { .. }), "{error}");
    }
}
