//! replica …: looks into a replica's folder, without a server; writes nothing.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tidemark_base::stop::Stop;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_process_server::scrub::{inspect_folder, verify_folder};
use tidemark_proto::control::{Failure, FailureKind};

use super::CliError;
use super::args::ReplicaVerb;
use super::output::{Output, bytes, bytes_at, text};

pub fn run(verb: ReplicaVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        ReplicaVerb::Inspect { dir } => inspect(&dir, output),
        ReplicaVerb::Verify { dir } => verify(&dir, output),
    }
}

fn open(dir: &Path) -> Result<Arc<dyn Storage>, CliError> {
    if dir.is_dir() {
        return Ok(RealStorage::open_folder(dir));
    }
    Err(CliError::new(
        format!("{} is no folder", dir.display()),
        "name the folder of one disk's replica: replicas/<disk> in the process server's folder",
    ))
}

fn refused(dir: &Path, error: &dyn std::error::Error, help: &str) -> CliError {
    let failure = Failure::from_error(FailureKind::Failed, error, help);
    CliError::new(format!("{}: {}", dir.display(), failure.message), failure.help)
}

fn inspect(dir: &Path, output: &Output) -> Result<(), CliError> {
    let report = inspect_folder(open(dir)?).map_err(|error| refused(dir, &error, error.help()))?;
    let value = serde_json::to_value(&report).map_err(|error| refused(dir, &error, "please report it"))?;
    if output.is_json() {
        return Ok(output.json(&value)?);
    }
    let mut rows = Vec::new();
    flatten("", &value, &mut rows);
    output.table(&["REPLICA", ""], &rows)?;
    let segments: Vec<Vec<String>> = value["segments"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|segment| {
            let mut row = ["/first_cut", "/last_cut", "/state", "/extents"].map(|at| text(segment, at)).to_vec();
            row.push(bytes_at(segment, "/bytes"));
            row
        })
        .collect();
    if !segments.is_empty() {
        output.line("")?;
        output.table(&["FIRST CUT", "LAST CUT", "STATE", "EXTENTS", "SIZE"], &segments)?;
    }
    for damage in &report.damage {
        output.line(&format!("damaged: {damage}"))?;
    }
    Ok(())
}

/// Names and plain values; lists have tables of their own.
fn flatten(prefix: &str, value: &Value, rows: &mut Vec<Vec<String>>) {
    let Value::Object(fields) = value else { return };
    for (name, value) in fields {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Object(_) => flatten(&name, value, rows),
            Value::Array(_) => {}
            _ => rows.push(vec![name, text(value, "")]),
        }
    }
}

fn verify(dir: &Path, output: &Output) -> Result<(), CliError> {
    let report = verify_folder(open(dir)?, &Stop::new()).map_err(|error| refused(dir, &error, error.help()))?;
    if output.is_json() {
        let value = serde_json::to_value(&report).map_err(|error| refused(dir, &error, "please report it"))?;
        output.json(&value)?;
    } else {
        output.line(&format!(
            "{}: {} segments, {} cuts, {} chunks, {} proven",
            if report.sound { "sound" } else { "damaged" },
            report.segments,
            report.cuts,
            report.chunks,
            bytes(report.bytes)
        ))?;
    }
    if report.sound {
        return Ok(());
    }
    let first = report.findings.first().map_or_else(
        || "it could not be read to its end".to_owned(),
        |finding| format!("{}: {}", finding.file, finding.what),
    );
    let others = (report.findings.len().saturating_sub(1) as u64) + report.findings_left_off;
    let more = if others > 0 { format!(" (and {others} more)") } else { String::new() };
    Err(CliError::new(
        format!("the replica in {} is damaged: {first}{more}", dir.display()),
        "recover a point that `tidemark point verify` finds sound, and resync the machine: `tidemark resync NAME`",
    ))
}
