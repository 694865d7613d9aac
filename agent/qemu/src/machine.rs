//! One QEMU, and the disks of it that are tracked.
//!
//! *Consistency.* What changed is in the live bitmap or in a frozen one, at any instant: a new one begins in the transaction in which the one before is
//! frozen, and frozen ones go when what they name is told elsewhere. *Retries.* Whoever asks asks again; a QEMU that was started anew is found, and its
//! bitmaps are judged each time that they are looked at. *Cancellation.* Each question has a limit. *Crash.* Of ours: bitmaps go on and are found by
//! their names; a copy under way ends by itself, and the next connection removes what is left. Of QEMU: the bitmaps say that they are
//! inconsistent, or are gone.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tidemark_base::disk::{Allocation, RemoteDisk};
use tidemark_base::stop::Stop;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{DiskId, Extent, ExtentSet};
use tidemark_nbd::Client;

use crate::bitmaps::{BitmapName, Chain, PREFIX, granularity, judge};
use crate::error::{QemuError, QmpError};
use crate::find::Place;
use crate::monitor::Monitor;
use crate::nodes::{Node, select};

/// A look at the bitmaps is good for so long.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Exports that nobody reads from any more are closed then, and the NBD server is left to others.
const IDLE_LIMIT: Duration = Duration::from_secs(5);
/// How long something in QEMU that was told to end may take.
const END_LIMIT: Duration = Duration::from_secs(30);
const READ_LIMIT: Duration = Duration::from_secs(60);
/// Connections to one export.
const CLIENTS_MAX: usize = 4;
/// States of a machine that runs elsewhere, or does not run here yet.
const MOVED: [&str; 3] = ["postmigrate", "finish-migrate", "inmigrate"];
/// Where QEMU, as another user, finds what is made for it.
const SHARED_FOLDER: &str = "/var/tmp";
/// The longest path of a socket, with room for a name.
const SOCKET_FOLDER_BYTES_MAX: usize = 80;

pub struct Machine {
    monitor: Monitor,
    /// For what QEMU writes while it runs as the same user.
    folder: PathBuf,
    inner: Mutex<Inner>,
    /// Instants whose copies are being read.
    pub(crate) copies: AtomicUsize,
}

#[derive(Default)]
pub(crate) struct Inner {
    connection: u64,
    /// Of the NBD server that we started.
    pub socket: Option<PathBuf>,
    pub disks: BTreeMap<DiskId, Tracked>,
}

pub(crate) struct Tracked {
    pub place: Place,
    pub node: Node,
    pub chain: Chain,
    /// Which session reads the bitmaps now.
    session: Option<[u8; 16]>,
    pub claimed: ExtentSet,
    broken: Option<String>,
    clients: Vec<Client>,
    is_exported: bool,
    used: Instant,
    looked: Option<Instant>,
}

