//! What a guest pays: fio against our NBD front end, and against the NBD servers of others on the same file.
//!
//! The file is on tmpfs and wholly allocated, so that neither media nor allocation is the limit. Ours has capture on:
//! intent bitmap and log, so data is written twice. Once with sending paused (what the front end itself costs), once
//! while everything is sent and made durable on the same processors. Servers alternate within a round; `nbdkit` is
//! measured twice, which shows what a difference means here.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tidemark_tests::image::Seeded;
use tidemark_tests::process::Owned;
use tidemark_tests::{tools, wait};

use crate::Failure;
use crate::options::Options;
use crate::ours::{Compression, Ours};
use crate::peers;
use crate::report::Report;
use crate::spinners::Spinners;

const FILE_BYTES: u64 = 1 << 30;
const START_LIMIT: Duration = Duration::from_secs(20);

/// Name in the report, and what fio is told.
pub const LOADS: [(&str, [&str; 3]); 3] = [
    ("4 KiB random write, QD1", ["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    ("4 KiB random write, QD32", ["--rw=randwrite", "--bs=4k", "--iodepth=32"]),
    ("128 KiB sequential write, QD8", ["--rw=write", "--bs=128k", "--iodepth=8"]),
];

pub const NBDKIT: &str = "nbdkit file";
pub const NBDKIT_AGAIN: &str = "nbdkit file, again (A/A)";
pub const QEMU_NBD: &str = "qemu-nbd";
pub const PAUSED: &str = "tidemark, sending paused";
pub const SENDING: &str = "tidemark, sending";

#[derive(Clone, Copy, Default, Debug)]
pub struct Load {
    pub operations_per_second: f64,
    pub mean_microseconds: f64,
    pub p99_microseconds: f64,
}

pub fn measure(options: &Options, folder: &Path, report: &mut Report) -> Result<(), Failure> {
    if !peers::installed("the front end", &["fio"]) {
        return Ok(());
    }
    let file = folder.join("front-end.img");
    make_file(&file)?;
    let _awake = Spinners::start();
    for round in 0..options.rounds {
        for server in [NBDKIT, QEMU_NBD, PAUSED, NBDKIT_AGAIN, SENDING] {
            if !options.takes(server) {
                continue;
            }
            let results = match server {
                PAUSED | SENDING => ours(options, folder, &file, server == PAUSED)?,
                _ => others(options, folder, &file, server)?,
            };
            for ((load, _), result) in LOADS.iter().zip(results) {
                report.load(load, server, round, result);
            }
        }
    }
    std::fs::remove_file(file)?;
    Ok(())
}

pub fn make_file(path: &Path) -> Result<(), Failure> {
    let file = File::create(path)?;
    let mut data = vec![0; 1 << 20];
    Seeded(1).fill(&mut data);
    for offset in (0..FILE_BYTES).step_by(data.len()) {
        file.write_all_at(&data, offset)?;
    }
    Ok(())
}

fn others(options: &Options, folder: &Path, file: &Path, server: &str) -> Result<Vec<Load>, Failure> {
    let socket = folder.join("front-end.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = if server == QEMU_NBD {
        let mut command = tools::command("qemu-nbd");
        command.args(["-t", "-e", "4", "-f", "raw", "--cache=writeback", "-k"]).arg(&socket).arg(file);
        command
    } else {
        let mut command = tools::command("nbdkit");
        command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(file);
        command
    };
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let _server = Owned::start(server, command, None);
    wait::until("the server listens", START_LIMIT, || socket.exists().then_some(()));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    loads(options, folder, &uri)
}

fn loads(options: &Options, folder: &Path, uri: &str) -> Result<Vec<Load>, Failure> {
    let run = |(_, load): &(_, [&str; 3])| {
        options.before_a_turn(folder)?;
        fio(options, &over_nbd(uri), load)
    };
    LOADS.iter().map(run).collect()
}

fn over_nbd(uri: &str) -> [String; 2] {
    ["--ioengine=nbd".to_owned(), format!("--uri={uri}")]
}

fn ours(options: &Options, folder: &Path, file: &Path, paused: bool) -> Result<Vec<Load>, Failure> {
    // A new site each time: what was logged and sent in one round does not burden the next.
    let mut ours = Ours::start(folder, Compression::Default);
    let machine = ours.protect(file);
    ours.wait_protected();
    if paused {
        ours.pause();
    }
    let results = loads(options, folder, machine.nbd());
    let status = ours.status();
    if status["mode"] != "data" {
        return Err(
            format!("the log did not hold what was written: mode {}, {}", status["mode"], status["problems"]).into()
        );
    }
    ours.site.json(&["unprotect", crate::ours::NAME]);
    ours.site.down();
    results
}

/// `target` says how fio reaches what it writes to.
pub fn fio<S: AsRef<str>>(options: &Options, target: &[S], load: &[&str; 3]) -> Result<Load, Failure> {
    let target: Vec<&str> = target.iter().map(AsRef::as_ref).collect();
    let mut command = tools::command("fio");
    command.args(["--name=load", "--thread", "--size=1g", "--time_based", "--output-format=json"]);
    command.args(load).arg(format!("--runtime={}", options.seconds)).args(&target);
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text.find('{').and_then(|start| serde_json::from_str::<Value>(&text[start..]).ok());
    let Some(report) = report.filter(|_| output.status.success()) else {
        return Err(format!("fio failed on {target:?}: {text}{}", String::from_utf8_lossy(&output.stderr)).into());
    };
    let write = &report["jobs"][0]["write"];
    let nanoseconds = |value: &Value| value.as_f64().unwrap_or(f64::NAN) / 1e3;
    Ok(Load {
        operations_per_second: write["iops"].as_f64().unwrap_or(f64::NAN),
        mean_microseconds: nanoseconds(&write["lat_ns"]["mean"]),
        p99_microseconds: nanoseconds(&write["clat_ns"]["percentile"]["99.000000"]),
    })
}
