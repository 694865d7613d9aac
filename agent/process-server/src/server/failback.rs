//! The way home: what the machine's home is told of a machine that runs here (`failback.proto`), and the machine's end here.
//!
//! A round is about what home does not have. It is claimed on all disks at one instant; a frozen one reads as the disks were then
//! ([`crate::view::capture`]). Home compares by hashes, so that asking for too much costs hashes and no data.
//!
//! *Consistency.* What a round is about is taken for being at home only when home says that it is durable there. *Retries.* A
//! round that was cut is given up by the next one, and what it was about is in that. *Cancellation.* The same. *Crash.* Rounds end with
//! the process; the next one is about everything that was written since the failover, or went into the replica after its point.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use tidemark_base::bits::PART_BYTES;
use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::compare::{BLOCK_HASH_BYTES, CompareKey, pieces};
use tidemark_base::disk::{Disk, is_zero};
use tidemark_base::storage::{OpenMode, StorageFile};
use tidemark_base::{Bits, CHUNK_BYTES_MAX, DiskId, Extent, Generation, HostId, MachineId};
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_proto::failback::wire::failback_server::{Failback, FailbackServer};
use tidemark_proto::failback::wire::{self, Scope};
use tidemark_proto::failback::{BLOCKS_BYTES_MAX, RUNS_MAX};
use tidemark_transport::{PeerIdentity, PeerInfo};
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use super::failover::{FailoverState, unknown};
use super::{Inner, ProcessServer, blocking, now, replica_failed, store_failed, table_failed};
use crate::failed_over::{FailedOver, Layer, Promote, pin_of_all};
use crate::view::scratch::{ClaimedRun, ScratchDisk, WITNESS};

/// The content of frozen blocks that the machine wrote since.
const FROZEN: &str = "round.raw";
/// A link home is slower than this level.
const COMPRESSION: Compression = Compression::Level(1);

/// A round under way; what it is about is in the layers.
#[derive(Clone)]
pub struct ActiveRound {
    round: u64,
    agent: HostId,
    session: [u8; 16],
    disks: Vec<(DiskId, Generation)>,
}

/// What a way home is chosen by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Changed {
    /// Written since the failover, and after its point in the replica. `None`: that is not known, so everything is compared.
    pub changed_bytes: Option<u64>,
    pub total_bytes: u64,
    /// What a plain image of each disk occupies, at most.
    pub data_bytes: Vec<(DiskId, u64)>,
}