impl Machine {
    /// Nothing is asked before it is needed.
    pub fn new(folder: &Path) -> Self {
        Self {
            monitor: Monitor::default(),
            folder: folder.to_owned(),
            inner: Mutex::default(),
            copies: AtomicUsize::new(0),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while held")
    }

    pub(crate) fn ask(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.monitor.execute(command, arguments)
    }

    /// The size of a disk, which is not tracked for it.
    pub fn probe(&self, place: &Place) -> Result<u64, QemuError> {
        let mut inner = self.lock();
        self.connect(&mut inner, place)?;
        let (devices, nodes) = self.graph()?;
        let node = select(place, &devices, &nodes, &self.name(place));
        self.hang_up_if_unused(&inner);
        Ok(node?.bytes)
    }

    /// Begins to track a disk, or goes on; the session that its bitmaps are the witness of.
    pub fn track(&self, disk: DiskId, place: &Place) -> Result<Option<[u8; 16]>, QemuError> {
        let mut inner = self.lock();
        self.connect(&mut inner, place)?;
        let (devices, nodes) = self.graph()?;
        let node = select(place, &devices, &nodes, &self.name(place))?;
        let mut tracked = Tracked {
            place: place.clone(),
            chain: none_yet(disk, &node),
            node,
            session: None,
            claimed: ExtentSet::new(),
            broken: None,
            clients: Vec::new(),
            is_exported: false,
            used: Instant::now(),
            looked: None,
        };
        self.take_over(disk, &mut tracked)?;
        // Nobody armed it: what it missed is the attach's to find out.
        tracked.broken = None;
        let session = tracked.chain.live.session;
        inner.disks.insert(disk, tracked);
        Ok(session)
    }

    /// Its bitmaps go, as far as its QEMU can be asked.
    pub fn untrack(&self, disk: DiskId) -> Result<(), QemuError> {
        let mut inner = self.lock();
        if !inner.disks.contains_key(&disk) {
            return Ok(());
        }
        let refreshed = self.refresh(&mut inner);
        let Some(mut tracked) = inner.disks.remove(&disk) else { return Ok(()) };
        refreshed?;
        self.close_export(disk, &mut tracked)?;
        self.close_server_if_unused(&mut inner)?;
        let removed = self.remove(&tracked.node, tracked.chain.frozen.iter().chain([&tracked.chain.live]));
        self.hang_up_if_unused(&inner);
        removed
    }

    fn hang_up_if_unused(&self, inner: &Inner) {
        if inner.disks.is_empty() {
            self.monitor.disconnect();
        }
    }

    /// Lets go of a disk that stays tracked by QEMU.
    pub fn leave(&self, disk: DiskId) {
        let mut inner = self.lock();
        let Some(mut tracked) = inner.disks.remove(&disk) else { return };
        let left = self.close_export(disk, &mut tracked).and_then(|()| self.close_server_if_unused(&mut inner));
        if let Err(error) = left {
            tracing::debug!(%disk, %error, "an export is left to the next connection");
        }
        self.hang_up_if_unused(&inner);
    }

    /// Everything before is told elsewhere: `session` reads the bitmaps from now on.
    pub fn arm(&self, disk: DiskId, session: [u8; 16]) -> Result<(), QemuError> {
        let mut inner = self.lock();
        self.refresh(&mut inner)?;
        let tracked = inner.disk(disk)?;
        if tracked.broken.is_some() {
            return Ok(());
        }
        if tracked.chain.live.session != Some(session) {
            let armed = BitmapName { disk, session: Some(session), number: 0 };
            self.switch(tracked, armed)?;
        }
        tracked.session = Some(session);
        Ok(())
    }

    /// Whether something changed that was not claimed; unknown is yes.
    pub fn is_dirty(&self, disk: DiskId) -> bool {
        let mut inner = self.lock();
        if let Err(error) = self.look(&mut inner, disk) {
            tracing::debug!(%disk, %error, "whether it changed is not known");
            return true;
        }
        inner.disks.get(&disk).is_none_or(|tracked| tracked.broken.is_some() || tracked.chain.bytes > 0)
    }

    /// Freezes what changed so far.
    pub fn claim(&self, disk: DiskId) -> Result<(), QemuError> {
        let mut inner = self.lock();
        self.refresh(&mut inner)?;
        let socket;
        let frozen;
        {
            let tracked = inner.disk(disk)?;
            tracked.must_be_whole(disk)?;
            self.collapse(tracked)?;
            tracked.claimed.clear();
            if tracked.chain.bytes == 0 {
                return Ok(());
            }
            let next = tracked.chain.live.next();
            frozen = tracked.chain.live;
            self.switch(tracked, next)?;
            socket = self.server(&mut inner)?;
        }
        let tracked = inner.disk(disk)?;
        tracked.claimed = self.read_bitmap(disk, &tracked.node, frozen, &socket)?;
        Ok(())
    }

    pub fn claimed(&self, disk: DiskId) -> ExtentSet {
        self.lock().disks.get(&disk).map(|tracked| tracked.claimed.clone()).unwrap_or_default()
    }

    /// What was claimed is told elsewhere.
    pub fn release(&self, disk: DiskId) -> Result<(), QemuError> {
        let mut inner = self.lock();
        let tracked = inner.disk(disk)?;
        tracked.claimed.clear();
        let frozen = std::mem::take(&mut tracked.chain.frozen);
        tracked.looked = None;
        self.remove(&tracked.node, frozen.iter())
    }

    /// Why something may have been missed.
    pub fn broken(&self, disk: DiskId) -> Option<String> {
        let mut inner = self.lock();
        // A QEMU that is away is no gap: what it did is judged when it is back.
        let _ = self.look(&mut inner, disk);
        inner.disks.get(&disk).and_then(|tracked| tracked.broken.clone())
    }

    pub fn forgive(&self, disk: DiskId) {
        if let Some(tracked) = self.lock().disks.get_mut(&disk) {
            tracked.broken = None;
        }
    }

    pub fn bytes(&self, disk: DiskId) -> u64 {
        self.lock().disks.get(&disk).map_or(0, |tracked| tracked.node.bytes)
    }

    /// What its image is, as its QEMU opened it.
    pub fn format(&self, disk: DiskId) -> Option<String> {
        self.lock().disks.get(&disk).map(|tracked| tracked.node.format().to_owned())
    }

    fn name(&self, place: &Place) -> String {
        match place {
            Place::Node { socket, .. } => socket.display().to_string(),
            Place::Image(_) => place.way().map(|way| way.name()).unwrap_or_default(),
        }
    }

    // ---- what QEMU has

    fn connect(&self, inner: &mut Inner, place: &Place) -> Result<(), QemuError> {
        let connection = self.monitor.connect(|| place.way())?;
        if connection != inner.connection {
            inner.socket = None;
            for tracked in inner.disks.values_mut() {
                tracked.clients.clear();
                tracked.is_exported = false;
            }
            self.clear_leftovers()?;
            inner.connection = connection;
        }
        // A storage daemon has no state of its own.
        if let Ok(status) = self.ask("query-status", json!({}))
            && let Some(state) = status["status"].as_str().filter(|state| MOVED.contains(state))
        {
            return Err(QemuError::Migrated { state: state.to_owned() });
        }
        Ok(())
    }

    fn graph(&self) -> Result<(Value, Value), QemuError> {
        let devices = self.ask("query-block", json!({})).unwrap_or(Value::Null);
        Ok((devices, self.ask("query-named-block-nodes", json!({ "flat": true }))?))
    }

    /// Looks anew, where the last look at this disk is old.
    fn look(&self, inner: &mut Inner, disk: DiskId) -> Result<(), QemuError> {
        let looked = inner.disks.get(&disk).and_then(|tracked| tracked.looked);
        match looked {
            Some(looked) if looked.elapsed() < LOOK_INTERVAL => Ok(()),
            _ => self.refresh(inner),
        }
    }

    /// Looks at every disk anew.
    pub(crate) fn refresh(&self, inner: &mut Inner) -> Result<(), QemuError> {
        let Some(place) = inner.disks.values().map(|tracked| tracked.place.clone()).next() else { return Ok(()) };
        self.connect(inner, &place)?;
        let (devices, nodes) = self.graph()?;
        let name = self.name(&place);
        let mut is_idle = true;
        for (disk, tracked) in &mut inner.disks {
            tracked.node = select(&tracked.place, &devices, &nodes, &name)?;
            self.take_over(*disk, tracked)?;
            if tracked.is_exported && tracked.used.elapsed() > IDLE_LIMIT {
                self.close_export(*disk, tracked)?;
            }
            is_idle &= !tracked.is_exported;
        }
        if is_idle {
            self.close_server_if_unused(inner)?;
        }
        Ok(())
    }

    /// Takes the bitmaps of a disk as they are, or begins anew.
    fn take_over(&self, disk: DiskId, tracked: &mut Tracked) -> Result<(), QemuError> {
        let judged = judge(disk, &tracked.node.bitmaps).and_then(|chain| match (tracked.session, chain.live.session) {
            (Some(ours), Some(theirs)) if ours != theirs => {
                Err("its bitmaps are of another session: an older agent, or an older image, is at work".to_owned())
            }
            _ => Ok(chain),
        });
        match judged {
            Ok(chain) => tracked.chain = chain,
            Err(reason) => {
                let ours = tracked.node.bitmaps.iter().filter_map(|bitmap| BitmapName::parse(&bitmap.name, disk));
                let ours: Vec<BitmapName> = ours.collect();
                self.remove(&tracked.node, ours.iter())?;
                tracked.chain = none_yet(disk, &tracked.node);
                self.transact(vec![self.addition(&tracked.node, tracked.chain.live, tracked.chain.granularity)])?;
                tracked.claimed.clear();
                tracked.session = None;
                tracked.broken = Some(reason);
            }
        }
        tracked.looked = Some(Instant::now());
        Ok(())
    }

    // ---- bitmaps

    pub(crate) fn transact(&self, actions: Vec<Value>) -> Result<(), QemuError> {
        if !actions.is_empty() {
            self.ask("transaction", json!({ "actions": actions }))?;
        }
        Ok(())
    }

    pub(crate) fn addition(&self, node: &Node, name: BitmapName, granularity: u64) -> Value {
        let persistent = node.keeps_bitmaps();
        json!({ "type": "block-dirty-bitmap-add", "data": {
            "node": node.name, "name": name.to_string(), "granularity": granularity, "persistent": persistent,
        }})
    }

    pub(crate) fn disable(&self, node: &Node, name: BitmapName) -> Value {
        json!({ "type": "block-dirty-bitmap-disable", "data": { "node": node.name, "name": name.to_string() } })
    }

    /// The live bitmap is frozen, and `next` records from before that.
    fn switch(&self, tracked: &mut Tracked, next: BitmapName) -> Result<(), QemuError> {
        let live = tracked.chain.live;
        self.transact(vec![
            self.addition(&tracked.node, next, tracked.chain.granularity),
            self.disable(&tracked.node, live),
        ])?;
        tracked.chain.frozen.push(live);
        tracked.chain.live = next;
        tracked.looked = None;
        Ok(())
    }

    /// What was frozen and not released is live again.
    pub(crate) fn collapse(&self, tracked: &mut Tracked) -> Result<(), QemuError> {
        if tracked.chain.frozen.is_empty() {
            return Ok(());
        }
        let (node, live) = (&tracked.node.name, tracked.chain.live.to_string());
        let frozen: Vec<String> = tracked.chain.frozen.iter().map(BitmapName::to_string).collect();
        let merge =
            json!({ "type": "block-dirty-bitmap-merge", "data": { "node": node, "target": live, "bitmaps": frozen } });
        let removals = frozen.iter().map(|name| removal(node, name));
        self.transact([merge].into_iter().chain(removals).collect())?;
        tracked.chain.frozen.clear();
        Ok(())
    }

    pub(crate) fn remove<'a>(&self, node: &Node, names: impl Iterator<Item = &'a BitmapName>) -> Result<(), QemuError> {
        self.transact(names.map(|name| removal(&node.name, &name.to_string())).collect())
    }

