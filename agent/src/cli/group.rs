//! group …

use hyper::Method;
use serde_json::{Map, Value, json};

use super::args::{GroupSettings, GroupVerb, WaitArgs};
use super::output::{Output, text};
use super::{CliError, job};
use crate::client::{Client, escape};

pub async fn run(client: &Client, verb: GroupVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        GroupVerb::Create { name, machines, settings } => {
            let mut request = said(&settings);
            request.insert("name".to_owned(), json!(name));
            request.insert("machines".to_owned(), json!(machines));
            show(&client.post("/groups", &Value::Object(request)).await?, output)
        }
        GroupVerb::Set { name, settings } => {
            let path = format!("/groups/{}", escape(&name));
            show(&client.request(Method::PATCH, &path, Some(&Value::Object(said(&settings)))).await?, output)
        }
        GroupVerb::Add { name, machines } => members(client, Method::PUT, &name, &machines, output).await,
        GroupVerb::Remove { name, machines } => members(client, Method::DELETE, &name, &machines, output).await,
        GroupVerb::Point { name, label, wait } => point(client, &name, &label, &wait, output).await,
        GroupVerb::Points { name } => points(client, &name, output).await,
        GroupVerb::List => show(&client.get("/groups").await?, output),
        GroupVerb::Show { name } => show(&client.get(&format!("/groups/{}", escape(&name))).await?, output),
        GroupVerb::Delete { name } => {
            super::delete(
                client,
                &format!("/groups/{}", escape(&name)),
                &format!("group {name} is deleted; its machines stay protected"),
                output,
            )
            .await
        }
    }
}

fn said(settings: &GroupSettings) -> Map<String, Value> {
    let mut said = Map::new();
    if let Some(interval) = settings.interval {
        said.insert("interval_seconds".to_owned(), json!(interval.as_secs()));
    }
    if let Some(limit) = settings.hold_limit {
        said.insert("hold_limit_ms".to_owned(), json!(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)));
    }
    said
}

async fn point(client: &Client, name: &str, label: &str, wait: &WaitArgs, output: &Output) -> Result<(), CliError> {
    let path = format!("/groups/{}/points", escape(name));
    let started = client.post(&path, &json!({ "label": label })).await?;
    let Some(made) = job::finish(client, started, wait, output).await? else { return Ok(()) };
    if output.is_json() {
        return Ok(output.json(&made)?);
    }
    let missed: Vec<String> = made["missed"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|missed| format!("{}: {}", text(missed, "/host"), text(missed, "/reason")))
        .collect();
    let held = format!("{:.1} ms", made["held_seconds"].as_f64().unwrap_or_default() * 1e3);
    let one = if made["group_consistent"] == true { "yes" } else { "no" };
    let missed = if missed.is_empty() { "–".to_owned() } else { missed.join("; ") };
    let row = vec![text(&made, "/id"), text(&made, "/time"), one.to_owned(), held, missed];
    Ok(output.table(&["POINT", "TIME", "ONE INSTANT", "HELD", "MISSED BY"], &[row])?)
}

async fn points(client: &Client, name: &str, output: &Output) -> Result<(), CliError> {
    let points = client.get(&format!("/groups/{}/points", escape(name))).await?;
    if output.is_json() {
        return Ok(output.json(&points)?);
    }
    let row = |point: &Value| vec![text(point, "/id"), text(point, "/time"), text(point, "/label"), machines(point)];
    let rows: Vec<Vec<String>> = points.as_array().into_iter().flatten().map(row).collect();
    Ok(output.table(&["POINT", "TIME", "LABEL", "MACHINES"], &rows)?)
}

fn machines(of: &Value) -> String {
    let names: Vec<&str> = of["machines"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    names.join(", ")
}

/// One after another: those before one that is refused stay done.
async fn members(
    client: &Client,
    method: Method,
    name: &str,
    machines: &[String],
    output: &Output,
) -> Result<(), CliError> {
    let mut group = Value::Null;
    for machine in machines {
        let path = format!("/groups/{}/machines/{}", escape(name), escape(machine));
        group = client.request(method.clone(), &path, None).await?;
    }
    show(&group, output)
}

fn show(groups: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(groups)?);
    }
    let list: Vec<&Value> = match groups {
        Value::Array(list) => list.iter().collect(),
        group => vec![group],
    };
    let row = |group: &Value| {
        vec![text(group, "/name"), text(group, "/health"), text(group, "/interval_seconds"), machines(group)]
    };
    let rows: Vec<Vec<String>> = list.into_iter().map(row).collect();
    Ok(output.table(&["GROUP", "HEALTH", "POINTS EVERY S", "MACHINES"], &rows)?)
}
