//! The role as a whole: what control asks of it, and what it does by itself.
//!
//! *Consistency.* Every method that changes something is durable when it returns. What is asked about a machine sees what
//! was acknowledged to its host before. *Retries.* Every command may be repeated: authorising again, stopping a serve that is
//! gone or locking twice changes nothing. *Cancellation.* Dropping a future of [`ProcessServer::export`] ends the export and
//! removes what it began; the other methods finish what they began. *Crash.* See the stages; serves end, everything else is
//! found again.

mod background;
pub(crate) mod backups;
mod directory;
pub mod failback;
pub mod failover;
mod maintain;
mod pins;
mod recover;
mod report;
mod scrubber;
mod tend;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::TryLockError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::meter::Meter;
use tidemark_base::storage::{OpenMode, RealStorage, Storage, StorageFile};
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, Generation, MachineId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, MachineGrant, Reply, Retention, ServerCommand};
use tidemark_proto::health::{Serving, health_server};
use tidemark_transport::{ByPath, Identity, TlsListener, serve, tls};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::accept::authorise::{Authorisation, Authorisations, AuthoriseError};
use crate::accept::{Acceptor, POOL_BYTES, ReplicaStores};
use crate::failed_over::FailedOvers;
use crate::journal::Limits;
use crate::offline;
use crate::points::{self, PointError};
use crate::replica::{OpenFailure, ReplicaError, ReplicaInfo, ReplicaSet, SetError};
use crate::serve::Serves;
use crate::settings::{self, MachineSettings, Settings};
use crate::table::TableError;
use backups::Backups;
use directory::directory_server;
pub use directory::{Directory, NoDirectory};
use maintain::Maintainer;
use scrubber::{Scrubber, Tables};
use tend::Tender;

/// How often points are thinned and journals folded.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(10);
/// How often every byte of a replica is read again.
const SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 86_400);
/// How fast a scrub reads, on average: 2.7 TB a day, and a small part of what a disk can do.
const SCRUB_RATE_BYTES: u64 = 32 << 20;

pub struct ProcessServerConfig {
    /// Replicas, points and settings. Made when it is absent.
    pub folder: PathBuf,
    /// Where hosts connect; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Names this process server.
    pub identity: Identity,
    /// Where served points are opened; in a folder of mode 0700.
    pub socket: PathBuf,
    /// What the streams of all hosts may have in memory.
    pub pool_bytes: u64,
    pub limits: Limits,
    pub qemu_img: PathBuf,
    pub maintenance_interval: Duration,
    pub scrub_interval: Duration,
    /// What a scrub in the background reads in a second at most.
    pub scrub_rate_bytes: u64,
    /// What is known of the configuration server, for those who ask.
    pub directory: Arc<dyn Directory>,
    /// Of this boot: what was not flushed before another one is lost.
    pub boot: String,
}

impl ProcessServerConfig {
    pub fn new(folder: impl Into<PathBuf>, listen: SocketAddr, identity: Identity) -> Self {
        let folder = folder.into();
        Self {
            socket: folder.join("run/points.sock"),
            folder,
            listen,
            identity,
            pool_bytes: POOL_BYTES,
            limits: Limits::default(),
            qemu_img: "qemu-img".into(),
            maintenance_interval: MAINTENANCE_INTERVAL,
            scrub_interval: SCRUB_INTERVAL,
            scrub_rate_bytes: SCRUB_RATE_BYTES,
            directory: Arc::new(NoDirectory),
            // Without one nothing counts that was not flushed.
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
        }
    }
}

/// A running process server. Clones share it; it runs until [`ProcessServer::stop`].
#[derive(Clone)]
pub struct ProcessServer(Arc<Inner>);

struct Inner {
    address: SocketAddr,
    set: Arc<ReplicaSet>,
    open_failures: Vec<OpenFailure>,
    authorisations: Arc<Authorisations>,
    settings: Arc<Settings>,
    acceptor: Acceptor,
    serves: Serves,
    failed_over: Arc<FailedOvers>,
    storage: Arc<dyn Storage>,
    boot: String,
    /// Grows whenever points were made.
    points: Arc<watch::Sender<u64>>,
    qemu_img: PathBuf,
    storage_encrypted: Option<bool>,
    stop: CancellationToken,
    transport: Mutex<Option<tokio::task::JoinHandle<Result<(), tonic::transport::Error>>>>,
    maintainer: Maintainer,
    scrubber: Scrubber,
    tender: Tender,
    backups: Backups,
    health: watch::Sender<Serving>,
    /// Locked until everything has stopped; the lock goes with the descriptor.
    lock: Mutex<Option<Arc<dyn StorageFile>>>,
}

