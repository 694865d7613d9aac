//! What a program pays that writes to a file: fio on a protected disk that is a file (`--via fuse`), and on the same file seen through a bare
//! pass-through. Taken as the front end is ([`crate::frontend`]): the same file, loads and rounds, fio past the page cache. Ours writes
//! everything twice, into the disk and into the log.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tidemark_tests::block::unmount_beneath;
use tidemark_tests::process::Owned;
use tidemark_tests::site::text;
use tidemark_tests::{tools, wait};

use crate::Failure;
use crate::frontend::{LOADS, Load, fio, make_file};
use crate::options::Options;
use crate::ours::{Compression, NAME, Ours};
use crate::peers;
use crate::report::Report;
use crate::spinners::Spinners;

pub const BINDFS: &str = "bindfs";
pub const BINDFS_THREADS: &str = "bindfs --multithreaded";
pub const BINDFS_AGAIN: &str = "bindfs, again (A/A)";
pub const FILE: &str = "tidemark --via fuse, sending paused";
const START_LIMIT: Duration = Duration::from_secs(20);

pub fn measure(options: &Options, folder: &Path, report: &mut Report) -> Result<(), Failure> {
    if !peers::installed("files", &["fio", "bindfs"]) {
        return Ok(());
    }
    let source = folder.join("source");
    std::fs::create_dir(&source)?;
    let file = source.join("disk.img");
    make_file(&file)?;
    let _awake = Spinners::start();
    for round in 0..options.rounds {
        for server in [BINDFS, FILE, BINDFS_THREADS, BINDFS_AGAIN] {
            if !options.takes(server) {
                continue;
            }
            let results = match server {
                FILE => ours(options, folder, &file)?,
                _ => bindfs(options, folder, &source, server == BINDFS_THREADS)?,
            };
            for ((load, _), result) in LOADS.iter().zip(results) {
                report.load(load, server, round, result);
            }
        }
    }
    std::fs::remove_dir_all(source)?;
    Ok(())
}

fn loads(options: &Options, folder: &Path, file: &Path) -> Result<Vec<Load>, Failure> {
    let target = format!("--filename={}", file.display());
    let run = |(_, load): &(_, [&str; 3])| {
        options.before_a_turn(folder)?;
        fio(options, &["--ioengine=libaio", "--direct=1", &target], load)
    };
    LOADS.iter().map(run).collect()
}

fn bindfs(options: &Options, folder: &Path, source: &Path, has_threads: bool) -> Result<Vec<Load>, Failure> {
    let shown = folder.join("bindfs");
    std::fs::create_dir_all(&shown)?;
    let mut command = tools::command("bindfs");
    command.arg("-f").args(has_threads.then_some("--multithreaded")).arg(source).arg(&shown).stdin(Stdio::null());
    let server = Owned::start("bindfs", command, None);
    let file = shown.join("disk.img");
    wait::until("bindfs shows the file", START_LIMIT, || file.exists().then_some(()));
    let results = loads(options, folder, &file);
    unmount_beneath(&shown);
    drop(server);
    results
}

fn ours(options: &Options, folder: &Path, file: &Path) -> Result<Vec<Load>, Failure> {
    let mut ours = Ours::start(folder, Compression::Default);
    let disk = file.to_str().ok_or("paths are text")?;
    let protect = ["protect", NAME, "--disk", disk, "--policy", "measured", "--via", "fuse"];
    let protected = ours.site.json(&protect);
    let shown = PathBuf::from(text(&protected["disks"][0]["attach"]["file"]));
    ours.wait_protected();
    ours.pause();
    let results = loads(options, folder, &shown);
    let status = ours.status();
    if status["mode"] != "data" {
        return Err(format!("the log did not hold what was written: {}", status["problems"]).into());
    }
    ours.site.json(&["unprotect", NAME]);
    ours.site.down();
    results
}
