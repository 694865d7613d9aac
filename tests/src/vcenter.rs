//! A vCenter for tests: the part of the vSphere API that a program needs which protects machines by changed-block tracking, over HTTPS, after VMware's public
//! description of it. No vCenter was at hand to record; its machines are made of real files, and what changed is tracked here by rules of its own.
//!
//! It is as strict as the real one where that matters: the blocks of a machine that runs can be read only while there is a snapshot, a session is needed for everything, and an
//! answer about changes covers only some of the disk.

mod disk;
mod folder;
mod methods;
mod server;
mod xml;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

pub use disk::Disk;
use server::Server;

pub const USER: &str = "tidemark@vsphere.local";
pub const PASSWORD: &str = "pa<ss>&word";
pub const DATACENTER: &str = "DC 0";
pub const DATASTORE: &str = "SAN 1";
/// The one machine that is there at the begin.
pub const MACHINE: &str = "vm-42";

pub struct Vcenter {
    state: Arc<Mutex<State>>,
    server: Server,
}

pub struct State {
    pub folder: PathBuf,
    pub machines: BTreeMap<String, Machine>,
    pub sessions: BTreeSet<String>,
    pub tasks: BTreeMap<String, Task>,
    /// Every method that was called.
    pub calls: Vec<String>,
    pub reads: u64,
    pub free_bytes: u64,
    pub faults: Faults,
    pub password: String,
    next: u64,
}

/// What goes wrong next.
#[derive(Default)]
pub struct Faults {
    /// Sessions end after so many requests.
    pub sessions_end_after: Option<u64>,
    pub quiesce: bool,
    /// Of the next snapshots: fault and message.
    pub create: Vec<(&'static str, &'static str)>,
    pub remove: Vec<(&'static str, &'static str)>,
    /// Of the next questions about changes.
    pub query: Vec<&'static str>,
    /// The next answers about changes cover nothing.
    pub query_nothing: u32,
    /// The next reads are cut in the middle.
    pub cut_reads: u32,
    /// The next reads are answered with fewer bytes, as if these were all.
    pub short_reads: u32,
    /// The next reads are answered with another range.
    pub other_ranges: u32,
    /// The next reads are answered with status 503.
    pub busy_reads: u32,
    /// The next reads are answered with the whole file.
    pub whole_reads: u32,
}

pub struct Task {
    pub looks: u32,
    pub outcome: Result<Option<(String, String)>, (String, String)>,
}

pub struct Snapshot {
    pub id: String,
    pub name: String,
    pub description: String,
    pub quiesced: bool,
    /// Of each disk.
    pub change_ids: Vec<Option<String>>,
}

pub struct Machine {
    pub name: String,
    pub uuid: String,
    pub is_on: bool,
    pub tracks: bool,
    pub host: String,
    pub version: u64,
    pub disks: Vec<Disk>,
    /// Oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Made in its life.
    pub snapshots_made: u64,
}

impl Vcenter {
    /// With a machine whose disks are these raw images, which become its own.
    pub fn start(folder: &Path, images: &[PathBuf]) -> Self {
        Self::start_as(folder, images, false)
    }

