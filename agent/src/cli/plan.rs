//! plan …

use hyper::Method;
use serde_json::{Value, json};
use tidemark_base::words::in_words;

use super::args::{PlanSteps, PlanVerb, WaitArgs};
use super::output::{Output, text};
use super::{CliError, job};
use crate::client::{Client, escape};

pub async fn run(client: &Client, verb: PlanVerb, output: &Output) -> Result<(), CliError> {
    let at = |name: &str, what: &str| format!("/plans/{}{what}", escape(name));
    match verb {
        PlanVerb::Create { name, steps } => {
            let request = json!({ "name": name, "steps": said(&steps)? });
            show(&client.post("/plans", &request).await?, output)
        }
        PlanVerb::Set { name, steps } => {
            let request = json!({ "steps": said(&steps)? });
            show(&client.request(Method::PUT, &at(&name, ""), Some(&request)).await?, output)
        }
        PlanVerb::List => list(&client.get("/plans").await?, output),
        PlanVerb::Show { name } => show(&client.get(&at(&name, "")).await?, output),
        PlanVerb::Run { name, unplanned, point, disks_only, dry_run, wait } => {
            let request =
                json!({ "unplanned": unplanned, "point": point, "disks_only": disks_only, "dry_run": dry_run });
            go(client, &at(&name, "/run"), &request, &wait, output).await
        }
        PlanVerb::Test { name, point, disks_only, wait } => {
            let request = json!({ "point": point, "disks_only": disks_only });
            go(client, &at(&name, "/test"), &request, &wait, output).await
        }
        PlanVerb::Continue { name, wait } => go(client, &at(&name, "/continue"), &json!({}), &wait, output).await,
        PlanVerb::Cancel { name, wait } => {
            let line = format!("plan {name} is taken back");
            simple(client, &at(&name, "/cancel"), &wait, &line, output).await
        }
        PlanVerb::Commit { name, wait } => {
            let line = format!("the machines of plan {name} are committed");
            simple(client, &at(&name, "/commit"), &wait, &line, output).await
        }
        PlanVerb::Confirm { name } => {
            let answer = client.post(&at(&name, "/confirm"), &json!({})).await?;
            super::done(&answer, &format!("plan {name} goes on"), output)
        }
        PlanVerb::Report { name } => report(&client.get(&at(&name, "/report")).await?, output),
        PlanVerb::Delete { name } => {
            super::delete(client, &at(&name, ""), &format!("plan {name} is deleted"), output).await
        }
    }
}

fn said(steps: &PlanSteps) -> Result<Value, CliError> {
    let Some(file) = &steps.file else {
        let all: Result<Vec<Value>, CliError> =
            steps.steps.iter().map(|text| step(text, steps.timeout.as_secs())).collect();
        return Ok(Value::Array(all?));
    };
    let read = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    let content = read.map_err(|error| {
        CliError::new(format!("cannot read {}: {error}", file.display()), "name a file with the steps of the plan")
    })?;
    let parsed: Value = serde_json::from_str(&content).map_err(|error| {
        CliError::new(
            format!("{} is no JSON: {}", file.display(), in_words("", &error.to_string())),
            "write it as `tidemark plan create --help` says",
        )
    })?;
    Ok(if parsed.is_array() { parsed } else { parsed["steps"].clone() })
}

/// `machines:web,db@10m`.
fn step(text: &str, timeout_seconds: u64) -> Result<Value, CliError> {
    let wrong = || {
        CliError::new(
            format!("{text:?} is no step of a plan"),
            "write machines:NAME,NAME, group:NAME, script:NAME or manual:TEXT, with @10m at its end for its time",
        )
    };
    let (kind, rest) = text.split_once(':').ok_or_else(wrong)?;
    let timed = rest.rsplit_once('@').and_then(|(rest, limit)| Some((rest, humantime::parse_duration(limit).ok()?)));
    let (rest, timeout_seconds) = timed.map_or((rest, timeout_seconds), |(rest, limit)| (rest, limit.as_secs()));
    let action = match kind {
        "machines" | "machine" => {
            json!({ "machines": rest.split(',').map(str::trim).filter(|name| !name.is_empty()).collect::<Vec<_>>() })
        }
        "group" | "script" | "manual" => json!({ kind: rest.trim() }),
        _ => return Err(wrong()),
    };
    Ok(json!({ "action": action, "timeout_seconds": timeout_seconds }))
}

/// What runs a plan ends with its report.
async fn go(client: &Client, path: &str, request: &Value, wait: &WaitArgs, output: &Output) -> Result<(), CliError> {
    let started = client.post(path, request).await?;
    let Some(result) = job::finish(client, started, wait, output).await? else { return Ok(()) };
    if result["dry_run"] == true { dry(&result, output) } else { report(&result, output) }
}

