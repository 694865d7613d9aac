//! The QEMU tracker, against a real QEMU: a machine without a processor, whose disks its monitor writes to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::{Extent, Generation, MachineId};
use tidemark_proto::control::DiskSpec;
use tidemark_proto::replication::Consistency;

use super::conformance::{DISK_BYTES, Replica, SEEDS, Subject, conforms, skipped};
use super::{Fixture, OverOnDrop, Random, records_after, replay};
use crate::attach::Decision;
use crate::capture::CaptureProvider;
use crate::capture::qemu::QemuTracker;
use crate::error::HostError;
use crate::events::EventKind;
use crate::mark::Marker;
use crate::protected::ProtectedDisk;
use crate::source::Source;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(60);

/// A QEMU with these disks, of one format.
struct Guest {
    folder: PathBuf,
    format: &'static str,
    disks: usize,
    child: Child,
    control: Control,
}

struct Control(BufReader<UnixStream>);

impl Control {
    fn connect(socket: &Path) -> Self {
        let deadline = Instant::now() + SOON;
        let never = Stop::new();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            never.wait_for(Duration::from_millis(5));
        };
        // One that hangs is named by the question that it does not answer.
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut this = Self(BufReader::new(stream));
        this.0.read_line(&mut String::new()).unwrap();
        this.ask("qmp_capabilities", json!({})).unwrap();
        this
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let question = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(format!("{question}\n").as_bytes()).map_err(|error| error.to_string())?;
        loop {
            let mut line = String::new();
            match self.0.read_line(&mut line) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    panic!("QEMU does not answer {command}")
                }
                Ok(1..) => {}
                _ => return Err("it ended".to_owned()),
            }
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].to_string());
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }
}

/// Why there is no such QEMU here, if there is none.
fn missing() -> Option<String> {
    for program in ["qemu-system-x86_64", "qemu-img"] {
        if !Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success()) {
            return Some(format!("{program} is not installed"));
        }
    }
    None
}

macro_rules! need_qemu {
    ($name:literal) => {
        if let Some(why) = missing() {
            return skipped($name, &why);
        }
    };
}

impl Guest {
    fn make(folder: &Path, format: &'static str, disks: usize, bytes: u64) -> Self {
        for disk in 0..disks {
            let image = folder.join(format!("disk{disk}.{format}"));
            let mut make = Command::new("qemu-img");
            make.args(["create", "-q", "-f", format]).arg(&image).arg(bytes.to_string());
            assert!(make.status().unwrap().success());
        }
        let (child, control) = Self::start(folder, format, disks);
        Self { folder: folder.to_owned(), format, disks, child, control }
    }

    fn start(folder: &Path, format: &str, disks: usize) -> (Child, Control) {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "none", "-nodefaults", "-display", "none"]).current_dir(folder);
        for socket in ["agent.qmp", "test.qmp", "writer.qmp"] {
            let _ = std::fs::remove_file(folder.join(socket));
            qemu.args(["-qmp", &format!("unix:{socket},server=on,wait=off")]);
        }
        for disk in 0..disks {
            let image = folder.join(format!("disk{disk}.{format}"));
            let file = format!("file.driver=file,file.filename={},discard=unmap", image.display());
            qemu.args(["-drive", &format!("if=none,id=device{disk},driver={format},node-name=disk{disk},{file}")]);
        }
        let child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        (child, Control::connect(&folder.join("test.qmp")))
    }

    /// Another hand that writes.
    fn writer(&self) -> Writer {
        Writer { control: Control::connect(&self.folder.join("writer.qmp")), file: self.folder.join("to-write") }
    }

    fn image(&self, disk: usize) -> PathBuf {
        self.folder.join(format!("disk{disk}.{}", self.format))
    }

    fn end(&mut self, is_clean: bool) {
        if is_clean {
            let _ = self.control.ask("quit", json!({}));
        } else {
            self.child.kill().unwrap();
        }
        let (deadline, never) = (Instant::now() + SOON, Stop::new());
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "QEMU does not end, asked to quit: {is_clean}");
            never.wait_for(Duration::from_millis(5));
        }
    }

    fn start_again(&mut self) {
        (self.child, self.control) = Self::start(&self.folder, self.format, self.disks);
    }

    /// Names of ours that are in it.
    fn names(&mut self) -> Vec<String> {
        let nodes = self.control.ask("query-named-block-nodes", json!({ "flat": true })).unwrap();
        let exports = self.control.ask("query-block-exports", json!({})).unwrap();
        let jobs = self.control.ask("query-jobs", json!({})).unwrap();
        let lists = [(nodes, "node-name"), (exports, "id"), (jobs, "id")];
        let all = lists.iter().flat_map(|(list, field)| {
            list.as_array().unwrap().iter().filter_map(|found| found[*field].as_str().map(str::to_owned))
        });
        all.filter(|name| name.starts_with("tidemark-")).collect()
    }

    fn bitmaps(&mut self) -> Vec<String> {
        let nodes = self.control.ask("query-named-block-nodes", json!({ "flat": true })).unwrap();
        let nodes = nodes.as_array().unwrap().iter().filter_map(|node| node["dirty-bitmaps"].as_array().cloned());
        nodes.flatten().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
    }
}

