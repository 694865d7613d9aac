//! Disks inside images of other formats: as any disk, whoever is killed; and what is refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemark_base::disk::DiskError;
use tidemark_base::{Extent, Timestamp};
use tidemark_nbd::{Export, WriteRequest};

use super::conformance::{DISK_BYTES, Fuse, Nbd, Subject, conforms, skipped};
use super::{Fixture, Random, write};
use crate::attach::{Decision, Why};
use crate::capture::images::{self, DiskImageError};
use crate::capture::splitter::Splitter;
use crate::error::HostError;
use crate::events::EventKind;
use crate::protected::ProtectedDisk;

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

fn done(program: &str, arguments: &[&str]) {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What is installed nowhere is not tested there, and says so.
fn has_tools(test: &str) -> bool {
    let is_there =
        ["qemu-img", "qemu-nbd", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !is_there {
        skipped(test, "QEMU's tools are not installed");
    }
    is_there
}

/// The formats as QEMU calls them, with options.
const KINDS: [(&str, &str, &str); 7] = [
    ("disk.qcow2", "qcow2", "preallocation=off"),
    ("parts.qcow2", "qcow2", "extended_l2=on,cluster_size=128k"),
    ("small.qcow2", "qcow2", "cluster_size=4k"),
    ("disk.vhdx", "vhdx", "subformat=dynamic,block_size=1M"),
    ("disk.vhd", "vpc", "subformat=dynamic,force_size=on"),
    ("fixed.vhd", "vpc", "subformat=fixed,force_size=on"),
    ("disk.vmdk", "vmdk", "subformat=monolithicSparse"),
];

fn make(fixture: &mut Fixture, (name, format, options): (&str, &str, &str)) -> PathBuf {
    let path = fixture.folder.path().join(name);
    done("qemu-img", &["create", "-q", "-f", format, "-o", options, text(&path), &DISK_BYTES.to_string()]);
    fixture.image = Some(path.clone());
    path
}

/// By another program than ours, whatever we have open meanwhile.
fn content(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("copy");
    done("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", text(path), text(&raw)]);
    std::fs::read(raw).unwrap()
}

/// A program that another test starts just now holds all our locks until it runs.
fn probe(path: &Path) -> Result<u64, HostError> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match images::probe(path) {
            Err(HostError::Disk(DiskError::InUse { .. })) if std::time::Instant::now() < deadline => {
                std::thread::yield_now();
            }
            probed => return probed,
        }
    }
}

/// Ends the program that has the image open, as the system does for want of memory.
fn kill_program(path: &Path) -> bool {
    let disk = text(path).as_bytes();
    let mut killed = false;
    for process in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Ok(command) = std::fs::read(process.path().join("cmdline")) else { continue };
        if command.starts_with(b"qemu-nbd\0") && command.windows(disk.len()).any(|part| part == disk) {
            let id = process.file_name().to_str().unwrap().parse().unwrap();
            killed |= nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::SIGKILL).is_ok();
        }
    }
    killed
}

struct OnImage<S> {
    format: &'static str,
    through: S,
    /// Kills the program before about every n-th write.
    kill_every: Option<u64>,
    random: Random,
    path: PathBuf,
}

impl<S> OnImage<S> {
    fn maybe_kill(&mut self) {
        if self.kill_every.is_some_and(|every| self.random.below(every) == 0) {
            kill_program(&self.path);
        }
    }
}

impl<S: Subject> Subject for OnImage<S> {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        self.path = fixture.path();
        self.through.attach(fixture)
    }

    fn let_go(&mut self) {
        self.through.let_go();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.maybe_kill();
        self.through.write(offset, data);
    }

    fn zero(&mut self, extent: Extent, discard: bool) {
        self.maybe_kill();
        self.through.zero(extent, discard);
    }

    fn content(&self, fixture: &Fixture) -> Vec<u8> {
        content(&fixture.path(), self.format)
    }
}

