//! One instant of several disks of a machine, with what changed up to it.
//!
//! What changed is *copied*, by QEMU itself, into scratch files beside it (`blockdev-backup`, `sync: bitmap`, all disks in one transaction): while that goes on, a
//! write of the guest to such a place waits until its old content was copied. The copy is of what changed alone, bounded beforehand, onto room that was reserved
//! beforehand, and ends by itself, also when we are killed. Nothing in it waits for a network, or for us: an image that is fleeced for as long as it is being sent
//! holds the guest's writes to the speed of the reader, grows until its room ends, and fails the guest's writes then.
//!
//! *Consistency.* The jobs are the first actions of the transaction: each keeps its disk drained until the transaction has ended. A new bitmap begins in it; the
//! one before records on until the copy has ended, so it names everything up to the instant and perhaps more. What of it the copy holds is what changed.
//! *Retries.* None: what was not released is in the chain. *Cancellation.* Dropping ends the jobs and removes scratch files. *Crash.* The next connection does.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, Extent, ExtentSet};
use tidemark_nbd::{Client, ClientError};

use crate::bitmaps::BitmapName;
use crate::error::{QemuError, QmpError};
use crate::machine::{Inner, Machine, export_name};
use crate::nodes::Node;

/// Copies are made in pieces of this size.
const PIECE_BYTES: u64 = 64 << 10;
/// What must stay free beside a scratch file.
const SPARE_BYTES: u64 = 16 << 20;
/// What is asked of a scratch file at once.
const WINDOW_BYTES: u64 = 1 << 30;
const READ_LIMIT: Duration = Duration::from_secs(60);

/// To be dropped as soon as what changed was read: its room is given back then.
pub struct Taken {
    machine: Arc<Machine>,
    parts: Vec<Part>,
}

struct Part {
    disk: DiskId,
    node: Node,
    /// Names what changed.
    frozen: BitmapName,
    changed: ExtentSet,
    client: Option<Mutex<Client>>,
    has_job: bool,
    has_file_node: bool,
    has_node: bool,
    has_export: bool,
    file: PathBuf,
}

impl Machine {
    /// An instant of these disks; `None` where more than `bytes_max` of one changed.
    pub fn take(self: &Arc<Self>, disks: &[DiskId], bytes_max: u64) -> Result<Option<Taken>, QemuError> {
        let mut inner = self.lock();
        self.refresh(&mut inner)?;
        let mut changed_bytes = Vec::new();
        for disk in disks {
            let tracked = inner.disk(*disk)?;
            tracked.must_be_whole(*disk)?;
            if tracked.chain.bytes > bytes_max {
                return Ok(None);
            }
            changed_bytes.push(tracked.chain.bytes);
            self.collapse(tracked)?;
        }
        self.copies.fetch_add(1, Ordering::SeqCst);
        let mut taken = Taken { machine: self.clone(), parts: Vec::new() };
        for (disk, bytes) in disks.iter().zip(changed_bytes) {
            let tracked = inner.disk(*disk)?;
            taken.parts.push(Part {
                disk: *disk,
                node: tracked.node.clone(),
                frozen: tracked.chain.live,
                changed: ExtentSet::new(),
                client: None,
                has_job: false,
                has_file_node: false,
                has_node: false,
                has_export: false,
                file: PathBuf::new(),
            });
            let Some(part) = taken.parts.last_mut() else { continue };
            self.make_scratch(part, bytes, tracked.chain.granularity)?;
        }
        let socket = self.server(&mut inner)?;
        self.begin(&mut inner, &mut taken)?;
        for part in &mut taken.parts {
            self.finish(part)?;
            let tracked = inner.disk(part.disk)?;
            self.transact(vec![self.disable(&part.node, part.frozen)])?;
            let named = self.read_bitmap(part.disk, &tracked.node, part.frozen, &socket)?;
            self.open(part, &named, &socket)?;
        }
        Ok(Some(taken))
    }

