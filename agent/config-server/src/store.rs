//! What is wanted, in memory and in the database.
//!
//! *Consistency.* A change is durable before it is seen by anyone: [`Store::change`] edits a copy, writes the rows that
//! differ in one transaction, and only then puts it in the place of the old. *Retries.* None: a change that could not be
//! written did not happen, and its caller says so; where that is not known (a connection to PostgreSQL broke) the next
//! change reads everything again first. *Cancellation.* Changes do not await. *Crash.* The old rows or the new.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tidemark_base::storage::{Storage, read_file};
use tidemark_proto::control::{Failure, FailureKind};

use crate::database::{Connection, Database, DatabaseError, Row, Statement, Value};
use crate::inventory::Inventories;
use crate::model::{STATE_VERSION, State};

/// What the first version kept; read once.
const FILE: &str = "state.json";
const IMPORTED: &str = "state.json.imported";
/// Ten thousand machines fit in it several times.
const STATE_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("cannot read the state of an older version")]
    Read(#[source] io::Error),
    #[error("{path} is damaged: {reason}")]
    Damaged { path: String, reason: String },
    #[error("{path} was written by a newer Tidemark (version {version} of the state, this one knows {STATE_VERSION})")]
    Newer { path: String, version: u32 },
}

impl StoreError {
    pub fn help(&self) -> &'static str {
        match self {
            StoreError::Database(error) => error.help(),
            StoreError::Read(_) => "check the folder's owner and mode",
            StoreError::Damaged { .. } => "restore it from a backup; replicas and protected disks are not affected",
            StoreError::Newer { .. } => {
                "run the newer version, or restore a backup of the state from before the upgrade"
            }
        }
    }
}

pub struct Store {
    database: Database,
    state: Mutex<Current>,
    inventories: Inventories,
}

struct Current {
    state: Arc<State>,
    /// What is in the database is not known: a connection broke during a write.
    stale: bool,
}

impl Store {
    /// Reads everything; takes over the file of an older version when the database is new.
    pub fn open(database: Database, storage: &dyn Storage) -> Result<Self, StoreError> {
        import(&database, storage)?;
        let mut state = load(&database)?;
        if state.policies.is_empty() {
            // A new installation.
            let mut first = State { policies: State::default().policies, ..State::clone(&state) };
            let statements = differences(&state, &mut first);
            database.write(statements)?;
            state = first;
        }
        let inventories = Inventories::open(database.clone())?;
        Ok(Self { inventories, database, state: Mutex::new(Current { state: Arc::new(state), stale: false }) })
    }

    pub fn database(&self) -> &Database {
        &self.database
    }

    /// What hosts told of their disks.
    pub fn inventories(&self) -> &Inventories {
        &self.inventories
    }

    /// What is wanted now.
    pub fn state(&self) -> Arc<State> {
        self.state.lock().expect("no panic while held").state.clone()
    }

    /// How often a row was changed; 0: it is not there.
    pub fn revision(&self, table: &'static str, id: &str) -> u64 {
        self.state().revisions.get(&(table, id.to_owned())).copied().unwrap_or(0)
    }

    /// Edits the state. Nothing happened when the edit refuses or the result cannot be made durable.
    pub fn change<T>(&self, edit: impl FnOnce(&mut State) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut current = self.state.lock().expect("no panic while held");
        if current.stale {
            current.state = Arc::new(load(&self.database).map_err(failure)?);
            current.stale = false;
        }
        let mut next = State::clone(&current.state);
        let result = edit(&mut next)?;
        let statements = differences(&current.state, &mut next);
        if statements.is_empty() {
            return Ok(result);
        }
        if let Err(error) = self.database.write(statements) {
            current.stale = error.is_unknown();
            return Err(error.into());
        }
        current.state = Arc::new(next);
        Ok(result)
    }
}

fn failure(error: StoreError) -> Failure {
    Failure::from_error(FailureKind::Failed, &error, error.help())
}

/// Calls a macro with each collection and its table.
macro_rules! collections {
    ($apply:ident) => {
        $apply!(machines, "machines");
        $apply!(policies, "policies");
        $apply!(hosts, "hosts");
        $apply!(servers, "process_servers");
        $apply!(passphrases, "passphrases");
        $apply!(registrations, "registrations");
        $apply!(identities, "identities");
        $apply!(users, "users");
        $apply!(tokens, "tokens");
        $apply!(alerts, "alerts");
        $apply!(groups, "machine_groups");
        $apply!(plans, "plans");
        $apply!(channels, "channels");
        $apply!(kept, "kept_replicas");
    };
}

