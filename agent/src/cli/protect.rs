//! protect, unprotect, pause, resume, resync, machine disk.

use std::path::Path;

use hyper::Method;
use serde_json::{Value, json};
use tidemark_proto::control::is_full_path_of_windows;

use super::args::{MachineArgs, MachineDiskVerb, ProcessServerOfVerb, ProtectArgs, UnprotectArgs, Via};
use super::output::{Output, bytes_at, text};
use super::{CliError, job};
use crate::client::{Client, escape};

pub async fn protect(client: &Client, args: ProtectArgs, output: &Output) -> Result<(), CliError> {
    let disks = args.disks.iter().map(|disk| full_path(disk)).collect::<Result<Vec<_>, _>>()?;
    let exclude = args.exclude.iter().map(|disk| full_path(disk)).collect::<Result<Vec<_>, _>>()?;
    let request = json!({
        "name": args.name,
        "disks": disks,
        "host": args.host,
        "process_servers": args.process_servers,
        "policy": args.policy,
        "group": args.group,
        "listen": args.listen,
        "via": args.via.map(|via| match via {
            Via::Nbd => "nbd",
            Via::Bpf => "bpf",
            Via::Fuse => "fuse",
            Via::Hrl => "hrl",
            Via::Qemu => "qemu",
            Via::Vsphere => "vsphere",
            Via::Rct => "rct",
        }),
        "exclude": exclude,
        "check_only": args.check,
    });
    let started = client.post("/machines", &request).await?;
    let Some(result) = job::finish(client, started, &args.wait, output).await? else { return Ok(()) };
    if args.check {
        return checks(&args.name, &result, output);
    }
    if output.is_json() {
        return Ok(output.json(&result)?);
    }
    for warning in result["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        output.line(&format!("note: {warning}"))?;
    }
    let rows: Vec<Vec<String>> = result["disks"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|disk| {
            ["/attach/nbd", "/attach/nbds", "/attach/file"]
                .map(|address| disk.pointer(address).and_then(|address| address.as_str()))
                .into_iter()
                .flatten()
                .map(|address| vec![text(disk, "/path"), address.to_owned()])
        })
        .collect();
    if rows.is_empty() {
        return Ok(output.line(&format!("{} is protected. Its workload goes on as it is.", args.name))?);
    }
    output.line(&format!("{} is protected. Its workload opens its disks here from now on:", args.name))?;
    Ok(output.table(&["DISK", "ADDRESS"], &rows)?)
}

fn checks(name: &str, result: &Value, output: &Output) -> Result<(), CliError> {
    let checks = result["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    if output.is_json() {
        output.json(result)?;
    } else {
        let row = |check: &Value| {
            let found = if check["ok"] == true { "/warning" } else { "/error" };
            ["/check", "/of", "/ok", found, "/help"].map(|at| text(check, at)).to_vec()
        };
        let rows: Vec<Vec<String>> = checks.iter().map(row).collect();
        output.table(&["CHECK", "OF", "OK", "FOUND", "HELP"], &rows)?;
    }
    match checks.iter().filter(|check| check["ok"] != Value::Bool(true)).count() {
        0 => Ok(()),
        failing => Err(CliError::new(
            format!("{name:?} cannot be protected so: {failing} of {} checks failed", checks.len()),
            "mend what each of them says; nothing was changed",
        )),
    }
}

pub async fn unprotect(client: &Client, args: UnprotectArgs, output: &Output) -> Result<(), CliError> {
    let path = format!("/machines/{}?delete_replica={}&force={}", escape(&args.name), args.delete_replica, args.force);
    let started = client.request(Method::DELETE, &path, None).await?;
    let Some(result) = job::finish(client, started, &args.wait, output).await? else { return Ok(()) };
    if output.is_json() {
        return Ok(output.json(&result)?);
    }
    output.line(&format!("{} is not protected any more", args.name))?;
    if !args.delete_replica {
        output.line("its replica and recovery points stay: see `tidemark replica list`")?;
    }
    Ok(())
}

/// pause, resume and resync.
pub async fn simple(client: &Client, verb: &str, args: MachineArgs, output: &Output) -> Result<(), CliError> {
    let started = client.post(&format!("/machines/{}/{verb}", escape(&args.name)), &json!({})).await?;
    let Some(result) = job::finish(client, started, &args.wait, output).await? else { return Ok(()) };
    if output.is_json() {
        return Ok(output.json(&result)?);
    }
    output.line(&format!("{}: {verb} is done", args.name))?;
    Ok(())
}