impl ProcessServer {
    /// Opens the folder and listens. Replicas that cannot be opened are reported and left as they are.
    pub async fn start(config: ProcessServerConfig) -> Result<Self, Failure> {
        let tls = tls::mutual_server(&config.identity).map_err(|error| {
            Failure::from_error(
                FailureKind::Failed,
                &error,
                "register this process server again to get a new certificate",
            )
        })?;
        let listener = TlsListener::bind(config.listen, tls).await.map_err(|error| {
            let message = format!("cannot listen on {}: {error}", config.listen);
            Failure::new(FailureKind::Failed, message, "stop the program that uses the port, or choose another port")
        })?;
        let address = listener.local_address();
        let directory = directory_server(config.directory.clone());
        let server = blocking(move || Self::open(config, address)).await?;
        let stop = server.0.stop.clone();
        let service = ByPath::new("/tidemark.control.v1.Directory/", directory, server.0.acceptor.service());
        let service = ByPath::new("/tidemark.failback.v1.Failback/", failback::failback_server(&server), service);
        let health = health_server(server.0.health.subscribe());
        let service = ByPath::new("/grpc.health.v1.Health/", health, service);
        let task = tokio::spawn(serve(listener, service, stop.cancelled_owned()));
        *server.0.transport.lock().expect("no panic while held") = Some(task);
        tracing::info!(%address, replicas = server.0.set.replicas().len(), "process server ready");
        Ok(server)
    }

    fn open(config: ProcessServerConfig, address: SocketAddr) -> Result<Self, Failure> {
        raise_file_limit();
        let storage: Arc<dyn Storage> = RealStorage::create(&config.folder).map_err(|error| store_failed(&error))?;
        // Tables whose rename a process before this one did not see the end of are durable before they are believed.
        storage.sync_folder("").map_err(|error| store_failed(&error))?;
        let lock = lock_folder(&*storage, "another process server", "stop the other one, or choose another folder")?;
        let (set, open_failures) = ReplicaSet::open(storage.clone(), config.limits).map_err(set_failed)?;
        for failure in &open_failures {
            tracing::error!(folder = failure.folder, error = %failure.error, "a replica cannot be opened");
        }
        let set = Arc::new(set);
        pins::release_stale(&set);
        let authorisations = Arc::new(Authorisations::open(storage.clone()).map_err(authorise_failed)?);
        let storage_encrypted = crate::encrypted::is_encrypted(&storage.path(""));
        let settings = Arc::new(Settings::open(storage.clone(), settings::FILE).map_err(table_failed)?);
        set.leave(settings.all().into_values().flat_map(|settings| settings.left));
        let serves = Serves::open(storage.clone(), &config.socket)?;
        let failed_over = Arc::new(FailedOvers::open(storage.clone()).map_err(table_failed)?);
        let points = Arc::new(watch::channel(0).0);
        let stores = ReplicaStores::new(set.clone(), points.clone());
        let acceptor =
            Acceptor::new(authorisations.clone(), stores, config.pool_bytes).map_err(|error| store_failed(&error))?;
        let maintainer = Maintainer::start(
            set.clone(),
            settings.clone(),
            failed_over.clone(),
            points.clone(),
            config.maintenance_interval,
        )
        .map_err(|error| store_failed(&error))?;
        let tables = Tables { authorisations: authorisations.clone(), settings: settings.clone() };
        let backups = Backups::open(storage.clone())?;
        let scrubber =
            Scrubber::start(set.clone(), tables, storage.clone(), config.scrub_interval, config.scrub_rate_bytes)
                .map_err(|error| store_failed(&error))?;
        let tender = Tender::start(set.clone()).map_err(|error| store_failed(&error))?;
        let inner = Arc::new(Inner {
            address,
            set,
            open_failures,
            authorisations,
            settings,
            acceptor,
            serves,
            failed_over,
            storage,
            boot: config.boot,
            points,
            qemu_img: config.qemu_img,
            storage_encrypted,
            stop: CancellationToken::new(),
            transport: Mutex::default(),
            maintainer,
            scrubber,
            tender,
            backups,
            health: watch::channel(serving(true)).0,
            lock: Mutex::new(Some(lock)),
        });
        inner.reopen_failovers()?;
        Ok(Self(inner))
    }