    /// What a frozen bitmap names.
    pub(crate) fn read_bitmap(
        &self,
        disk: DiskId,
        node: &Node,
        name: BitmapName,
        socket: &Path,
    ) -> Result<ExtentSet, QemuError> {
        let export = export_name(disk, "bitmap");
        let name = name.to_string();
        let arguments =
            json!({ "type": "nbd", "id": export, "node-name": node.name, "name": export, "bitmaps": [name] });
        self.ask("block-export-add", arguments)?;
        let read = || -> Result<ExtentSet, QemuError> {
            let mut client = Client::connect_unix_for(socket, &export, &format!("qemu:dirty-bitmap:{name}"))?;
            client.set_timeout(Some(READ_LIMIT)).map_err(tidemark_nbd::ClientError::from)?;
            let whole = Extent::new(0, client.bytes());
            let runs = client.context_status(whole)?;
            client.close()?;
            Ok(runs.into_iter().filter(|(_, flags)| flags & 1 != 0).map(|(extent, _)| extent).collect())
        };
        let found = read();
        self.remove_export(&export)?;
        found
    }

    // ---- exports

    /// The socket of our NBD server.
    pub(crate) fn server(&self, inner: &mut Inner) -> Result<PathBuf, QemuError> {
        if let Some(socket) = &inner.socket {
            return Ok(socket.clone());
        }
        let socket = self.shared_folder()?.join(format!("nbd-{}", short(uuid::Uuid::new_v4().as_bytes())));
        let address = json!({ "type": "unix", "data": { "path": socket } });
        match self.ask("nbd-server-start", json!({ "addr": address })) {
            Ok(_) => {}
            Err(QmpError::Refused { reason, .. }) if reason.contains("already running") => {
                return Err(QemuError::ServerInUse { reason });
            }
            Err(error) => return Err(error.into()),
        }
        inner.socket = Some(socket.clone());
        Ok(socket)
    }