impl ProcessServer {
    /// How much differs between a machine here and its home, at most.
    pub async fn changed(&self, id: Uuid) -> Result<Changed, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            let layers = inner.failed_over.layers_of(id);
            let total_bytes = inner.total_bytes(&entry)?;
            let (mut changed_bytes, mut data_bytes) = (Some(0), Vec::new());
            for held in &entry.disks {
                let layer = layers.iter().find(|layer| layer.disk == held.disk);
                let bits = match layer {
                    Some(layer) => {
                        let bytes = layer.scratch.data_bytes().map_err(|error| store_failed(&error))?;
                        data_bytes.push((held.disk, bytes));
                        inner.changed_after(held.disk, held.cut, &layer.scratch)?.map(|mut parts| {
                            parts.unite(&layer.scratch.written());
                            parts
                        })
                    }
                    None => None,
                };
                changed_bytes = changed_bytes.zip(bits).map(|(sum, bits)| sum + bits.bytes());
            }
            Ok(Changed { changed_bytes, total_bytes, data_bytes })
        })
        .await
    }

    /// Keeps everybody from the disks of a machine that is off. They can still be read on the way home.
    pub async fn stop_failed_over(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            refuse_plain(&entry)?;
            if !entry.stopped {
                inner.end_serve(&entry)?;
                for layer in inner.failed_over.layers_of(id) {
                    layer.scratch.flush().map_err(|error| store_failed(&error))?;
                }
                inner.failed_over.change(id, |entry| entry.stopped = true).map_err(table_failed)?;
            }
            inner.failover_state(id)
        })
        .await
    }

    /// Serves the disks again, at the addresses of before.
    pub async fn start_failed_over(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            if entry.stopped {
                inner.failed_over.change(id, |entry| entry.stopped = false).map_err(table_failed)?;
                let entry = FailedOver { stopped: false, ..entry };
                match &inner.failed_over.layers_of(id)[..] {
                    [] => inner.open_failover(id, &entry)?,
                    // They know what home does not have.
                    layers => inner.serve_to_machine(&entry, layers)?,
                }
            }
            inner.failover_state(id)
        })
        .await
    }

    /// A machine on plain disks comes through here again, so that what it writes is seen: it goes home. Whoever runs it moves it
    /// onto what is served then, which shows the same.
    pub async fn see_again(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            if entry.promote == Promote::Plain {
                // Nobody saw what it wrote meanwhile: without the witness everything counts as written.
                for held in &entry.disks {
                    let folder = inner.storage.folder(&format!("{}/{}", entry.folder(), held.disk));
                    let forgotten = match folder.exists(WITNESS) {
                        Ok(true) => folder.remove(WITNESS).and_then(|()| folder.sync_folder("")),
                        other => other.map(drop),
                    };
                    forgotten.map_err(|error| store_failed(&error))?;
                }
                let change = |entry: &mut FailedOver| (entry.promote, entry.captured) = (Promote::Filled, true);
                inner.failed_over.change(id, change).map_err(table_failed)?;
                inner.open_failover(id, &FailedOver { promote: Promote::Filled, captured: true, ..entry })?;
            }
            inner.failover_state(id)
        })
        .await
    }

    /// Its home does not follow it any more: nobody needs to see what it writes.
    pub async fn stay_away(&self, id: Uuid) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            inner.failed_over.forget_round(id);
            inner.failed_over.change(id, |entry| entry.captured = false).map_err(table_failed)
        })
        .await
    }

    /// The machine is home: what it had here goes. The replica stays, for replication from home. One that is not there is fine.
    pub async fn return_home(&self, id: Uuid) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let Some(entry) = inner.failed_over.get(id) else { return Ok(()) };
            if !entry.stopped {
                let message = format!("the disks of failover {id} are still open to their machine");
                return Err(Failure::new(
                    FailureKind::Conflict,
                    message,
                    "fail it back first: `tidemark failback NAME`",
                ));
            }
            inner.failed_over.stop_promotion(id);
            inner.failed_over.forget_round(id);
            inner.stop_serving(id, &entry)?;
            inner.failed_over.remove(id).map_err(table_failed)?;
            inner.failed_over.note_problem(id, None);
            inner.release(entry.machine, &pin_of_all(id))?;
            inner.discard(&entry)
        })
        .await
    }
}

impl Inner {
    fn total_bytes(&self, entry: &FailedOver) -> Result<u64, Failure> {
        let bytes = |held: &crate::failed_over::FailedOverDisk| {
            Ok(self.set.get(held.disk).map_err(replica_failed)?.disk_bytes())
        };
        entry.disks.iter().map(bytes).sum()
    }

    /// What the replica got after the point. What may differ between the layer and a home that has what it sent is that, and what the
    /// machine wrote: see rule 3.9 of the three sets. Home's own last changes are in the replica before anything is overwritten there.
    fn changed_after(&self, disk: DiskId, cut: u64, scratch: &ScratchDisk) -> Result<Option<Bits>, Failure> {
        let replica = self.set.get(disk).map_err(replica_failed)?;
        Ok(replica.changed_after(cut, scratch.bytes()))
    }

