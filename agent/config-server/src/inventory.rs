//! What hosts told of their disks: observed, not wanted, so that it has a place beside the state.
//!
//! *Consistency.* The newest of each host counts, in memory from when it was told, and in the database so that it is there after a restart.
//! *Retries.* None: hosts tell it again whenever they connect. *Cancellation.* None. *Crash.* The one of before, until the host connects.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tidemark_base::{HostId, Timestamp};
use tidemark_proto::control::Inventory;

use crate::database::{Database, DatabaseError, Statement};

pub struct Inventories {
    database: Database,
    known: Mutex<BTreeMap<HostId, Arc<Told>>>,
}

/// What one host told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Told {
    /// When, by our clock.
    pub time: Timestamp,
    pub inventory: Inventory,
}

impl Inventories {
    pub fn open(database: Database) -> Result<Self, DatabaseError> {
        let rows = database.read(Statement::new("SELECT id, body FROM inventories", []))?;
        let read = |id: &str, body: &str| Some((id.parse().ok()?, Arc::new(serde_json::from_str(body).ok()?)));
        let mut known = BTreeMap::new();
        for row in &rows {
            match read(row[0].text(), row[1].text()) {
                Some((host, told)) => drop(known.insert(host, told)),
                None => tracing::warn!(host = row[0].text(), "its inventory cannot be read; it is told on connecting"),
            }
        }
        Ok(Self { database, known: Mutex::new(known) })
    }

    /// Blocks.
    pub fn keep(&self, host: HostId, told: Told) -> Result<(), DatabaseError> {
        let body = serde_json::to_string(&told).expect("an inventory is plain data");
        let time = told.time.0;
        self.known.lock().expect("no panic while held").insert(host, Arc::new(told));
        let sql = "INSERT INTO inventories (id, time, body) VALUES ($1, $2, $3) \
                   ON CONFLICT (id) DO UPDATE SET time = excluded.time, body = excluded.body";
        self.database.write(vec![Statement::new(sql, [host.to_string().into(), time.into(), body.into()])])
    }

    /// Blocks.
    pub fn forget(&self, host: HostId) -> Result<(), DatabaseError> {
        self.known.lock().expect("no panic while held").remove(&host);
        self.database.write(vec![Statement::new("DELETE FROM inventories WHERE id = $1", [host.to_string().into()])])
    }

    /// `None`: it told none yet.
    pub fn of(&self, host: HostId) -> Option<Arc<Told>> {
        self.known.lock().expect("no panic while held").get(&host).cloned()
    }
}

#[cfg(test)]
mod tests {
    use tidemark_proto::control::HostDisk;

    use super::*;
    use crate::database::DatabaseSetting;

    #[test]
    fn what_a_host_told_is_there_after_a_restart_and_a_damaged_row_keeps_nobody_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        let setting = DatabaseSetting::Sqlite(folder.path().join("config.db"));
        let (host, other) = (HostId::random(), HostId::random());
        let told = |path: &str| Told {
            time: Timestamp(7),
            inventory: Inventory {
                time: Timestamp(6),
                disks: vec![HostDisk { path: path.to_owned(), ..HostDisk::default() }],
                left_out: 1,
            },
        };
        let database = Database::open(&setting).unwrap();
        let inventories = Inventories::open(database.clone()).unwrap();
        assert_eq!(inventories.of(host), None);
        inventories.keep(host, told("/dev/sda")).unwrap();
        inventories.keep(host, told("/dev/sdb")).unwrap();
        inventories.keep(other, told("/dev/sda")).unwrap();
        let sql = "UPDATE inventories SET body = $1 WHERE id = $2";
        database.write(vec![Statement::new(sql, ["{".into(), other.to_string().into()])]).unwrap();
        database.close();

        let inventories = Inventories::open(Database::open(&setting).unwrap()).unwrap();
        assert_eq!(inventories.of(host).as_deref(), Some(&told("/dev/sdb")));
        assert_eq!(inventories.of(other), None);
    }
}
