//! events, alert …

use std::str::FromStr;

use serde_json::Value;

use super::CliError;
use super::args::{AlertVerb, EventsArgs, Target};
use super::output::{Output, text};
use super::watch::Watch;
use crate::client::{Client, escape};

/// How long one poll of a watch waits.
const POLL_SECONDS: u64 = 30;

pub async fn run(target: &Target, args: EventsArgs, output: &Output) -> Result<(), CliError> {
    let mut filter = format!("limit={}", args.limit);
    if let Some(machine) = &args.machine {
        filter.push_str(&format!("&machine={}", escape(machine)));
    }
    if let Some(severity) = &args.severity {
        filter.push_str(&format!("&severity={}", escape(severity)));
    }
    if !args.watch {
        let after = args.after.map_or(String::new(), Seen::query);
        let found = target.client()?.get(&format!("/events?{filter}{after}")).await?;
        return if output.is_json() { Ok(output.json(&found)?) } else { table(&found, output) };
    }
    let mut watch = Watch::new(target)?;
    let mut seen = match args.after {
        Some(after) => after,
        // From now on: after the newest that there is.
        None => newest(&watch.get("/events?limit=1").await?).unwrap_or_default(),
    };
    let ended = super::run::ended()?;
    tokio::pin!(ended);
    loop {
        let path = format!("/events?{filter}{}&wait_seconds={POLL_SECONDS}", seen.query());
        let found = tokio::select! {
            found = watch.get(&path) => found?,
            () = &mut ended => return Ok(()),
        };
        for event in found.as_array().into_iter().flatten() {
            if output.is_json() { output.json(event)? } else { output.line(&line(event))? }
        }
        seen = newest(&found).unwrap_or(seen);
    }
}

/// Which event was seen last: its id, and the epoch that it is of. After a restore of the configuration ids begin again, in another epoch.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    epoch: Option<u64>,
    id: u64,
}

impl Seen {
    fn query(self) -> String {
        let epoch = self.epoch.map_or(String::new(), |epoch| format!("&epoch={epoch}"));
        format!("&after={}{epoch}", self.id)
    }
}

impl FromStr for Seen {
    type Err = String;

    /// `1234`, or `2.1234` with its epoch.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().map_err(|_| "give ID, or EPOCH.ID as `--json` shows both".to_owned());
        Ok(match text.split_once('.') {
            Some((epoch, id)) => Self { epoch: Some(number(epoch)?), id: number(id)? },
            None => Self { epoch: None, id: number(text)? },
        })
    }
}

fn newest(events: &Value) -> Option<Seen> {
    let last = events.as_array()?.last()?;
    Some(Seen { epoch: last["epoch"].as_u64(), id: last["id"].as_u64()? })
}

fn line(event: &Value) -> String {
    let machine = event["machine"].as_str().map_or(String::new(), |machine| format!(" [{machine}]"));
    let (time, severity, message) = (text(event, "/time"), text(event, "/severity"), text(event, "/message"));
    let by = if event["actor"].is_object() { format!(" (by {})", actor(event)) } else { String::new() };
    format!("{time}  {severity:<8}{machine} {message}{by}")
}

/// Who did it, and from where.
fn actor(event: &Value) -> String {
    match (event.pointer("/actor/user"), event.pointer("/actor/address")) {
        (Some(Value::String(user)), Some(Value::String(address))) => format!("{user} from {address}"),
        _ => text(event, "/actor/user"),
    }
}

fn table(events: &Value, output: &Output) -> Result<(), CliError> {
    let row = |event: &Value| {
        let columns = ["/id", "/time", "/severity", "/source", "/machine", "/kind"];
        let mut row = columns.map(|at| text(event, at)).to_vec();
        row.extend([actor(event), text(event, "/message")]);
        row
    };
    let rows: Vec<Vec<String>> = events.as_array().into_iter().flatten().map(row).collect();
    Ok(output.table(&["ID", "TIME", "SEVERITY", "SOURCE", "MACHINE", "KIND", "BY", "MESSAGE"], &rows)?)
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