    fn begin_round(&self, peer: &PeerInfo, asked: wire::BeginRound) -> Result<wire::Round, Failure> {
        let machine = MachineId::from_bytes(sixteen(&asked.machine, "machine")?);
        let id = Uuid::from_bytes(sixteen(&asked.failover, "failover")?);
        let session = sixteen(&asked.session, "session")?;
        let scope = Scope::try_from(asked.scope).unwrap_or(Scope::Invalid);
        let mut disks = Vec::new();
        for disk in &asked.disks {
            disks.push((DiskId::from_bytes(sixteen(&disk.disk, "disk")?), Generation(disk.generation)));
        }
        let agent = self.authorise_home(peer, &disks)?;
        // A machine is stopped and started under this lock.
        let _one = self.failed_over.changing.lock().expect("no panic while held");
        let entry = self.failed_over.get(id).filter(|entry| entry.machine == machine).ok_or_else(|| unknown(id))?;
        refuse_plain(&entry)?;
        if !entry.committed {
            let message = format!("the failover to the point of {} is not committed", entry.time);
            return Err(Failure::new(FailureKind::Conflict, message, "commit it first: `tidemark commit NAME`"));
        }
        if !entry.captured {
            self.failed_over.change(id, |entry| entry.captured = true).map_err(table_failed)?;
        }
        let mut layers: Vec<Layer> = Vec::new();
        for (asked, (disk, _)) in asked.disks.iter().zip(&disks) {
            let layer = self.failed_over.layers_of(id).into_iter().find(|layer| layer.disk == *disk);
            let layer = layer.filter(|layer| layer.scratch.bytes() == asked.bytes).ok_or_else(|| {
                let message = format!("disk {disk} with {} bytes is none of the disks that failed over", asked.bytes);
                let help = "home must have the disks that failed over, at their sizes; a disk that came later is removed first";
                Failure::new(FailureKind::Conflict, message, help)
            })?;
            layers.push(layer);
        }
        if entry.disks.len() != layers.len() {
            let message = format!("{} disks failed over, home has {} of them", entry.disks.len(), layers.len());
            return Err(Failure::new(FailureKind::Conflict, message, "add the disks that home lacks, then try again"));
        }
        for (layer, asked) in layers.iter().zip(&asked.disks) {
            let held = entry.disks.iter().find(|held| held.disk == layer.disk);
            let cut = held.map_or(0, |held| held.cut);
            let parts = match scope {
                Scope::Invalid => return Err(bad_request("a round needs a scope")),
                Scope::Behind if layer.scratch.behind_bytes().is_some() => continue,
                Scope::All => None,
                Scope::Changed | Scope::Behind => self.changed_after(layer.disk, cut, &layer.scratch)?,
            };
            let done = if scope == Scope::Behind { 0 } else { asked.done };
            layer.scratch.set_behind(parts.unwrap_or_else(|| Bits::all(layer.scratch.bytes())), done);
        }
        let frozen = |layer: &Layer| -> Result<Option<Arc<dyn StorageFile>>, Failure> {
            if !asked.frozen {
                return Ok(None);
            }
            let name = format!("{}/{}/{FROZEN}", entry.folder(), layer.disk);
            let file = self.storage.open(&name, OpenMode::OpenOrCreate).map_err(|error| store_failed(&error))?;
            file.set_bytes(0)
                .and_then(|()| file.set_bytes(layer.scratch.bytes()))
                .map_err(|error| store_failed(&error))?;
            Ok(Some(file))
        };
        let files = layers.iter().map(frozen).collect::<Result<Vec<_>, _>>()?;
        let round = u64::from_le_bytes(Uuid::new_v4().as_bytes()[..8].try_into().expect("eight bytes")).max(1);
        self.failed_over.set_round(id, ActiveRound { round, agent, session, disks });
        let claims: Vec<_> = layers.iter().zip(files).map(|(layer, file)| (&*layer.scratch, file)).collect();
        ScratchDisk::claim(round, &claims);
        let sizes = layers
            .iter()
            .map(|layer| wire::RoundSize { disk: layer.disk.to_vec(), bytes: layer.scratch.claimed_bytes(round) });
        Ok(wire::Round { round, time_ns: now().0, stopped: entry.stopped, disks: sizes.collect() })
    }

    /// Whether this agent may have the content of these disks: it is the one that they are written by, at their generation.
    fn authorise_home(&self, peer: &PeerInfo, disks: &[(DiskId, Generation)]) -> Result<HostId, Failure> {
        let refuse = |message: String, help: &str| Err(Failure::new(FailureKind::BadRequest, message, help));
        let Some(PeerIdentity::Agent(agent)) = peer.identity else {
            return refuse("only an agent asks for the way home".to_owned(), "use an agent's certificate");
        };
        if self.authorisations.is_denied(peer) {
            return refuse(format!("the certificate of agent {agent} was revoked"), "register the host again");
        }
        for (disk, generation) in disks {
            let known = self.authorisations.get(*disk);
            if known.is_none_or(|known| known.agent != agent || known.generation != *generation) {
                return refuse(
                    format!("disk {disk} at generation {generation} is not authorised for agent {agent}"),
                    "ask for the reprotect again: `tidemark reprotect NAME`",
                );
            }
        }
        Ok(agent)
    }

    /// The layer of a disk in a round that is under way, for whoever began it.
    fn round_of(&self, peer: &PeerInfo, id: &[u8], round: u64, disk: &[u8]) -> Result<(ActiveRound, Layer), Failure> {
        let (id, disk) = (Uuid::from_bytes(sixteen(id, "failover")?), DiskId::from_bytes(sixteen(disk, "disk")?));
        let active = self.active_round(peer, id, round)?;
        let layer = self.failed_over.layers_of(id).into_iter().find(|layer| layer.disk == disk);
        let layer = layer.filter(|_| active.disks.iter().any(|(known, _)| *known == disk));
        Ok((active, layer.ok_or_else(|| over(round))?))
    }