fn check<S: Subject>(test: &str, kind: (&str, &'static str, &str), through: S, kill_every: Option<u64>) {
    if !has_tools(test) {
        return;
    }
    let mut fixture = Fixture::new(DISK_BYTES);
    let path = make(&mut fixture, kind);
    let mut subject = OnImage { format: kind.1, through, kill_every, random: Random(7), path: path.clone() };
    conforms(&mut subject, &mut fixture, 1);
    assert_eq!(fixture.kinds().contains(&EventKind::ImageReopened), kill_every.is_some());
    if kind.1 == "qcow2" {
        // Kills leave room that nobody uses, and nothing worse.
        let checked = run("qemu-img", &["check", "-f", kind.1, text(&path)]);
        let is_leaky = kill_every.is_some() && checked.status.code() == Some(3);
        assert!(checked.status.success() || is_leaky, "{}", String::from_utf8_lossy(&checked.stdout));
    }
}

#[test]
fn a_qcow2_image_conforms() {
    check("a_qcow2_image_conforms", KINDS[0], Nbd::default(), None);
}

#[test]
fn a_qcow2_image_of_parts_conforms() {
    check("a_qcow2_image_of_parts_conforms", KINDS[1], Nbd::default(), None);
}

#[test]
fn a_vhdx_image_conforms() {
    check("a_vhdx_image_conforms", KINDS[3], Nbd::default(), None);
}

#[test]
fn a_vhd_image_conforms() {
    check("a_vhd_image_conforms", KINDS[4], Nbd::default(), None);
}

#[test]
fn a_fixed_vhd_image_conforms() {
    check("a_fixed_vhd_image_conforms", KINDS[5], Nbd::default(), None);
}

#[test]
fn a_vmdk_image_conforms() {
    check("a_vmdk_image_conforms", KINDS[6], Nbd::default(), None);
}

#[test]
fn an_image_conforms_as_a_file() {
    if let Err(error) = tidemark_fuse::probe() {
        return skipped("an_image_conforms_as_a_file", &error.to_string());
    }
    check("an_image_conforms_as_a_file", KINDS[0], Fuse::default(), None);
}

#[test]
fn an_image_conforms_while_its_program_is_killed() {
    check("an_image_conforms_while_its_program_is_killed", KINDS[0], Nbd::default(), Some(20));
}

#[test]
fn a_vhdx_conforms_while_its_program_is_killed() {
    check("a_vhdx_conforms_while_its_program_is_killed", KINDS[3], Nbd::default(), Some(20));
}

/// Whatever a write allocated: nobody but the program knows of it, until it is told to write that down.
pub fn a_killed_program_loses_nothing() {
    if !has_tools("a_killed_program_loses_nothing") {
        return;
    }
    for kind in KINDS {
        let mut fixture = Fixture::new(DISK_BYTES);
        let path = make(&mut fixture, kind);
        let disk = fixture.attach_in_sync();
        let splitter = Splitter::new(disk.clone()).unwrap();
        let mut model = vec![0; DISK_BYTES as usize];
        let mut random = Random(3);
        for round in 0..8 {
            for _ in 0..12 {
                let offset = random.below(DISK_BYTES / 512 - 64) * 512;
                let data = vec![1 + random.below(255) as u8; 512 * (1 + random.below(64) as usize)];
                if random.below(5) == 0 {
                    let extent = Extent::new(offset, data.len() as u64);
                    splitter.zero(extent, random.below(2) == 0, tidemark_base::disk::Durability::Cached).unwrap();
                    model[offset as usize..][..data.len()].fill(0);
                } else {
                    write(&splitter, offset, &data).unwrap();
                    model[offset as usize..][..data.len()].copy_from_slice(&data);
                }
            }
            assert!(kill_program(&path), "{} in round {round}", kind.0);
            let mut read = vec![0; model.len()];
            splitter.read(0, &mut read).unwrap();
            assert!(read == model, "{} lost a write in round {round}", kind.0);
        }
        // Blocks that are known, zeroed, and written to anew where they lay: each is the last thing before a kill.
        let whole = Extent::new(0, 4 * MIB);
        let bytes = whole.length as usize;
        for discard in [true, false] {
            for step in 0..3 {
                match step {
                    1 => splitter.zero(whole, discard, tidemark_base::disk::Durability::Cached).unwrap(),
                    _ => write(&splitter, 0, &vec![step + 1; bytes]).unwrap(),
                }
                model[..bytes].fill(if step == 1 { 0 } else { step + 1 });
                assert!(kill_program(&path), "{} in step {step}", kind.0);
                let mut read = vec![0; model.len()];
                splitter.read(0, &mut read).unwrap();
                assert!(read == model, "{} lost step {step}, discard: {discard}", kind.0);
            }
        }
        drop(splitter);
        disk.detach().unwrap();
        assert!(content(&path, kind.1) == model, "{}", kind.0);
    }
}

#[test]
fn a_killed_program_loses_nothing_that_was_acknowledged() {
    a_killed_program_loses_nothing();
}

/// Many at once: each waits until the image is open again, and is done once.
#[test]
fn requests_under_way_outlive_the_program() {
    if !has_tools("requests_under_way_outlive_the_program") {
        return;
    }
    let mut fixture = Fixture::new(DISK_BYTES);
    let path = make(&mut fixture, KINDS[0]);
    let disk = fixture.attach_in_sync();
    let splitter = Arc::new(Splitter::new(disk.clone()).unwrap());
    let written = &AtomicU64::new(0);
    let parts: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..6u64)
            .map(|number| {
                let splitter = splitter.clone();
                scope.spawn(move || {
                    let (at, bytes) = (number * MIB, MIB as usize);
                    let mut model = vec![0; bytes];
                    let mut random = Random(number);
                    for round in 0..60 {
                        let offset = random.below(255) * 4096;
                        let data = vec![round + 1; 4096];
                        let mut results = [Err(std::io::ErrorKind::Other.into())];
                        let request = WriteRequest { offset: at + offset, data: &data, fua: round % 7 == 0 };
                        splitter.write_batch(&[request], &mut results);
                        results[0].as_ref().unwrap();
                        written.fetch_add(1, Ordering::Release);
                        model[offset as usize..][..4096].copy_from_slice(&data);
                        if round % 20 == 5 {
                            splitter.flush().unwrap();
                        }
                    }
                    model
                })
            })
            .collect();
        let mut kills = 0;
        // Not faster than requests end: one that never gets an answer fails at last.
        let mut next = 20;
        while !writers.iter().all(|writer| writer.is_finished()) {
            if written.load(Ordering::Acquire) >= next {
                kills += u32::from(kill_program(&path));
                next = written.load(Ordering::Acquire) + 20;
            }
            std::thread::yield_now();
        }
        assert!(kills > 2, "{kills} kills");
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    drop(splitter);
    disk.detach().unwrap();
    let found = content(&path, "qcow2");
    for (number, part) in parts.iter().enumerate() {
        assert!(found[number * MIB as usize..][..MIB as usize] == part[..], "writer {number}");
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn others_are_kept_out_and_what_they_write_meanwhile_is_noticed() {
    if !has_tools("others_are_kept_out_and_what_they_write_meanwhile_is_noticed") {
        return;
    }
    for kind in [KINDS[0], KINDS[3]] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let path = make(&mut fixture, kind);
        let edit = || run("qemu-io", &["-f", kind.1, "-c", "write -P 9 1M 64k", text(&path)]);
        let disk = fixture.attach_in_sync();
        let splitter = Splitter::new(disk.clone()).unwrap();
        write(&splitter, 0, &[1; 4096]).unwrap();
        assert!(!edit().status.success(), "it is locked");
        let twice = images::probe(&path).unwrap_err();
        assert!(matches!(twice, HostError::Disk(DiskError::InUse { .. })), "{twice}");
        drop(splitter);
        disk.detach().unwrap();
        let before = std::fs::metadata(&path).unwrap().modified().unwrap();
        drop(disk);
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before, "nobody of ours is left");
        assert_eq!(fixture.attach().decision, Decision::Continue, "{}", kind.0);
        // As by a kill: the session is not clean, and nothing was in flight.
        assert_eq!(fixture.attach().decision, Decision::ReadSlots, "{}", kind.0);
        // The program ends a moment after its disk was let go of, and one that another test starts holds all our locks until it runs.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !edit().status.success() {
            assert!(std::time::Instant::now() < deadline, "{}: it stays locked", kind.0);
        }
        let decision = fixture.attach().decision;
        assert_eq!(decision, Decision::ScanWhole(Why::WrittenMeanwhile), "{}", kind.0);
    }
}

