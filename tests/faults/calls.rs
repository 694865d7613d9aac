//! Every system call that matters may be the last one of a process, or fail. A short life of a machine (protect, write,
//! flush, point, stop) is lived with a fault at the n-th call, for one n after another, until a life has fewer calls than
//! that. Afterwards the role runs again without faults, and nothing that was acknowledged may be missing.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::site::{LIMIT, Machine, text};
use tidemark_tests::trace::{Fault, Injection, Trace};
use tidemark_tests::{Site, need, need_root, tools, wait};

const DISK_BYTES: u64 = 2 * MIB;
const BLOCK: u64 = 4096;
/// A step of a life that a fault holds up; longer is as good as failed.
const STEP_LIMIT: Duration = Duration::from_secs(4);
const STOP_LIMIT: Duration = Duration::from_secs(30);
const WRITES: u64 = 24;

/// The calls by which the roles change what lasts, or tell others.
const CALLS: [&str; 14] = [
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "pwritev2",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "ftruncate",
    "mkdir",
    "msync",
    "sendto",
    "openat",
];
/// Calls that a disk can refuse, and with what.
const FAILING: [(&str, &str); 14] = [
    ("pwrite64", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("pwritev", "EIO"),
    ("pwritev", "ENOSPC"),
    ("pwritev2", "EIO"),
    ("pwritev2", "ENOSPC"),
    ("fsync", "EIO"),
    ("fdatasync", "EIO"),
    ("rename", "EIO"),
    ("ftruncate", "EIO"),
    ("fallocate", "ENOSPC"),
    ("mkdir", "ENOSPC"),
    ("unlink", "EIO"),
    ("msync", "EIO"),
];

/// What a client of the disk, and an operator, were told.
struct Told {
    /// Number of the last acknowledged write of each block, and of one that was not answered.
    acknowledged: Vec<u64>,
    maybe: Vec<u64>,
    /// Points that were reported as made, each with the disk as it was then.
    points: Vec<(String, PathBuf)>,
}

fn content(block: u64, number: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    Seeded(block << 32 | number).fill(&mut data);
    data
}

/// Runs a verb; `None` when it failed, took too long, or the role under test ended.
fn verb(site: &mut Site, role: &str, arguments: &[&str]) -> Option<Value> {
    let mut command = site.command();
    command.args(arguments).arg("--json").stdin(Stdio::null()).stdout(Stdio::piped());
    let log = site.path("verbs.log");
    let mut process = Owned::start("verb", command, Some(&log));
    let deadline = Instant::now() + STEP_LIMIT;
    let ended = wait::until("a verb ends", STEP_LIMIT + Duration::from_secs(5), || match process.ending() {
        Some(status) => Some(status.success()),
        None => (Instant::now() > deadline || !site.role(role).is_running()).then_some(false),
    });
    if !ended {
        return None;
    }
    let stdout = process.child().stdout.take().expect("stdout is piped");
    serde_json::from_reader(stdout).ok()
}

/// Connects to the machine's disk, when it is attached in time.
fn connect(site: &mut Site, role: &str, name: &str) -> Option<Client> {
    let uri = format!("nbd+unix:///{name}-0?socket={}", site.state().join("run/nbd.sock").display());
    let deadline = Instant::now() + STEP_LIMIT;
    wait::until("the disk is attached", STEP_LIMIT + Duration::from_secs(5), || match Client::connect(&uri) {
        Ok(client) => Some(Some(client)),
        Err(_) => (Instant::now() > deadline || !site.role(role).is_running()).then_some(None),
    })
}

/// Whether the role under test came up far enough to be told something.
fn is_there(site: &mut Site, role: &str) -> bool {
    let deadline = Instant::now() + STEP_LIMIT;
    wait::until("the role is connected", STEP_LIMIT + Duration::from_secs(5), || match site.connected() {
        Some(2..) => Some(true),
        _ => (Instant::now() > deadline || !site.role(role).is_running()).then_some(false),
    })
}

/// One life, with a fault somewhere in it.
fn live(site: &mut Site, role: &str, name: &str, disk: &Path) -> Told {
    let blocks = (DISK_BYTES / BLOCK) as usize;
    let mut told = Told { acknowledged: vec![0; blocks], maybe: vec![0; blocks], points: Vec::new() };
    let disk_text = disk.to_str().unwrap();
    if !is_there(site, role) {
        return told;
    }
    verb(site, role, &["protect", name, "--disk", disk_text, "--no-wait"]);
    let mut seeded = Seeded(7);
    let mut number = 0;
    for round in 0..2 {
        let Some(mut client) = connect(site, role, name) else { return told };
        for _ in 0..WRITES {
            number += 1;
            let block = seeded.below(blocks as u64);
            let outcome = match number % 8 {
                0 => client.flush(),
                _ => client.write(block * BLOCK, &content(block, number)),
            };
            match outcome {
                Ok(()) if number % 8 != 0 => {
                    told.acknowledged[block as usize] = number;
                    told.maybe[block as usize] = 0;
                }
                Ok(()) => {}
                // Refused: it may be there or not.
                Err(error) if error.raw_os_error().is_some_and(|code| code == libc::EIO || code == libc::ENOSPC) => {
                    if number % 8 != 0 {
                        told.maybe[block as usize] = number;
                    }
                }
                Err(_) => {
                    told.maybe[block as usize] = number;
                    return told;
                }
            }
        }
        let _ = client.disconnect();
        if let Some(point) = verb(site, role, &["point", "create", name]) {
            let reference = site.path(&format!("{name}-{round}.img"));
            image::copy(disk, &reference);
            told.points.push((text(&point["id"]), reference));
        }
    }
    told
}

/// What was told is so: on the disk, in the newest point, and in each point that was reported.
fn assert_kept(site: &Site, machine: &Machine, told: &Told) {
    let file = std::fs::File::open(&machine.disks[0].path).unwrap();
    let mut data = vec![0; BLOCK as usize];
    for (block, (number, maybe)) in told.acknowledged.iter().zip(&told.maybe).enumerate() {
        if *number == 0 {
            continue;
        }
        file.read_exact_at(&mut data, block as u64 * BLOCK).unwrap();
        let fine = data == content(block as u64, *number) || *maybe != 0 && data == content(block as u64, *maybe);
        assert!(fine, "block {block} lost its acknowledged write {number}");
    }
    site.wait_protected(&machine.name);
    // A log that failed is left for a while; the way back up is found without anybody's help.
    wait::until("the mode steps up", LIMIT, || (site.status(&machine.name)["mode"] == "data").then_some(()));
    site.point(&machine.name);
    let recovered = site.export(&machine.name, "latest", "recovered.raw", "raw");
    image::assert_same(&machine.disks[0].path, &recovered);
    std::fs::remove_file(recovered).unwrap();
    for (point, reference) in &told.points {
        let exported = site.export(&machine.name, point, "point.raw", "raw");
        image::assert_same(reference, &exported);
        std::fs::remove_file(exported).unwrap();
        std::fs::remove_file(reference).unwrap();
    }
}

#[derive(Default)]
struct Tally {
    lives: u64,
    kills: u64,
    errors: u64,
    /// The farthest call that was hit.
    farthest: u64,
}

/// Lives once with the injection; whether it happened.
fn trial(site: &mut Site, role: &str, injection: &Injection, tally: &mut Tally) -> bool {
    tally.lives += 1;
    let name = format!("m{}", tally.lives);
    let disk = site.path(&format!("{name}.img"));
    image::make_mixed(&disk, DISK_BYTES, tally.lives);
    let trace = Trace::new(site.path("trace"));
    let _ = std::fs::remove_file(trace.path());
    let mut before = site.take_role(role);
    before.stop(STOP_LIMIT);
    site.start_role_as(role, injection.command(trace.path()));
    let told = live(site, role, &name, &disk);
    let mut process = site.take_role(role);
    if process.ending().is_none() {
        // A clean end is part of the life, with its own calls.
        process.signal(nix::sys::signal::Signal::SIGTERM);
    }
    let ended = wait::until("the role ends", STOP_LIMIT, || process.ending());
    let injected = match injection.fault {
        Fault::Kill => ended.signal() == Some(libc::SIGKILL),
        Fault::Error(_) => trace.injected(),
    };
    match injection.fault {
        Fault::Kill => tally.kills += u64::from(injected),
        Fault::Error(_) => tally.errors += u64::from(injected),
    }
    if injected {
        tally.farthest = tally.farthest.max(injection.at);
    }
    // Its stream may still look open, and be taken for that of the next process.
    wait::until("its end is noticed", LIMIT, || (site.connected() == Some(1)).then_some(()));
    site.start_role(role);
    site.wait_connected();
    // What an interrupted protect began is finished, or taken back first and begun again: the same words, the same machine.
    wait::until("the machine is protected again", LIMIT, || {
        let again = site.run(&["protect", &name, "--disk", disk.to_str().unwrap(), "--no-wait"]);
        if again.code != 0 {
            again.assert_refused(&["is just being unprotected"]);
        }
        (again.code == 0).then_some(())
    });
    let machine = site.protect(&name, &[&disk], &[]);
    assert_kept(site, &machine, &told);
    site.json(&["unprotect", &name, "--delete-replica"]);
    std::fs::remove_file(disk).unwrap();
    injected
}

/// Every n in a long run; a few otherwise. Errors, which hold up a life, are fewer than kills, which end it.
fn next(at: u64, fault: Fault) -> u64 {
    match fault {
        _ if tools::is_long() => at + 1,
        Fault::Kill => at * 2 + at / 2,
        Fault::Error(_) => at * 6,
    }
}

fn sweep(role: &str, injections: &[(&'static str, Fault, bool)]) {
    let mut site = Site::start_roles();
    let mut tally = Tally::default();
    for (call, fault, from_then_on) in injections {
        let mut at = 1;
        loop {
            let injection = Injection { call, fault: *fault, at, from_then_on: *from_then_on };
            println!("{role} {injection}");
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                trial(&mut site, role, &injection, &mut tally)
            }));
            match outcome {
                Ok(true) => at = next(at, *fault),
                Ok(false) => break,
                Err(panic) => {
                    eprintln!("--- {role}: {injection}");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
    println!("{role}: {} lives, {} kills, {} errors", tally.lives, tally.kills, tally.errors);
    tools::counted("kills of a real role at a chosen system call", tally.kills);
    tools::counted("system calls of a real role made to fail", tally.errors);
    let happened = tally.kills + tally.errors;
    assert!(happened > injections.len() as u64 / 2, "{happened} faults in {} sweeps", injections.len());
    assert!(tally.farthest > 5, "no call was hit but the first {}: faults get lost", tally.farthest);
}

fn kills() -> Vec<(&'static str, Fault, bool)> {
    CALLS.map(|call| (call, Fault::Kill, false)).to_vec()
}

fn errors() -> Vec<(&'static str, Fault, bool)> {
    let once = FAILING.map(|(call, error)| (call, Fault::Error(error), false));
    let lasting = FAILING.map(|(call, error)| (call, Fault::Error(error), true));
    if tools::is_long() { [once, lasting].concat() } else { once.to_vec() }
}

#[test]
fn an_agent_survives_its_death_at_any_system_call() {
    need!("strace");
    need_root!("tracing");
    sweep("agent", &kills());
}

#[test]
fn a_process_server_survives_its_death_at_any_system_call() {
    need!("strace");
    need_root!("tracing");
    sweep("process-server", &kills());
}

#[test]
fn an_agent_survives_any_failing_system_call() {
    need!("strace");
    need_root!("tracing");
    sweep("agent", &errors());
}

#[test]
fn a_process_server_survives_any_failing_system_call() {
    need!("strace");
    need_root!("tracing");
    sweep("process-server", &errors());
}
