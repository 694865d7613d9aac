//! The embedded one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::types::{ToSqlOutput, Value as Sql, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, ToSql, TransactionBehavior};

use super::{Backend, DatabaseError, Row, Statement, Value};

/// How long another process may hold the file before we say so: one that is just ending.
const BUSY: Duration = Duration::from_secs(2);

pub struct Sqlite {
    connection: Connection,
    path: PathBuf,
}

impl Sqlite {
    pub fn open(path: &Path, pages_max: Option<u32>) -> Result<Self, DatabaseError> {
        let failed = |error: rusqlite::Error| named(path, &error);
        private(path)
            .map_err(|error| DatabaseError::Refused { name: path.display().to_string(), reason: error.to_string() })?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        connection.busy_timeout(BUSY).map_err(failed)?;
        // Before the journal's mode: a log of an exclusive connection needs no shared memory file.
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE").map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        // What was deleted may have been secret.
        connection.pragma_update(None, "secure_delete", true).map_err(failed)?;
        if let Some(pages) = pages_max {
            connection.pragma_update(None, "max_page_count", pages).map_err(failed)?;
        }
        // Takes the lock now, not at the first change.
        connection.execute_batch("BEGIN IMMEDIATE; COMMIT;").map_err(failed)?;
        Ok(Self { connection, path: path.to_owned() })
    }
}

/// The file holds digests of tokens: it is its owner's before anything is in it.
fn private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().append(true).create(true).mode(0o600).open(path).map(drop)
}

impl Backend for Sqlite {
    fn write(&mut self, statements: &[Statement]) -> Result<(), DatabaseError> {
        let path = self.path.clone();
        let mut write = || {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for statement in statements {
                let mut prepared = transaction.prepare(&statement.sql)?;
                prepared.execute(rusqlite::params_from_iter(&statement.values))?;
            }
            transaction.commit()
        };
        write().map_err(|error| named(&path, &error))
    }

    fn read(&mut self, statement: &Statement) -> Result<Vec<Row>, DatabaseError> {
        let read = || {
            let mut prepared = self.connection.prepare(&statement.sql)?;
            let columns = prepared.column_count();
            let mut rows = prepared.query(rusqlite::params_from_iter(&statement.values))?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                let row: Result<Row, rusqlite::Error> = (0..columns)
                    .map(|column| {
                        Ok(match row.get_ref(column)? {
                            ValueRef::Integer(value) => Value::Int(value),
                            ValueRef::Text(text) => Value::Text(String::from_utf8_lossy(text).into_owned()),
                            ValueRef::Null | ValueRef::Real(_) | ValueRef::Blob(_) => Value::Null,
                        })
                    })
                    .collect();
                found.push(row?);
            }
            Ok(found)
        };
        read().map_err(|error: rusqlite::Error| named(&self.path, &error))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Value::Null => ToSqlOutput::Owned(Sql::Null),
            Value::Int(value) => ToSqlOutput::Owned(Sql::Integer(*value)),
            Value::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
        })
    }
}

fn named(path: &Path, error: &rusqlite::Error) -> DatabaseError {
    let (name, reason) = (path.display().to_string(), error.to_string());
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => DatabaseError::Locked { name },
        Some(ErrorCode::DiskFull) => DatabaseError::Full { name, reason },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => DatabaseError::Damaged { name, reason },
        _ => DatabaseError::Refused { name, reason },
    }
}
