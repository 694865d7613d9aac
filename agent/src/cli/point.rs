//! point …

use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};
use tidemark_proto::control::ImageFormat;
use tokio::signal::unix::{SignalKind, signal};

use super::args::{PointVerb, WaitArgs};
use super::output::{Output, bytes_at, text};
use super::protect::full_path;
use super::{CliError, job};
use crate::client::{Client, ClientError, escape};

/// A serve's lease is renewed several times before it ends.
const RENEW_EVERY: Duration = Duration::from_secs(10);

pub async fn run(client: &Client, verb: PointVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        PointVerb::Create { name, app_consistent, label, wait } => {
            let request = json!({ "app_consistent": app_consistent, "label": label });
            let started = client.post(&format!("/machines/{}/points", escape(&name)), &request).await?;
            let Some(point) = job::finish(client, started, &wait, output).await? else { return Ok(()) };
            print_points(&point, std::slice::from_ref(&point), output)
        }
        PointVerb::List { name } => {
            let points = client.get(&format!("/machines/{}/points", escape(&name))).await?;
            let rows = points.as_array().map(Vec::as_slice).unwrap_or_default();
            print_points(&points, rows, output)
        }
        PointVerb::Lock { name, point } => lock(client, Method::PUT, &name, &point, output).await,
        PointVerb::Unlock { name, point } => lock(client, Method::DELETE, &name, &point, output).await,
        PointVerb::Serve { name, point, writable, listen, process_server } => {
            let request = json!({ "writable": writable, "listen": listen, "process_server": process_server });
            serve(client, &name, &point, request, output).await
        }
        PointVerb::Export { name, point, to, format, process_server, wait } => {
            let format = format.unwrap_or_else(|| ImageFormat::of_name(&to));
            let request = json!({ "to": full_path(&to)?, "format": format, "process_server": process_server });
            let started = client.post(&format!("{}/export", at(&name, &point)), &request).await?;
            let Some(result) = job::finish(client, started, &wait, output).await? else { return Ok(()) };
            if output.is_json() {
                return Ok(output.json(&result)?);
            }
            let rows: Vec<Vec<String>> = result["files"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|file| vec![text(file, "/path"), bytes_at(file, "/bytes")])
                .collect();
            Ok(output.table(&["FILE", "SIZE"], &rows)?)
        }
        PointVerb::Verify { name, point, wait } => verify(client, &name, &point, &wait, output).await,
    }
}

fn at(name: &str, point: &str) -> String {
    format!("/machines/{}/points/{}", escape(name), escape(point))
}

fn print_points(whole: &Value, points: &[Value], output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(whole)?);
    }
    let held = |point: &Value| -> Vec<String> {
        let names = point["process_servers"].as_array().into_iter().flatten();
        names.filter_map(|name| Some(name.as_str()?.to_owned())).collect()
    };
    // Where there is one, it needs no column.
    let first = points.first().map(held).unwrap_or_default();
    let is_split = points.iter().any(|point| held(point) != first) || first.len() > 1;
    let rows: Vec<Vec<String>> = points
        .iter()
        .map(|point| {
            let flags: Vec<&str> = point["flags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let mut row = vec![
                text(point, "/id"),
                text(point, "/time"),
                text(point, "/consistency"),
                text(point, "/label"),
                bytes_at(point, "/change_bytes"),
                if point["locked"] == true { "locked" } else { "–" }.to_owned(),
                if flags.is_empty() { "–".to_owned() } else { flags.join(", ") },
            ];
            row.extend(is_split.then(|| held(point).join(", ")));
            row
        })
        .collect();
    let mut header = vec!["POINT", "TIME", "CONSISTENCY", "LABEL", "CHANGES", "LOCK", "FLAGS"];
    header.extend(is_split.then_some("PROCESS SERVERS"));
    Ok(output.table(&header, &rows)?)
}

async fn lock(client: &Client, method: Method, name: &str, point: &str, output: &Output) -> Result<(), CliError> {
    let point = client.request(method, &format!("{}/lock", at(name, point)), None).await?;
    print_points(&point, std::slice::from_ref(&point), output)
}

async fn verify(client: &Client, name: &str, point: &str, wait: &WaitArgs, output: &Output) -> Result<(), CliError> {
    let started = client.post(&format!("{}/verify", at(name, point)), &json!({})).await?;
    let Some(result) = job::finish(client, started, wait, output).await? else { return Ok(()) };
    let defects = result["defects"].as_array().map(Vec::as_slice).unwrap_or_default();
    if output.is_json() {
        output.json(&result)?;
    } else if defects.is_empty() {
        output.line(&format!("point {} is sound: {} checked", text(&result, "/point"), bytes_at(&result, "/bytes")))?;
    }
    if defects.is_empty() {
        return Ok(());
    }
    let all: Vec<&str> = defects.iter().filter_map(Value::as_str).collect();
    Err(CliError::new(
        format!("point {} is damaged: {}", text(&result, "/point"), all.join("; ")),
        "recover another point, and resync the machine so that later points are sound: `tidemark resync NAME`",
    ))
}

/// Serves until it is told to stop; renews the lease meanwhile.
async fn serve(client: &Client, name: &str, point: &str, request: Value, output: &Output) -> Result<(), CliError> {
    // Before the serve exists, so that no signal finds it without an end.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let serving = client.post(&format!("{}/serve", at(name, point)), &request).await?;
    let id = text(&serving, "/serve");
    let told = print_serving(&serving, output);
    let outcome = match told {
        Ok(()) => tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            error = renew(client, &id) => Err(error.into()),
        },
        Err(error) => Err(error),
    };
    match client.request(Method::DELETE, &format!("/serves/{id}"), None).await {
        // It ended by itself.
        Err(ClientError::Refused { status: 404, .. }) | Ok(_) => {}
        Err(error) if outcome.is_ok() => return Err(error.into()),
        Err(_) => {}
    }
    outcome
}

fn print_serving(serving: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(serving)?);
    }
    output.line(&format!(
        "serving point {} of {} until this is stopped (Ctrl-C)",
        text(serving, "/point"),
        text(serving, "/time")
    ))?;
    let rows: Vec<Vec<String>> = serving["disks"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|disk| {
            ["/nbd", "/nbds", "/file"]
                .into_iter()
                .filter_map(|address| disk.pointer(address)?.as_str())
                .map(|address| vec![text(disk, "/id"), address.to_owned()])
        })
        .collect();
    Ok(output.table(&["DISK", "ADDRESS"], &rows)?)
}

/// Returns when the lease cannot be renewed for good.
async fn renew(client: &Client, id: &str) -> ClientError {
    let mut ticks = tokio::time::interval(RENEW_EVERY);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        match client.post(&format!("/serves/{id}/renew"), &json!({})).await {
            Err(error @ ClientError::Refused { status: 404, .. }) => return error,
            // The configuration server may be away; the serve goes on without it.
            _ => continue,
        }
    }
}