    fn active_round(&self, peer: &PeerInfo, id: Uuid, round: u64) -> Result<ActiveRound, Failure> {
        let active = self.failed_over.round(id).filter(|active| active.round == round).ok_or_else(|| over(round))?;
        // Again for each call: a certificate may be revoked, a generation raised.
        if self.authorise_home(peer, &active.disks)? != active.agent {
            return Err(over(round));
        }
        Ok(active)
    }

    fn runs(&self, peer: &PeerInfo, asked: &wire::RunsRequest) -> Result<wire::RunsReply, Failure> {
        let (_, layer) = self.round_of(peer, &asked.failover, asked.round, &asked.disk)?;
        let (runs, next) =
            layer.scratch.claimed_runs(asked.round, asked.from, RUNS_MAX).map_err(|error| store_failed(&error))?;
        let run =
            |run: ClaimedRun| wire::Run { offset: run.extent.offset, length: run.extent.length, zeroes: run.zeroes };
        Ok(wire::RunsReply { runs: runs.into_iter().map(run).collect(), next: next.unwrap_or(0) })
    }

    fn blocks(&self, peer: &PeerInfo, asked: &wire::BlocksRequest) -> Result<wire::BlocksReply, Failure> {
        let (active, layer) = self.round_of(peer, &asked.failover, asked.round, &asked.disk)?;
        let extent = Extent::new(asked.offset, asked.length);
        let parts: Vec<Extent> = pieces(extent, PART_BYTES).collect();
        let hashes = &asked.hashes[..];
        let is_whole = asked.offset.is_multiple_of(PART_BYTES) && extent.is_valid_on(layer.scratch.bytes());
        if !is_whole
            || !(1..=BLOCKS_BYTES_MAX).contains(&asked.length)
            || !(hashes.is_empty() || hashes.len() == parts.len() * BLOCK_HASH_BYTES)
        {
            return Err(bad_request(
                "blocks are asked for in whole parts of 4 KiB of the disk, with a hash for each or none",
            ));
        }
        let generation = active.disks.iter().find(|(disk, _)| *disk == layer.disk).map(|(_, generation)| *generation);
        let generation = generation.ok_or_else(|| over(asked.round))?;
        let mut content = vec![0; asked.length as usize];
        layer.scratch.read_claimed(asked.round, asked.offset, &mut content).map_err(|error| store_failed(&error))?;
        let key = CompareKey::new(layer.disk, generation, active.session);
        let of = |part: &Extent| &content[(part.offset - asked.offset) as usize..][..part.length as usize];
        let differs = |index: usize, part: &Extent| {
            let theirs = hashes.get(index * BLOCK_HASH_BYTES..(index + 1) * BLOCK_HASH_BYTES);
            theirs.is_none_or(|theirs| *theirs != key.hash(*part, of(part)))
        };
        let mut sealer = Sealer::new(ChunkKey::new(layer.disk, generation), COMPRESSION);
        let mut chunks = Vec::new();
        // Neighbours of one kind become one extent of one chunk.
        let mut run: Option<(Extent, bool)> = None;
        for (index, part) in parts.iter().enumerate() {
            let kind = differs(index, part).then(|| is_zero(of(part)));
            run = match (run, kind) {
                (Some((known, zeroes)), Some(kind))
                    if zeroes == kind
                        && known.end() == part.offset
                        && (zeroes || (known.length + part.length) as usize <= CHUNK_BYTES_MAX) =>
                {
                    Some((Extent::new(known.offset, known.length + part.length), zeroes))
                }
                (before, kind) => {
                    before.into_iter().for_each(|run| seal(&mut sealer, run, &content, asked.offset, &mut chunks));
                    kind.map(|zeroes| (*part, zeroes))
                }
            };
        }
        run.into_iter().for_each(|run| seal(&mut sealer, run, &content, asked.offset, &mut chunks));
        Ok(wire::BlocksReply { chunks: chunks.into() })
    }

