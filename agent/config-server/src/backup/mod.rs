//! Backups of the configuration: made by themselves and on command, sealed for the recovery key, opened and checked after
//! they were written, and kept by every process server as well.
//!
//! A backup holds every row of the database, the authority's key and the administrator's token ([`content`]); its file is
//! described in `tidemark_transport::recovery`. It is restored on any machine, under any address, into either database.
//!
//! *Consistency.* One moment of the database; checked by opening what was written and filling a database with it. *Retries.*
//! A backup that fails is made again, and a process server that did not take one is asked again, as [`crate::retry`] says.
//! *Cancellation.* A backup that is cancelled while it is sent stays where it is already. *Crash.* A file is there whole or
//! not at all.

pub mod content;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{Clock, ServerId, SystemClock, Timestamp};
use tidemark_proto::control::{BackupPart, Failure, FailureKind, ServerCommand, Severity};
use tidemark_transport::recovery::{Keeper, RecoveryError, RecoveryKey, unproven_head};

use crate::core::{Core, QUICK};
use crate::database::{Database, DatabaseSetting};
use crate::history::News;
use crate::hub::PeerId;
use crate::jobs::{Job, Progress};
use crate::model::{Alert, State};
use crate::retry::Retries;
use content::Content;

/// What the server keeps of its recovery key.
pub const KEEPER_FILE: &str = "recovery-keeper";
const FOLDER: &str = "backups";
const CHECK_FILE: &str = "backups/check.db";
/// Backups that are kept here; process servers keep as many.
pub const KEPT_MAX: usize = 24;
/// At least that often.
const EVERY: Duration = Duration::from_secs(86_400);
/// At most that often, when something changed.
const CHANGED_EVERY: Duration = Duration::from_secs(3_600);
/// None for so long is an alert.
const OLD: Duration = Duration::from_secs(2 * 86_400);
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Ten thousand machines fit several times.
pub const BACKUP_BYTES_MAX: u64 = 512 << 20;
const CONTENT_BYTES_MAX: usize = 2 << 30;
/// Of one message on the control stream.
const PART_BYTES: usize = 1 << 20;
const COMPRESSION: i32 = 3;

/// Anybody can read it: it names no secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Head {
    pub created: Timestamp,
    /// Of the configuration server that made it, as people know it.
    pub name: String,
    pub incarnation: u64,
    /// Fingerprint of the authority.
    pub authority: String,
    /// Which recovery key opens it.
    pub key: String,
    pub software: String,
    pub machines: u64,
    /// Tells whether anything that counts changed since.
    pub state: String,
}

/// A backup as it is listed.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct BackupInfo {
    /// The name of its file.
    pub id: String,
    #[schema(value_type = String, format = "date-time")]
    pub created: Timestamp,
    pub bytes: u64,
    /// Which recovery key opens it.
    pub key: String,
    pub incarnation: u64,
    pub machines: u64,
    /// On the configuration server.
    pub path: String,
    /// Process servers that keep it, as far as is known since the start.
    pub process_servers: Vec<String>,
}

/// What makes backups.
pub struct Backups {
    storage: Arc<dyn Storage>,
    database: Database,
    keeper: Option<Keeper>,
    authority: String,
    fingerprint: String,
    /// The administrator's.
    token: Mutex<String>,
    name: String,
    incarnation: u64,
    /// The last backup that each process server took.
    kept: Mutex<BTreeMap<ServerId, String>>,
    failed: Mutex<Option<Failure>>,
    /// When the newest was made; absent: there is none.
    newest_at: Mutex<Option<Timestamp>>,
    /// Grows with each that is made, by itself or on command.
    made: AtomicU64,
    clock: SystemClock,
    started: Timestamp,
    making: Mutex<()>,
}

/// What backups need beside the database.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Key and certificate of the authority, PEM.
    pub authority: String,
    pub fingerprint: String,
    pub token: String,
    pub name: String,
}

/// Reads what the server keeps of its recovery key, if it has one.
pub fn keeper(storage: &dyn Storage) -> Result<Option<Keeper>, Failure> {
    let failed =
        |error: std::io::Error| Failure::from_error(FailureKind::Failed, &error, "check the folder's owner and mode");
    if !storage.exists(KEEPER_FILE).map_err(failed)? {
        return Ok(None);
    }
    let content = read_file(storage, KEEPER_FILE, 4096).map_err(failed)?;
    Keeper::from_text(&String::from_utf8_lossy(&content)).map(Some).map_err(|error| recovery_failed(&error))
}