/// Writes to the disks of a guest as its devices do: through what QEMU puts above the node meanwhile.
struct Writer {
    control: Control,
    file: PathBuf,
}

impl Writer {
    fn write(&mut self, disk: usize, offset: u64, data: &[u8]) {
        std::fs::File::create(&self.file).unwrap().write_all(data).unwrap();
        self.act(disk, &format!("write -s {} {offset} {}", self.file.display(), data.len()));
    }

    fn act(&mut self, disk: usize, what: &str) {
        let line = format!("qemu-io device{disk} \"{what}\"");
        let told = self.control.ask("human-monitor-command", json!({ "command-line": line })).unwrap();
        assert_eq!(told, "", "{what}");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.end(false);
    }
}

/// One disk of a guest, and what it holds.
struct Qemu {
    guest: Guest,
    model: Vec<u8>,
    writer: Option<Writer>,
    tracker: Option<QemuTracker>,
    restarts: u64,
}

impl Qemu {
    fn new(fixture: &mut Fixture, format: &'static str) -> Self {
        let guest = Guest::make(fixture.folder.path(), format, 1, DISK_BYTES);
        fixture.image = Some(guest.image(0));
        Self::of(guest, DISK_BYTES)
    }

    fn of(guest: Guest, model_bytes: u64) -> Self {
        let writer = Some(guest.writer());
        Self { guest, model: vec![0; model_bytes as usize], writer, tracker: None, restarts: 0 }
    }

    fn restart(&mut self, is_clean: bool) {
        self.writer = None;
        self.guest.end(is_clean);
        self.guest.start_again();
        self.writer = Some(self.guest.writer());
    }
}