    /// An empty image that QEMU has open, with room for the copy.
    fn make_scratch(&self, part: &mut Part, changed: u64, granularity: u64) -> Result<(), QemuError> {
        let folder = self.shared_folder()?;
        let (file_node, node) = (export_name(part.disk, "file"), export_name(part.disk, "copy"));
        part.file = folder.join(format!("{node}.qcow2"));
        let failed = |what| {
            let path = part.file.clone();
            move |source| QemuError::Io { what, path, source }
        };
        // Left by a kill between its making and its opening.
        let _ = std::fs::remove_file(&part.file);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&part.file).map_err(failed("make"))?;
        let (uid, gid) = self.owner()?;
        if uid != nix::unistd::Uid::effective().as_raw() {
            let owned = nix::unistd::fchown(&file, Some(uid.into()), Some(gid.into()));
            owned.map_err(|error| QemuError::User { uid, source: error.into() })?;
        }
        self.ask("blockdev-add", json!({ "driver": "file", "node-name": file_node, "filename": part.file }))?;
        part.has_file_node = true;
        let job = export_name(part.disk, "make");
        let image = json!({ "driver": "qcow2", "file": file_node, "size": part.node.bytes });
        self.ask("blockdev-create", json!({ "job-id": job, "options": image }))?;
        let made = self.wait_for_job(&job);
        self.ask("job-dismiss", json!({ "id": job }))?;
        made.map_err(|reason| QemuError::Copy { disk: part.node.name.clone(), reason })?;
        self.ask("blockdev-add", json!({ "driver": "qcow2", "node-name": node, "file": file_node }))?;
        part.has_node = true;
        // Each granule may need a piece of its own, and the image has tables.
        let pieces = changed.div_ceil(granularity) * PIECE_BYTES.max(granularity);
        let room = pieces.min(changed.saturating_mul(16)).min(part.node.bytes) + SPARE_BYTES;
        reserve(&file, room, &folder)?;
        // QEMU has it open: it goes with the node, whatever happens to us.
        std::fs::remove_file(&part.file).map_err(failed("remove"))
    }

    /// The instant.
    fn begin(&self, inner: &mut Inner, taken: &mut Taken) -> Result<(), QemuError> {
        let backup = |part: &Part, or_break_copy: bool| {
            let mut data = json!({
                "job-id": export_name(part.disk, "job"), "device": part.node.name, "target": export_name(part.disk, "copy"),
                "sync": "bitmap", "bitmap": part.frozen.to_string(), "bitmap-mode": "never", "auto-dismiss": false,
            });
            if or_break_copy {
                data["on-cbw-error"] = json!("break-snapshot");
            }
            json!({ "type": "blockdev-backup", "data": data })
        };
        let mut additions = Vec::new();
        for part in &taken.parts {
            let tracked = inner.disk(part.disk)?;
            additions.push(self.addition(&part.node, part.frozen.next(), tracked.chain.granularity));
        }
        let actions = |or_break_copy| -> Vec<Value> {
            let backups = taken.parts.iter().map(|part| backup(part, or_break_copy));
            backups.chain(additions.iter().cloned()).collect()
        };
        match self.transact(actions(true)) {
            // QEMU before 10.1 fails the guest's write where the copy cannot be written.
            Err(QemuError::Qmp(QmpError::Refused { reason, .. })) if reason.contains("on-cbw-error") => {
                self.transact(actions(false))?;
            }
            other => other?,
        }
        for part in &mut taken.parts {
            part.has_job = true;
            let tracked = inner.disk(part.disk)?;
            tracked.chain.frozen.push(part.frozen);
            tracked.chain.live = part.frozen.next();
        }
        Ok(())
    }

    fn finish(&self, part: &mut Part) -> Result<(), QemuError> {
        let job = export_name(part.disk, "job");
        let copied = self.wait_for_job(&job);
        self.ask("job-dismiss", json!({ "id": job }))?;
        part.has_job = false;
        copied.map_err(|reason| QemuError::Copy { disk: part.node.name.clone(), reason })
    }

    /// Why it failed, if it did.
    fn wait_for_job(&self, job: &str) -> Result<(), String> {
        let mut outcome = Ok(());
        let ended = self.until("a copy", || {
            let jobs = self.ask("query-jobs", json!({}))?;
            let Some(found) = jobs.as_array().into_iter().flatten().find(|found| found["id"] == job) else {
                outcome = Err("it is gone".to_owned());
                return Ok(true);
            };
            if found["status"] != "concluded" {
                return Ok(false);
            }
            if let Some(reason) = found["error"].as_str() {
                outcome = Err(reason.to_owned());
            }
            Ok(true)
        });
        ended.map_err(|error| error.to_string()).and(outcome)
    }

    /// What of the named blocks the copy holds, and a way to read it.
    fn open(&self, part: &mut Part, named: &ExtentSet, socket: &Path) -> Result<(), QemuError> {
        let export = export_name(part.disk, "copy");
        let arguments =
            json!({ "type": "nbd", "id": export, "node-name": export, "name": export, "allocation-depth": true });
        self.ask("block-export-add", arguments)?;
        part.has_export = true;
        let mut client = Client::connect_unix_for(socket, &export, "qemu:allocation-depth")?;
        client.set_timeout(Some(READ_LIMIT)).map_err(ClientError::from)?;
        let mut seen = None;
        let mut copied = ExtentSet::new();
        for extent in named.iter() {
            for window in extent.offset / WINDOW_BYTES..=(extent.end() - 1) / WINDOW_BYTES {
                if seen == Some(window) {
                    continue;
                }
                seen = Some(window);
                let offset = window * WINDOW_BYTES;
                let asked = Extent::new(offset, (client.bytes() - offset).min(WINDOW_BYTES));
                let runs = client.context_status(asked)?;
                runs.into_iter().filter(|(_, depth)| *depth > 0).for_each(|(run, _)| copied.insert(run));
            }
        }
        part.changed = named.iter().flat_map(|extent| copied.overlapping(extent).collect::<Vec<_>>()).collect();
        part.client = Some(Mutex::new(client));
        Ok(())
    }

    fn remove_scratch(&self, part: &mut Part) -> Result<(), QemuError> {
        part.client = None;
        if std::mem::take(&mut part.has_job) {
            self.end_job(&export_name(part.disk, "job"))?;
        }
        if std::mem::take(&mut part.has_export) {
            self.remove_export(&export_name(part.disk, "copy"))?;
        }
        for (is_there, node) in [(&mut part.has_node, "copy"), (&mut part.has_file_node, "file")] {
            if std::mem::take(is_there) {
                self.ask("blockdev-del", json!({ "node-name": export_name(part.disk, node) }))?;
            }
        }
        Ok(())
    }
}

