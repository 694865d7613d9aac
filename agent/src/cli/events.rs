//! events, alert …

use serde_json::Value;

use super::CliError;
use super::args::{AlertVerb, EventsArgs};
use super::output::{Output, text};
use crate::client::{Client, escape};

/// How long one poll of a watch waits.
const POLL_SECONDS: u64 = 30;

pub async fn run(client: &Client, args: EventsArgs, output: &Output) -> Result<(), CliError> {
    let mut filter = format!("limit={}", args.limit);
    if let Some(machine) = &args.machine {
        filter.push_str(&format!("&machine={}", escape(machine)));
    }
    if let Some(severity) = &args.severity {
        filter.push_str(&format!("&severity={}", escape(severity)));
    }
    if !args.watch {
        let after = args.after.map_or(String::new(), |after| format!("&after={after}"));
        let found = client.get(&format!("/events?{filter}{after}")).await?;
        return if output.is_json() { Ok(output.json(&found)?) } else { table(&found, output) };
    }
    let mut after = match args.after {
        Some(after) => after,
        // From now on: after the newest that there is.
        None => newest(&client.get("/events?limit=1").await?).unwrap_or(0),
    };
    let ended = super::run::ended()?;
    tokio::pin!(ended);
    loop {
        let path = format!("/events?{filter}&after={after}&wait_seconds={POLL_SECONDS}");
        let found = tokio::select! {
            found = client.get(&path) => found?,
            () = &mut ended => return Ok(()),
        };
        for event in found.as_array().into_iter().flatten() {
            if output.is_json() { output.json(event)? } else { output.line(&line(event))? }
        }
        after = newest(&found).unwrap_or(after);
    }
}

fn newest(events: &Value) -> Option<u64> {
    events.as_array()?.last()?["id"].as_u64()
}

fn line(event: &Value) -> String {
    let machine = event["machine"].as_str().map_or(String::new(), |machine| format!(" [{machine}]"));
    let (time, severity, message) = (text(event, "/time"), text(event, "/severity"), text(event, "/message"));
    format!("{time}  {severity:<8}{machine} {message}")
}

fn table(events: &Value, output: &Output) -> Result<(), CliError> {
    let columns = ["/id", "/time", "/severity", "/source", "/machine", "/kind", "/message"];
    let rows: Vec<Vec<String>> =
        events.as_array().into_iter().flatten().map(|event| columns.map(|at| text(event, at)).to_vec()).collect();
    Ok(output.table(&["ID", "TIME", "SEVERITY", "SOURCE", "MACHINE", "KIND", "MESSAGE"], &rows)?)
}

pub async fn alert(client: &Client, verb: AlertVerb, output: &Output) -> Result<(), CliError> {
    let AlertVerb::List = verb;
    let alerts = client.get("/alerts").await?;
    if output.is_json() {
        return Ok(output.json(&alerts)?);
    }
    let list = alerts.as_array().map(Vec::as_slice).unwrap_or_default();
    if list.is_empty() {
        output.line("nothing needs anyone")?;
        return Ok(());
    }
    let of = |alert: &Value| match alert["machines"].as_array().map_or(0, Vec::len) {
        0 | 1 => text(alert, "/machine"),
        several => format!("{several} machines"),
    };
    let row = |alert: &Value| {
        let [severity, since, kind, message] = ["/severity", "/since", "/kind", "/message"].map(|at| text(alert, at));
        vec![severity, of(alert), since, kind, message]
    };
    let rows: Vec<Vec<String>> = list.iter().map(row).collect();
    output.table(&["SEVERITY", "MACHINE", "SINCE", "KIND", "MESSAGE"], &rows)?;
    for alert in list.iter().filter(|alert| !text(alert, "/help").eq("–")) {
        output.line(&format!("{}: {}", text(alert, "/message"), text(alert, "/help")))?;
    }
    Ok(())
}
