//! machine …, failover …

use hyper::Method;
use serde_json::{Value, json};
use tidemark_hypervisor::call::Description;

use super::args::{FailoverVerb, MachineArgs, MachineSetArgs, MachineVerb, StartArgs, WaitArgs};
use super::output::{Output, bytes_at, text};
use super::{CliError, job};
use crate::client::{Client, escape};

pub async fn machine(client: &Client, verb: MachineVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        MachineVerb::Disk { verb } => super::protect::disk(client, verb, output).await,
        MachineVerb::ProcessServer { verb } => super::protect::process_server(client, verb, output).await,
        MachineVerb::Show { name } => {
            let shown = client.get(&address(&name)).await?;
            show(&shown, output)
        }
        MachineVerb::Set(args) => {
            let known = client.get(&address(&args.name)).await?;
            let mut description = changed(known["description"].clone(), &args)?;
            if let Some(generation) = &args.generation {
                let machine = client.get(&format!("/machines/{}", escape(&args.name))).await?;
                let disks = machine["disks"].as_array().map_or(0, Vec::len);
                description = converted(description, generation, disks)?;
            }
            let set = client.request(Method::PUT, &address(&args.name), Some(&description)).await?;
            show(&set, output)
        }
    }
}

fn address(name: &str) -> String {
    format!("/machines/{}/description", escape(name))
}

/// What is known, with what was named.
fn changed(known: Value, args: &MachineSetArgs) -> Result<Value, CliError> {
    let mut all = if known.is_object() { known } else { json!({ "hardware": {} }) };
    let hardware = &mut all["hardware"];
    if let Some(firmware) = &args.firmware {
        hardware["firmware"] = json!(firmware);
    }
    if let Some(processors) = args.processors {
        hardware["processors"] = json!(processors);
    }
    if let Some(bytes) = args.memory {
        if !bytes.is_multiple_of(1 << 20) {
            return Err(CliError::new("memory comes in whole MiB", "write it as 512M or 4G"));
        }
        hardware["memory_mib"] = json!(bytes >> 20);
    }
    if !args.buses.is_empty() {
        hardware["buses"] = json!(args.buses);
    }
    match &args.bridges[..] {
        [] => {}
        [none] if none == "none" => hardware["cards"] = json!([]),
        bridges => {
            let cards: Vec<Value> = bridges.iter().map(|name| json!({ "network": { "bridge": name } })).collect();
            hardware["cards"] = json!(cards);
        }
    }
    match args.kernel.as_deref() {
        None => {}
        Some("none") => hardware["kernel"] = Value::Null,
        Some(image) => {
            hardware["kernel"] =
                json!({ "image": image, "initrd": args.initrd, "command_line": args.kernel_command_line });
        }
    }
    if let Some(text) = &args.sign_console {
        all["sign"] = json!({ "console": { "text": text } });
    } else if let Some(port) = args.sign_port {
        all["sign"] = json!({ "port": { "port": port } });
    } else if args.sign_agent {
        all["sign"] = json!("agent");
    } else if args.no_sign {
        all["sign"] = Value::Null;
    }
    if let Some(limit) = args.sign_limit {
        all["sign_limit_seconds"] = json!(limit);
    }
    Ok(all)
}

fn converted(description: Value, generation: &str, disks: usize) -> Result<Value, CliError> {
    let not_understood = |error: serde_json::Error| {
        CliError::new(
            format!("what the machine is like is not understood: {error}"),
            "use the versions that belong together",
        )
    };
    let mut description: Description = serde_json::from_value(description).map_err(not_understood)?;
    let to = serde_json::from_value(json!(generation)).map_err(not_understood)?;
    description.become_generation(to, disks);
    serde_json::to_value(description).map_err(not_understood)
}