async fn simple(client: &Client, path: &str, wait: &WaitArgs, line: &str, output: &Output) -> Result<(), CliError> {
    let started = client.post(path, &json!({})).await?;
    let Some(result) = job::finish(client, started, wait, output).await? else { return Ok(()) };
    super::done(&result, line, output)
}

fn each(of: &Value) -> impl Iterator<Item = &Value> {
    of.as_array().into_iter().flatten()
}

fn dry(result: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(result)?);
    }
    let row = |check: &Value| {
        let details = &check["details"];
        let lost = details["lost_seconds"].as_f64().map(|seconds| format!("{seconds:.1} s"));
        let said = details.as_str().map(str::to_owned).unwrap_or_else(|| text(details, "/direction"));
        vec![text(check, "/step"), text(check, "/what"), said, lost.unwrap_or_else(|| "–".to_owned())]
    };
    let rows: Vec<Vec<String>> = each(&result["steps"]).map(row).collect();
    Ok(output.table(&["STEP", "WHAT", "HOW", "LOST"], &rows)?)
}

fn report(report: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(report)?);
    }
    let seconds = |of: &Value| of.as_f64().map_or_else(|| "–".to_owned(), |seconds| format!("{seconds:.2} s"));
    output.line(&format!(
        "plan {} ({}): {} after {}",
        text(report, "/plan"),
        text(report, "/kind"),
        text(report, "/state"),
        seconds(&report["seconds"])
    ))?;
    let step = |of: &Value| {
        vec![text(of, "/step"), text(of, "/action"), text(of, "/state"), seconds(&of["seconds"]), text(of, "/reason")]
    };
    let rows: Vec<Vec<String>> = each(&report["steps"]).map(step).collect();
    output.table(&["STEP", "WHAT", "STATE", "TOOK", "REASON"], &rows)?;
    let machine = |of: &Value| {
        let state = text(of, "/state");
        vec![
            text(of, "/machine"),
            text(of, "/step"),
            state,
            seconds(&of["rto_seconds"]),
            seconds(&of["lost_seconds"]),
            text(of, "/time"),
        ]
    };
    let rows: Vec<Vec<String>> = each(&report["machines"]).map(machine).collect();
    Ok(output.table(&["MACHINE", "STEP", "STATE", "RTO", "LOST", "POINT OF"], &rows)?)
}

fn list(plans: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(plans)?);
    }
    let row = |plan: &Value| {
        let steps = plan["steps"].as_array().map_or(0, Vec::len).to_string();
        vec![text(plan, "/name"), steps, text(plan, "/run/state"), text(plan, "/run/began")]
    };
    let rows: Vec<Vec<String>> = each(plans).map(row).collect();
    Ok(output.table(&["PLAN", "STEPS", "LAST RUN", "BEGAN"], &rows)?)
}

fn show(plan: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(plan)?);
    }
    output.line(&format!("plan {}", text(plan, "/name")))?;
    let ran: Vec<&Value> = each(&plan["run"]["steps"]).collect();
    let row = |(index, step): (usize, &Value)| {
        let action = step["action"].as_object().and_then(|action| action.iter().next());
        let what = action.map_or_else(String::new, |(kind, value)| match value {
            Value::String(text) => format!("{kind} {text}"),
            list => format!("{kind} {}", each(list).filter_map(Value::as_str).collect::<Vec<_>>().join(", ")),
        });
        let state = ran.get(index).map_or_else(|| "–".to_owned(), |run| text(run, "/state"));
        vec![(index + 1).to_string(), what, format!("{} s", text(step, "/timeout_seconds")), state]
    };
    let rows: Vec<Vec<String>> = each(&plan["steps"]).enumerate().map(row).collect();
    output.table(&["STEP", "WHAT", "AT MOST", "LAST RUN"], &rows)?;
    if plan["run"].is_object() {
        output.line(&format!(
            "last run: {} ({}), began {}",
            text(plan, "/run/state"),
            text(plan, "/run/kind"),
            text(plan, "/run/began")
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_written_in_one_word() {
        let of = |text: &str| step(text, 7).unwrap();
        assert_eq!(of("machines:web,db"), json!({ "action": { "machines": ["web", "db"] }, "timeout_seconds": 7 }));
        assert_eq!(of("group:shop@10m"), json!({ "action": { "group": "shop" }, "timeout_seconds": 600 }));
        assert_eq!(of("script:dns-switch"), json!({ "action": { "script": "dns-switch" }, "timeout_seconds": 7 }));
        let manual = of("manual:write to ops@example.org");
        assert_eq!(manual, json!({ "action": { "manual": "write to ops@example.org" }, "timeout_seconds": 7 }));
        for wrong in ["web", "disks:web", ""] {
            assert!(step(wrong, 7).is_err(), "{wrong}");
        }
    }
}
