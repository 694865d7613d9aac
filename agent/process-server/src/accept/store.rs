//! Replicas as the receiving end sees them.

use std::sync::Arc;

use tidemark_base::DiskId;
use tidemark_base::compare::CompareKey;
use tidemark_base::error::with_causes;
use tidemark_proto::replication::{CutEnd, CutOrdinal, Durable, Hashes, Hello, Refusal, RefusalReason};
use tokio::sync::watch;

use super::authorise::Authorisation;
use super::{Comparison, Held, Store, Stores, Writer, refusal};
use crate::journal::JournalError;
use crate::replica::{Comparer, DurableState, Needs, Replica, ReplicaSet, Session};

pub struct ReplicaStores {
    set: Arc<ReplicaSet>,
    /// Grows whenever points were made.
    points: Arc<watch::Sender<u64>>,
}

impl ReplicaStores {
    pub fn new(set: Arc<ReplicaSet>, points: Arc<watch::Sender<u64>>) -> Arc<Self> {
        Arc::new(Self { set, points })
    }
}

impl Stores for ReplicaStores {
    fn open(&self, disk: DiskId, _: &Authorisation) -> Result<Arc<dyn Store>, Refusal> {
        // Made when the disk was authorised: if it is not there, it could not be opened.
        let replica = self.set.get(disk).map_err(|error| {
            refusal(
                RefusalReason::StoreFailed,
                format!("{error}: it could not be opened when the process server started"),
                "look at the process server's log and volume, then restart it",
            )
        })?;
        Ok(Arc::new(ReplicaStore { set: self.set.clone(), replica, points: self.points.clone() }))
    }
}

struct ReplicaStore {
    set: Arc<ReplicaSet>,
    replica: Arc<Replica>,
    points: Arc<watch::Sender<u64>>,
}

impl ReplicaStore {
    fn sync_state(&self) -> Result<DurableState, Refusal> {
        let (durable, points) = self.set.sync(&self.replica).map_err(refused)?;
        if !points.is_empty() {
            for point in points.iter().filter(|point| point.keep) {
                tracing::info!(machine = %point.machine, point = %point.id, time = %point.time, "recovery point made");
            }
            self.points.send_modify(|changes| *changes += 1);
        }
        Ok(durable)
    }
}

impl Store for ReplicaStore {
    fn attach(&self, hello: &Hello) -> Result<(Box<dyn Writer>, Held), Refusal> {
        let session = self.replica.begin_session(hello.generation, hello.disk_bytes).map_err(refused)?;
        // Cuts that the stream before this one ended are part of what the host continues after.
        let state = self.sync_state()?;
        let held = Held {
            durable: state.position,
            cut: CutOrdinal(state.cut),
            scan_open: state.scan_open,
            // What is left when cuts were lost is worth comparing with.
            comparable: state.cut > 0,
        };
        let key = CompareKey::new(hello.disk, hello.generation, hello.session.0);
        Ok((Box::new(SessionWriter { session, comparer: Comparer::new(key) }), held))
    }

    fn sync(&self) -> Result<Option<Durable>, Refusal> {
        let state = self.sync_state()?;
        Ok(state.position.map(|position| Durable { cut: CutOrdinal(state.cut), position }))
    }

    fn needs(&self) -> Option<Arc<Needs>> {
        Some(self.replica.needs().clone())
    }
}

/// An incomplete cut is discarded by the session that follows; until then it is behind the journal's end.
struct SessionWriter {
    session: Session,
    comparer: Comparer,
}

impl Writer for SessionWriter {
    fn append(&mut self, cut: CutOrdinal, chunks: &[u8]) -> Result<(), Refusal> {
        self.session.append_chunks(cut.0, chunks).map_err(refused)
    }

    fn end_cut(&mut self, end: CutEnd) -> Result<(), Refusal> {
        self.session.end_cut(&end).map_err(refused)
    }

    fn compare(&mut self, hashes: Hashes) -> Result<Comparison, Refusal> {
        let comparison = self.session.compare(&self.comparer, hashes).map_err(refused)?;
        Ok(Box::new(move |cancelled: &dyn Fn() -> bool| comparison.run(cancelled)))
    }
}

fn refused(error: JournalError) -> Refusal {
    Refusal { reason: error.reason(), message: with_causes(&error), help: error.help().to_owned() }
}
