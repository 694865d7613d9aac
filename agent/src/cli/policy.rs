//! policy …

use hyper::Method;
use serde_json::{Map, Value, json};

use super::CliError;
use super::args::{PolicyArgs, PolicyVerb, parse_size};
use super::output::{Output, text};
use crate::client::{Client, escape};

pub async fn run(client: &Client, verb: PolicyVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        PolicyVerb::Create(args) => {
            let mut settings = settings(&args)?;
            settings.insert("name".to_owned(), json!(args.name));
            show(&client.post("/policies", &Value::Object(settings)).await?, output)
        }
        PolicyVerb::Set(args) => {
            let path = format!("/policies/{}", escape(&args.name));
            let settings = Value::Object(settings(&args)?);
            show(&client.request(Method::PATCH, &path, Some(&settings)).await?, output)
        }
        PolicyVerb::List => show(&client.get("/policies").await?, output),
        PolicyVerb::Show { name } => show(&client.get(&format!("/policies/{}", escape(&name))).await?, output),
        PolicyVerb::Delete { name } => {
            let answer = client.request(Method::DELETE, &format!("/policies/{}", escape(&name)), None).await?;
            if output.is_json() {
                return Ok(output.json(&answer)?);
            }
            output.line(&format!("policy {name} is deleted"))?;
            Ok(())
        }
    }
}

fn settings(args: &PolicyArgs) -> Result<Map<String, Value>, CliError> {
    let mut settings = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            settings.insert(name.to_owned(), value);
        }
    };
    set("frequency", args.frequency.as_ref().map(|value| json!(value)));
    set("any_time_seconds", args.any_time.map(|value| json!(value.as_secs())));
    set("retention_seconds", args.retention.map(|value| json!(value.as_secs())));
    set("retention_count", args.retention_count.map(|value| json!(value)));
    set("point_interval_seconds", args.point_interval.map(|value| json!(value.as_secs())));
    set("compression", args.compression.map(|value| json!(value)));
    set("log_limit_bytes", args.log_limit.map(|value| json!(value)));
    set("throttle_bytes_per_second", args.throttle.map(|value| json!(value)));
    set("app_point_interval_seconds", args.app_interval.map(|value| json!(value.as_secs())));
    set("alarm_rpo_seconds", args.alarm_rpo.map(|value| json!(value.as_secs())));
    set("alarm_log_percent", args.alarm_log.map(|value| json!(value)));
    set("alarm_no_contact_seconds", args.alarm_no_contact.map(|value| json!(value.as_secs())));
    let windows = args.throttle_window.iter().map(|text| window(text)).collect::<Result<Vec<_>, _>>()?;
    set("throttle_schedule", (!windows.is_empty()).then(|| json!(windows)));
    Ok(settings)
}

/// `1-5 08:00-18:00 10M`
fn window(text: &str) -> Result<Value, CliError> {
    let wrong = || {
        CliError::new(
            format!("{text:?} is no window of a throttle"),
            "write days (1 is Monday; may be left out), hours and a limit: `1-5 08:00-18:00 10M`, `22:00-06:00 none`",
        )
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let (days, hours, limit) = match words[..] {
        [hours, limit] => (Vec::new(), hours, limit),
        [days, hours, limit] => (days_of(days).ok_or_else(wrong)?, hours, limit),
        _ => return Err(wrong()),
    };
    let (from, to) = hours.split_once('-').ok_or_else(wrong)?;
    let limit = match limit {
        "none" => None,
        limit => Some(parse_size(limit).map_err(|_| wrong())?),
    };
    Ok(json!({ "days": days, "from": from, "to": to, "bytes_per_second": limit }))
}

fn days_of(text: &str) -> Option<Vec<u8>> {
    let mut days = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u8, u8) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > 7 {
            return None;
        }
        days.extend(first..=last);
    }
    Some(days)
}

fn show(policies: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(policies)?);
    }
    let list: Vec<&Value> = match policies {
        Value::Array(list) => list.iter().collect(),
        policy => vec![policy],
    };
    let columns = [
        "/name",
        "/frequency",
        "/any_time_seconds",
        "/retention_seconds",
        "/retention_count",
        "/point_interval_seconds",
        "/compression",
    ];
    let rows: Vec<Vec<String>> =
        list.into_iter().map(|policy| columns.map(|column| text(policy, column)).to_vec()).collect();
    let header = ["POLICY", "FREQUENCY", "ANY TIME (s)", "RETENTION (s)", "POINTS", "POINT EVERY (s)", "COMPRESSION"];
    Ok(output.table(&header, &rows)?)
}