    /// Where hosts connect.
    pub fn address(&self) -> SocketAddr {
        self.0.address
    }

    /// Bytes that came for all disks since the start.
    pub fn appended_bytes(&self) -> u64 {
        self.0.set.appended_bytes()
    }

    /// Replication streams that were refused since the start, by disk and reason; no disk: further ones.
    pub fn refused_streams(&self) -> Vec<(Option<DiskId>, &'static str, u64)> {
        self.0.acceptor.refused().all()
    }

    /// As people know it; its id, where the name is not known.
    pub fn machine_name(&self, machine: MachineId) -> String {
        let name = self.0.settings.read(|machines| machines.get(&machine).map(|settings| settings.name.clone()));
        name.unwrap_or_else(|| machine.to_string())
    }

    /// Whose disk it is.
    pub fn machine_of(&self, disk: DiskId) -> Option<MachineId> {
        self.0.set.get(disk).ok().map(|replica| replica.machine())
    }

    /// Takes no more frames, makes what came durable, ends serves and folding, and waits for all of it.
    pub async fn stop(&self) {
        self.0.health.send_replace(serving(false));
        self.0.acceptor.stop().await;
        self.0.stop.cancel();
        let transport = self.0.transport.lock().expect("no panic while held").take();
        if let Some(transport) = transport {
            match transport.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "the listener failed"),
                Err(error) => tracing::error!(%error, "the listener ended badly"),
            }
        }
        let inner = self.0.clone();
        let finishing = tokio::task::spawn_blocking(move || {
            inner.maintainer.stop();
            inner.scrubber.stop();
            inner.tender.stop();
            inner.failed_over.stop_promotions();
            inner.serves.stop_all();
            inner.set.end_segments();
            drop(inner.lock.lock().expect("no panic while held").take());
        });
        if let Err(error) = finishing.await {
            tracing::error!(%error, "the process server did not stop cleanly");
        }
        tracing::info!("process server stopped");
    }

    /// What control asks, whatever it is.
    pub async fn execute(&self, command: ServerCommand) -> Result<Reply, Failure> {
        self.execute_metered(command, &Arc::default()).await
    }

    /// The same; long work says how far it is.
    pub async fn execute_metered(&self, command: ServerCommand, meter: &Arc<Meter>) -> Result<Reply, Failure> {
        match command {
            ServerCommand::Authorise(grant) => self.authorise(grant).await.map(|()| Reply::Done),
            ServerCommand::Deauthorise { machine, delete_replica } => {
                self.deauthorise(machine, delete_replica).await.map(|()| Reply::Done)
            }
            ServerCommand::Retention { machine, retention } => {
                self.set_retention(machine, retention).await.map(|()| Reply::Done)
            }
            ServerCommand::Points(machine) => self.points(machine).await.map(Reply::Points),
            ServerCommand::Resolve { machine, point } => self.resolve(machine, point).await.map(Reply::Point),
            ServerCommand::Lock { machine, point, locked } => self.lock(machine, point, locked).await.map(Reply::Point),
            ServerCommand::Verify { machine, point } => {
                self.verify_metered(machine, point, meter).await.map(Reply::Verified)
            }
            ServerCommand::WaitPoint { machine, mark, limit } => {
                self.wait_point(machine, mark, limit).await.map(Reply::Point)
            }
            ServerCommand::Serve { machine, point, writable, listen } => {
                self.serve(machine, point, writable, listen).await.map(Reply::Serving)
            }
            ServerCommand::ConfirmPoint { machine, point } => {
                self.confirm_point(machine, point).await.map(|()| Reply::Done)
            }
            ServerCommand::StopServe(id) => self.stop_serve(id).await.map(|_| Reply::Done),
            ServerCommand::Export { machine, point, to, format } => {
                self.export_metered(machine, point, &to, format, meter).await.map(Reply::Exported)
            }
            ServerCommand::Status => self.status().await.map(Reply::Server),
            ServerCommand::KeepBackup(part) => {
                let inner = self.0.clone();
                blocking(move || inner.backups.take(part)).await.map(|()| Reply::Done)
            }
            ServerCommand::Deny(list) => {
                let inner = self.0.clone();
                blocking(move || inner.authorisations.deny(list).map_err(authorise_failed)).await.map(|()| Reply::Done)
            }
            ServerCommand::Hypervisor(_) => Err(Failure::new(
                FailureKind::BadRequest,
                "no machines are run here",
                "ask a process server that is a process of its own",
            )),
        }
    }

    /// Lets a host write the disks of a machine, and makes their replicas where there are none. A generation only grows:
    /// a higher one ends the stream of the old one, and may come with a larger disk. A disk that the machine had and has no longer
    /// takes nothing more; its replica stays for as long as points need it.
    ///
    /// Crash at any place: control says the same again, and what was done stays done. Until then a disk that is to leave may
    /// still be written, and one that came has a replica that nothing was sent to.
    pub async fn authorise(&self, grant: MachineGrant) -> Result<(), Failure> {
        let granted: Vec<DiskId> = grant.disks.iter().map(|disk| disk.disk).collect();
        self.0.set.rejoin(&granted);
        for disk in &grant.disks {
            let known = self.0.authorisations.get(disk.disk);
            let superseded = known.is_some_and(|known| known.generation < disk.generation);
            let is_grown = superseded && known.is_some_and(|known| known.disk_bytes < disk.bytes);
            let asked = Authorisation {
                machine: grant.machine,
                agent: grant.host,
                generation: disk.generation,
                disk_bytes: disk.bytes,
            };
            let (inner, id) = (self.0.clone(), disk.disk);
            if is_grown {
                // What it sends is of the smaller disk; nothing more is wanted of that.
                self.0.acceptor.end_stream(id).await;
            }
            blocking(move || inner.prepare_replica(id, asked)).await?;
            let inner = self.0.clone();
            blocking(move || inner.authorisations.authorise(id, asked).map_err(authorise_failed)).await?;
            if superseded {
                self.0.acceptor.end_stream(id).await;
            }
        }
        let generations = grant.disks.iter().map(|disk| (disk.disk, disk.generation)).collect();
        let inner = self.0.clone();
        blocking(move || offline::supersede(inner.storage.clone(), &inner.set, grant.machine, &generations)).await?;
        let is_gone = |disk: &DiskId| !granted.contains(disk);
        let authorised = self.0.authorisations.all().into_iter();
        let of_machine = authorised.filter(|(_, authorisation)| authorisation.machine == grant.machine);
        for (disk, _) in of_machine.filter(|(disk, _)| is_gone(disk)) {
            let inner = self.0.clone();
            blocking(move || inner.authorisations.deauthorise(disk).map_err(authorise_failed)).await?;
            self.0.acceptor.end_stream(disk).await;
        }
        let replicas = self.0.set.of_machine(grant.machine);
        let left: BTreeSet<DiskId> = replicas.iter().map(|replica| replica.disk()).filter(is_gone).collect();
        let (inner, name, retention) = (self.0.clone(), grant.name, retention_of(grant.retention));
        blocking(move || {
            let change = inner.settings.change(|machines| {
                machines.insert(grant.machine, MachineSettings { name, retention, left: left.clone() });
                Ok(())
            });
            change.map_err(table_failed)?;
            inner.set.leave(left);
            Ok(())
        })
        .await
    }

    /// Who may write a machine's replica.
    pub async fn rights(&self, machine: MachineId) -> Result<Rights, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let mut rights = Rights::default();
            for replica in inner.set.of_machine(machine) {
                let authorised = inner.authorisations.get(replica.disk()).map(|known| known.generation);
                let generation = authorised.map_or(replica.generation(), |known| known.max(replica.generation()));
                rights.generations.insert(replica.disk(), generation);
            }
            let of_machine = inner.failed_over.all().into_values().find(|entry| entry.machine == machine);
            rights.failed_over = of_machine.map(|entry| entry.since);
            let record = offline::records(inner.storage.clone())?.remove(&machine);
            rights.by_recovery_key = record.map(|record| (record.at, record.point_time));
            Ok(rights)
        })
        .await
    }

    /// No stream of this machine is taken any more. The replica and its points stay unless `delete_replica`.
    pub async fn deauthorise(&self, machine: MachineId, delete_replica: bool) -> Result<(), Failure> {
        self.0.refuse_failed_over(machine)?;
        let authorised: Vec<DiskId> = self
            .0
            .authorisations
            .all()
            .into_iter()
            .filter(|(_, authorisation)| authorisation.machine == machine)
            .map(|(disk, _)| disk)
            .collect();
        for disk in authorised {
            let inner = self.0.clone();
            blocking(move || inner.authorisations.deauthorise(disk).map_err(authorise_failed)).await?;
            self.0.acceptor.end_stream(disk).await;
        }
        if !delete_replica {
            return Ok(());
        }
        let inner = self.0.clone();
        blocking(move || {
            for serve in inner.serves.of_machine(machine) {
                inner.serves.stop(serve)?;
            }
            for replica in inner.set.of_machine(machine) {
                inner.set.remove(replica.disk()).map_err(set_failed)?;
            }
            let change = inner.settings.change(|machines| {
                machines.remove(&machine);
                Ok(())
            });
            change.map_err(table_failed)?;
            // Last: until it is done the command is repeated. What stays of it would name cuts of a later replica.
            inner.set.remove_points(machine).map_err(set_failed)
        })
        .await
    }

    pub async fn set_retention(&self, machine: MachineId, retention: Retention) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            if !inner.settings.read(|machines| machines.contains_key(&machine)) {
                return Err(unknown_machine(machine));
            }
            let change = inner.settings.change(|machines| {
                if let Some(settings) = machines.get_mut(&machine) {
                    settings.retention = retention_of(retention);
                }
                Ok(())
            });
            change.map(drop).map_err(table_failed)
        })
        .await
    }

    /// Points are thinned and journals folded now, instead of within the interval.
    pub async fn maintain_now(&self) {
        let inner = self.0.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || inner.maintainer.run_now()).await {
            tracing::error!(%error, "maintenance failed");
        }
    }
}