    fn end_round(&self, peer: &PeerInfo, asked: &wire::EndRound) -> Result<wire::Ended, Failure> {
        let id = Uuid::from_bytes(sixteen(&asked.failover, "failover")?);
        let active = self.active_round(peer, id, asked.round)?;
        let layers = self.failed_over.layers_of(id);
        for layer in layers.iter().filter(|layer| active.disks.iter().any(|(disk, _)| *disk == layer.disk)) {
            layer.scratch.end_claim(asked.round, asked.durable);
        }
        self.failed_over.forget_round(id);
        Ok(wire::Ended { behind_bytes: layers.iter().filter_map(|layer| layer.scratch.behind_bytes()).sum() })
    }
}

fn seal(sealer: &mut Sealer, (extent, zeroes): (Extent, bool), content: &[u8], from: u64, out: &mut Vec<u8>) {
    match zeroes {
        true => sealer.seal_zeroes(&[extent], out),
        false => sealer.seal(&[extent], &content[(extent.offset - from) as usize..][..extent.length as usize], out),
    };
}

/// Keeps a machine that is on disks of its own from what needs to see its writes.
fn refuse_plain(entry: &FailedOver) -> Result<(), Failure> {
    if entry.promote != Promote::Plain {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Conflict,
        "the machine runs on its plain disks, where nobody sees what it writes",
        "complete the migration (`tidemark migrate NAME`) and protect it where it is",
    ))
}

fn over(round: u64) -> Failure {
    let message = format!("round {round} is over: another one began, or the process server was started again");
    Failure::new(FailureKind::Unavailable, message, "the master target begins another one by itself")
}

fn bad_request(message: &str) -> Failure {
    Failure::new(FailureKind::BadRequest, message, "let both ends be of the same version")
}

fn sixteen(bytes: &[u8], what: &str) -> Result<[u8; 16], Failure> {
    bytes.try_into().map_err(|_| bad_request(&format!("the {what} of a round has {} bytes, not 16", bytes.len())))
}

/// Rounds by failover; one each.
pub type ActiveRounds = BTreeMap<Uuid, ActiveRound>;

#[derive(Clone)]
pub struct FailbackService(Weak<Inner>);

pub fn failback_server(server: &ProcessServer) -> FailbackServer<FailbackService> {
    FailbackServer::new(FailbackService(Arc::downgrade(&server.0)))
}

impl FailbackService {
    /// Reading disks is no work for the connection's own threads.
    async fn answer<Q: Send + 'static, A: Send + 'static>(
        &self,
        request: Request<Q>,
        work: impl FnOnce(&Inner, &PeerInfo, Q) -> Result<A, Failure> + Send + 'static,
    ) -> Result<Response<A>, Status> {
        let peer = *request
            .extensions()
            .get::<PeerInfo>()
            .ok_or_else(|| Status::unauthenticated("the connection has no proven identity"))?;
        let inner = self.0.upgrade().ok_or_else(|| Status::unavailable("the process server is stopping"))?;
        let asked = request.into_inner();
        blocking(move || work(&inner, &peer, asked)).await.map(Response::new).map_err(|failure| status(&failure))
    }
}

fn status(failure: &Failure) -> Status {
    let code = match failure.kind {
        FailureKind::BadRequest => Code::InvalidArgument,
        FailureKind::NotFound => Code::NotFound,
        FailureKind::Conflict => Code::FailedPrecondition,
        FailureKind::Unavailable => Code::Unavailable,
        FailureKind::TimedOut => Code::DeadlineExceeded,
        FailureKind::Damaged => Code::DataLoss,
        FailureKind::Failed => Code::Internal,
    };
    Status::new(code, format!("{}: {}", failure.message, failure.help))
}

#[tonic::async_trait]
impl Failback for FailbackService {
    async fn begin(&self, request: Request<wire::BeginRound>) -> Result<Response<wire::Round>, Status> {
        self.answer(request, |inner, peer, asked| inner.begin_round(peer, asked)).await
    }

    async fn runs(&self, request: Request<wire::RunsRequest>) -> Result<Response<wire::RunsReply>, Status> {
        self.answer(request, |inner, peer, asked| inner.runs(peer, &asked)).await
    }

    async fn blocks(&self, request: Request<wire::BlocksRequest>) -> Result<Response<wire::BlocksReply>, Status> {
        self.answer(request, |inner, peer, asked| inner.blocks(peer, &asked)).await
    }

    async fn end(&self, request: Request<wire::EndRound>) -> Result<Response<wire::Ended>, Status> {
        self.answer(request, |inner, peer, asked| inner.end_round(peer, &asked)).await
    }
}