/// Makes a recovery key, whose public half backups are sealed for from now on; the caller shows it, this once.
pub fn new_recovery_key(storage: &dyn Storage) -> Result<RecoveryKey, Failure> {
    let key = RecoveryKey::generate().map_err(|error| recovery_failed(&error))?;
    let keeper = key.keeper().map_err(|error| recovery_failed(&error))?;
    replace_file(storage, KEEPER_FILE, keeper.to_text().as_bytes())
        .map_err(|error| Failure::from_error(FailureKind::Failed, &error, "check the folder's owner and mode"))?;
    Ok(key)
}

pub fn recovery_failed(error: &RecoveryError) -> Failure {
    let kind = match error {
        RecoveryError::Key(_) => FailureKind::BadRequest,
        RecoveryError::Damaged(_) | RecoveryError::Foreign => FailureKind::Damaged,
        _ => FailureKind::Failed,
    };
    Failure::from_error(kind, error, error.help())
}

/// Opens a backup: what is in it, proven to be of the installation whose recovery key this is.
pub fn open(key: &RecoveryKey, sealed: &[u8]) -> Result<(Head, Content), Failure> {
    let (head, content) = key.open(sealed).map_err(|error| recovery_failed(&error))?;
    Ok((parse_head(&head)?, unpack(&content)?))
}

fn parse_head(head: &[u8]) -> Result<Head, Failure> {
    serde_json::from_slice(head).map_err(|error| damaged(&format!("its head cannot be read: {error}")))
}

fn damaged(what: &str) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("the backup cannot be used: {what}"),
        "take another one: every process server keeps some in `config-backups`",
    )
}

fn pack(content: &Content) -> Result<Vec<u8>, Failure> {
    let text = serde_json::to_vec(content).map_err(|error| damaged(&error.to_string()))?;
    zstd::bulk::compress(&text, COMPRESSION).map_err(|error| damaged(&error.to_string()))
}

