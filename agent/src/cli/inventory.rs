//! host …, disk …, and process-server list and show.

use serde_json::Value;

use super::CliError;
use super::args::{DiskVerb, HostVerb};
use super::output::{Output, bytes_at, text};
use crate::client::{Client, escape};

pub async fn host(client: &Client, verb: HostVerb, output: &Output) -> Result<(), CliError> {
    let host = match verb {
        HostVerb::Show { host } => host,
        HostVerb::Delete { host } => {
            let (path, line) = (format!("/hosts/{}", escape(&host)), format!("host {host} is deleted"));
            return super::delete(client, &path, &line, output).await;
        }
        HostVerb::List => {
            let hosts = client.get("/hosts").await?;
            return if output.is_json() { Ok(output.json(&hosts)?) } else { show_hosts(&rows(&hosts), output) };
        }
    };
    let shown = client.get(&format!("/hosts/{}", escape(&host))).await?;
    if output.is_json() {
        return Ok(output.json(&shown)?);
    }
    show_hosts(&[&shown], output)?;
    let disks = rows(&shown["inventory"]);
    if !disks.is_empty() {
        output.line("")?;
        show_disks(&disks, output)?;
    }
    if shown["disks_told"].is_null() {
        output.line("\nits agent has not told of its disks yet; those that are protected are known all the same")?;
    }
    Ok(())
}

pub async fn disk(client: &Client, verb: DiskVerb, output: &Output) -> Result<(), CliError> {
    let DiskVerb::List { host, unprotected } = verb;
    let mut path = format!("/disks?unprotected={unprotected}");
    if let Some(host) = host {
        path.push_str(&format!("&host={}", escape(&host)));
    }
    let disks = client.get(&path).await?;
    if output.is_json() {
        return Ok(output.json(&disks)?);
    }
    let disks = rows(&disks);
    if disks.is_empty() {
        return Ok(output.line("no such disk is known")?);
    }
    show_disks(&disks, output)
}

pub async fn servers(client: &Client, wanted: Option<&str>, output: &Output) -> Result<(), CliError> {
    let path = wanted.map_or_else(|| "/process-servers".to_owned(), |one| format!("/process-servers/{}", escape(one)));
    let servers = client.get(&path).await?;
    if output.is_json() {
        return Ok(output.json(&servers)?);
    }
    let rows: Vec<Vec<String>> = rows(&servers)
        .into_iter()
        .map(|server| {
            vec![
                text(server, "/name"),
                text(server, "/approval"),
                contact(server),
                text(server, "/address"),
                text(server, "/version"),
                bytes_at(server, "/volume/free_bytes"),
                bytes_at(server, "/volume/bytes"),
                words(&server["machines"]),
                text(server, "/id"),
            ]
        })
        .collect();
    let header = ["PROCESS SERVER", "APPROVAL", "CONTACT", "ADDRESS", "VERSION", "FREE", "VOLUME", "MACHINES", "ID"];
    Ok(output.table(&header, &rows)?)
}

fn rows(answer: &Value) -> Vec<&Value> {
    match answer {
        Value::Array(rows) => rows.iter().collect(),
        row => vec![row],
    }
}

fn show_hosts(hosts: &[&Value], output: &Output) -> Result<(), CliError> {
    let row = |host: &&Value| {
        vec![
            text(host, "/name"),
            text(host, "/approval"),
            contact(host),
            text(host, "/version"),
            text(host, "/disks"),
            text(host, "/unprotected_disks"),
            words(&host["machines"]),
            text(host, "/id"),
        ]
    };
    let rows: Vec<Vec<String>> = hosts.iter().map(row).collect();
    let header = ["HOST", "APPROVAL", "CONTACT", "VERSION", "DISKS", "UNPROTECTED", "MACHINES", "ID"];
    Ok(output.table(&header, &rows)?)
}

fn show_disks(disks: &[&Value], output: &Output) -> Result<(), CliError> {
    let row = |disk: &&Value| {
        vec![
            text(disk, "/host"),
            text(disk, "/path"),
            bytes_at(disk, "/bytes"),
            text(disk, "/kind"),
            text(disk, "/content"),
            uses(disk),
            text(disk, "/machine"),
            ways(disk),
        ]
    };
    let rows: Vec<Vec<String>> = disks.iter().map(row).collect();
    Ok(output.table(&["HOST", "DISK", "SIZE", "KIND", "HOLDS", "USED BY", "MACHINE", "VIA"], &rows)?)
}

/// Since when it is there, or when it was heard of last.
fn contact(of: &Value) -> String {
    match of["connected"].as_bool() {
        Some(true) => format!("since {}", text(of, "/since")),
        _ if of["last_seen"].is_string() => format!("gone, seen {}", text(of, "/last_seen")),
        _ => "never".to_owned(),
    }
}

fn uses(disk: &Value) -> String {
    let word = |of: &Value| match (of["kind"].as_str().unwrap_or_default(), of["at"].as_str().unwrap_or_default()) {
        (kind, "") => kind.to_owned(),
        (_, at) => at.to_owned(),
    };
    let used: Vec<String> = disk["uses"].as_array().into_iter().flatten().map(word).collect();
    dash(used.join(", "))
}

/// How it is captured, or how it could be.
fn ways(disk: &Value) -> String {
    if disk["via"].is_string() {
        return text(disk, "/via");
    }
    let ways = disk["ways"].as_array().into_iter().flatten().filter(|way| way["possible"] == true);
    let possible: Vec<&str> = ways.filter_map(|way| way["via"].as_str()).collect();
    if possible.is_empty() { "–".to_owned() } else { format!("possible: {}", possible.join(", ")) }
}

fn words(list: &Value) -> String {
    dash(list.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(", "))
}

fn dash(text: String) -> String {
    if text.is_empty() { "–".to_owned() } else { text }
}
