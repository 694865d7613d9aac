//! replica …: a replica's folder, without a server: looking writes nothing, failing over does. And what unprotected machines
//! left, which the server knows.

use std::path::{Path, PathBuf};
use std::{fs, io};

use hyper::Method;
use serde_json::{Value, json};
use tidemark_base::Timestamp;
use tidemark_base::stop::Stop;
use tidemark_base::storage::RealStorage;
use tidemark_process_server::offline;
use tidemark_process_server::points::{PointError, PointSelector};
use tidemark_process_server::scrub::{inspect_folder, verify_folder};
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_transport::recovery::RecoveryKey;

use super::args::{FailoverArgs, ReplicaVerb, Target, WaitArgs};
use super::output::{Output, bytes, bytes_at, text};
use super::{CliError, job};
use crate::client::{Client, escape};

pub fn run(verb: ReplicaVerb, target: &Target, output: &Output) -> Result<(), CliError> {
    match verb {
        ReplicaVerb::Inspect { dir } => inspect(&dir, output),
        ReplicaVerb::Verify { dir } => verify(&dir, output),
        ReplicaVerb::Failover(args) => failover(args, output),
        ReplicaVerb::List => super::client(list(&target.client()?, output)),
        ReplicaVerb::Delete { id, force, wait } => super::client(delete(&target.client()?, &id, force, &wait, output)),
    }
}

async fn list(client: &Client, output: &Output) -> Result<(), CliError> {
    let kept = client.get("/replicas").await?;
    if output.is_json() {
        return Ok(output.json(&kept)?);
    }
    let row = |replica: &Value| {
        let disks = replica["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
        let size = disks.iter().filter_map(|disk| disk["bytes"].as_u64()).sum();
        let mut row = ["/id", "/name", "/process_server"].map(|at| text(replica, at)).to_vec();
        row.extend([disks.len().to_string(), bytes(size), text(replica, "/unprotected")]);
        row
    };
    let rows: Vec<Vec<String>> = kept.as_array().into_iter().flatten().map(row).collect();
    Ok(output.table(&["ID", "MACHINE", "PROCESS SERVER", "DISKS", "SIZE", "UNPROTECTED"], &rows)?)
}

async fn delete(client: &Client, id: &str, force: bool, wait: &WaitArgs, output: &Output) -> Result<(), CliError> {
    let path = format!("/replicas/{}?force={force}", escape(id));
    let started = client.request(Method::DELETE, &path, None).await?;
    let Some(result) = job::finish(client, started, wait, output).await? else { return Ok(()) };
    super::done(&result, "the replica and its recovery points are deleted", output)
}

/// The replicas that a folder holds: itself, or, of a process server's folder, each of its disks'.
struct Replicas {
    folders: Vec<PathBuf>,
    is_server: bool,
}

impl Replicas {
    fn of(dir: &Path) -> Result<Self, CliError> {
        if !dir.is_dir() {
            return Err(CliError::new(
                format!("{} is no folder", dir.display()),
                "name the folder of a process server, or replicas/<disk> in it, which is one disk's replica",
            ));
        }
        let inner = dir.join("replicas");
        if !inner.is_dir() {
            return Ok(Self { folders: vec![dir.to_owned()], is_server: false });
        }
        let entries = std::fs::read_dir(&inner).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.map_err(|error| refused(&inner, &error, "check that you may read it"))?;
        let mut folders: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).filter(|path| path.is_dir()).collect();
        folders.sort();
        if folders.is_empty() {
            let message = format!("{} holds no replica", inner.display());
            return Err(CliError::new(message, "the process server that it belongs to has got no disk yet"));
        }
        Ok(Self { folders, is_server: true })
    }

    /// As programs read it: of a process server's folder a list, each with its folder.
    fn json(&self, mut reports: Vec<Value>) -> Value {
        if !self.is_server {
            return reports.swap_remove(0);
        }
        for (folder, report) in self.folders.iter().zip(&mut reports) {
            report["folder"] = json!(folder);
        }
        json!(reports)
    }
}

fn refused(dir: &Path, error: &dyn std::error::Error, help: &str) -> CliError {
    let failure = Failure::from_error(FailureKind::Failed, error, help);
    CliError::new(format!("{}: {}", dir.display(), failure.message), failure.help)
}

fn inspect(dir: &Path, output: &Output) -> Result<(), CliError> {
    let replicas = Replicas::of(dir)?;
    let mut reports = Vec::new();
    for folder in &replicas.folders {
        let report = inspect_folder(RealStorage::open_folder(folder));
        let report = report.map_err(|error| refused(folder, &error, error.help()))?;
        reports.push(serde_json::to_value(&report).map_err(|error| refused(folder, &error, "please report it"))?);
    }
    if output.is_json() {
        return Ok(output.json(&replicas.json(reports))?);
    }
    for (index, (folder, report)) in replicas.folders.iter().zip(&reports).enumerate() {
        if replicas.is_server {
            output.line(&format!("{}{}", if index > 0 { "\n" } else { "" }, folder.display()))?;
        }
        show(report, output)?;
    }
    Ok(())
}

fn show(report: &Value, output: &Output) -> Result<(), CliError> {
    let mut rows = Vec::new();
    flatten("", report, &mut rows);
    output.table(&["REPLICA", ""], &rows)?;
    let segments: Vec<Vec<String>> = report["segments"]
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
    for damage in report["damage"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        output.line(&format!("damaged: {damage}"))?;
    }
    Ok(())
}