/// What a backing file holds is part of the disk.
#[test]
fn a_backing_file_that_is_written_to_is_noticed() {
    if !has_tools("a_backing_file_that_is_written_to_is_noticed") {
        return;
    }
    let mut fixture = Fixture::new(DISK_BYTES);
    let below = make(&mut fixture, KINDS[0]);
    done("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 64k", text(&below)]);
    let path = fixture.folder.path().join("top.qcow2");
    // As people make them: by a name beside it.
    let made = Command::new("qemu-img")
        .current_dir(fixture.folder.path())
        .args(["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2"])
        .status();
    assert!(made.unwrap().success());
    fixture.image = Some(path.clone());
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, MIB, &[7; 4096]).unwrap();
    let mut read = [0; 4096];
    splitter.read(0, &mut read).unwrap();
    assert_eq!(read, [5; 4096]);
    drop(splitter);
    disk.detach().unwrap();
    drop(disk);
    let disk = fixture.attach();
    assert_eq!(disk.decision, Decision::Continue);
    disk.disk.detach().unwrap();
    drop(disk);
    done("qemu-io", &["-f", "qcow2", "-c", "write -P 6 0 64k", text(&below)]);
    assert_eq!(fixture.attach().decision, Decision::ScanWhole(Why::WrittenMeanwhile));
    std::fs::remove_file(below).unwrap();
    let error = probe(&path).unwrap_err();
    assert!(matches!(error, HostError::Image(DiskImageError::Unreadable { .. })), "{error}");
}

