//! machine …, failover …

use hyper::Method;
use serde_json::{Value, json};

use super::args::{FailoverVerb, MachineSetArgs, MachineVerb};
use super::output::{Output, text};
use super::{CliError, job};
use crate::client::{Client, escape};

pub async fn machine(client: &Client, verb: MachineVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        MachineVerb::Show { name } => {
            let shown = client.get(&address(&name)).await?;
            show(&shown, output)
        }
        MachineVerb::Set(args) => {
            let known = client.get(&address(&args.name)).await?;
            let description = changed(known["description"].clone(), &args)?;
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
    }
}

fn seconds(value: &Value) -> String {
    value.as_f64().map_or_else(|| "–".to_owned(), |seconds| format!("{seconds:.2}"))
}
