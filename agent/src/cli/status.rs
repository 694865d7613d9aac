//! status.

use std::time::Duration;

use serde_json::Value;

use super::CliError;
use super::args::{StatusArgs, Target};
use super::output::{Output, bytes_at, text};
use super::watch::Watch;
use crate::client::escape;

const WATCH_EVERY: Duration = Duration::from_secs(1);

pub async fn run(target: &Target, args: StatusArgs, output: &Output) -> Result<(), CliError> {
    let path = match &args.name {
        Some(name) => format!("/machines/{}", escape(name)),
        None => "/machines".to_owned(),
    };
    if !args.watch {
        return show(&target.client()?.get(&path).await?, output);
    }
    let mut watch = Watch::new(target)?;
    let ended = super::run::ended()?;
    tokio::pin!(ended);
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    loop {
        let looking = async {
            ticks.tick().await;
            watch.get(&path).await
        };
        tokio::select! {
            status = looking => show(&status?, output)?,
            () = &mut ended => return Ok(()),
        }
    }
}

fn show(status: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(status)?);
    }
    let machines: Vec<&Value> = match status {
        Value::Array(machines) => machines.iter().collect(),
        machine => vec![machine],
    };
    if machines.is_empty() {
        output.line("no machine is protected")?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> = machines
        .iter()
        .map(|machine| {
            vec![
                text(machine, "/name"),
                state(machine),
                text(machine, "/health"),
                text(machine, "/mode"),
                rpo(machine),
                bytes_at(machine, "/pending_bytes"),
                bytes_at(machine, "/written_bytes"),
                bytes_at(machine, "/sent_bytes"),
                text(machine, "/points"),
                text(machine, "/last_point/time"),
            ]
        })
        .collect();
    let header = ["MACHINE", "STATE", "HEALTH", "MODE", "RPO", "WAITING", "WRITTEN", "SENT", "POINTS", "LAST POINT"];
    output.table(&header, &rows)?;
    for machine in machines {
        show_servers(machine, output)?;
        if machine.pointer("/compare/left_bytes").and_then(Value::as_u64).is_some_and(|left| left > 0) {
            output.line(&format!(
                "{}: {} compared with the replica, {} differ, {} left to compare",
                text(machine, "/name"),
                bytes_at(machine, "/compare/compared_bytes"),
                bytes_at(machine, "/compare/differing_bytes"),
                bytes_at(machine, "/compare/left_bytes"),
            ))?;
        }
        for problem in machine["problems"].as_array().into_iter().flatten() {
            output.line(&format!("{}: {}", text(machine, "/name"), text(problem, "/problem")))?;
            output.line(&format!("  help: {}", text(problem, "/help")))?;
        }
    }
    Ok(())
}

/// Where there are several: how the machine does at each.
fn show_servers(machine: &Value, output: &Output) -> Result<(), CliError> {
    let servers = machine["process_servers"].as_array().map(Vec::as_slice).unwrap_or_default();
    if servers.len() < 2 {
        return Ok(());
    }
    let row = |server: &Value| {
        vec![
            text(server, "/name"),
            state(server),
            text(server, "/mode"),
            rpo(server),
            bytes_at(server, "/pending_bytes"),
            bytes_at(server, "/sent_bytes"),
            text(server, "/points"),
            text(server, "/last_point/time"),
        ]
    };
    output.line(&format!("{}:", text(machine, "/name")))?;
    let rows: Vec<Vec<String>> = servers.iter().map(row).collect();
    output.table(&["PROCESS SERVER", "STATE", "MODE", "RPO", "WAITING", "SENT", "POINTS", "LAST POINT"], &rows)?;
    for server in servers.iter().filter(|server| server["mode_reason"].is_string()) {
        output.line(&format!("  {}: {}", text(server, "/name"), text(server, "/mode_reason")))?;
    }
    Ok(())
}

fn rpo(of: &Value) -> String {
    of["rpo_seconds"].as_f64().map_or_else(|| "–".to_owned(), |seconds| format!("{seconds:.2} s"))
}

fn state(machine: &Value) -> String {
    match machine.pointer("/progress/fraction").and_then(Value::as_f64) {
        Some(fraction) => format!("{} {:.0} %", text(machine, "/state"), fraction * 100.0),
        None => text(machine, "/state"),
    }
}
