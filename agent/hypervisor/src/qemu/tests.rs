//! With a real QEMU: machines without an operating system where that is enough, and a boot sector that writes to the serial line.

use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;
use crate::drill::{self, Drill, Outcome, Sign};
use crate::machine::{Bus, Card, CardModel, Hardware, Network, Purpose};

/// Says that a test did not run; `tests/run` gathers these lines.
pub(crate) fn skipped(test: &str) {
    skip(test, "qemu-system-x86_64 is not installed");
}

pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    print!("{line}");
    if let Some(file) = std::env::var_os("TIDEMARK_SKIPPED") {
        let file = std::fs::File::options().create(true).append(true).open(file);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the list of skipped tests can be written");
    }
}

macro_rules! need_qemu {
    () => {
        if find_program(Path::new("qemu-system-x86_64")).is_none() {
            return skipped(std::thread::current().name().unwrap_or("a test"));
        }
    };
}

fn open(folder: &Path) -> Qemu {
    let settings = QemuSettings { accelerator: Some(Accelerator::Tcg), ..QemuSettings::new(folder.join("machines")) };
    Qemu::open(settings).unwrap()
}

/// A boot sector: counts on the serial line for ever (`tick\n`), reading the disk's second sector each time, whose first bytes
/// it says.
fn boot_sector() -> [u8; 512] {
    // Real mode, loaded at 0x7c00, dl = the disk it came from.
    let code: &[u8] = &[
        0xfa, 0xfc, // cli; cld
        0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // ds = es = ss = 0
        0xbc, 0x00, 0x7c, // sp = 0x7c00
        0xfb, // sti
        0x88, 0x16, 0xf0, 0x7d, // the disk's number is kept at 0x7df0
        // 0x12: read sector 2 to 0x8000
        0xb8, 0x01, 0x02, // ax = 0x0201
        0xbb, 0x00, 0x80, // bx = 0x8000
        0xb9, 0x02, 0x00, // cx = 2
        0xb6, 0x00, // dh = 0
        0x8a, 0x16, 0xf0, 0x7d, // dl
        0xcd, 0x13, // int 13h
        0x72, 0xed, // failed: again
        0xbe, 0x00, 0x80, // si = 0x8000
        // 0x28: one letter to the serial line
        0xac, // lodsb
        0x84, 0xc0, // zero?
        0x74, 0xe5, // yes: read again
        0x89, 0xc3, // bx = ax
        0xba, 0xfd, 0x03, // dx = 0x3fd
        0xec, 0xa8, 0x20, 0x74, 0xfb, // until it takes one
        0x89, 0xd8, // ax = bx
        0xba, 0xf8, 0x03, 0xee, // dx = 0x3f8; out
        0xeb, 0xe9, // next letter
    ];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// The same, which shuts its machine down when the power button is pressed. It looks after each text.
fn listening_boot_sector() -> [u8; 512] {
    const LISTEN: usize = 0x80;
    let code: &[u8] = &[
        0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, // the power button is to show: port 0x602, bit 8
        0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, // does it, in port 0x600?
        0x74, 0x82, // no: read again
        0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, // port 0x604: sleep so that only the switch wakes it
        0xeb, 0xfe,
    ];
    let mut sector = boot_sector();
    // Where the text is over: the jump from 0x2b.
    sector[0x2c] = (LISTEN - 0x2d) as u8;
    sector[LISTEN..LISTEN + code.len()].copy_from_slice(code);
    sector
}

/// A disk that boots and says `text` again and again.
pub(crate) fn boot_disk(path: &Path, text: &str) {
    boot_disk_of(path, text, &boot_sector());
}

/// The same, whose guest knows its power button.
pub(crate) fn listening_disk(path: &Path, text: &str) {
    boot_disk_of(path, text, &listening_boot_sector());
}

fn boot_disk_of(path: &Path, text: &str, sector: &[u8; 512]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(sector, 0).unwrap();
    file.write_all_at(format!("{text}\n\0").as_bytes(), 512).unwrap();
}

pub fn machine(name: &str, path: &Path) -> Machine {
    Machine {
        id: Uuid::new_v4(),
        name: name.to_owned(),
        hardware: Hardware { memory_mib: 32, ..Hardware::default() },
        disks: vec![Place::Raw { path: path.to_owned() }],
        purpose: Purpose::Failover,
        ports: Vec::new(),
    }
}

const SOON: Duration = Duration::from_secs(60);

/// Waits until the console says `text` after `from`; where that ends.
async fn says(qemu: &Qemu, id: Uuid, from: u64, text: &str) -> u64 {
    let mut again = tokio::time::interval(Duration::from_millis(20));
    let waiting = async {
        loop {
            again.tick().await;
            let console = qemu.console(id, from).await.unwrap();
            if String::from_utf8_lossy(&console.bytes).contains(text) {
                return console.end();
            }
        }
    };
    let waited = tokio::time::timeout(SOON, waiting).await;
    match waited {
        Ok(end) => end,
        Err(_) => {
            let console = qemu.console(id, 0).await.unwrap();
            panic!("it does not say {text:?} but {:?}", String::from_utf8_lossy(&console.bytes))
        }
    }
}

/// Ends a machine whatever becomes of its test.
struct Ends<'a>(&'a Path);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.0.join("machines")).into_iter().flatten().flatten() {
            if let Ok(Some(process)) = process::find(&entry.path().join(PID)) {
                let _ = process.kill();
            }
        }
    }
}