/// Offline, with the recovery key.
fn failover(args: FailoverArgs, output: &Output) -> Result<(), CliError> {
    let key = read_recovery_key(&args.key_file)?;
    if args.release {
        let released = offline::release(&args.dir, args.machine.as_deref(), &key)
            .map_err(|failure| CliError::new(failure.message, failure.help))?;
        if output.is_json() {
            return Ok(output.json(&json!({ "machine": released.name, "id": released.machine, "released": true }))?);
        }
        output.line(&format!("{}: what its failover held is given back", released.name))?;
        return Ok(());
    }
    let selector: PointSelector =
        args.point.parse().map_err(|error: PointError| CliError::new(error.to_string(), error.help()))?;
    let refused = |failure: Failure| CliError::new(failure.message, failure.help);
    let done = offline::failover(&args.dir, args.machine.as_deref(), selector, &args.without, args.to.as_deref(), &key)
        .map_err(refused)?;
    let record = &done.record;
    let mut answer = json!({
        "machine": record.name,
        "id": record.machine,
        "point": record.point,
        "time": record.point_time,
        "disks": record.disks,
        "lost_seconds": Timestamp::now().saturating_since(record.point_time).as_secs_f64(),
    });
    if !output.is_json() {
        output.line(&format!("{} was failed over to the point of {}", record.name, record.point_time))?;
        for (disk, of) in &record.disks {
            output
                .line(&format!("  disk {disk}: generation {}; its old host is refused from now on", of.generation))?;
        }
    }
    if let Some(to) = &args.to {
        let exported = done.export(to, &Stop::new()).map_err(refused)?;
        let files: Vec<Value> = exported
            .files
            .iter()
            .map(|file| json!({ "id": file.id, "path": file.path, "bytes": file.bytes }))
            .collect();
        for file in files.iter().filter(|_| !output.is_json()) {
            output.line(&format!("  {} ({})", text(file, "/path"), bytes_at(file, "/bytes")))?;
        }
        answer["files"] = Value::Array(files);
    }
    let Some(socket) = &args.serve else {
        if output.is_json() {
            output.json(&answer)?;
        } else if args.to.is_none() {
            output.line("To have its disks: the same again with --to DIR, or with --serve SOCKET.")?;
        }
        return Ok(());
    };
    let (serving, _serves) = done.serve(socket).map_err(refused)?;
    answer["serving"] =
        serving.disks.iter().map(|disk| json!({ "id": disk.id, "nbd": disk.nbd, "bytes": disk.bytes })).collect();
    if output.is_json() {
        output.json(&answer)?;
    } else {
        for disk in &serving.disks {
            output.line(&format!("  {}", disk.nbd.as_deref().unwrap_or_default()))?;
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::runtime)?;
    runtime.block_on(async {
        let ended = super::run::ended().map_err(CliError::runtime)?;
        ended.await;
        Ok(())
    })
}

/// As people keep it: a file, or typed.
pub fn read_recovery_key(path: &Path) -> Result<RecoveryKey, CliError> {
    let read = match path.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(path),
    };
    let read = read.map_err(|error| {
        CliError::new(
            format!("cannot read the recovery key from {}: {error}", path.display()),
            "name the file that holds it, or `-` for standard input",
        )
    })?;
    RecoveryKey::parse(&read).map_err(|error| CliError::new(error.to_string(), error.help()))
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
    let replicas = Replicas::of(dir)?;
    let mut reports = Vec::new();
    for folder in &replicas.folders {
        let report = verify_folder(RealStorage::open_folder(folder), &Stop::new());
        let report = report.map_err(|error| refused(folder, &error, error.help()))?;
        if !output.is_json() {
            let of = if replicas.is_server { format!("{}: ", folder.display()) } else { String::new() };
            output.line(&format!(
                "{of}{}: {} segments, {} cuts, {} chunks, {} proven",
                if report.sound { "sound" } else { "damaged" },
                report.segments,
                report.cuts,
                report.chunks,
                bytes(report.bytes)
            ))?;
        }
        reports.push(report);
    }
    if output.is_json() {
        let values: Result<Vec<Value>, _> = reports.iter().map(serde_json::to_value).collect();
        output.json(&replicas.json(values.map_err(|error| refused(dir, &error, "please report it"))?))?;
    }
    let damaged: Vec<_> = replicas.folders.iter().zip(&reports).filter(|(_, report)| !report.sound).collect();
    let Some((folder, report)) = damaged.first() else { return Ok(()) };
    let first = report.findings.first().map_or_else(
        || "it could not be read to its end".to_owned(),
        |finding| format!("{}: {}", finding.file, finding.what),
    );
    let others = (report.findings.len().saturating_sub(1) as u64) + report.findings_left_off;
    let more = if others > 0 { format!(" (and {others} more)") } else { String::new() };
    let beside = if damaged.len() > 1 { format!("; {} replicas are damaged", damaged.len()) } else { String::new() };
    Err(CliError::new(
        format!("the replica in {} is damaged: {first}{more}{beside}", folder.display()),
        "recover a point that `tidemark point verify` finds sound, and resync the machine: `tidemark resync NAME`",
    ))
}