impl Subject for Qemu {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        let tracker = QemuTracker::new(&fixture.folder.path().join("state"));
        fixture.tracker = tracker.track(&fixture.path(), fixture.disk, fixture.folder.path()).unwrap();
        self.tracker = Some(tracker);
        let attached = fixture.attach();
        (attached.disk, attached.decision)
    }

    /// The machine goes on, and may be shut down and started before the agent comes back.
    fn let_go(&mut self) {
        if let Some(tracker) = self.tracker.take() {
            tracker.stop().unwrap();
        }
        let at = self.restarts * 7 * 4096 % DISK_BYTES;
        self.write(at, &[self.restarts as u8 + 1; 4096]);
        self.restarts += 1;
        if self.guest.format == "qcow2" && self.restarts.is_multiple_of(2) {
            self.restart(true);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.writer.as_mut().unwrap().write(0, offset, data);
        self.model[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn zero(&mut self, extent: Extent, discard: bool) {
        let how = if discard { "write -z -u" } else { "write -z" };
        self.writer.as_mut().unwrap().act(0, &format!("{how} {} {}", extent.offset, extent.length));
        self.model[extent.offset as usize..extent.end() as usize].fill(0);
    }

    fn content(&self, _fixture: &Fixture) -> Vec<u8> {
        self.model.clone()
    }
}

#[test]
fn the_qemu_tracker_conforms() {
    need_qemu!("the_qemu_tracker_conforms");
    for (seed, format) in SEEDS.zip(["qcow2", "raw"]) {
        let mut fixture = Fixture::new(DISK_BYTES);
        let mut subject = Qemu::new(&mut fixture, format);
        conforms(&mut subject, &mut fixture, seed);
    }
}

/// Protected and in sync.
fn in_sync(fixture: &mut Fixture, subject: &mut Qemu) -> (Arc<ProtectedDisk>, Marker) {
    let (disk, decision) = subject.attach(fixture);
    assert!(matches!(decision, Decision::ScanWhole(_)), "{decision:?}");
    fixture.settle(&disk);
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    marker.mark(Consistency::Crash, "", true).unwrap();
    (disk, marker)
}

/// A counter that is written to one disk and then to the other: no instant has the second ahead of the first.
#[test]
fn two_disks_are_taken_at_one_instant_while_they_are_written() {
    need_qemu!("two_disks_are_taken_at_one_instant_while_they_are_written");
    let first = Fixture::new(DISK_BYTES);
    let mut guest = Guest::make(first.folder.path(), "qcow2", 2, DISK_BYTES);
    let provider = QemuTracker::new(&first.folder.path().join("state"));
    let mut fixtures = [first, Fixture::new(DISK_BYTES)];
    let mut disks = Vec::new();
    for (number, fixture) in fixtures.iter_mut().enumerate() {
        fixture.image = Some(guest.image(number));
        fixture.tracker = provider.track(&fixture.path(), fixture.disk, Path::new("/")).unwrap();
        disks.push(fixture.attach().disk);
        fixture.settle(&disks[number]);
    }
    let mut writer = guest.writer();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = OverOnDrop(&is_over);
        scope.spawn(|| {
            let writer = &mut writer;
            let mut random = Random(7);
            for counter in 1u64.. {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                // Beside the counter, each write is somewhere else, so that what changed is many places.
                for disk in 0..2 {
                    writer.write(disk, 0, &counter.to_le_bytes().repeat(512));
                    writer.write(disk, (1 + random.below(2000)) * 4096, &counter.to_le_bytes().repeat(512));
                }
            }
        });
        let marker = Marker::new(MachineId::random(), "web".into(), disks.clone(), None, Duration::from_secs(1));
        let mut images = [vec![0; DISK_BYTES as usize], vec![0; DISK_BYTES as usize]];
        let mut at: Vec<_> = disks.iter().map(|disk| disk.state().logged.epoch.start()).collect();
        let mut last = 0;
        for round in 0..25 {
            let outcome = marker.mark(Consistency::Crash, "", true).unwrap();
            for number in 0..2 {
                let records = records_after(&disks[number], &at[number]);
                replay(&disks[number], &records, &mut images[number]);
                at[number] = outcome.positions.iter().find(|(disk, _)| *disk == fixtures[number].disk).unwrap().1;
            }
            // Of all blocks; the first one is written first.
            let newest = |image: &[u8]| {
                let all = image.chunks_exact(4096).map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()));
                all.max().unwrap()
            };
            let (one, other) = (newest(&images[0]), newest(&images[1]));
            let counter = |image: &[u8]| u64::from_le_bytes(image[..8].try_into().unwrap());
            assert_eq!(counter(&images[0]), one, "round {round}: what was written last of all is there");
            assert_eq!(counter(&images[1]), other, "round {round}");
            assert!(one == other || one == other + 1, "round {round}: {one} and {other}");
            assert!(one > last, "round {round}: nothing was written");
            last = one;
        }
    });
    assert_eq!(guest.names(), Vec::<String>::new(), "nothing is left of a copy");
    disks.iter().for_each(|disk| disk.detach().unwrap());
}