#[test]
fn after_a_power_cut_the_regions_that_were_written_to_are_compared() {
    if !has_tools("after_a_power_cut_the_regions_that_were_written_to_are_compared") {
        return;
    }
    let mut fixture = Fixture::new(DISK_BYTES);
    make(&mut fixture, KINDS[0]);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 4096]).unwrap();
    drop((splitter, disk));
    fixture.boot.id = format!("after {}", fixture.boot.id);
    fixture.boot.started = Timestamp(fixture.clock.wall_now().0 + 1_000_000_000);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanTouched);
    assert!(super::covers(&fixture.pending(&attached.disk), Extent::new(0, 4096)));
}

#[test]
fn what_cannot_be_protected_is_refused_by_name() {
    const NAME: &str = "what_cannot_be_protected_is_refused_by_name";
    if !has_tools(NAME) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let create = |name: &str, arguments: &[&str]| {
        done("qemu-img", &[&["create", "-q"], arguments, &[text(&at(name)), "8M"]].concat());
    };
    let refused = |name: &str, said: &str| {
        let error = probe(&at(name)).expect_err(name);
        let message = format!("{error}; {}", error.help());
        assert!(message.contains(said) && !error.help().is_empty(), "{name}: {message}");
        assert!(matches!(error, HostError::Image(_)), "{name}");
        // Whoever attaches all the same gets no further.
        if said != "not named as one" {
            assert!(images::open(&at(name)).is_err(), "{name}");
        }
    };
    create("good.qcow2", &["-f", "qcow2"]);
    assert_eq!(probe(&at("good.qcow2")).unwrap(), 8 * MIB);
    std::fs::copy(at("good.qcow2"), at("disguised.img")).unwrap();
    refused("disguised.img", "not named as one");
    std::fs::copy(at("good.qcow2"), at("meant.raw")).unwrap();
    let bytes = File::open(at("meant.raw")).unwrap().metadata().unwrap().len();
    File::options().write(true).open(at("meant.raw")).unwrap().set_len(bytes.next_multiple_of(512)).unwrap();
    probe(&at("meant.raw")).unwrap();
    File::create(at("plain.vhdx")).unwrap().set_len(MIB).unwrap();
    refused("plain.vhdx", "and is none");
    std::fs::copy(at("good.qcow2"), at("wrong.vmdk")).unwrap();
    refused("wrong.vmdk", "and is none");

    create("snapshot.qcow2", &["-f", "qcow2"]);
    done("qemu-img", &["snapshot", "-c", "before", text(&at("snapshot.qcow2"))]);
    refused("snapshot.qcow2", "snapshots of its own");
    let secret = [
        "--object",
        "secret,id=s,data=x",
        "-f",
        "qcow2",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    ];
    create("secret.qcow2", &secret);
    refused("secret.qcow2", "encrypted");
    let data = format!("data_file={},data_file_raw=on", text(&at("data.bin")));
    create("apart.qcow2", &["-f", "qcow2", "-o", &data]);
    refused("apart.qcow2", "in another file");

    create("stream.vmdk", &["-f", "vmdk", "-o", "subformat=streamOptimized"]);
    refused("stream.vmdk", "is compressed");
    create("flat.vmdk", &["-f", "vmdk", "-o", "subformat=monolithicFlat"]);
    refused("flat.vmdk", "NAME-flat.vmdk");
    assert_eq!(probe(&at("flat-flat.vmdk")).unwrap(), 8 * MIB, "which is the disk itself");

    create("child.vhd", &["-f", "vpc"]);
    let vhd = File::options().read(true).write(true).open(at("child.vhd")).unwrap();
    let end = vhd.metadata().unwrap().len();
    vhd.write_all_at(&4u32.to_be_bytes(), end - 512 + 60).unwrap();
    drop(vhd);
    refused("child.vhd", "another VHD");

    let open = File::options().write(true).open(at("good.qcow2")).unwrap();
    let error = images::probe(&at("good.qcow2")).unwrap_err();
    assert!(matches!(error, HostError::Disk(DiskError::InUse { .. })), "{error}");
    drop(open);
    assert!(matches!(probe(&at("absent.vhd")), Err(HostError::Disk(DiskError::Absent { .. }))));
}