fn show(shown: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(shown)?);
    }
    if shown["description"].is_null() {
        return Ok(output.line("nobody has said yet how it is run: `tidemark machine set NAME …`")?);
    }
    let of = |at: &str| text(shown, &format!("/description/{at}"));
    output.line(&format!("firmware    {}", of("hardware/firmware")))?;
    output.line(&format!("processors  {}", of("hardware/processors")))?;
    output.line(&format!("memory      {} MiB", of("hardware/memory_mib")))?;
    if let Some(was) = shown.pointer("/description/converted/firmware") {
        output.line(&format!("converted   from {}", if was == "uefi" { "generation 2" } else { "generation 1" }))?;
    }
    for (name, at) in [("buses", "hardware/buses"), ("cards", "hardware/cards"), ("kernel", "hardware/kernel")] {
        if let Some(value) = shown.pointer(&format!("/description/{at}")).filter(|value| !value.is_null()) {
            output.line(&format!("{name:<11} {value}"))?;
        }
    }
    output.line(&format!("sign        {}, for {} s", shown["description"]["sign"], of("sign_limit_seconds")))?;
    if let Some(error) = shown["hypervisor"]["error"].as_str() {
        output.line(&format!("it cannot run now: {error}; {}", text(shown, "/hypervisor/help")))?;
    } else if shown["hypervisor"].is_object() {
        let version = text(shown, "/hypervisor/version");
        output.line(&format!("runs on     {version}, {}", text(shown, "/hypervisor/accelerator")))?;
        if let Some(why) = shown["hypervisor"]["why"].as_str() {
            output.line(&format!("            {why}"))?;
        }
    }
    Ok(())
}

pub async fn run(client: &Client, verb: FailoverVerb, output: &Output) -> Result<(), CliError> {
    let name = match &verb {
        FailoverVerb::Test { name, .. }
        | FailoverVerb::Show { name }
        | FailoverVerb::ChangePoint { name, .. }
        | FailoverVerb::Promote { name, .. } => name.clone(),
        FailoverVerb::Cleanup(args) | FailoverVerb::Cancel(args) => args.name.clone(),
        FailoverVerb::Planned { start, .. } | FailoverVerb::Unplanned { start, .. } => start.name.clone(),
    };
    act(client, verb, output).await.map_err(|error| error.about(&name))
}

async fn act(client: &Client, verb: FailoverVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        FailoverVerb::Test { name, point, cleanup, wait } => {
            let request = json!({ "point": point, "cleanup": cleanup });
            let started = client.post(&format!("/machines/{}/failover/test", escape(&name)), &request).await?;
            let Some(result) = job::finish(client, started, &wait, output).await? else { return Ok(()) };
            if output.is_json() {
                return Ok(output.json(&result)?);
            }
            let proven = match result["sign"].is_null() {
                false => "boots",
                true => "was started; no sign of life is set (`tidemark machine set`), so nothing is proven",
            };
            output.line(&format!("point {} of {} {proven}", text(&result, "/point"), text(&result, "/time")))?;
            output.line(&format!("  first instruction after {} s", seconds(&result["rto_seconds"])))?;
            if !result["sign_seconds"].is_null() {
                output.line(&format!("  sign of life after {} s", seconds(&result["sign_seconds"])))?;
            }
            output.line(&format!("  console: {}", text(&result, "/console")))?;
            output.line(&format!("  screen: {}", text(&result, "/screen")))?;
            if result["running"] == true {
                output.line(&format!("it runs in isolation until: tidemark failover cleanup {name}"))?;
            }
            Ok(())
        }
        FailoverVerb::Cleanup(args) => {
            let path = format!("/machines/{}/failover/cleanup", escape(&args.name));
            let started = client.post(&path, &json!({})).await?;
            let Some(result) = job::finish(client, started, &args.wait, output).await? else { return Ok(()) };
            if output.is_json() {
                return Ok(output.json(&result)?);
            }
            Ok(output.line(&format!("{} test failovers were ended", text(&result, "/ended")))?)
        }
        FailoverVerb::Planned { start: args, shutdown_limit, turn_off } => {
            let how = json!({ "shutdown_limit_seconds": shutdown_limit, "turn_off": turn_off });
            start(client, "planned", args, how, output).await
        }
        FailoverVerb::Unplanned { point, start: args } => {
            start(client, "unplanned", args, json!({ "point": point }), output).await
        }
        FailoverVerb::Show { name } => {
            shown(&client.get(&format!("/machines/{}/failover", escape(&name))).await?, output)
        }
        FailoverVerb::ChangePoint { name, point, wait } => {
            let request = json!({ "point": point });
            let Some(result) = finish(client, &name, "failover/change-point", &request, &wait, output).await? else {
                return Ok(());
            };
            output.line(&format!("it runs from the point of {}", text(&result, "/time")))?;
            disks(&result, output)
        }
        FailoverVerb::Cancel(args) => {
            let Some(result) = finish(client, &args.name, "failover/cancel", &json!({}), &args.wait, output).await?
            else {
                return Ok(());
            };
            match result["waiting"].as_str() {
                None => Ok(output.line("the source goes on")?),
                Some(waiting) => Ok(output.line(&format!("the failover is gone; {waiting}"))?),
            }
        }
        FailoverVerb::Promote { name, throttle, stop, wait } => {
            let request = json!({ "bytes_per_second": throttle, "stop": stop });
            let Some(result) = finish(client, &name, "failover/promote", &request, &wait, output).await? else {
                return Ok(());
            };
            match result["promotion"].as_str() {
                Some("plain") => output.line("it runs on plain disks:")?,
                Some("filled") => output.line("the plain disks have everything; move to them with the machine off:")?,
                _ => output.line("no plain disks are being written; what was written stays")?,
            }
            disks(&result, output)
        }
    }
}