/// While an instant is copied, its bitmap goes on recording. What it names by then and the copy does not hold is of the next instant: read
/// from the copy it would be zeroes.
#[test]
fn what_is_written_elsewhere_while_an_instant_is_copied_is_left_to_the_next_one() {
    need_qemu!("what_is_written_elsewhere_while_an_instant_is_copied_is_left_to_the_next_one");
    const BYTES: u64 = 128 * MIB;
    // So much is copied at each instant that others are written meanwhile, each in a piece of its own.
    const COPIED: u64 = 24 * MIB;
    const APART: u64 = 128 << 10;
    let places: Vec<u64> = (COPIED..BYTES).step_by(APART as usize).collect();
    let mut fixture = Fixture::new(DISK_BYTES);
    let guest = Guest::make(fixture.folder.path(), "qcow2", 1, BYTES);
    fixture.image = Some(guest.image(0));
    let mut subject = Qemu::of(guest, BYTES);
    places.iter().for_each(|place| subject.write(*place, &[1; 4096]));
    let (disk, marker) = in_sync(&mut fixture, &mut subject);
    let mut image = subject.model.clone();
    let mut writer = subject.writer.take().unwrap();
    let mut at = disk.state().logged;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = OverOnDrop(&is_over);
        scope.spawn(|| {
            for (number, place) in places.iter().cycle().enumerate() {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                if number % 32 == 0 {
                    writer.act(0, &format!("write -P {} 0 {COPIED}", number / 32 % 255 + 1));
                }
                writer.write(0, *place, &[(number % 255) as u8 + 1; 4096]);
            }
        });
        for round in 0..12 {
            let outcome = marker.mark(Consistency::Crash, "", true).unwrap();
            replay(&disk, &records_after(&disk, &at), &mut image);
            at = outcome.positions[0].1;
            let lost = places.iter().filter(|place| image[**place as usize] == 0).count();
            assert_eq!(lost, 0, "round {round}: places that were never empty");
        }
    });
    disk.detach().unwrap();
}

#[test]
fn a_machine_that_was_shut_down_and_started_goes_on_and_one_that_was_killed_is_compared() {
    need_qemu!("a_machine_that_was_shut_down_and_started_goes_on_and_one_that_was_killed_is_compared");
    for (format, is_clean) in [("qcow2", true), ("qcow2", false), ("raw", true), ("raw", false)] {
        let case = format!("{format}, shut down: {is_clean}");
        let mut fixture = Fixture::new(DISK_BYTES);
        let mut subject = Qemu::new(&mut fixture, format);
        let (disk, marker) = in_sync(&mut fixture, &mut subject);
        if format == "qcow2" && !is_clean {
            // Its image names the bitmaps from the first clean end on; a kill then leaves them inconsistent.
            subject.restart(true);
            assert!(!disk.is_unwitnessed());
        }
        subject.write(MIB, &[7; 4096]);
        subject.restart(is_clean);
        subject.write(2 * MIB, &[8; 4096]);
        let marked = marker.mark(Consistency::Crash, "", true);
        if format == "qcow2" && is_clean {
            marked.unwrap();
            assert!(fixture.pending(&disk).is_empty(), "{case}");
            continue;
        }
        let error = marked.unwrap_err();
        assert!(matches!(error, HostError::Scanning { .. }), "{case}: {error}");
        assert_eq!(fixture.pending(&disk).total_bytes(), DISK_BYTES, "{case}");
        let told = fixture.events.after(0).into_iter().rfind(|event| event.kind == EventKind::DiskUnwitnessed).unwrap();
        let reason = if format == "qcow2" { "inconsistent" } else { "started anew" };
        assert!(told.message.contains(reason), "{case}: {}", told.message);
        // Compared once; from then on it is a witness again.
        fixture.settle(&disk);
        subject.write(3 * MIB, &[9; 4096]);
        marker.mark(Consistency::Crash, "", true).unwrap();
        drop((marker, disk));
        subject.tracker.take().unwrap().stop().unwrap();
        let (_, decision) = subject.attach(&mut fixture);
        assert!(!matches!(decision, Decision::ScanWhole(_)), "{case}: {decision:?}");
    }
}

