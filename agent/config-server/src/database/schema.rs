//! The tables, and how older ones become today's.

use super::{Backend, DatabaseError, Statement, Value};

/// The version of the tables that this build writes.
pub const VERSION: i64 = 6;

/// What each version adds to the one before. Never changed once released: a database may stand at any of them.
const MIGRATIONS: [&[&str]; VERSION as usize] =
    [FIRST, GROUPS_AND_CHANNELS, KEPT_REPLICAS, PLANS, INVENTORIES, WHO_DID_IT];

const GROUPS_AND_CHANNELS: &[&str] = &[
    "CREATE TABLE machine_groups (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE channels (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
];

const KEPT_REPLICAS: &[&str] =
    &["CREATE TABLE kept_replicas (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)"];

const PLANS: &[&str] = &["CREATE TABLE plans (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)"];

// What agents told, as it was told; they tell it again whenever they connect.
const INVENTORIES: &[&str] =
    &["CREATE TABLE inventories (id TEXT PRIMARY KEY, time BIGINT NOT NULL, body TEXT NOT NULL)"];

// Who did what an event tells of, and which alert it is about: JSON.
const WHO_DID_IT: &[&str] = &["ALTER TABLE events ADD COLUMN actor TEXT", "ALTER TABLE events ADD COLUMN alert TEXT"];

const FIRST: &[&str] = &[
    // One row a thing that is wanted; `revision` counts its changes, for `If-Match`.
    "CREATE TABLE hosts (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE process_servers (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE machines (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE policies (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE passphrases (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE registrations (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE identities (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE users (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE tokens (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE alerts (id TEXT PRIMARY KEY, revision BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE TABLE jobs (id TEXT PRIMARY KEY, started BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX jobs_by_start ON jobs (started)",
    "CREATE TABLE events (id BIGINT PRIMARY KEY, time BIGINT NOT NULL, severity TEXT NOT NULL, source TEXT NOT NULL, \
     machine TEXT, disk TEXT, kind TEXT NOT NULL, message TEXT NOT NULL, help TEXT NOT NULL)",
    // How far each sender's events are here: what makes that none is stored twice.
    "CREATE TABLE event_streams (source TEXT PRIMARY KEY, stream TEXT NOT NULL, sequence BIGINT NOT NULL)",
    // Answers to creations, for whoever repeats one with the same key.
    "CREATE TABLE answers (id TEXT PRIMARY KEY, time BIGINT NOT NULL, request TEXT NOT NULL, status BIGINT NOT NULL, \
     body TEXT NOT NULL)",
    // Single values, such as what was imported.
    "CREATE TABLE facts (id TEXT PRIMARY KEY, value TEXT NOT NULL)",
];

/// Brings the tables to the version `to`.
pub(super) fn migrate(backend: &mut dyn Backend, to: i64) -> Result<(), DatabaseError> {
    backend.write(&[Statement::new("CREATE TABLE IF NOT EXISTS schema (version BIGINT NOT NULL)", [])])?;
    let rows = backend.read(&Statement::new("SELECT version FROM schema", []))?;
    let before = rows.first().map_or(0, |row| row[0].int());
    if before > VERSION {
        return Err(DatabaseError::Newer { name: backend.name(), version: before });
    }
    for version in before..to {
        // One transaction a version: a crash between two leaves a sound older one.
        let steps = MIGRATIONS[version as usize].iter().map(|sql| Statement::new(*sql, []));
        let noted = [
            Statement::new("DELETE FROM schema", []),
            Statement::new("INSERT INTO schema (version) VALUES ($1)", [Value::Int(version + 1)]),
        ];
        backend.write(&steps.chain(noted).collect::<Vec<_>>())?;
        tracing::info!(database = backend.name(), version = version + 1, "the tables are up to date");
    }
    Ok(())
}

/// The tables of a version with their columns, as its migrations made them: what a backup holds cannot fall behind them.
pub fn tables(version: i64) -> Vec<(String, Vec<String>)> {
    let mut tables: Vec<(String, Vec<String>)> = Vec::new();
    let steps = MIGRATIONS.iter().take(usize::try_from(version).unwrap_or_default());
    for sql in steps.flat_map(|steps| steps.iter()) {
        let words: Vec<&str> = sql.split_whitespace().take(6).collect();
        match words[..] {
            ["CREATE", "TABLE", name, ..] => {
                let list = sql.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map_or("", |(list, _)| list);
                let column = |of: &str| of.split_whitespace().next().unwrap_or_default().to_owned();
                tables.push((name.to_owned(), list.split(',').map(column).collect()));
            }
            ["ALTER", "TABLE", name, "ADD", "COLUMN", column] => {
                if let Some((_, columns)) = tables.iter_mut().find(|(known, _)| known == name) {
                    columns.push(column.to_owned());
                }
            }
            ["DROP", "TABLE", name] => tables.retain(|(known, _)| known != name),
            _ => {}
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::{Database, DatabaseSetting};

    #[test]
    fn the_tables_and_columns_that_backups_hold_are_those_of_the_database() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::open(&DatabaseSetting::Sqlite(folder.path().join("config.db"))).unwrap();
        let sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'schema' ORDER BY name";
        let there: Vec<String> = database
            .read(Statement::new(sql, []))
            .unwrap()
            .iter()
            .map(|row| row[0].text().to_owned())
            .filter(|name| !name.starts_with("sqlite_"))
            .collect();
        let mut known = tables(VERSION);
        known.sort();
        assert_eq!(known.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), there);
        for (table, mut columns) in known {
            let sql = format!("SELECT name FROM pragma_table_info('{table}')");
            let rows = database.read(Statement::new(sql, [])).unwrap();
            let mut there: Vec<String> = rows.iter().map(|row| row[0].text().to_owned()).collect();
            columns.sort();
            there.sort();
            assert_eq!(columns, there, "{table}");
        }
    }
}