#[tokio::test]
async fn a_machine_outlives_the_process_that_started_it() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let path = folder.path().join("disk.img");
    boot_disk(&path, "tick");
    let machine = machine("web", &path);
    let qemu = open(folder.path());
    assert!(matches!(qemu.power(machine.id).await, Err(HypervisorError::Unknown { .. })));
    qemu.define(&machine).await.unwrap();
    assert_eq!(qemu.power(machine.id).await.unwrap(), Power::Off);
    qemu.start(machine.id).await.unwrap();
    let before = says(&qemu, machine.id, 0, "tick\ntick").await;
    let twin = Machine { id: Uuid::new_v4(), ..machine.clone() };
    assert!(matches!(qemu.define(&twin).await, Err(HypervisorError::Exists { .. })), "one machine of a name");
    assert!(matches!(qemu.start(machine.id).await, Err(HypervisorError::Running { .. })));
    assert!(matches!(Qemu::open(QemuSettings::new(folder.path().join("machines"))), Err(HypervisorError::InUse)));
    drop(qemu);

    let qemu = open(folder.path());
    assert_eq!(qemu.power(machine.id).await.unwrap(), Power::On);
    let listed = qemu.inventory().await.unwrap();
    assert_eq!(listed, [Listed { id: machine.id, name: "web".into(), power: Power::On, ours: true }]);
    says(&qemu, machine.id, before, "tick").await;
    assert_eq!(qemu.describe(machine.id).await.unwrap(), machine);
    let screen = folder.path().join("screen.png");
    qemu.screenshot(machine.id, &screen).await.unwrap();
    assert!(std::fs::read(&screen).unwrap().starts_with(b"\x89PNG"));

    // No operating system listens: it is turned off when the limit is over.
    let stopped = qemu.stop(machine.id, Some(Duration::from_millis(300))).await.unwrap();
    assert_eq!(stopped, Stopped::TurnedOff);
    assert_eq!(qemu.stop(machine.id, None).await.unwrap(), Stopped::WasOff);
    assert_eq!(qemu.power(machine.id).await.unwrap(), Power::Off);
    qemu.delete(machine.id).await.unwrap();
    qemu.delete(machine.id).await.unwrap();
    assert!(qemu.inventory().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_killed_qemu_is_off_and_starts_again() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let path = folder.path().join("disk.img");
    boot_disk(&path, "alive");
    let machine = machine("web", &path);
    let qemu = open(folder.path());
    qemu.define(&machine).await.unwrap();
    qemu.start(machine.id).await.unwrap();
    let mut events = qemu.events(machine.id).await.unwrap();
    let process = qemu.process(machine.id).unwrap().unwrap();
    process.kill().unwrap();
    process.ended().await.unwrap();
    assert!(matches!(events.recv().await, Err(broadcast::error::RecvError::Closed)));
    assert_eq!(qemu.power(machine.id).await.unwrap(), Power::Off);
    qemu.start(machine.id).await.unwrap();
    says(&qemu, machine.id, 0, "alive").await;
    qemu.delete(machine.id).await.unwrap();
}