/// H36: the images of a machine that is off are kept from everybody, and what changed last is known from them: by the bitmaps in a qcow2, of a raw
/// one by a compare. An agent that starts again keeps them again, and let go of, its QEMU goes on with them.
#[test]
fn h36_the_images_of_a_machine_that_is_off_are_kept_and_read() {
    need_qemu!("h36_the_images_of_a_machine_that_is_off_are_kept_and_read");
    for format in ["qcow2", "raw"] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let mut subject = Qemu::new(&mut fixture, format);
        let (disk, marker) = in_sync(&mut fixture, &mut subject);
        let machine = MachineId::random();
        let disks = [DiskSpec {
            disk: fixture.disk,
            path: subject.guest.image(0).to_str().unwrap().to_owned(),
            export: "web-0".to_owned(),
            generation: Generation(1),
            bytes: DISK_BYTES,
            added: false,
        }];
        let start = disk.state().logged;
        subject.write(MIB, &[7; 4096]);
        let provider = subject.tracker.take().unwrap();
        let refused = provider.fence(machine, &disks, true).unwrap_err();
        assert!(refused.to_string().contains("may be written to by somebody else"), "{format}: {refused}");
        subject.writer = None;
        subject.guest.end(true);
        provider.fence(machine, &disks, true).unwrap();
        assert!(!can_open(&subject.guest), "{format}: nobody gets at it");
        let marked = marker.mark(Consistency::Crash, "", true);
        if format == "raw" {
            assert!(matches!(marked.unwrap_err(), HostError::Scanning { .. }));
            assert_eq!(fixture.pending(&disk).total_bytes(), DISK_BYTES, "it is compared");
            fixture.settle(&disk);
            marker.mark(Consistency::Crash, "", true).unwrap();
        } else {
            marked.unwrap();
            let mut image = vec![0; DISK_BYTES as usize];
            replay(&disk, &records_after(&disk, &start), &mut image);
            assert_eq!(image[MIB as usize..][..4096], [7; 4096]);
        }
        assert!(disk.is_settled(), "{format}");

        drop((marker, disk));
        provider.stop().unwrap();
        drop(provider);
        fixture.tracker = None;
        assert!(can_open(&subject.guest), "{format}: it ends with its agent");
        let provider = QemuTracker::new(&fixture.folder.path().join("state"));
        provider.fence(machine, &disks, true).unwrap();
        assert!(!can_open(&subject.guest) && provider.trespass(machine, &disks[0]).is_none());
        fixture.tracker = provider.track(&fixture.path(), fixture.disk, fixture.folder.path()).unwrap();
        let attached = fixture.attach();
        let is_compared = matches!(attached.decision, Decision::ScanWhole(_));
        assert_eq!(is_compared, format == "raw", "{format}: {:?}", attached.decision);
        fixture.settle(&attached.disk);
        provider.fence(machine, &disks, false).unwrap();
        subject.guest.start_again();
        subject.writer = Some(subject.guest.writer());
        subject.write(2 * MIB, &[8; 4096]);
        let disks = vec![attached.disk.clone()];
        let marker = Marker::new(MachineId::random(), "web".into(), disks, None, Duration::from_secs(1));
        let marked = marker.mark(Consistency::Crash, "", true);
        assert_eq!(marked.is_ok(), format == "qcow2", "{format}: {marked:?}");
    }
}

/// As a QEMU does that starts.
fn can_open(guest: &Guest) -> bool {
    let mut open = Command::new("qemu-io");
    open.args(["-f", guest.format, "-c", "read 0 512"]).arg(guest.image(0)).stdout(Stdio::null()).stderr(Stdio::null());
    open.status().unwrap().success()
}

