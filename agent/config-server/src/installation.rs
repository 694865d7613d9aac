//! That a folder, its authority and its database are those of one installation. A database that lost everything looks like
//! a new one: taken for that, it would tell process servers and agents that nobody is refused, and nothing protected.
//!
//! *Consistency.* The database notes whose authority it serves, in its facts. The folder notes that its database was made,
//! in a file, which is written after the database and never before it. *Retries.* None. *Cancellation.* None. *Crash.*
//! 1. Before the database is made: no file, an empty database; both are made at the next start.
//! 2. Between the database and the file: the file is written at the next start.
//!
//! Whatever else does not fit is refused, and nothing is changed.

use std::io;

use tidemark_base::storage::{Storage, read_file, replace_file};

use crate::database::{Database, DatabaseError, Statement};

/// Holds the fingerprint of the authority whose database was made.
pub const FILE: &str = "database-made";
const FACT: &str = "authority";
const FILE_BYTES_MAX: u64 = 4 << 10;

#[derive(Debug, thiserror::Error)]
pub enum InstallationError {
    #[error("the database {database} is empty, but this installation had one that was not (see {file})")]
    Emptied { database: String, file: String },
    #[error("{what} belongs to the authority {theirs}, and this folder's is {ours}")]
    Foreign { what: String, theirs: String, ours: String },
    #[error("cannot use {file}")]
    Io { file: String, source: io::Error },
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl InstallationError {
    pub fn help(&self) -> &'static str {
        match self {
            InstallationError::Emptied { .. } => {
                "restore a backup (`tidemark config-server restore`); to begin anew on purpose, with none of its machines, \
                 users and revocations, use another folder"
            }
            InstallationError::Foreign { .. } => {
                "use the folder and the database that belong together, or restore a backup (`tidemark config-server restore`)"
            }
            InstallationError::Io { .. } => "check the folder's owner and mode",
            InstallationError::Database(error) => error.help(),
        }
    }
}

/// Before anything is read from the database: whether it can be this installation's. `authority` is its fingerprint.
pub fn check(database: &Database, storage: &dyn Storage, authority: &str) -> Result<(), InstallationError> {
    let path = || storage.path(FILE).display().to_string();
    let failed = |source| InstallationError::Io { file: path(), source };
    let foreign = |what: String, theirs: &str| {
        let (theirs, ours) = (theirs.to_owned(), authority.to_owned());
        Err(InstallationError::Foreign { what, theirs, ours })
    };
    let made = match storage.exists(FILE).map_err(failed)? {
        true => Some(read_file(storage, FILE, FILE_BYTES_MAX).map_err(failed)?),
        false => None,
    };
    let made = made.map(|content| String::from_utf8_lossy(&content).trim().to_owned());
    if let Some(theirs) = made.as_deref().filter(|theirs| *theirs != authority) {
        return foreign(path(), theirs);
    }
    match authority_of(database)? {
        Some(theirs) if theirs != authority => foreign(format!("the database {}", database.name()), &theirs),
        Some(_) => Ok(()),
        None if made.is_some() && is_empty(database)? => {
            Err(InstallationError::Emptied { database: database.name().to_owned(), file: path() })
        }
        // A new one, or one of a version that noted nothing.
        None => Ok(()),
    }
}

/// After the database holds what it begins with: the two belong together from now on.
pub fn note(database: &Database, storage: &dyn Storage, authority: &str) -> Result<(), InstallationError> {
    if authority_of(database)?.is_none() {
        let sql = "INSERT INTO facts (id, value) VALUES ($1, $2)";
        database.write(vec![Statement::new(sql, [FACT.into(), authority.into()])])?;
    }
    let failed = |source| InstallationError::Io { file: storage.path(FILE).display().to_string(), source };
    if !storage.exists(FILE).map_err(failed)? {
        replace_file(storage, FILE, format!("{authority}\n").as_bytes()).map_err(failed)?;
    }
    Ok(())
}

/// Of all that a database begins with, and never loses.
fn is_empty(database: &Database) -> Result<bool, DatabaseError> {
    let counted = database.read(Statement::new("SELECT COUNT(*) FROM policies", []))?;
    Ok(counted.first().is_none_or(|row| row[0].int() == 0))
}

fn authority_of(database: &Database) -> Result<Option<String>, DatabaseError> {
    let rows = database.read(Statement::new("SELECT value FROM facts WHERE id = $1", [FACT.into()]))?;
    Ok(rows.first().map(|row| row[0].text().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::DatabaseSetting;
    use crate::store::Store;
    use crate::store::tests::{Postgres, skipped};
    use tidemark_base::storage::RealStorage;

    fn start(setting: &DatabaseSetting, storage: &dyn Storage, authority: &str) -> Result<(), InstallationError> {
        let database = Database::open(setting)?;
        let checked = check(&database, storage, authority).and_then(|()| {
            Store::open(database.clone(), storage).unwrap();
            note(&database, storage, authority)
        });
        database.close();
        checked
    }

    /// The same for both databases.
    fn belongs_together(setting: &DatabaseSetting, empty: impl Fn()) {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        // A crash in the middle of the first start: an empty database, and no file.
        Database::open(setting).unwrap().close();
        start(setting, &*storage, "ours").unwrap();
        start(setting, &*storage, "ours").unwrap();
        let error = start(setting, &*storage, "another").unwrap_err();
        assert!(matches!(error, InstallationError::Foreign { .. }), "{error}");
        // A crash between the database and the file, or a restored backup: the file is written.
        storage.remove(FILE).unwrap();
        let error = start(setting, &*storage, "another").unwrap_err();
        assert!(matches!(error, InstallationError::Foreign { .. }) && !storage.exists(FILE).unwrap(), "{error}");
        start(setting, &*storage, "ours").unwrap();

        empty();
        for _ in 0..2 {
            let error = start(setting, &*storage, "ours").unwrap_err();
            assert!(matches!(error, InstallationError::Emptied { .. }), "{error}");
            assert!(error.help().contains("restore a backup") && error.help().contains("another folder"));
        }
        let new = tempfile::tempdir().unwrap();
        start(setting, &*RealStorage::open_folder(new.path()), "ours").unwrap();
    }

    #[test]
    fn a_database_that_lost_everything_is_not_taken_for_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.db");
        let empty = || {
            std::fs::File::create(&path).unwrap();
            for of in ["config.db-wal", "config.db-shm"] {
                let _ = std::fs::remove_file(folder.path().join(of));
            }
        };
        belongs_together(&DatabaseSetting::Sqlite(path.clone()), empty);
    }

    #[test]
    fn an_empty_postgresql_is_not_taken_for_a_new_one() {
        let Some(postgres) = Postgres::start() else {
            skipped("PostgreSQL is not installed");
            return;
        };
        let setting = postgres.setting();
        let empty = || {
            let database = Database::open(&setting).unwrap();
            for table in ["facts", "policies"] {
                database.write(vec![Statement::new(format!("DELETE FROM {table}"), [])]).unwrap();
            }
            database.close();
        };
        belongs_together(&setting, empty);
    }
}