impl ProcessServer {
    /// Every byte is read again now, instead of within the interval.
    pub async fn scrub_now(&self) {
        let inner = self.0.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || inner.scrubber.run_now()).await {
            tracing::error!(%error, "scrubbing failed");
        }
    }
}

impl Inner {
    fn prepare_replica(&self, disk: DiskId, asked: Authorisation) -> Result<(), Failure> {
        let info =
            ReplicaInfo { disk, machine: asked.machine, generation: asked.generation, disk_bytes: asked.disk_bytes };
        let replica = match self.set.get(disk) {
            Ok(replica) => replica,
            Err(ReplicaError::Absent { .. }) => return self.set.create(info).map(drop).map_err(set_failed),
            Err(error) => return Err(replica_failed(error)),
        };
        let is_next = replica.generation() < asked.generation && replica.machine() == asked.machine;
        if is_next && replica.disk_bytes() < asked.disk_bytes {
            return self.set.grow(&replica, asked.generation, asked.disk_bytes).map_err(set_failed);
        }
        if replica.disk_bytes() != asked.disk_bytes {
            let (known, asked) = (replica.disk_bytes(), asked.disk_bytes);
            return Err(authorise_failed(AuthoriseError::Size {
                disk,
                known,
                asked,
                generation: replica.generation(),
            }));
        }
        let current = replica.generation();
        if current > asked.generation {
            return Err(authorise_failed(AuthoriseError::Superseded { disk, asked: asked.generation, current }));
        }
        if replica.machine() != asked.machine {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("disk {disk} has a replica here, of machine {}", replica.machine()),
                "unprotect that machine first",
            ));
        }
        if current < asked.generation {
            replica.advance_generation(current, asked.generation).map_err(replica_failed)?;
        }
        Ok(())
    }
}

