//! The main job, shown and proven on this machine.
//!
//! A machine with two disks, each with a real file system: the first is full of this machine's own files, and both have a
//! file `database` that writers change all the time, through the agent. The file tree changes in versions, each applied as
//! an application would that is quiet at its mark. Every proof compares the BLAKE3 of a recovered disk with one that was
//! found without the product:
//!
//! * at an **app-consistent** point the writers are held, and the source itself is hashed at that instant;
//! * at a **crash-consistent** point under load, the recovered disks say how far each writer had come; that must lie between
//!   what was acknowledged before the mark and what was issued after it, on both disks together, and the disks must equal
//!   the last reference with each writer's log replayed exactly so far.

mod api;
mod content;
mod disks;
mod proof;
mod report;
mod site;
mod stage;
mod tools;
mod writers;

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use crate::cli::{CliError, Output};
use report::Report;

#[derive(Args)]
pub struct DemoArgs {
    /// An empty or absent folder to work in; one in /var/tmp otherwise.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The size of the larger disk.
    #[arg(long, default_value = "512M", value_parser = crate::cli::parse_size)]
    pub size: u64,
    /// Leave the disks, the replica and the recovered images.
    #[arg(long)]
    pub keep: bool,
}

/// Smaller ones do not hold a file system, files and a database; larger ones do not fit into a minute.
const SIZE_MIN: u64 = 64 << 20;
const SIZE_MAX: u64 = 16 << 30;

pub fn run(args: DemoArgs, output: &Output) -> Result<(), CliError> {
    if !(SIZE_MIN..=SIZE_MAX).contains(&args.size) || !args.size.is_multiple_of(1 << 20) {
        return Err(CliError::new(
            format!("a disk of {} bytes is not possible here", args.size),
            "choose whole megabytes from 64M to 16G",
        ));
    }
    tools::check()?;
    let began = Instant::now();
    let folder = stage::WorkFolder::create(args.dir.as_deref(), args.keep)?;
    let mut report = Report::default();
    let outcome = stage::Stage::set(&folder, args.size, output).and_then(|mut stage| {
        let played = stage.play(&mut report, output);
        let stopped = stage.end();
        played.and(stopped)
    });
    if outcome.is_err() {
        folder.tell_log();
    }
    outcome?;
    report.finish(began.elapsed(), args.keep.then(|| folder.path().to_owned()));
    report.print(output)?;
    if report.holds() {
        return Ok(());
    }
    Err(CliError::new(
        format!("{} of {} proofs do not hold", report.broken(), report.proofs.len()),
        "run again with --keep and compare the images; please report it with the log",
    ))
}
