//! Jobs: waiting for them, and looking at them.

use serde_json::{Value, json};

use super::CliError;
use super::args::{JobVerb, Target, WaitArgs};
use super::output::{Output, text};
use super::watch::Watch;
use crate::client::{Client, ClientError, escape};

/// Waits for a job that was just started and gives its result; `None` when nobody wants to wait.
pub async fn finish(client: &Client, job: Value, wait: &WaitArgs, output: &Output) -> Result<Option<Value>, CliError> {
    if wait.no_wait {
        let id = text(&job, "/id");
        if output.is_json() {
            output.json(&json!({ "job": id }))?
        } else {
            output.line(&id)?
        }
        return Ok(None);
    }
    Ok(Some(watch(client, job, output).await?))
}

pub async fn run(target: &Target, verb: JobVerb, output: &Output) -> Result<(), CliError> {
    let client = &target.client()?;
    match verb {
        JobVerb::List { machine, state, limit } => {
            let machine = machine.map(|name| format!("machine={}", escape(&name)));
            let state = state.map(|state| format!("state={state}"));
            let limit = limit.map(|limit| format!("limit={limit}"));
            let asked: Vec<String> = [machine, state, limit].into_iter().flatten().collect();
            let jobs = client.get(&format!("/jobs?{}", asked.join("&"))).await?;
            if output.is_json() {
                return Ok(output.json(&jobs)?);
            }
            let rows: Vec<Vec<String>> = jobs
                .as_array()
                .into_iter()
                .flatten()
                .map(|job| {
                    let [id, machine, state, started, finished] =
                        ["/id", "/machine", "/state", "/started", "/finished"].map(|at| text(job, at));
                    vec![id, kind(job), machine, state, started, finished]
                })
                .collect();
            Ok(output.table(&["ID", "KIND", "MACHINE", "STATE", "STARTED", "FINISHED"], &rows)?)
        }
        JobVerb::Show { id } => show(&client.get(&format!("/jobs/{}", escape(&id))).await?, output),
        JobVerb::Cancel { id } => {
            let job = client.post(&format!("/jobs/{}/cancel", escape(&id)), &json!({})).await?;
            show(&job, output)
        }
        JobVerb::Watch { id } => {
            let mut watching = Watch::new(target)?;
            let path = format!("/jobs/{}", escape(&id));
            let mut job = watching.get(&path).await?;
            // A restart in between ends no watch: the job is there afterwards, and says how it ended.
            let outcome = loop {
                match watch(watching.client(), job, output).await {
                    Err(error @ (ClientError::Unreachable { .. } | ClientError::Refused { status: 500.., .. })) => {
                        watching.wait(error).await?;
                        job = watching.get(&path).await?;
                    }
                    outcome => break outcome,
                }
            };
            show(&watching.get(&path).await?, output)?;
            outcome?;
            Ok(())
        }
    }
}

/// To its end: with `--json` one document at the end, for people a bar until then.
async fn watch(client: &Client, job: Value, output: &Output) -> Result<Value, ClientError> {
    let mut bar = output.bar();
    client.watch(job, |job| bar.draw(job)).await
}

/// One that only looks whether something could be done says so.
fn kind(job: &Value) -> String {
    let kind = text(job, "/kind");
    if job["check"] == true { format!("{kind} (check only)") } else { kind }
}

fn show(job: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(job)?);
    }
    output.line(&format!("{} {} {}: {}", text(job, "/id"), kind(job), text(job, "/machine"), text(job, "/state")))?;
    for step in job["steps"].as_array().into_iter().flatten() {
        let done = if step["finished"].is_null() { "not done" } else { "done" };
        output.line(&format!("  {}  {} ({done})", text(step, "/started"), text(step, "/name")))?;
    }
    if !job["failure"].is_null() {
        output.line(&format!("  failed: {}", text(job, "/failure/error")))?;
        output.line(&format!("  help: {}", text(job, "/failure/help")))?;
    }
    Ok(())
}