    /// A folder that QEMU can make a socket in, whoever it runs as.
    pub(crate) fn shared_folder(&self) -> Result<PathBuf, QemuError> {
        let (uid, gid) = self.monitor.owner()?;
        let is_ours = uid == nix::unistd::Uid::effective().as_raw();
        if is_ours && self.folder.as_os_str().len() <= SOCKET_FOLDER_BYTES_MAX {
            let failed = |source| QemuError::Io { what: "make", path: self.folder.clone(), source };
            tidemark_base::storage::create_private_folder(&self.folder).map_err(failed)?;
            return Ok(self.folder.clone());
        }
        let name = format!("tidemark-{}-{uid}", short(self.folder.as_os_str().as_encoded_bytes()));
        let folder = Path::new(SHARED_FOLDER).join(name);
        let failed = |source| QemuError::User { uid, source };
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => {
                nix::unistd::chown(&folder, Some(uid.into()), Some(gid.into())).map_err(|error| failed(error.into()))?
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = std::fs::symlink_metadata(&folder).map_err(failed)?;
                // Whatever lies there under our name and is somebody else's is not for us.
                if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
                    return Err(failed(io::ErrorKind::AlreadyExists.into()));
                }
            }
            Err(error) => return Err(failed(error)),
        }
        Ok(folder)
    }

    pub(crate) fn owner(&self) -> Result<(u32, u32), QemuError> {
        Ok(self.monitor.owner()?)
    }

    fn close_export(&self, disk: DiskId, tracked: &mut Tracked) -> Result<(), QemuError> {
        tracked.clients.clear();
        if std::mem::take(&mut tracked.is_exported) {
            self.remove_export(&export_name(disk, "disk"))?;
        }
        Ok(())
    }

    fn close_server_if_unused(&self, inner: &mut Inner) -> Result<(), QemuError> {
        let is_read = self.copies.load(Ordering::SeqCst) > 0;
        if is_read || inner.disks.values().any(|tracked| tracked.is_exported) {
            return Ok(());
        }
        if let Some(socket) = inner.socket.take() {
            self.ask("nbd-server-stop", json!({}))?;
            let _ = std::fs::remove_file(socket);
        }
        Ok(())
    }

    /// Gone when this returns.
    pub(crate) fn remove_export(&self, export: &str) -> Result<(), QemuError> {
        self.ask("block-export-del", json!({ "id": export, "mode": "hard" }))?;
        self.until("the end of an export", || {
            let exports = self.ask("query-block-exports", json!({}))?;
            Ok(exports.as_array().into_iter().flatten().all(|found| found["id"] != export))
        })
    }

    pub(crate) fn until(
        &self,
        what: &str,
        mut is_so: impl FnMut() -> Result<bool, QemuError>,
    ) -> Result<(), QemuError> {
        let never = Stop::new();
        let deadline = Instant::now() + END_LIMIT;
        let mut pause = Duration::from_millis(1);
        while !is_so()? {
            if Instant::now() > deadline {
                return Err(QmpError::TimedOut { what: what.to_owned(), limit: END_LIMIT }.into());
            }
            never.wait_for(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }

    /// What a process of ours left that was killed: jobs, exports and nodes of our names.
    fn clear_leftovers(&self) -> Result<(), QemuError> {
        let names = |list: &Value, field: &str| -> Vec<String> {
            let all = list.as_array().into_iter().flatten().filter_map(|found| found[field].as_str());
            all.filter(|name| name.starts_with(PREFIX)).map(str::to_owned).collect()
        };
        for job in names(&self.ask("query-jobs", json!({}))?, "id") {
            self.end_job(&job)?;
        }
        let exports = names(&self.ask("query-block-exports", json!({}))?, "id");
        for export in &exports {
            self.remove_export(export)?;
        }
        if !exports.is_empty() {
            // With exports of ours, it was ours.
            self.ask("nbd-server-stop", json!({}))?;
        }
        let mut nodes = names(&self.ask("query-named-block-nodes", json!({ "flat": true }))?, "node-name");
        // What lies above another one goes first.
        nodes.sort_by_key(|name| name.ends_with("-file"));
        for node in nodes {
            self.ask("blockdev-del", json!({ "node-name": node }))?;
        }
        Ok(())
    }

    /// Cancels a job that still runs, and forgets it.
    pub(crate) fn end_job(&self, job: &str) -> Result<(), QemuError> {
        // One that has ended refuses this.
        let _ = self.ask("block-job-cancel", json!({ "device": job, "force": true }));
        self.until("the end of a copy", || {
            let jobs = self.ask("query-jobs", json!({}))?;
            let found = jobs.as_array().into_iter().flatten().find(|found| found["id"] == job);
            Ok(found.is_none_or(|found| found["status"] == "concluded"))
        })?;
        let _ = self.ask("job-dismiss", json!({ "id": job }));
        Ok(())
    }

    // ---- reading

    fn client(&self, disk: DiskId) -> Result<Client, QemuError> {
        let mut inner = self.lock();
        let tracked = inner.disk(disk)?;
        tracked.used = Instant::now();
        if let Some(client) = tracked.clients.pop() {
            return Ok(client);
        }
        if inner.socket.is_none() || !inner.disk(disk)?.is_exported {
            self.refresh(&mut inner)?;
        }
        let socket = self.server(&mut inner)?;
        let export = export_name(disk, "disk");
        let tracked = inner.disk(disk)?;
        if !tracked.is_exported {
            let arguments = json!({ "type": "nbd", "id": export, "node-name": tracked.node.name, "name": export });
            self.ask("block-export-add", arguments)?;
            tracked.is_exported = true;
        }
        let client = Client::connect_unix(&socket, &export)?;
        client.set_timeout(Some(READ_LIMIT)).map_err(tidemark_nbd::ClientError::from)?;
        Ok(client)
    }

    fn give_back(&self, disk: DiskId, client: Client) {
        let mut inner = self.lock();
        if let Ok(tracked) = inner.disk(disk)
            && tracked.clients.len() < CLIENTS_MAX
        {
            tracked.clients.push(client);
        }
    }

    /// Once more where a connection is dead: QEMU may have been started anew since it was made.
    fn with_client<T>(
        &self,
        disk: DiskId,
        mut act: impl FnMut(&mut Client) -> Result<T, tidemark_nbd::ClientError>,
    ) -> io::Result<T> {
        let mut client = self.client(disk)?;
        if let Ok(done) = act(&mut client) {
            self.give_back(disk, client);
            return Ok(done);
        }
        drop(client);
        if let Ok(tracked) = self.lock().disk(disk) {
            tracked.clients.clear();
        }
        let mut client = self.client(disk)?;
        let done = act(&mut client).map_err(io::Error::from)?;
        self.give_back(disk, client);
        Ok(done)
    }
}

impl Tracked {
    /// A gap that was found just now is known to nobody yet: what the new bitmap names is not all that changed.
    pub fn must_be_whole(&self, disk: DiskId) -> Result<(), QemuError> {
        match &self.broken {
            Some(reason) => Err(QemuError::Unwitnessed { disk: disk.to_string(), reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

impl Inner {
    pub fn disk(&mut self, disk: DiskId) -> Result<&mut Tracked, QemuError> {
        self.disks.get_mut(&disk).ok_or_else(|| QemuError::Unknown { disk: disk.to_string() })
    }
}

/// A chain that begins.
fn none_yet(disk: DiskId, node: &Node) -> Chain {
    let live = BitmapName { disk, session: None, number: 0 };
    Chain { live, granularity: granularity(node.bytes), bytes: 0, frozen: Vec::new() }
}

fn removal(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": name } })
}

/// Names of nodes have at most 31 characters.
pub(crate) fn export_name(disk: DiskId, what: &str) -> String {
    format!("{PREFIX}{}-{what}", short(disk.as_bytes()))
}

/// Twelve characters that stand for it.
fn short(bytes: &[u8]) -> String {
    // FNV-1a: names, of which a handful are side by side.
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{:012x}", hash >> 16)
}

/// A tracked disk as its QEMU reads it now.
pub struct Live {
    pub machine: Arc<Machine>,
    pub disk: DiskId,
    /// When it was attached.
    pub bytes: u64,
}

impl RemoteDisk for Live {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn current_bytes(&self) -> io::Result<u64> {
        Ok(self.machine.bytes(self.disk))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.machine.with_client(self.disk, |client| client.read(offset, buffer))
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        const LOOK_BYTES: u64 = 1 << 30;
        let window = Extent::new(offset, (self.bytes - offset).min(LOOK_BYTES));
        let runs = self.machine.with_client(self.disk, |client| client.block_status(window))?;
        let (first, kind) = runs.first().copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((first.length, kind))
    }
}