fn serving(works: bool) -> Serving {
    Serving::from([(String::new(), works), ("tidemark.replication.v1.Replication".to_owned(), works)])
}

/// Every segment of every replica is an open file; the usual limit of 1,024 is for programs that use `select`.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls touch the structure alone, which lives as long as they run.
    let raised = unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        } else {
            Ok(())
        }
    };
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

/// Two processes on one folder would each believe that they know the journals' ends. `whose` says what may have it, and
/// `help` what to do then.
pub(crate) fn lock_folder(storage: &dyn Storage, whose: &str, help: &str) -> Result<Arc<dyn StorageFile>, Failure> {
    let lock = storage.open("lock", OpenMode::OpenOrCreate).map_err(|error| store_failed(&error))?;
    match lock.as_file().map(std::fs::File::try_lock) {
        None | Some(Ok(())) => Ok(lock),
        Some(Err(TryLockError::WouldBlock)) => Err(Failure::new(
            FailureKind::Conflict,
            format!("{} is in use by {whose}", storage.path("").display()),
            help,
        )),
        Some(Err(TryLockError::Error(error))) => Err(store_failed(&error)),
    }
}

fn retention_of(retention: Retention) -> points::Retention {
    points::Retention {
        any_time_window: retention.any_time,
        point_age_max: retention.age.unwrap_or(Duration::MAX),
        points_max: retention.count.map_or(usize::MAX, |count| usize::try_from(count).unwrap_or(usize::MAX)),
        grid: retention.grid,
    }
}