/// Bitmaps that are gone, or name another session, prove nothing.
#[test]
fn a_gap_in_the_bitmaps_is_a_compare() {
    need_qemu!("a_gap_in_the_bitmaps_is_a_compare");
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Qemu::new(&mut fixture, "qcow2");
    for gap in ["removed", "switched off", "of another session"] {
        let (disk, decision) = subject.attach(&mut fixture);
        assert!(gap == "removed" || !matches!(decision, Decision::ScanWhole(_)), "{gap}: {decision:?}");
        fixture.settle(&disk);
        let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
        marker.mark(Consistency::Crash, "", true).unwrap();
        let names = subject.guest.bitmaps();
        let [name] = &names[..] else { panic!("{names:?}") };
        let arguments = json!({ "node": "disk0", "name": name });
        let mut control = |command: &str, arguments| subject.guest.control.ask(command, arguments).unwrap();
        match gap {
            "switched off" => drop(control("block-dirty-bitmap-disable", arguments)),
            gap => {
                control("block-dirty-bitmap-remove", arguments);
                if gap == "of another session" {
                    let other = format!("tidemark-{}.{}.0", fixture.disk, "ab".repeat(16));
                    control("block-dirty-bitmap-add", json!({ "node": "disk0", "name": other }));
                }
            }
        }
        subject.write(5 * MIB, &[3; 4096]);
        let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
        assert!(matches!(error, HostError::Scanning { .. }), "{gap}: {error}");
        assert_eq!(fixture.pending(&disk).total_bytes(), DISK_BYTES, "{gap}");
        fixture.settle(&disk);
        subject.tracker.take().unwrap().stop().unwrap();
    }
}

/// A kill between the instant and the log: nothing of it stays in QEMU, and nothing is missed.
#[test]
fn an_instant_that_was_cut_short_is_cleared_away_and_taken_again() {
    need_qemu!("an_instant_that_was_cut_short_is_cleared_away_and_taken_again");
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Qemu::new(&mut fixture, "qcow2");
    let (disk, marker) = in_sync(&mut fixture, &mut subject);
    subject.write(MIB, &[7; 4096]);
    let instants = fixture.tracker.as_ref().unwrap().instants().unwrap();
    let taken = instants.take(&[fixture.disk], u64::MAX).unwrap().unwrap();
    assert_eq!(taken.changed(fixture.disk).iter().collect::<Vec<_>>(), [Extent::new(MIB, 4096)]);
    // As it was at the instant, whatever is written now.
    subject.write(MIB, &[8; 8192]);
    let mut read = [0; 4096];
    taken.read_at(fixture.disk, MIB, &mut read).unwrap();
    assert_eq!(read, [7; 4096]);
    assert!(!subject.guest.names().is_empty());
    std::mem::forget(taken);
    drop((marker, disk, instants));
    subject.tracker.take().unwrap().stop().unwrap();
    let (disk, decision) = subject.attach(&mut fixture);
    assert!(!matches!(decision, Decision::ScanWhole(_)), "{decision:?}");
    assert_eq!(subject.guest.names(), Vec::<String>::new());
    let start = disk.state().logged;
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    marker.mark(Consistency::Crash, "", true).unwrap();
    let mut image = vec![0; DISK_BYTES as usize];
    replay(&disk, &records_after(&disk, &start), &mut image);
    assert_eq!(image[MIB as usize..][..8192], [8; 8192]);
    assert_eq!(subject.guest.bitmaps().len(), 1, "what was released is gone");
    let tracker = subject.tracker.take().unwrap();
    tracker.untrack(fixture.disk).unwrap();
    assert_eq!(subject.guest.bitmaps(), Vec::<String>::new(), "nothing stays of a disk that is not protected any more");
}

/// More than is logged is scanned while the machine goes on, and what changed meanwhile is the instant's.
#[test]
fn much_that_changed_in_a_machine_is_scanned_first() {
    need_qemu!("much_that_changed_in_a_machine_is_scanned_first");
    const BYTES: u64 = 160 * MIB;
    let mut fixture = Fixture::new(DISK_BYTES);
    let guest = Guest::make(fixture.folder.path(), "qcow2", 1, BYTES);
    fixture.image = Some(guest.image(0));
    let mut subject = Qemu::of(guest, BYTES);
    let (disk, marker) = in_sync(&mut fixture, &mut subject);
    let mut replica = Replica {
        image: subject.model.clone(),
        at: disk.state().logged,
        is_consistent: true,
        copies: BTreeMap::new(),
        checked: 0,
    };
    for piece in 0..70 {
        subject.write(piece * MIB, &[piece as u8 + 1; MIB as usize]);
    }
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Scanning { total, .. } if total == 70 * MIB), "{error}");
    replica.catch_up(&fixture, &disk);
    subject.write(MIB, &[99; 4096]);
    let model = subject.model.clone();
    marker
        .mark_observed(Consistency::Crash, "", true, &mut |outcome| {
            drop(replica.copies.insert(outcome.id, model.clone()))
        })
        .unwrap();
    replica.catch_up(&fixture, &disk);
    assert_eq!(replica.checked, 1);
    assert!(replica.image == subject.model);
}

