//! Where the configuration server keeps what must outlive it: SQLite inside, or a PostgreSQL that is there already.
//!
//! One thread owns the one connection; everything goes through it in order. The SQL is the same text for both.
//!
//! *Consistency.* [`Database::write`] is one transaction, durable when it returns (`synchronous=FULL`). One configuration
//! server at a time: SQLite's file is locked exclusively, PostgreSQL by an advisory lock. *Retries.* A PostgreSQL
//! connection that broke is made anew at the next call; a write whose end is not known says so
//! ([`DatabaseError::is_unknown`]) and its caller reads again. *Cancellation.* None: calls are short. *Crash.* The
//! transaction is there or not.

mod postgres;
mod schema;
mod sqlite;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use serde::{Deserialize, Serialize};
use tidemark_base::Timestamp;
use tidemark_proto::control::{Failure, FailureKind};

pub use schema::{VERSION, tables};

/// Calls that wait for the thread; callers of more wait to hand theirs over.
const CALLS_MAX: usize = 1024;

/// A value of a column. Ids are text, times are ns since 1970, documents are JSON text.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    Null,
    Int(i64),
    Text(String),
}

impl Value {
    /// Zero where it is none: columns have one type.
    pub fn int(&self) -> i64 {
        if let Value::Int(value) = self { *value } else { 0 }
    }

    pub fn text(&self) -> &str {
        if let Value::Text(value) = self { value } else { "" }
    }

    pub fn optional_text(&self) -> Option<&str> {
        if let Value::Text(value) = self { Some(value) } else { None }
    }
}

impl From<u64> for Value {
    /// Times reach 2262 this way.
    fn from(value: u64) -> Self {
        Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::Text(value)
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Value::Null, Into::into)
    }
}

pub type Row = Vec<Value>;

/// SQL with `$1`, `$2`, … which appear in this order for the first time.
#[derive(Clone, Debug)]
pub struct Statement {
    pub sql: String,
    pub values: Vec<Value>,
}

impl Statement {
    pub fn new(sql: impl Into<String>, values: impl IntoIterator<Item = Value>) -> Self {
        Self { sql: sql.into(), values: values.into_iter().collect() }
    }
}

/// The setting that chooses the database.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DatabaseSetting {
    /// A file of our own.
    Sqlite(PathBuf),
    /// `host=/run/postgresql user=tidemark dbname=tidemark`, or a `postgresql://` URL.
    Postgres(String),
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("the database {name} is in use by another process")]
    Locked { name: String },
    #[error("there is no room for the database {name}: {reason}")]
    Full { name: String, reason: String },
    #[error(
        "the database {name} was written by a newer Tidemark (version {version} of its tables, this one knows {VERSION})"
    )]
    Newer { name: String, version: i64 },
    #[error("the database {name} is damaged: {reason}")]
    Damaged { name: String, reason: String },
    #[error("the database {name} cannot be reached: {reason}")]
    Unreachable { name: String, reason: String },
    #[error("the database {name} refused: {reason}")]
    Refused { name: String, reason: String },
}

impl DatabaseError {
    pub fn help(&self) -> &'static str {
        match self {
            DatabaseError::Locked { .. } => {
                "stop the other configuration server, or the program that has the file open"
            }
            DatabaseError::Full { .. } => "free space on its volume; nothing was changed",
            DatabaseError::Newer { .. } => "run the newer version, or restore a backup from before the upgrade",
            DatabaseError::Damaged { .. } => {
                "restore the configuration from a backup; replicas and protected disks are not affected"
            }
            DatabaseError::Unreachable { .. } => {
                "check that the database server runs and that the setting `database` is right; replication goes on meanwhile"
            }
            DatabaseError::Refused { .. } => "check the rights of its user, and the owner and mode of its folder",
        }
    }

    /// Whether a write may have happened all the same.
    pub fn is_unknown(&self) -> bool {
        matches!(self, DatabaseError::Unreachable { .. })
    }
}

impl From<DatabaseError> for Failure {
    fn from(error: DatabaseError) -> Self {
        let kind = match error {
            DatabaseError::Unreachable { .. } | DatabaseError::Locked { .. } => FailureKind::Unavailable,
            _ => FailureKind::Failed,
        };
        Failure::new(kind, format!("the configuration server cannot store its state: {error}"), error.help())
    }
}

/// One of the two.
trait Backend: Send {
    /// All of them or none.
    fn write(&mut self, statements: &[Statement]) -> Result<(), DatabaseError>;
    fn read(&mut self, statement: &Statement) -> Result<Vec<Row>, DatabaseError>;
    fn name(&self) -> String;
}

/// What runs on the thread.
pub struct Connection<'a> {
    backend: &'a mut dyn Backend,
    refuses_writes: &'a AtomicBool,
}

impl Connection<'_> {
    pub fn write(&mut self, statements: &[Statement]) -> Result<(), DatabaseError> {
        if statements.is_empty() {
            return Ok(());
        }
        let outcome = self.backend.write(statements);
        self.refuses_writes.store(outcome.is_err(), Ordering::Relaxed);
        outcome
    }

    pub fn read(&mut self, statement: Statement) -> Result<Vec<Row>, DatabaseError> {
        self.backend.read(&statement)
    }
}