fn unpack(packed: &[u8]) -> Result<Content, Failure> {
    let text = zstd::stream::read::Decoder::new(packed).and_then(|decoder| {
        let mut text = Vec::new();
        let limit = CONTENT_BYTES_MAX as u64;
        std::io::Read::read_to_end(&mut std::io::Read::take(decoder, limit), &mut text)?;
        Ok(text)
    });
    let text = text.map_err(|error| damaged(&error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| damaged(&error.to_string()))
}

fn fill_failed(error: content::FillError) -> Failure {
    let help = error.help();
    Failure::from_error(FailureKind::Failed, &error, help)
}

impl Backups {
    pub fn open(
        storage: Arc<dyn Storage>,
        database: Database,
        options: BackupOptions,
        incarnation: u64,
    ) -> Result<Self, Failure> {
        let keeper = keeper(&*storage)?;
        let BackupOptions { authority, fingerprint, token, name } = options;
        let clock = SystemClock::new();
        let started = clock.wall_now();
        let backups = Self {
            storage,
            database,
            keeper,
            authority,
            fingerprint,
            token: Mutex::new(token),
            name,
            incarnation,
            kept: Mutex::default(),
            failed: Mutex::default(),
            newest_at: Mutex::default(),
            made: AtomicU64::new(0),
            clock,
            started,
            making: Mutex::new(()),
        };
        let newest_at = backups.newest().map(|(_, head)| head.created);
        *backups.newest_at.lock().expect("no panic while held") = newest_at;
        Ok(backups)
    }

    /// Backups from now on hold this one.
    pub fn set_token(&self, token: String) {
        *self.token.lock().expect("no panic while held") = token;
    }

    /// Makes a backup, and opens what was written. Blocks.
    pub fn make(&self, state: &State) -> Result<BackupInfo, Failure> {
        let _one = self.making.lock().expect("no panic while held");
        let made = self.make_one(state);
        *self.failed.lock().expect("no panic while held") = made.as_ref().err().cloned();
        if let Ok(made) = &made {
            *self.newest_at.lock().expect("no panic while held") = Some(made.created);
            self.made.fetch_add(1, Ordering::Release);
        }
        made
    }

    fn make_one(&self, state: &State) -> Result<BackupInfo, Failure> {
        let keeper = self.keeper.as_ref().ok_or_else(|| {
            Failure::new(
                FailureKind::Conflict,
                "this installation has no recovery key, for which backups are sealed",
                "stop the configuration server, and make one: `tidemark config-server recovery-key`",
            )
        })?;
        let created = self.clock.wall_now();
        let tables = self.database.run(content::rows)?;
        let content = Content {
            version: content::VERSION,
            created,
            incarnation: self.incarnation,
            schema: crate::database::VERSION,
            authority: self.authority.clone(),
            token: self.token.lock().expect("no panic while held").clone(),
            keeper: keeper.to_text(),
            tables,
        };
        let head = Head {
            created,
            name: self.name.clone(),
            incarnation: self.incarnation,
            authority: self.fingerprint.clone(),
            key: keeper.id(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            machines: state.machines.len() as u64,
            state: digest(state),
        };
        let head_text = serde_json::to_vec(&head).map_err(|error| damaged(&error.to_string()))?;
        let sealed = keeper.seal(&head_text, &pack(&content)?).map_err(|error| recovery_failed(&error))?;
        let failed = |error: std::io::Error| {
            Failure::from_error(FailureKind::Failed, &error, "free space on the volume of the configuration server")
        };
        self.storage.create_folder(FOLDER).map_err(failed)?;
        // Names grow with time, also where the clock went back.
        let newest = self.names()?.last().and_then(|name| time_of(name)).unwrap_or_default();
        let id = name_of(created.0.max(newest + 1));
        let path = format!("{FOLDER}/{id}");
        let written = replace_file(&*self.storage, &path, &sealed.bytes).map_err(failed).and_then(|()| {
            let read_back = read_file(&*self.storage, &path, BACKUP_BYTES_MAX).map_err(failed)?;
            let opened = unpack(&sealed.check(&read_back).map_err(|error| recovery_failed(&error))?)?;
            if opened != content {
                return Err(damaged("what was read back is not what was written"));
            }
            self.check(&opened)
        });
        if let Err(failure) = written {
            // One that does not prove itself is no backup.
            let _ = self.storage.remove(&path);
            return Err(failure);
        }
        self.prune()?;
        tracing::info!(backup = id, bytes = sealed.bytes.len(), "the configuration was backed up");
        Ok(self.info(&id, &head, sealed.bytes.len() as u64))
    }

    /// Fills a database with it, reads that as a start does, and throws it away.
    fn check(&self, content: &Content) -> Result<(), Failure> {
        let path = self.storage.path(CHECK_FILE);
        let remove = |path: &PathBuf| {
            for end in ["", "-wal", "-shm", "-journal"] {
                let mut name = path.clone().into_os_string();
                name.push(end);
                let _ = std::fs::remove_file(name);
            }
        };
        remove(&path);
        let checked = content.check(&DatabaseSetting::Sqlite(path.clone()), &*self.storage.folder(FOLDER));
        remove(&path);
        checked.map_err(fill_failed)
    }

    /// Of all that are here, the oldest first.
    fn names(&self) -> Result<Vec<String>, Failure> {
        let failed = |error: std::io::Error| {
            Failure::from_error(FailureKind::Failed, &error, "check the folder's owner and mode")
        };
        if !self.storage.exists(FOLDER).map_err(failed)? {
            return Ok(Vec::new());
        }
        let mut names = self.storage.list(FOLDER).map_err(failed)?;
        names.retain(|name| time_of(name).is_some());
        names.sort();
        Ok(names)
    }

    fn prune(&self) -> Result<(), Failure> {
        let names = self.names()?;
        for name in names.iter().take(names.len().saturating_sub(KEPT_MAX)) {
            if let Err(error) = self.storage.remove(&format!("{FOLDER}/{name}")) {
                tracing::warn!(%error, backup = name, "an old backup cannot be removed");
            }
        }
        Ok(())
    }

    fn info(&self, id: &str, head: &Head, bytes: u64) -> BackupInfo {
        let kept = self.kept.lock().expect("no panic while held");
        BackupInfo {
            id: id.to_owned(),
            created: head.created,
            bytes,
            key: head.key.clone(),
            incarnation: head.incarnation,
            machines: head.machines,
            path: self.storage.path(&format!("{FOLDER}/{id}")).display().to_string(),
            process_servers: kept
                .iter()
                .filter(|(_, name)| *name == id)
                .map(|(server, _)| server.to_string())
                .collect(),
        }
    }

    /// The newest first. Blocks.
    pub fn list(&self) -> Result<Vec<BackupInfo>, Failure> {
        let mut found = Vec::new();
        for name in self.names()?.iter().rev() {
            match self.read(name).and_then(|bytes| Ok((self.head(&bytes)?, bytes.len() as u64))) {
                Ok((head, bytes)) => found.push(self.info(name, &head, bytes)),
                Err(failure) => tracing::warn!(backup = name, %failure, "a backup cannot be read"),
            }
        }
        Ok(found)
    }

    fn head(&self, sealed: &[u8]) -> Result<Head, Failure> {
        parse_head(unproven_head(sealed).map_err(|error| recovery_failed(&error))?)
    }

    /// The sealed file. Blocks.
    pub fn read(&self, id: &str) -> Result<Vec<u8>, Failure> {
        let unknown = || {
            Failure::new(FailureKind::NotFound, "there is no such backup", "see `tidemark config-server backup --list`")
        };
        // Only names of our own become parts of a path.
        if !self.names()?.iter().any(|name| name == id) {
            return Err(unknown());
        }
        let path = format!("{FOLDER}/{id}");
        let bytes = read_file(&*self.storage, &path, BACKUP_BYTES_MAX)
            .map_err(|error| Failure::from_error(FailureKind::Failed, &error, "take a backup from a process server"))?;
        match &self.keeper {
            Some(keeper) if !keeper.is_ours(&bytes) && self.head(&bytes)?.key == keeper.id() => {
                Err(damaged("its bytes are not those that were written"))
            }
            _ => Ok(bytes),
        }
    }

    fn newest(&self) -> Option<(String, Head)> {
        let name = self.names().ok()?.pop()?;
        let head = self.read(&name).and_then(|bytes| self.head(&bytes)).ok()?;
        Some((name, head))
    }

    /// Whether one should be made now.
    fn is_due(&self, state: &State, newest: Option<&Head>) -> bool {
        let is_new = state.machines.is_empty() && state.identities.is_empty();
        match newest {
            // An installation without anything in it waits for its first host.
            None => !is_new,
            Some(head) => {
                let now = self.clock.wall_now();
                let age = now.saturating_since(head.created);
                // Of a clock that was ahead, or sealed for a key of before: as good as none.
                let is_alien = head.created > now || self.keeper.as_ref().is_some_and(|keeper| keeper.id() != head.key);
                is_alien || age >= EVERY || (age >= CHANGED_EVERY && head.state != digest(state))
            }
        }
    }

    /// What is wrong with the backups, if something is.
    pub fn alert(&self, state: &State) -> Option<Alert> {
        let now = self.clock.wall_now();
        let failure = self.failed.lock().expect("no panic while held").clone();
        let newest = *self.newest_at.lock().expect("no panic while held");
        let is_old = now.saturating_since(newest.unwrap_or(self.started)) > OLD;
        let (kind, message, help) = match failure {
            Some(failure) => {
                let message = format!("the configuration cannot be backed up: {}", failure.message);
                ("backup_failed", message, failure.help)
            }
            // Nothing would be lost yet.
            None if state.machines.is_empty() => return None,
            None if self.keeper.is_none() => {
                let message = "the configuration is not backed up: there is no recovery key".to_owned();
                let help = "stop the configuration server, and make one: `tidemark config-server recovery-key`";
                ("backup_missing", message, help.to_owned())
            }
            None if is_old => {
                let message = match newest {
                    Some(newest) => format!("the newest backup of the configuration is of {newest}"),
                    None => "there is no backup of the configuration".to_owned(),
                };
                ("backup_missing", message, "make one: `tidemark config-server backup`; see its log".to_owned())
            }
            None => return None,
        };
        let severity = if is_old { Severity::Critical } else { Severity::Warning };
        Some(Alert::new(severity, kind, message, help, now))
    }
}

/// What people decided; who is connected and what lasts are no reasons for a backup.
fn digest(state: &State) -> String {
    let mut hasher = blake3::Hasher::new();
    for ((table, id), revision) in &state.revisions {
        if !["hosts", "process_servers", "alerts"].contains(table) {
            hasher.update(format!("{table}\0{id}\0{revision}\n").as_bytes());
        }
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

fn name_of(time: u64) -> String {
    format!("backup-{time:020}.tidemark")
}

/// `None`: it is no backup's name.
pub fn time_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("backup-")?.strip_suffix(".tidemark")?;
    (digits.len() == 20 && digits.bytes().all(|digit| digit.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Makes a backup now, and gives it to every process server that is there.
pub fn start(core: &Arc<Core>) -> Result<Job, Failure> {
    let core = core.clone();
    core.jobs.clone().start("backup", None, |progress| async move {
        progress.step("write and check");
        let made = make(&core).await?;
        progress.step("give it to the process servers");
        let mut left = Vec::new();
        for (peer, name) in core.hub.connected() {
            let PeerId::ProcessServer(id) = peer else { continue };
            if let Err(failure) = give(&core, id, &made.id, Some(&progress)).await {
                left.push(json!({ "process_server": name, "error": failure.message, "help": failure.help }));
            }
        }
        let core = core.clone();
        let id = made.id.clone();
        let listed = blocking(move || {
            let bytes = core.backups.read(&id)?;
            Ok(core.backups.info(&id, &core.backups.head(&bytes)?, bytes.len() as u64))
        })
        .await?;
        let mut result = serde_json::to_value(listed).unwrap_or(Value::Null);
        result["not_kept_by"] = Value::Array(left);
        Ok(result)
    })
}

async fn make(core: &Arc<Core>) -> Result<BackupInfo, Failure> {
    let core = core.clone();
    blocking(move || core.backups.make(&core.store.state())).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Failure::new(FailureKind::Failed, format!("the configuration server failed: {error}"), "see its log"))
    })
}

/// Part after part, over the control stream.
async fn give(core: &Arc<Core>, server: ServerId, id: &str, progress: Option<&Progress>) -> Result<(), Failure> {
    let reading = (core.clone(), id.to_owned());
    let sealed = blocking(move || reading.0.backups.read(&reading.1)).await?;
    let Some(break_glass) = core.backups.keeper.as_ref().map(Keeper::break_glass) else { return Ok(()) };
    let digest = *blake3::hash(&sealed).as_bytes();
    let bytes = sealed.len() as u64;
    for (index, data) in sealed.chunks(PART_BYTES).enumerate() {
        let offset = (index * PART_BYTES) as u64;
        let part = BackupPart { name: id.to_owned(), offset, bytes, digest, data: data.to_vec(), break_glass };
        core.server_does(server, &ServerCommand::KeepBackup(part), QUICK).await?;
        if let Some(progress) = progress {
            progress.done(offset + data.len() as u64, bytes);
        }
    }
    core.backups.kept.lock().expect("no panic while held").insert(server, id.to_owned());
    Ok(())
}

/// Makes backups when they are due, and sees to it that process servers have the newest.
pub async fn run(core: Arc<Core>) {
    if core.backups.keeper.is_none() {
        tracing::warn!(
            "there is no recovery key: the configuration is not backed up (`tidemark config-server recovery-key`)"
        );
        return;
    }
    let mut making: Retries<()> = Retries::default();
    let mut giving: Retries<ServerId> = Retries::default();
    let mut newest: Option<(String, Head)> = None;
    let mut is_known = false;
    let mut seen = 0;
    while tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_err() {
        let now = core.clock.monotonic_now();
        // One that was made on command is given to those who were away then, too.
        let made = core.backups.made.load(Ordering::Acquire);
        if !is_known || made != seen {
            seen = made;
            let looking = core.clone();
            newest = blocking(move || Ok(looking.backups.newest())).await.unwrap_or_default();
            is_known = true;
        }
        let is_due = core.backups.is_due(&core.store.state(), newest.as_ref().map(|(_, head)| head));
        if is_due && making.is_due(&(), 0, now) {
            match make(&core).await {
                Ok(_) => {
                    making.succeeded(&());
                    is_known = false;
                }
                Err(failure) => {
                    making.failed((), 0, core.clock.monotonic_now());
                    core.history.note(News {
                        severity: Severity::Warning,
                        kind: "backup_failed",
                        machine: None,
                        message: format!("the configuration cannot be backed up: {}", failure.message),
                        help: failure.help,
                    });
                }
            }
            continue;
        }
        let Some((name, _)) = &newest else { continue };
        for (peer, _) in core.hub.connected() {
            let PeerId::ProcessServer(id) = peer else { continue };
            let has = core.backups.kept.lock().expect("no panic while held").get(&id) >= Some(name);
            if has || !giving.is_due(&id, time_of(name).unwrap_or_default(), now) {
                continue;
            }
            let outcome = tokio::select! {
                outcome = give(&core, id, name, None) => outcome,
                () = core.stop.cancelled() => return,
            };
            match outcome {
                Ok(()) => giving.succeeded(&id),
                Err(failure) => {
                    let pause = giving.failed(id, time_of(name).unwrap_or_default(), core.clock.monotonic_now());
                    tracing::warn!(server = %id, %failure, again_in = pause.as_secs(), "a process server did not take a backup");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