#[test]
fn a_machine_that_cannot_be_asked_says_why() {
    need_qemu!("a_machine_that_cannot_be_asked_says_why");
    let mut fixture = Fixture::new(DISK_BYTES);
    let folder = fixture.folder.path().to_owned();
    let provider = QemuTracker::new(&folder.join("state"));
    let refused = |path: &Path| {
        let error = provider.probe(path, &folder).unwrap_err();
        assert!(!error.help().is_empty());
        error.to_string()
    };
    let alone = folder.join("disk.img");
    assert!(refused(&alone).contains("no QEMU has"), "nobody has it open");
    assert!(refused(&folder.join("nothing")).contains("neither an image nor a node"));
    assert!(refused(&folder.join("agent.qmp/disk0")).contains("cannot be reached"), "its machine is off");
    let mut subject = Qemu::new(&mut fixture, "raw");
    assert_eq!(provider.probe(&subject.guest.image(0), &folder).unwrap(), DISK_BYTES);
    assert_eq!(provider.probe(&folder.join("agent.qmp/disk0"), &folder).unwrap(), DISK_BYTES);
    assert!(refused(&folder.join("agent.qmp/other")).contains("no node"));
    // Somebody else's backup has the one NBD server, which we had last.
    let (disk, marker) = in_sync(&mut fixture, &mut subject);
    disk.disk.read_at(0, &mut [0; 4096]).unwrap();
    let socket = folder.join("theirs.sock");
    let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
    let deadline = Instant::now() + SOON;
    let never = Stop::new();
    while subject.guest.control.ask("nbd-server-start", address.clone()).is_err() {
        // Ours is given back when nobody reads.
        assert!(Instant::now() < deadline);
        disk.is_dirty();
        never.wait_for(Duration::from_millis(20));
    }
    subject.write(MIB, &[5; 4096]);
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Instant { .. }) && error.help().contains("backup"), "{error}: {}", error.help());
    subject.guest.control.ask("nbd-server-stop", json!({})).unwrap();
    marker.mark(Consistency::Crash, "", true).unwrap();
    // While the machine is off nothing is known; nothing is called complete, and nothing is compared.
    subject.writer = None;
    subject.guest.end(true);
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Instant { .. }) && error.help().contains("start the machine"), "{error}");
    assert!(disk.is_dirty() && fixture.pending(&disk).is_empty());
    subject.guest.start_again();
}

/// The figure of an idle terabyte: how long a cycle takes that finds nothing, and one that finds a block.
#[test]
fn a_cycle_over_an_idle_terabyte_is_short() {
    need_qemu!("a_cycle_over_an_idle_terabyte_is_short");
    let mut fixture = Fixture::new(DISK_BYTES);
    let guest = Guest::make(fixture.folder.path(), "qcow2", 1, 1 << 40);
    fixture.image = Some(guest.image(0));
    let mut subject = Qemu::of(guest, 0);
    let (disk, marker) = in_sync(&mut fixture, &mut subject);
    let mut figures = Vec::new();
    for writes in [0, 0, 1, 1] {
        if writes > 0 {
            subject.writer.as_mut().unwrap().write(0, 700 << 30, &[7; 4096]);
        }
        let began = Instant::now();
        marker.mark(Consistency::Crash, "", true).unwrap();
        figures.push((writes, began.elapsed()));
    }
    println!("cycles over 1 TiB, blocks that changed and time: {figures:?}");
    // A tenth of this where nothing else runs.
    assert!(figures.iter().all(|(_, took)| *took < Duration::from_secs(5)), "{figures:?}");
    disk.detach().unwrap();
}