pub async fn commit(client: &Client, args: MachineArgs, output: &Output) -> Result<(), CliError> {
    let Some(result) = finish(client, &args.name, "failover/commit", &json!({}), &args.wait, output).await? else {
        return Ok(());
    };
    if result["home"] == true {
        output.line("it is home, and replication from there goes on")?;
        return match result["waiting"].as_str() {
            None => Ok(()),
            Some(waiting) => Ok(output.line(waiting)?),
        };
    }
    output.line(&format!("the point of {} is accepted", text(&result, "/time")))?;
    if result["promotion"] != "plain" {
        output
            .line(&format!("it still runs from its replica; plain disks: tidemark failover promote {}", args.name))?;
    }
    Ok(output.line(&format!("the way home begins with: tidemark reprotect {}", args.name))?)
}

pub async fn migrate(client: &Client, args: MachineArgs, output: &Output) -> Result<(), CliError> {
    let Some(result) = finish(client, &args.name, "migrate", &json!({}), &args.wait, output).await? else {
        return Ok(());
    };
    output.line("the machine is migrated; it is not protected any more")?;
    disks(&result, output)
}

/// Starts a job and waits for it; `None`: everything was said.
pub async fn finish(
    client: &Client,
    name: &str,
    what: &str,
    request: &Value,
    wait: &WaitArgs,
    output: &Output,
) -> Result<Option<Value>, CliError> {
    let finishing = async {
        let started = client.post(&format!("/machines/{}/{what}", escape(name)), request).await?;
        job::finish(client, started, wait, output).await
    };
    let Some(result) = finishing.await.map_err(|error: CliError| error.about(name))? else { return Ok(None) };
    if output.is_json() {
        output.json(&result)?;
        return Ok(None);
    }
    Ok(Some(result))
}

