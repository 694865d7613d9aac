//! status.

use std::time::Duration;

use serde_json::Value;

use super::CliError;
use super::args::StatusArgs;
use super::output::{Output, bytes_at, text};
use crate::client::{Client, escape};

const WATCH_EVERY: Duration = Duration::from_secs(1);

pub async fn run(client: &Client, args: StatusArgs, output: &Output) -> Result<(), CliError> {
    let path = match &args.name {
        Some(name) => format!("/machines/{}", escape(name)),
        None => "/machines".to_owned(),
    };
    if !args.watch {
        return show(&client.get(&path).await?, output);
    }
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    loop {
        tokio::select! {
            _ = ticks.tick() => show(&client.get(&path).await?, output)?,
            _ = tokio::signal::ctrl_c() => return Ok(()),
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
                machine["rpo_seconds"].as_f64().map_or_else(|| "–".to_owned(), |seconds| format!("{seconds:.2} s")),
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

fn state(machine: &Value) -> String {
    match machine.pointer("/progress/fraction").and_then(Value::as_f64) {
        Some(fraction) => format!("{} {:.0} %", text(machine, "/state"), fraction * 100.0),
        None => text(machine, "/state"),
    }
}
