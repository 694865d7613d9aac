//! Measurements of Tidemark and of what a user would pick instead, side by side in one run.
//!
//! `cargo run --release -p tidemark-bench -- all` measures everything and prints tables in Markdown, with the goals as
//! ratios; see `bench/README.md` for the results and for how each number is taken. In the order of a run:
//!
//! * [`image`]: the disk that everybody replicates, and the changes made to it; the same bytes in every run.
//! * [`isolate`]: a network namespace of our own, so that the bytes on its loopback are the bytes on the wire.
//! * [`meter`]: wall time, processor seconds, bytes on the wire, memory.
//! * [`peers`], [`reference`], [`bitmap`]: the others. [`ours`]: Tidemark, through its command line.
//! * [`initial`], [`delta`], [`resync`], [`frontend`], [`files`], [`intent`], [`rpo`], [`serve`]: what is measured.
//! * [`report`]: tables, JSON, goals.

mod bitmap;
mod delta;
mod files;
mod frontend;
mod image;
mod initial;
mod intent;
mod isolate;
mod meter;
mod options;
mod ours;
mod peers;
mod reference;
mod report;
mod resync;
mod rpo;
mod serve;
mod spinners;

use std::process::ExitCode;

use options::Options;
use report::Report;

/// What ends a measurement: a tool that fails, a replica that differs. There is nothing to recover: it is told and ends.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // The minimal sender and receiver are processes of their own: this program again.
    if let Some(outcome) = reference::run_if_asked(&arguments) {
        return end(outcome);
    }
    let options = match Options::parse(&arguments) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("error: {message}\n\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    end(measure(&options))
}

fn end(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Failure> {
    let isolated = isolate::enter();
    let mut report = Report::new(options, isolated);
    let folder = tempfile::Builder::new().prefix("tidemark-bench-").tempdir_in(&options.dir)?;
    if ["initial", "delta", "append", "resync"].iter().any(|kind| options.wants(kind)) {
        let source = folder.path().join("source.img");
        eprintln!("making the disk: {} MiB", options.bytes >> 20);
        report.image(image::make(&source, options.bytes)?);
        if options.wants("initial") {
            initial::measure(options, folder.path(), &source, &mut report)?;
        }
        for (name, kind) in [("delta", image::Change::Random), ("append", image::Change::Append)] {
            if options.wants(name) {
                delta::measure(options, folder.path(), &source, kind, &mut report)?;
            }
        }
        if options.wants("resync") {
            resync::measure(options, folder.path(), &source, &mut report)?;
        }
        std::fs::remove_file(&source)?;
    }
    if options.wants("frontend") {
        frontend::measure(options, folder.path(), &mut report)?;
    }
    if options.wants("files") {
        files::measure(options, folder.path(), &mut report)?;
    }
    if options.wants("intent") {
        intent::measure(options, folder.path(), &mut report)?;
    }
    if options.wants("rpo") {
        rpo::measure(options, folder.path(), &mut report)?;
    }
    if options.wants("serve") {
        serve::measure(options, folder.path(), &mut report)?;
    }
    report.print();
    if let Some(file) = &options.json {
        report.save(file)?;
    }
    Ok(())
}