/// What makes the rows of `before` those of `after`, whose revisions it counts on.
fn differences(before: &State, after: &mut State) -> Vec<Statement> {
    let mut statements = Vec::new();
    macro_rules! compare {
        ($field:ident, $table:literal) => {
            compare($table, &before.$field, &after.$field, &mut after.revisions, &mut statements)
        };
    }
    collections!(compare);
    statements
}

fn compare<K: Ord + Display, V: Serialize + PartialEq>(
    table: &'static str,
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
    revisions: &mut BTreeMap<(&'static str, String), u64>,
    statements: &mut Vec<Statement>,
) {
    for (id, value) in after.iter().filter(|(id, value)| before.get(id) != Some(value)) {
        let id = id.to_string();
        let revision = revisions.entry((table, id.clone())).or_default();
        *revision += 1;
        let body = serde_json::to_string(value).expect("the state is plain data");
        let sql = format!(
            "INSERT INTO {table} (id, revision, body) VALUES ($1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET revision = excluded.revision, body = excluded.body"
        );
        statements.push(Statement::new(sql, [id.into(), (*revision).into(), body.into()]));
    }
    for id in before.keys().filter(|id| !after.contains_key(id)) {
        let id = id.to_string();
        revisions.remove(&(table, id.clone()));
        statements.push(Statement::new(format!("DELETE FROM {table} WHERE id = $1"), [id.into()]));
    }
}

fn load(database: &Database) -> Result<State, StoreError> {
    let name = database.name().to_owned();
    let loaded = database.run(move |connection| {
        let mut state = State { policies: BTreeMap::new(), ..State::default() };
        macro_rules! read {
            ($field:ident, $table:literal) => {
                state.$field = read($table, connection, &mut state.revisions)?;
            };
        }
        collections!(read);
        Ok(state)
    });
    loaded.map_err(|error| match error {
        DatabaseError::Damaged { reason, .. } => StoreError::Damaged { path: name, reason },
        error => error.into(),
    })
}

fn read<K: Ord + FromStr, V: DeserializeOwned>(
    table: &'static str,
    connection: &mut Connection<'_>,
    revisions: &mut BTreeMap<(&'static str, String), u64>,
) -> Result<BTreeMap<K, V>, DatabaseError> {
    let rows = connection.read(Statement::new(format!("SELECT id, revision, body FROM {table}"), []))?;
    rows.iter()
        .map(|row: &Row| {
            let id = row[0].text();
            let damaged = |reason: String| DatabaseError::Damaged {
                name: table.to_owned(),
                reason: format!("row {id:?} of {table}: {reason}"),
            };
            let value = serde_json::from_str(row[2].text()).map_err(|error| damaged(error.to_string()))?;
            let key = id.parse().map_err(|_| damaged("its id is none".to_owned()))?;
            revisions.insert((table, id.to_owned()), u64::try_from(row[1].int()).unwrap_or_default());
            Ok((key, value))
        })
        .collect()
}

/// Takes over what the first version wrote, once: noted in the transaction that stores it.
fn import(database: &Database, storage: &dyn Storage) -> Result<(), StoreError> {
    if !storage.exists(FILE).map_err(StoreError::Read)? {
        return Ok(());
    }
    let noted = database.read(Statement::new("SELECT value FROM facts WHERE id = $1", ["imported".into()]))?;
    if noted.is_empty() {
        let content = read_file(storage, FILE, STATE_BYTES_MAX).map_err(StoreError::Read)?;
        let path = || storage.path(FILE).display().to_string();
        let damaged = |error: serde_json::Error| StoreError::Damaged { path: path(), reason: error.to_string() };
        // The version first: a newer state need not have today's shape.
        let versioned: Version = serde_json::from_slice(&content).map_err(damaged)?;
        if versioned.version > STATE_VERSION {
            return Err(StoreError::Newer { path: path(), version: versioned.version });
        }
        let mut state: State = serde_json::from_slice(&content).map_err(damaged)?;
        let before = load(database)?;
        let mut statements = differences(&before, &mut state);
        let sql = "INSERT INTO facts (id, value) VALUES ($1, $2)";
        statements.push(Statement::new(sql, ["imported".into(), Value::from(FILE)]));
        database.write(statements)?;
        tracing::info!(machines = state.machines.len(), "the state of an older version was taken over");
    }
    // Kept for whoever goes back to the older version.
    storage.rename(FILE, IMPORTED).and_then(|()| storage.sync_folder("")).map_err(StoreError::Read)
}

#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

#[cfg(test)]
#[path = "store/tests.rs"]
pub(crate) mod tests;