/// resync --cancel.
pub async fn cancel_resync(client: &Client, args: MachineArgs, output: &Output) -> Result<(), CliError> {
    let started = client.request(Method::DELETE, &format!("/machines/{}/resync", escape(&args.name)), None).await?;
    let Some(result) = job::finish(client, started, &args.wait, output).await? else { return Ok(()) };
    if output.is_json() {
        return Ok(output.json(&result)?);
    }
    output.line(&format!("{}: it is no longer compared", args.name))?;
    Ok(())
}

/// machine disk.
pub async fn disk(client: &Client, verb: MachineDiskVerb, output: &Output) -> Result<(), CliError> {
    let (name, started, wait) = match verb {
        MachineDiskVerb::Add { name, disks, wait } => {
            let disks = disks.iter().map(|disk| full_path(disk)).collect::<Result<Vec<_>, _>>()?;
            let path = format!("/machines/{}/disks", escape(&name));
            (name, client.post(&path, &json!({ "disks": disks })).await?, wait)
        }
        MachineDiskVerb::Remove { name, disk, wait } => {
            let path = format!("/machines/{}/disks/{}", escape(&name), escape(&disk));
            (name, client.request(Method::DELETE, &path, None).await?, wait)
        }
        MachineDiskVerb::Resize(MachineArgs { name, wait }) => {
            let path = format!("/machines/{}/resize", escape(&name));
            (name, client.post(&path, &json!({})).await?, wait)
        }
    };
    let Some(result) = job::finish(client, started, &wait, output).await? else { return Ok(()) };
    if output.is_json() {
        return Ok(output.json(&result)?);
    }
    match result["disks"].as_array() {
        Some(disks) => {
            let row = |disk: &Value| vec![text(disk, "/path"), bytes_at(disk, "/bytes"), text(disk, "/attach/nbd")];
            output.table(&["DISK", "SIZE", "ADDRESS"], &disks.iter().map(row).collect::<Vec<_>>())?;
        }
        None => output.line(&format!("{name}: the disk is not protected any more"))?,
    }
    Ok(())
}

/// machine process-server.
pub async fn process_server(client: &Client, verb: ProcessServerOfVerb, output: &Output) -> Result<(), CliError> {
    let (started, wait) = match verb {
        ProcessServerOfVerb::Add { name, servers, wait } => {
            let path = format!("/machines/{}/process-servers", escape(&name));
            (client.post(&path, &json!({ "process_servers": servers })).await?, wait)
        }
        ProcessServerOfVerb::Remove { name, process_server, delete_replica, force, wait } => {
            let path = format!("/machines/{}/process-servers/{}", escape(&name), escape(&process_server));
            let path = format!("{path}?delete_replica={delete_replica}&force={force}");
            (client.request(Method::DELETE, &path, None).await?, wait)
        }
    };
    let Some(result) = job::finish(client, started, &wait, output).await? else { return Ok(()) };
    if output.is_json() {
        return Ok(output.json(&result)?);
    }
    let names: Vec<&str> =
        result["process_servers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    output.line(&format!("{} is replicated to {}", text(&result, "/machine"), names.join(", ")))?;
    if result["complete"] == false {
        output.line("not everyone could be told of it yet; that is done as soon as it is possible")?;
    }
    Ok(())
}

/// As the server must be told it: it is not where we are.
pub fn full_path(path: &Path) -> Result<String, CliError> {
    // The disk of a machine in a vCenter lies in no folder, and that of a Windows host in none of this system's.
    let is_elsewhere = |path: &str| path.starts_with("vsphere:") || is_full_path_of_windows(path);
    let full = match path.to_str().is_some_and(is_elsewhere) {
        true => path.to_owned(),
        false => std::path::absolute(path)
            .map_err(|error| CliError::new(format!("{path:?} is no path: {error}"), "name a file, or a folder"))?,
    };
    full.into_os_string().into_string().map_err(|path| {
        CliError::new(format!("the path {path:?} is not UTF-8"), "rename it, or name it by a link with a plain name")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_of_other_systems_are_named_as_they_are_there() {
        let full = |path: &str| full_path(path.as_ref()).unwrap();
        for path in
            [r"D:\Machines\web.vhdx", r"\\files\machines\web.vhdx", "vsphere:lab/DC0/vm/web/scsi0:0", "/dev/sdb"]
        {
            assert_eq!(full(path), path);
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(full("disk.img"), here.join("disk.img").to_str().unwrap());
    }
}
