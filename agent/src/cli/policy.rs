//! policy …

use hyper::Method;
use serde_json::{Map, Value, json};

use super::CliError;
use super::args::{PolicyArgs, PolicyVerb, parse_size};
use super::output::Output;
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
            super::delete(client, &format!("/policies/{}", escape(&name)), &format!("policy {name} is deleted"), output)
                .await
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
    set("retention_seconds", args.retention.map(|limit| json!(limit.0.map(|value| value.as_secs()))));
    set("retention_count", args.retention_count.map(|limit| json!(limit.0)));
    set("point_interval_seconds", args.point_interval.map(|value| json!(value.as_secs())));
    set("retention_grid", args.grid.as_deref().map(grid).transpose()?);
    let compression = |text: &String| text.parse::<i32>().map_or_else(|_| json!(text), |level| json!(level));
    set("compression", args.compression.as_ref().map(compression));
    set("log_limit_bytes", args.log_limit.map(|limit| json!(limit.0)));
    set("throttle_bytes_per_second", args.throttle.map(|limit| json!(limit.0)));
    set("app_point_interval_seconds", args.app_interval.map(|value| json!(value.as_secs())));
    set("alarm_rpo_seconds", args.alarm_rpo.map(|value| json!(value.as_secs())));
    set("alarm_log_percent", args.alarm_log.map(|value| json!(value)));
    set("alarm_missed_percent", args.alarm_missed.map(|value| json!(value)));
    set("encryption", args.encryption.map(|value| json!(value.name())));
    set("alarm_no_contact_seconds", args.alarm_no_contact.map(|value| json!(value.as_secs())));
    let is_none = args.throttle_window == ["none"];
    let windows = args.throttle_window.iter().filter(|_| !is_none).map(|text| window(text));
    let windows = windows.collect::<Result<Vec<_>, _>>()?;
    set("throttle_schedule", (is_none || !windows.is_empty()).then(|| json!(windows)));
    Ok(settings)
}

/// `2h:all,1day:1h,7days:2h,rest:4h`; `all`: no grid.
fn grid(text: &str) -> Result<Value, CliError> {
    let wrong = || {
        CliError::new(
            format!("{text:?} is no grid of a retention"),
            "write ages and of which interval one point stays: `2h:all,1day:1h,7days:2h,rest:4h`; `all` keeps all",
        )
    };
    if text == "all" {
        return Ok(json!([]));
    }
    let seconds = |text: &str| humantime::parse_duration(text).map(|duration| duration.as_secs()).map_err(|_| wrong());
    let step = |step: &str| {
        let (within, every) = step.split_once(':').ok_or_else(wrong)?;
        let within = if within == "rest" { None } else { Some(seconds(within)?) };
        let every = if every == "all" { 0 } else { seconds(every)? };
        Ok(json!({ "within_seconds": within, "every_seconds": every }))
    };
    text.split(',').map(|text| step(text.trim())).collect::<Result<Vec<Value>, CliError>>().map(Value::Array)
}