impl Taken {
    /// What changed of a disk since the instant before, in whole granules.
    pub fn changed(&self, disk: DiskId) -> ExtentSet {
        self.part(disk).map(|part| part.changed.clone()).unwrap_or_default()
    }

    /// Reads a part of what changed as it was at the instant.
    pub fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let client = self.part(disk).and_then(|part| part.client.as_ref());
        let client = client.ok_or_else(|| QemuError::Unknown { disk: disk.to_string() })?;
        client.lock().expect("no panic while held").read(offset, buffer)?;
        Ok(())
    }

    fn part(&self, disk: DiskId) -> Option<&Part> {
        self.parts.iter().find(|part| part.disk == disk)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        for part in &mut self.parts {
            if let Err(error) = self.machine.remove_scratch(part) {
                tracing::warn!(disk = %part.disk, %error, "a copy is left to the next connection");
            }
            let _ = std::fs::remove_file(&part.file);
        }
        self.machine.copies.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Room for the copy, so that the guest never waits for any.
fn reserve(file: &std::fs::File, bytes: u64, folder: &Path) -> Result<(), QemuError> {
    // SAFETY: the descriptor is open; nothing of this process's memory is touched.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, bytes as i64) };
    let error = std::io::Error::last_os_error();
    match (result, error.raw_os_error()) {
        (0, _) => Ok(()),
        // File systems without it.
        (_, Some(libc::EOPNOTSUPP)) => Ok(()),
        (_, Some(libc::ENOSPC | libc::EDQUOT)) => Err(QemuError::NoRoom { folder: folder.to_owned(), bytes }),
        _ => Err(QemuError::Io { what: "make room in", path: folder.to_owned(), source: error }),
    }
}