async fn start(
    client: &Client,
    how: &str,
    args: StartArgs,
    mut request: Value,
    output: &Output,
) -> Result<(), CliError> {
    request["disks_only"] = json!(args.disks_only);
    request["check_only"] = json!(args.check);
    request["process_server"] = json!(args.process_server);
    let Some(result) = finish(client, &args.name, &format!("failover/{how}"), &request, &args.wait, output).await?
    else {
        return Ok(());
    };
    output.line(&format!("{}, the point of {}", text(&result, "/direction"), text(&result, "/time")))?;
    let lost =
        format!("{} s and at most {} are lost", seconds(&result["lost_seconds"]), bytes_at(&result, "/lost_bytes"));
    output.line(&match result["source_last_seen"].as_str() {
        None => lost,
        Some(at) => format!("{lost}, and what the source wrote since it was last seen {at}"),
    })?;
    if result["source_is_well"] == true {
        let first = if args.check { String::new() } else { format!("tidemark failover cancel {0}, then ", args.name) };
        output.line(&format!(
            "its source is there and well; nothing would be lost by: {first}tidemark failover planned {}",
            args.name
        ))?;
    }
    if args.check {
        return source(&result, "the machine at the source is", "/source/power", output);
    }
    source(&result, "the machine at the source was shut down:", "/source/stopped", output)?;
    if result["rto_seconds"].is_number() {
        output.line(&format!("first instruction after {} s", seconds(&result["rto_seconds"])))?;
    }
    disks(&result, output)?;
    output.line(&format!(
        "until `tidemark commit {0}` it can be changed and cancelled: tidemark failover --help",
        args.name
    ))?;
    Ok(())
}

fn source(result: &Value, said: &str, at: &str, output: &Output) -> Result<(), CliError> {
    match result["source"]["owner"].as_str() {
        Some(owner) => Ok(output.line(&format!("{said} {} ({owner})", text(result, at)))?),
        None => Ok(()),
    }
}

fn disks(result: &Value, output: &Output) -> Result<(), CliError> {
    for disk in result["disks"].as_array().into_iter().flatten() {
        let place = disk["nbd"].as_str().or(disk["plain"].as_str()).unwrap_or_default();
        output.line(&format!("  disk {}: {place}", text(disk, "/id")))?;
    }
    Ok(())
}

fn shown(shown: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(shown)?);
    }
    output.line(&format!("failover    {}, {}", text(shown, "/failover/kind"), text(shown, "/failover/phase")))?;
    output.line(&format!("point       {} of {}", text(shown, "/failover/point"), text(shown, "/failover/time")))?;
    if let Some(stage) = shown["home"]["stage"].as_str() {
        let behind = bytes_at(&shown["home"], "/behind_bytes");
        let at = shown["home"]["consistent_at"].as_str().map_or_else(String::new, |at| format!(", as it was at {at}"));
        // Nobody knows how far a mix is behind.
        let far = match stage {
            "syncing" | "undoing" => {
                format!("{} of {}", bytes_at(&shown["home"], "/done_bytes"), bytes_at(&shown["home"], "/total_bytes"))
            }
            _ => format!("{behind} behind"),
        };
        output.line(&format!("home        {stage}{at}, {far}"))?;
        if let Some(problem) = shown["home"]["problem"].as_str() {
            output.line(&format!("            {problem}; {}", text(&shown["home"], "/help")))?;
        }
    } else if let Some(error) = shown["home"]["error"].as_str() {
        output.line(&format!("home        {error}; {}", text(&shown["home"], "/help")))?;
    }
    if let Some(error) = shown["unknown"]["error"].as_str() {
        return Ok(output.line(&format!("how it does is not known: {error}; {}", text(shown, "/unknown/help")))?);
    }
    output.line(&format!("runs on     {}, {}", text(shown, "/running/hypervisor"), text(shown, "/running/power")))?;
    let (done, total) = (bytes_at(shown, "/running/done_bytes"), bytes_at(shown, "/running/total_bytes"));
    output.line(&format!("plain disks {}, {done} of {total}", text(shown, "/running/promotion")))?;
    if let Some(problem) = shown["running"]["problem"].as_str() {
        output.line(&format!("problem     {problem}"))?;
    }
    disks(&shown["running"], output)
}

pub fn seconds(value: &Value) -> String {
    value.as_f64().map_or_else(|| "–".to_owned(), |seconds| format!("{seconds:.2}"))
}