/// `1-5 08:00-18:00 10.1.0.0/16 10M`
fn window(text: &str) -> Result<Value, CliError> {
    let wrong = || {
        CliError::new(
            format!("{text:?} is no window of a throttle"),
            "write days (1 is Monday), hours and a range of addresses, each where it matters, and a limit: \
             `1-5 08:00-18:00 10M`, `22:00-06:00 none`, `10.1.0.0/16 5M`",
        )
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let (limit, when) = words.split_last().ok_or_else(wrong)?;
    let limit = match *limit {
        "none" => None,
        limit => Some(parse_size(limit).map_err(|_| wrong())?),
    };
    if when.is_empty() {
        return Err(wrong());
    }
    let mut window = json!({ "bytes_per_second": limit });
    for word in when {
        let (name, value) = if word.contains('/') {
            ("network", json!(word))
        } else if word.contains(':') {
            let (from, to) = word.split_once('-').ok_or_else(wrong)?;
            window["from"] = json!(from);
            ("to", json!(to))
        } else {
            ("days", json!(days_of(word).ok_or_else(wrong)?))
        };
        if window.get(name).is_some() {
            return Err(wrong());
        }
        window[name] = value;
    }
    Ok(window)
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
    let Value::Array(list) = policies else {
        let settings = policies.as_object().into_iter().flatten();
        let rows: Vec<Vec<String>> = settings.map(|(name, value)| in_words(name, value).to_vec()).collect();
        return Ok(output.table(&["SETTING", ""], &rows)?);
    };
    let columns = [
        "name",
        "frequency",
        "any_time_seconds",
        "retention_seconds",
        "retention_count",
        "point_interval_seconds",
        "compression",
    ];
    let row = |policy: &Value| columns.map(|name| in_words(name, &policy[name])[1].clone()).to_vec();
    let rows: Vec<Vec<String>> = list.iter().map(row).collect();
    let header = ["POLICY", "FREQUENCY", "ANY TIME", "RETENTION", "POINTS", "POINT EVERY", "COMPRESSION"];
    Ok(output.table(&header, &rows)?)
}

/// A setting as people write it, its unit included.
fn in_words(name: &str, value: &Value) -> [String; 2] {
    let short = |unit: &str| name.strip_suffix(unit).unwrap_or(name).to_owned();
    let duration = |seconds: u64| humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string();
    match (name, value) {
        ("retention_grid", Value::Array(steps)) => {
            let step = |step: &Value| {
                let within = step["within_seconds"].as_u64().map_or("rest".to_owned(), duration);
                let every = step["every_seconds"].as_u64().filter(|every| *every > 0);
                format!("{within}:{}", every.map_or("all".to_owned(), duration))
            };
            let steps: Vec<String> = steps.iter().map(step).collect();
            [name.to_owned(), if steps.is_empty() { "all".to_owned() } else { steps.join(",") }]
        }
        ("throttle_schedule", Value::Array(windows)) => {
            let windows: Vec<String> = windows.iter().map(window_in_words).collect();
            [name.to_owned(), if windows.is_empty() { "–".to_owned() } else { windows.join(", ") }]
        }
        (_, Value::Number(seconds)) if name.ends_with("_seconds") => {
            [short("_seconds"), seconds.as_u64().map_or_else(|| seconds.to_string(), duration)]
        }
        (_, Value::Number(size)) if name.contains("_bytes") => {
            [name.to_owned(), size.as_u64().map_or_else(|| size.to_string(), super::output::bytes)]
        }
        (_, Value::Number(percent)) if name.ends_with("_percent") => [short("_percent"), format!("{percent} %")],
        (_, Value::Null) => [name.to_owned(), "–".to_owned()],
        (_, Value::String(text)) => [name.to_owned(), text.clone()],
        _ => [name.to_owned(), value.to_string()],
    }
}

/// As `--throttle-window` takes it, the limit with its unit.
fn window_in_words(window: &Value) -> String {
    let text = |name: &str| window[name].as_str().map(str::to_owned);
    let days = window["days"].as_array().filter(|days| !days.is_empty());
    let days = days.map(|days| days.iter().map(Value::to_string).collect::<Vec<_>>().join(","));
    let hours = text("from").zip(text("to")).map(|(from, to)| format!("{from}-{to}"));
    let hours = hours.filter(|hours| hours != "00:00-24:00");
    let limit = window["bytes_per_second"].as_u64();
    let limit = limit.map_or("none".to_owned(), |limit| format!("{}/s", super::output::bytes(limit)));
    [days, hours, text("network"), Some(limit)].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_are_written_in_words() {
        let steps = grid("2h:all, 1day:1h,rest:4h").unwrap();
        let expected = json!([
            { "within_seconds": 7200, "every_seconds": 0 },
            { "within_seconds": 86400, "every_seconds": 3600 },
            { "within_seconds": null, "every_seconds": 14400 },
        ]);
        assert_eq!((steps, grid("all").unwrap()), (expected, json!([])));
        for wrong in ["", "2h", "2h:1h:1h", "x:1h", "2h:x", "2h:1h,"] {
            assert!(grid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_are_shown_in_words() {
        let grid =
            json!([{ "within_seconds": 7200, "every_seconds": 0 }, { "within_seconds": null, "every_seconds": 14400 }]);
        for (name, value, expected) in [
            ("retention_grid", grid, ["retention_grid", "2h:all,rest:4h"]),
            ("retention_grid", json!([]), ["retention_grid", "all"]),
            ("retention_seconds", json!(86400), ["retention", "1day"]),
            ("log_limit_bytes", json!(10 << 20), ["log_limit_bytes", "10.0 MiB"]),
            ("alarm_log_percent", json!(80), ["alarm_log", "80 %"]),
            ("retention_count", json!(null), ["retention_count", "–"]),
            (
                "throttle_schedule",
                json!([{ "days": [1, 2], "from": "08:00", "to": "18:00", "network": null, "bytes_per_second": 10 << 20 },
                    { "days": [], "from": "00:00", "to": "24:00", "network": "10.0.0.0/8", "bytes_per_second": null }]),
                ["throttle_schedule", "1,2 08:00-18:00 10.0 MiB/s, 10.0.0.0/8 none"],
            ),
        ] {
            assert_eq!(in_words(name, &value), expected, "{name}");
        }
    }

    #[test]
    fn windows_are_written_in_words() {
        for (text, expected) in [
            (
                "1-5 08:00-18:00 10M",
                json!({"days": [1,2,3,4,5], "from": "08:00", "to": "18:00", "bytes_per_second": 10 << 20}),
            ),
            ("22:00-06:00 none", json!({"from": "22:00", "to": "06:00", "bytes_per_second": null})),
            ("10.1.0.0/16 5K", json!({"network": "10.1.0.0/16", "bytes_per_second": 5120})),
            ("6,7 fd00::/8 1", json!({"days": [6, 7], "network": "fd00::/8", "bytes_per_second": 1})),
        ] {
            assert_eq!(window(text).unwrap(), expected, "{text}");
        }
        for wrong in ["", "10M", "1-5 5M x", "08:00 5M", "1-9 5M", "10.0.0.0/8 10.0.0.0/9 5M"] {
            assert!(window(wrong).is_err(), "{wrong}");
        }
    }
}