#[tokio::test]
async fn a_disk_moves_while_the_machine_runs() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let (from, to) = (folder.path().join("from.img"), folder.path().join("to.img"));
    boot_disk(&from, "tick");
    std::fs::File::create(&to).unwrap().set_len(8 << 20).unwrap();
    let machine = machine("web", &from);
    let qemu = open(folder.path());
    qemu.define(&machine).await.unwrap();
    qemu.start(machine.id).await.unwrap();
    says(&qemu, machine.id, 0, "tick").await;

    // A place that is not there, or is too small, leaves everything as it was.
    let nowhere = Place::Raw { path: folder.path().join("nowhere.img") };
    qemu.move_disk(machine.id, 0, &nowhere, SOON).await.unwrap_err();
    let small = folder.path().join("small.img");
    std::fs::File::create(&small).unwrap().set_len(1 << 20).unwrap();
    qemu.move_disk(machine.id, 0, &Place::Raw { path: small }, SOON).await.unwrap_err();
    assert_eq!(qemu.places(machine.id).await.unwrap(), machine.disks);

    let place = Place::Raw { path: to.clone() };
    qemu.move_disk(machine.id, 0, &place, SOON).await.unwrap();
    assert_eq!(qemu.places(machine.id).await.unwrap(), std::slice::from_ref(&place));
    let copied = std::fs::read(&to).unwrap();
    assert!(copied == std::fs::read(&from).unwrap(), "the copy is the disk");
    // The old disk is let go of: it may change, or go, and the guest does not see it.
    std::fs::remove_file(&from).unwrap();
    let now = qemu.console(machine.id, 0).await.unwrap().end();
    says(&qemu, machine.id, now, "tick").await;
    // What is read comes from the new disk.
    let file = std::fs::File::options().write(true).open(&to).unwrap();
    file.write_all_at(b"tock\n\0", 512).unwrap();
    let now = says(&qemu, machine.id, now, "tock").await;
    // And back again, to a third place, by another process of ours.
    drop(qemu);
    let qemu = open(folder.path());
    let third = folder.path().join("third.img");
    std::fs::File::create(&third).unwrap().set_len(8 << 20).unwrap();
    qemu.move_disk(machine.id, 0, &Place::Raw { path: third.clone() }, SOON).await.unwrap();
    says(&qemu, machine.id, now, "tock").await;
    // Off and on again it starts from where it was moved to.
    qemu.stop(machine.id, None).await.unwrap();
    std::fs::remove_file(&to).unwrap();
    qemu.start(machine.id).await.unwrap();
    says(&qemu, machine.id, 0, "tock").await;
    qemu.delete(machine.id).await.unwrap();
    assert!(third.exists(), "disks stay");
}

/// As a served point and its plain disk are.
#[tokio::test]
async fn a_disk_is_switched_to_a_place_that_shows_the_same() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let from = folder.path().join("from.img");
    boot_disk(&from, "tick");
    let machine = machine("web", &from);
    let qemu = open(folder.path());
    qemu.define(&machine).await.unwrap();
    qemu.start(machine.id).await.unwrap();
    says(&qemu, machine.id, 0, "tick").await;
    let place = Place::Raw { path: folder.path().join("copy.img") };
    std::fs::copy(&from, folder.path().join("copy.img")).unwrap();
    let file = std::fs::File::options().write(true).open(folder.path().join("copy.img")).unwrap();
    file.write_all_at(b"tock\n\0", 512).unwrap();
    // Nothing is copied: what the new place shows is what the guest reads from then on.
    qemu.switch_disk(machine.id, 0, &place, SOON).await.unwrap();
    let now = qemu.console(machine.id, 0).await.unwrap().end();
    says(&qemu, machine.id, now, "tock").await;
    assert_eq!(qemu.places(machine.id).await.unwrap(), [place]);
    qemu.delete(machine.id).await.unwrap();
}

#[tokio::test]
async fn a_move_that_was_interrupted_is_settled() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let (from, to) = (folder.path().join("from.img"), folder.path().join("to.img"));
    boot_disk(&from, "tick");
    let machine = machine("web", &from);
    for kept in [false, true] {
        std::fs::File::create(&to).unwrap().set_len(8 << 20).unwrap();
        let qemu = open(folder.path());
        qemu.define(&machine).await.unwrap();
        qemu.start(machine.id).await.unwrap();
        let place = Place::Raw { path: to.clone() };
        // As far as a process came that died before, or after, the new place was kept.
        let qmp = qemu.qmp(machine.id).await.unwrap();
        let mut events = qmp.events();
        qmp.execute("blockdev-add", command::blockdev("disk0-1", &place), SOON).await.unwrap();
        let arguments = json!({ "job-id": job_name(0, 1), "device": "disk0-0", "target": "disk0-1", "sync": "full",
            "copy-mode": "write-blocking" });
        qmp.execute("blockdev-mirror", arguments, SOON).await.unwrap();
        assert!(matches!(job_event(&mut events, &job_name(0, 1)).await, Ok(Ready::Same)));
        if kept {
            let moved = Machine { disks: vec![place.clone()], ..machine.clone() };
            qemu.keep(&Kept { machine: moved, moves: vec![1] }).unwrap();
        }
        drop((qmp, qemu));
        let qemu = open(folder.path());
        let qmp = qemu.qmp(machine.id).await.unwrap();
        let mut again = tokio::time::interval(Duration::from_millis(10));
        let jobs = async {
            loop {
                again.tick().await;
                if qmp.execute("query-block-jobs", json!({}), SOON).await.unwrap() == json!([]) {
                    return;
                }
            }
        };
        tokio::time::timeout(SOON, jobs).await.expect("the mirror ends");
        let nodes = qmp.execute("query-block", json!({}), SOON).await.unwrap();
        let node = nodes.as_array().unwrap().iter().find_map(|device| device["inserted"]["node-name"].as_str());
        assert_eq!(node, Some(if kept { "disk0-1" } else { "disk0-0" }));
        qemu.delete(machine.id).await.unwrap();
    }
}