    /// `is_old`: speaks TLS 1.2 and no later one.
    pub fn start_as(folder: &Path, images: &[PathBuf], is_old: bool) -> Self {
        let disks = images.iter().enumerate().map(|(number, image)| Disk::open(number as u64, image)).collect();
        let machine = Machine {
            name: "web".to_owned(),
            uuid: "5029b440-4ba1-2f0b-8d9c-8a9f0d3b6c11".to_owned(),
            is_on: true,
            tracks: false,
            host: "host-9".to_owned(),
            version: 1,
            disks,
            snapshots: Vec::new(),
            snapshots_made: 0,
        };
        let state = Arc::new(Mutex::new(State {
            folder: folder.to_owned(),
            machines: BTreeMap::from([(MACHINE.to_owned(), machine)]),
            sessions: BTreeSet::new(),
            tasks: BTreeMap::new(),
            calls: Vec::new(),
            reads: 0,
            free_bytes: 1 << 40,
            faults: Faults::default(),
            password: PASSWORD.to_owned(),
            next: 100,
        }));
        let server = Server::start(state.clone(), is_old);
        Self { state, server }
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    pub fn thumbprint(&self) -> &str {
        &self.server.thumbprint
    }

    pub fn certificate_pem(&self) -> &str {
        &self.server.pem
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The settings of a connection to it, in an agent's folder. Snapshots as often as somebody wants.
    pub fn connect(&self, state_folder: &Path, name: &str) -> PathBuf {
        self.connect_with(state_folder, name, &format!("thumbprint = \"{}\"\n", self.thumbprint()))
    }

    pub fn connect_with(&self, state_folder: &Path, name: &str, more: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let folder = state_folder.join("vsphere.d");
        std::fs::create_dir_all(&folder).unwrap();
        let password = folder.join(format!("{name}.password"));
        let settings = folder.join(format!("{name}.toml"));
        let shown = password.display();
        let text = format!(
            "url = \"https://{}\"\nuser = \"{USER}\"\npassword-file = \"{shown}\"\ninterval = \"0s\"\nfree-bytes-min = 1000000\n{more}",
            self.address(),
        );
        for (file, text) in [(&password, format!("{PASSWORD}\n")), (&settings, text)] {
            std::fs::File::create(file).and_then(|mut file| file.write_all(text.as_bytes())).unwrap();
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        settings
    }

    /// As its guest does.
    pub fn write(&self, disk: usize, offset: u64, data: &[u8]) {
        self.with_disk(disk, |disk, tracks| disk.write(offset, data, tracks));
    }

    pub fn content(&self, disk: usize) -> Vec<u8> {
        let mut content = Vec::new();
        self.with_disk(disk, |disk, _| content = disk.content());
        content
    }

    /// VMware forgets what changed, as after a crash of the host.
    pub fn reset_tracking(&self, disk: usize) {
        self.with_disk(disk, |disk, _| disk.reset_tracking());
    }

    pub fn with_disk(&self, disk: usize, act: impl FnOnce(&mut Disk, bool)) {
        let mut state = self.state();
        let machine = state.machines.get_mut(MACHINE).unwrap();
        let tracks = machine.tracks;
        act(&mut machine.disks[disk], tracks);
    }

    pub fn snapshot_names(&self) -> Vec<String> {
        self.state().machines[MACHINE].snapshots.iter().map(|snapshot| snapshot.name.clone()).collect()
    }

    /// How often a method was called.
    pub fn calls(&self, method: &str) -> usize {
        self.state().calls.iter().filter(|call| *call == method).count()
    }

    /// As another program or person does.
    pub fn make_snapshot(&self, name: &str) {
        self.state().machines.get_mut(MACHINE).unwrap().make_snapshot("snapshot-of-others", name, "", false);
    }

    pub fn remove_snapshot(&self, name: &str) {
        self.state().machines.get_mut(MACHINE).unwrap().remove_snapshot(|snapshot| snapshot.name == name);
    }
}

impl Machine {
    pub(crate) fn make_snapshot(&mut self, id: &str, name: &str, description: &str, quiesced: bool) {
        let tracks = self.tracks;
        let change_ids = self.disks.iter_mut().map(|disk| disk.snapshot(tracks)).collect();
        self.version += 1;
        self.snapshots_made += 1;
        let (id, name, description) = (id.to_owned(), name.to_owned(), description.to_owned());
        self.snapshots.push(Snapshot { id, name, description, quiesced, change_ids });
    }

    pub(crate) fn remove_snapshot(&mut self, is_it: impl Fn(&Snapshot) -> bool) -> bool {
        let Some(at) = self.snapshots.iter().position(is_it) else { return false };
        self.snapshots.remove(at);
        self.disks.iter_mut().for_each(|disk| disk.merge(at));
        self.version += 1;
        true
    }
}

impl State {
    fn id(&mut self, kind: &str) -> String {
        self.next += 1;
        format!("{kind}-{}", self.next)
    }
}