fn now() -> Timestamp {
    Timestamp::now()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        let message = format!("the process server failed: {error}");
        Err(Failure::new(FailureKind::Failed, message, "report this, with the process server's log"))
    })
}

fn unknown_machine(machine: MachineId) -> Failure {
    let message = format!("machine {machine} is not known to this process server");
    Failure::new(FailureKind::NotFound, message, "protect it first, or ask the process server that has it")
}

fn store_failed(error: &io::Error) -> Failure {
    Failure::from_error(FailureKind::Failed, error, "check the process server's volume (free room, kernel log)")
}

fn table_failed(error: TableError) -> Failure {
    Failure::from_error(FailureKind::Failed, &error, error.help())
}

/// Who may write a machine's replica here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    pub generations: BTreeMap<DiskId, Generation>,
    /// The machine was made one of a point, and is not back: since when.
    pub failed_over: Option<Timestamp>,
    /// It was failed over with the recovery key: when, and to the point of when.
    pub by_recovery_key: Option<(Timestamp, Timestamp)>,
}

fn authorise_failed(error: AuthoriseError) -> Failure {
    let kind = match &error {
        AuthoriseError::Superseded { .. } | AuthoriseError::Size { .. } => FailureKind::Conflict,
        AuthoriseError::Table(_) => FailureKind::Failed,
    };
    Failure::from_error(kind, &error, error.help())
}

fn replica_failed(error: ReplicaError) -> Failure {
    use crate::journal::ReadError;
    let kind = match &error {
        ReplicaError::Absent { .. } | ReplicaError::NotViewable { .. } => FailureKind::NotFound,
        ReplicaError::Exists { .. }
        | ReplicaError::GenerationMoved { .. }
        | ReplicaError::GenerationBack { .. }
        | ReplicaError::Size { .. }
        | ReplicaError::Busy { .. } => FailureKind::Conflict,
        ReplicaError::Read { source: ReadError::Damaged { .. }, .. } => FailureKind::Damaged,
        _ => FailureKind::Failed,
    };
    Failure::from_error(kind, &error, error.help())
}

fn point_failed(error: PointError) -> Failure {
    let kind = match &error {
        PointError::Selector { .. } => FailureKind::BadRequest,
        PointError::Absent { .. } => FailureKind::NotFound,
        PointError::Store { .. } => FailureKind::Failed,
    };
    Failure::from_error(kind, &error, error.help())
}

fn set_failed(error: SetError) -> Failure {
    match error {
        SetError::Replica(error) => replica_failed(error),
        SetError::Point(error) => point_failed(error),
        error @ SetError::Open { .. } => Failure::from_error(FailureKind::Failed, &error, error.help()),
    }
}