type Call = Box<dyn FnOnce(&mut Connection<'_>) + Send>;

/// Clones share the connection, which closes with the last of them.
#[derive(Clone)]
pub struct Database(Arc<Inner>);

struct Inner {
    /// The last write failed.
    refuses_writes: Arc<AtomicBool>,
    calls: Mutex<Option<mpsc::SyncSender<Call>>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    name: String,
}

impl Database {
    /// Opens it, alone, and brings its tables up to date.
    pub fn open(setting: &DatabaseSetting) -> Result<Self, DatabaseError> {
        Self::open_with(setting, None)
    }

    /// Opens it with the tables of an older version, for what a backup of that version holds.
    pub fn open_at(setting: &DatabaseSetting, version: i64) -> Result<Self, DatabaseError> {
        Self::start(setting, None, version)
    }

    /// `pages_max` limits SQLite's file, for tests of a full volume.
    pub fn open_with(setting: &DatabaseSetting, pages_max: Option<u32>) -> Result<Self, DatabaseError> {
        Self::start(setting, pages_max, VERSION)
    }

    fn start(setting: &DatabaseSetting, pages_max: Option<u32>, version: i64) -> Result<Self, DatabaseError> {
        let (calls, receiver) = mpsc::sync_channel::<Call>(CALLS_MAX);
        let (opened, outcome) = mpsc::channel();
        let setting = setting.clone();
        let refuses_writes = Arc::new(AtomicBool::new(false));
        let noted = refuses_writes.clone();
        let thread = std::thread::Builder::new()
            .name("database".to_owned())
            .spawn(move || {
                let backend: Result<Box<dyn Backend>, DatabaseError> = match &setting {
                    DatabaseSetting::Sqlite(path) => {
                        sqlite::Sqlite::open(path, pages_max).map(|backend| Box::new(backend) as _)
                    }
                    DatabaseSetting::Postgres(text) => {
                        postgres::Postgres::open(text).map(|backend| Box::new(backend) as _)
                    }
                };
                let ready = backend.and_then(|mut backend| schema::migrate(&mut *backend, version).map(|()| backend));
                let mut backend = match ready {
                    Ok(backend) => {
                        let _ = opened.send(Ok(backend.name()));
                        backend
                    }
                    Err(error) => {
                        let _ = opened.send(Err(error));
                        return;
                    }
                };
                let mut connection = Connection { backend: &mut *backend, refuses_writes: &noted };
                while let Ok(call) = receiver.recv() {
                    call(&mut connection);
                }
            })
            .map_err(|error| DatabaseError::Refused { name: "of its own".to_owned(), reason: error.to_string() })?;
        let gone = || DatabaseError::Refused { name: "of its own".to_owned(), reason: "its thread ended".to_owned() };
        let name = match outcome.recv() {
            Ok(Ok(name)) => name,
            Ok(Err(error)) => {
                // The lock goes with the thread: whoever tries again at once must not meet it.
                let _ = thread.join();
                return Err(error);
            }
            Err(_) => return Err(gone()),
        };
        let (calls, thread) = (Mutex::new(Some(calls)), Mutex::new(Some(thread)));
        Ok(Self(Arc::new(Inner { refuses_writes, calls, thread, name })))
    }

    /// Runs `work` on the thread of the connection and waits for it.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection<'_>) -> Result<T, DatabaseError> + Send + 'static,
    ) -> Result<T, DatabaseError> {
        let (sender, receiver) = mpsc::channel();
        self.post(move |connection| {
            let _ = sender.send(work(connection));
        })?;
        receiver.recv().map_err(|_| self.gone())?
    }

    /// Has `work` run on the thread of the connection, after everything before it.
    pub fn post(&self, work: impl FnOnce(&mut Connection<'_>) + Send + 'static) -> Result<(), DatabaseError> {
        let calls = self.0.calls.lock().expect("no panic while held").clone().ok_or_else(|| self.gone())?;
        calls.send(Box::new(work)).map_err(|_| self.gone())
    }

    pub fn write(&self, statements: Vec<Statement>) -> Result<(), DatabaseError> {
        self.run(move |connection| connection.write(&statements))
    }

    pub fn read(&self, statement: Statement) -> Result<Vec<Row>, DatabaseError> {
        self.run(move |connection| connection.read(statement))
    }

    /// Whether it answers, and where the last write was refused, whether it takes one again.
    pub fn check(&self) -> Result<(), DatabaseError> {
        if self.0.refuses_writes.load(Ordering::Relaxed) {
            let sql = "INSERT INTO facts (id, value) VALUES ('checked', $1) ON CONFLICT (id) DO UPDATE SET value = $1";
            return self.write(vec![Statement::new(sql, [Timestamp::now().to_string().into()])]);
        }
        self.read(Statement::new("SELECT COUNT(*) FROM facts", [])).map(drop)
    }

    /// As people know it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Ends the connection for every clone: the file is closed, and its lock free, when this returns.
    pub fn close(&self) {
        self.0.close();
    }

    fn gone(&self) -> DatabaseError {
        DatabaseError::Refused { name: self.0.name.clone(), reason: "its thread ended".to_owned() }
    }
}

impl Inner {
    fn close(&self) {
        drop(self.calls.lock().expect("no panic while held").take());
        let thread = self.thread.lock().expect("no panic while held").take();
        // The last clone may go with a call, on the thread itself.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}
