//! group …

use hyper::Method;
use serde_json::{Value, json};

use super::CliError;
use super::args::GroupVerb;
use super::output::{Output, text};
use crate::client::{Client, escape};

pub async fn run(client: &Client, verb: GroupVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        GroupVerb::Create { name, machines } => {
            show(&client.post("/groups", &json!({ "name": name, "machines": machines })).await?, output)
        }
        GroupVerb::Add { name, machines } => members(client, Method::PUT, &name, &machines, output).await,
        GroupVerb::Remove { name, machines } => members(client, Method::DELETE, &name, &machines, output).await,
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
        let names: Vec<&str> = group["machines"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        vec![text(group, "/name"), text(group, "/health"), names.join(", ")]
    };
    let rows: Vec<Vec<String>> = list.into_iter().map(row).collect();
    Ok(output.table(&["GROUP", "HEALTH", "MACHINES"], &rows)?)
}
