//! reprotect …, failback …

use serde_json::{Value, json};

use super::CliError;
use super::args::{FailbackArgs, FailbackVerb, ReprotectArgs, ReprotectVerb};
use super::failover::{finish, seconds};
use super::output::{Output, bytes_at, text};
use crate::client::Client;

pub async fn reprotect(client: &Client, args: ReprotectArgs, output: &Output) -> Result<(), CliError> {
    if let Some(ReprotectVerb::Cancel(args)) = args.verb {
        let cancelled = finish(client, &args.name, "reprotect/cancel", &json!({}), &args.wait, output).await?;
        let Some(result) = cancelled else { return Ok(()) };
        output.line(&format!(
            "the home disks have what they had: {} were given back",
            bytes_at(&result, "/given_back_bytes")
        ))?;
        for path in result["left_disks"]["paths"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            output.line(&format!("  {path} was made for it and is left where it is: nobody needs it"))?;
        }
        return Ok(());
    }
    let name = args.name.unwrap_or_default();
    let request = json!({ "method": args.method, "to": args.to, "store": args.store,
        "process_server": args.process_server, "check_only": args.check });
    let Some(result) = finish(client, &name, "reprotect", &request, &args.wait, output).await? else { return Ok(()) };
    if args.check {
        let recommended = text(&result, "/recommended");
        if result["needed_bytes"].is_number() {
            let all: Vec<&str> = result["paths"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let needed = bytes_at(&result, "/needed_bytes");
            output.line(&format!("would make {}, and there is room for their {needed}", all.join(", ")))?;
        }
        return Ok(output.line(&format!("recommended: --method {recommended}, because {}", text(&result, "/why")))?);
    }
    let (compared, received) = (bytes_at(&result, "/compared_bytes"), bytes_at(&result, "/received_bytes"));
    output.line(&format!("the home disks follow the machine ({})", text(&result, "/method")))?;
    output.line(&format!(
        "  {compared} were compared, {received} came, {} on the wire",
        bytes_at(&result, "/wire_bytes")
    ))?;
    output.line(&format!("  as it was at {}", text(&result, "/consistent_at")))?;
    if let Some(kept) = result["kept_point"].as_str() {
        output.line(&format!("  what only home had is point {kept}, which is locked"))?;
    }
    Ok(output.line(&format!("take it home with: tidemark failback {name}"))?)
}

pub async fn failback(client: &Client, args: FailbackArgs, output: &Output) -> Result<(), CliError> {
    match args.verb {
        Some(FailbackVerb::Cancel(args)) => {
            let cancelled = finish(client, &args.name, "failback/cancel", &json!({}), &args.wait, output).await?;
            let Some(result) = cancelled else { return Ok(()) };
            return Ok(output.line(&format!("it goes on where it ran; it is {}", text(&result, "/state")))?);
        }
        Some(FailbackVerb::Complete { name, shutdown_limit, wait }) => {
            let request = json!({ "shutdown_limit_seconds": shutdown_limit });
            let completed = finish(client, &name, "failback/complete", &request, &wait, output).await?;
            let Some(result) = completed else { return Ok(()) };
            return home(&name, &result, output);
        }
        None => {}
    }
    let name = args.name.unwrap_or_default();
    let request = json!({ "minimise_downtime": args.minimise_downtime, "full_download": args.full_download,
        "unplanned": args.unplanned, "to": args.to, "shutdown_limit_seconds": args.shutdown_limit });
    let Some(result) = finish(client, &name, "failback", &request, &args.wait, output).await? else { return Ok(()) };
    if result["ready"] == true {
        output.line(&format!("its home disks are {} behind", bytes_at(&result, "/behind_bytes")))?;
        return Ok(output.line(&format!("it still runs; take it home with: tidemark failback complete {name}"))?);
    }
    home(&name, &result, output)
}

fn home(name: &str, result: &Value, output: &Output) -> Result<(), CliError> {
    output.line("it is home: its workload opens its disks at")?;
    for disk in result["disks"].as_array().into_iter().flatten() {
        output.line(&format!("  disk {}: {}", text(disk, "/path"), text(disk, "/attach/nbd")))?;
    }
    if result["consistent_at"].is_string() {
        let (seconds, at) = (seconds(&result["lost_seconds"]), text(result, "/consistent_at"));
        output.line(&format!("it is as it was at {at}: what it wrote in the {seconds} s since then is lost"))?;
    }
    if result["downtime_seconds"].is_number() {
        let (delta, stop) = (seconds(&result["delta_seconds"]), seconds(&result["stop_seconds"]));
        let total = seconds(&result["downtime_seconds"]);
        output.line(&format!("it was down for {total} s: {stop} s to shut it down, {delta} s for the last changes"))?;
    }
    Ok(output
        .line(&format!("until `tidemark commit {name}` this can be taken back: tidemark failback cancel {name}"))?)
}
