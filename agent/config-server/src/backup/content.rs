//! What is in a backup: every row of the database, the authority with its key, and the administrator's token.
//!
//! *Consistency.* Rows are read on the database's one thread, between two changes. *Retries*, *Cancellation*: none. *Crash.*
//! A database is filled in one transaction.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tidemark_base::Timestamp;
use tidemark_base::storage::Storage;

use crate::database::{Connection, Database, DatabaseError, DatabaseSetting, Statement, Value, tables};
use crate::store::{Store, StoreError};

pub const VERSION: u32 = 1;
/// Rows that only serve those who repeat a request at once, and what hosts tell again whenever they connect.
const LEFT_OUT: [&str; 2] = ["answers", "inventories"];
/// Of events the newest; the rest is history.
const EVENTS_MAX: u64 = 10_000;
const INCARNATION: &str = "incarnation";
const RESTORED: &str = "restored";

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Content {
    pub version: u32,
    pub created: Timestamp,
    /// Of the configuration server that made it.
    pub incarnation: u64,
    /// The version of the tables.
    pub schema: i64,
    /// Key and certificate of the authority, PEM.
    pub authority: String,
    /// The first administrator's token.
    pub token: String,
    /// What makes backups of the same recovery key.
    pub keeper: String,
    pub tables: BTreeMap<String, Rows>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Rows {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

#[derive(Debug, thiserror::Error)]
pub enum FillError {
    #[error("the backup was made by a newer Tidemark (version {0} of its content)")]
    Newer(u32),
    #[error("the backup's tables are of version {have}, this Tidemark knows {known}")]
    NewerTables { have: i64, known: i64 },
    #[error("the database {name} is in use already: it has {rows} rows in {table}")]
    NotEmpty { name: String, table: String, rows: i64 },
    #[error("the backup names a table or column that its version does not have: {0:?}")]
    Unknown(String),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("what was restored cannot be read")]
    Store(#[from] StoreError),
}

impl FillError {
    pub fn help(&self) -> &'static str {
        match self {
            FillError::Newer(_) | FillError::NewerTables { .. } => {
                "restore it with the version that made it, or a newer one"
            }
            FillError::NotEmpty { .. } => "restore into a new folder, and a new database where it is PostgreSQL",
            FillError::Unknown(_) => "take another backup",
            FillError::Database(error) => error.help(),
            FillError::Store(error) => error.help(),
        }
    }
}

/// Every row, as of one moment.
pub fn rows(connection: &mut Connection<'_>) -> Result<BTreeMap<String, Rows>, DatabaseError> {
    let mut all = BTreeMap::new();
    for (table, columns) in tables(crate::database::VERSION) {
        if LEFT_OUT.contains(&table.as_str()) {
            continue;
        }
        let list = columns.join(", ");
        let statement = match table.as_str() {
            "events" => {
                let sql = format!("SELECT {list} FROM events ORDER BY id DESC LIMIT $1");
                Statement::new(sql, [EVENTS_MAX.into()])
            }
            // By their first column, which names the row: the same content is the same text.
            _ => Statement::new(format!("SELECT {list} FROM {table} ORDER BY 1"), []),
        };
        all.insert(table, Rows { columns, rows: connection.read(statement)? });
    }
    Ok(all)
}

impl Content {
    /// Fills a new database, whose configuration server is of the next incarnation.
    pub fn restore(&self, setting: &DatabaseSetting, now: Timestamp) -> Result<(), FillError> {
        self.fill(setting, self.incarnation + 1, now)
    }

    /// Hosts that nobody tells where the restored server is, by name: all of them, where it names no process server that could.
    pub fn hosts_untold(&self) -> Vec<String> {
        let bodies = |table: &str| {
            let rows = self.tables.get(table).map(|rows| rows.rows.as_slice()).unwrap_or_default();
            let body = |row: &Vec<Value>| serde_json::from_str::<serde_json::Value>(row.last()?.text()).ok();
            rows.iter().filter_map(body).collect::<Vec<_>>()
        };
        let text = |of: &serde_json::Value, field: &str| of[field].as_str().unwrap_or_default().to_owned();
        if bodies("process_servers").iter().any(|server| !text(server, "address").is_empty()) {
            return Vec::new();
        }
        let mut names: Vec<String> = bodies("hosts").iter().map(|host| text(host, "name")).collect();
        names.sort();
        names
    }

    /// Proves that a backup can be restored: into a database that is thrown away.
    pub fn check(&self, setting: &DatabaseSetting, storage: &dyn Storage) -> Result<(), FillError> {
        self.fill(setting, self.incarnation, self.created)?;
        let database = Database::open(setting)?;
        let opened = Store::open(database.clone(), storage);
        database.close();
        opened.map(drop).map_err(FillError::from)
    }

    fn fill(&self, setting: &DatabaseSetting, incarnation: u64, now: Timestamp) -> Result<(), FillError> {
        if self.version > VERSION {
            return Err(FillError::Newer(self.version));
        }
        if self.schema > crate::database::VERSION || self.schema < 1 {
            return Err(FillError::NewerTables { have: self.schema, known: crate::database::VERSION });
        }
        // In the tables of its own version: opening them later brings them up to date as it does with an old database.
        let database = Database::open_at(setting, self.schema)?;
        let filled = self.fill_opened(&database, incarnation, now);
        database.close();
        filled
    }

    fn fill_opened(&self, database: &Database, incarnation: u64, now: Timestamp) -> Result<(), FillError> {
        let known: BTreeMap<String, Vec<String>> = tables(self.schema).into_iter().collect();
        for table in known.keys() {
            let counted = database.read(Statement::new(format!("SELECT COUNT(*) FROM {table}"), []))?;
            let rows = counted.first().map_or(0, |row| row[0].int());
            if rows > 0 {
                let (name, table) = (database.name().to_owned(), table.clone());
                return Err(FillError::NotEmpty { name, table, rows });
            }
        }
        let mut statements = Vec::new();
        for (table, rows) in &self.tables {
            // Names go into the SQL: only those that the tables have.
            let columns = known.get(table).ok_or_else(|| FillError::Unknown(table.clone()))?;
            if let Some(unknown) = rows.columns.iter().find(|column| !columns.contains(column)) {
                return Err(FillError::Unknown(format!("{table}.{unknown}")));
            }
            // Passphrases that were used since the backup would be good again: new ones are made quickly.
            if table == "passphrases" && incarnation > self.incarnation {
                continue;
            }
            let places: Vec<String> = (1..=rows.columns.len()).map(|place| format!("${place}")).collect();
            let sql = format!("INSERT INTO {table} ({}) VALUES ({})", rows.columns.join(", "), places.join(", "));
            for row in &rows.rows {
                if row.len() != rows.columns.len() {
                    return Err(FillError::Unknown(format!("{table}: a row of another length")));
                }
                if table == "facts" && [INCARNATION, RESTORED].contains(&row[0].text()) {
                    continue;
                }
                statements.push(Statement::new(sql.clone(), row.iter().cloned()));
            }
        }
        let fact = "INSERT INTO facts (id, value) VALUES ($1, $2)";
        statements.push(Statement::new(fact, [INCARNATION.into(), incarnation.to_string().into()]));
        if incarnation > self.incarnation {
            let told = format!("at {now} from the backup of {}", self.created);
            statements.push(Statement::new(fact, [RESTORED.into(), told.into()]));
        }
        Ok(database.write(statements)?)
    }
}

/// How often this configuration was restored, plus one.
pub fn incarnation(database: &Database) -> Result<u64, DatabaseError> {
    Ok(fact(database, INCARNATION)?.and_then(|text| text.parse().ok()).unwrap_or(1))
}

/// When, and from what, if it was; told once.
pub fn take_restored(database: &Database) -> Result<Option<String>, DatabaseError> {
    let told = fact(database, RESTORED)?;
    if told.is_some() {
        database.write(vec![Statement::new("DELETE FROM facts WHERE id = $1", [RESTORED.into()])])?;
    }
    Ok(told)
}

pub fn fact(database: &Database, id: &str) -> Result<Option<String>, DatabaseError> {
    let rows = database.read(Statement::new("SELECT value FROM facts WHERE id = $1", [id.into()]))?;
    Ok(rows.first().map(|row| row[0].text().to_owned()))
}