#[tokio::test]
async fn uefi_machines_start_where_the_firmware_is() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let path = folder.path().join("disk.img");
    boot_disk(&path, "tick");
    let mut machine = machine("web", &path);
    machine.hardware =
        Hardware { firmware: Firmware::Uefi, memory_mib: 128, buses: vec![Bus::Scsi], ..Hardware::default() };
    let qemu = open(folder.path());
    let defined = qemu.define(&machine).await;
    if command::find_uefi().is_none() {
        assert!(defined.unwrap_err().help().contains("ovmf"));
        return;
    }
    defined.unwrap();
    qemu.start(machine.id).await.unwrap();
    // Debian's firmware speaks on the serial line when it looks for something to boot.
    says(&qemu, machine.id, 0, "BdsDxe").await;
    qemu.delete(machine.id).await.unwrap();
}

fn drill(folder: &Path, machine: Machine, sign: Sign, limit: Duration) -> Drill {
    Drill { machine, sign: Some(sign), limit, evidence: folder.join("evidence"), keep: false }
}

#[tokio::test]
async fn drills_run_side_by_side_and_leave_evidence_only() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let qemu = open(folder.path());
    let isolated =
        Card { network: Network::Isolated, mac: None, model: CardModel::Virtio, addresses: vec!["10.9.0.7/24".into()] };
    let drills: Vec<Drill> = (0..2)
        .map(|number| {
            let path = folder.path().join(format!("disk-{number}.img"));
            boot_disk(&path, &format!("guest {number} is alive"));
            let mut machine = machine(&format!("web-{number}"), &path);
            machine.hardware.cards = vec![isolated.clone()];
            // The second one never says what is waited for.
            let (text, limit) = if number == 0 { ("0 is alive", SOON) } else { ("nothing", Duration::from_secs(3)) };
            drill(folder.path(), machine, Sign::Console { text: text.into() }, limit)
        })
        .collect();
    let tell = |_: &str| {};
    let began = Instant::now();
    let (good, silent) =
        tokio::join!(drill::run(&qemu, &drills[0], began, &tell), drill::run(&qemu, &drills[1], began, &tell));
    assert_eq!(good.outcome, Outcome::Alive, "{good:?}");
    assert!(good.sign_seconds > good.first_instruction_seconds && good.left.is_none(), "{good:?}");
    assert_eq!(silent.outcome, Outcome::NoSign, "{silent:?}");
    let reason = silent.reason.unwrap();
    assert!(reason.contains("\"nothing\" on the serial console") && reason.contains("3 s"), "{reason}");
    let console = std::fs::read_to_string(silent.console.unwrap()).unwrap();
    assert!(console.contains("guest 1 is alive"), "what it did say is kept: {console}");
    assert!(std::fs::read(good.screen.unwrap()).unwrap().starts_with(b"\x89PNG"));
    assert!(qemu.inventory().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_drill_that_cannot_start_says_why_and_leaves_nothing() {
    need_qemu!();
    let folder = tempfile::tempdir().unwrap();
    let _ends = Ends(folder.path());
    let qemu = open(folder.path());
    let absent = machine("web", &folder.path().join("absent.img"));
    let drill = drill(folder.path(), absent, Sign::Agent, SOON);
    let report = drill::run(&qemu, &drill, Instant::now(), &|_| {}).await;
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.unwrap().contains("absent.img") && report.help.is_some());
    assert!(qemu.inventory().await.unwrap().is_empty());
    // A drill on a bridge is refused before anything is made.
    let bridged =
        Card { network: Network::Bridge("br0".into()), mac: None, model: CardModel::Virtio, addresses: Vec::new() };
    let mut open_drill = drill;
    open_drill.machine.hardware.cards = vec![bridged];
    let report = drill::run(&qemu, &open_drill, Instant::now(), &|_| {}).await;
    assert!(report.reason.unwrap().contains("not isolated"));
    assert!(qemu.inventory().await.unwrap().is_empty());
}
