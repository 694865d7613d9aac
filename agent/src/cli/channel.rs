//! channel …

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::CliError;
use super::args::{ChannelArgs, ChannelVerb, MailTlsArg};
use super::output::{Output, text};
use crate::client::{Client, escape};

pub async fn run(client: &Client, verb: ChannelVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        ChannelVerb::Create(args) => show(&client.post("/channels", &channel(&args)?).await?, output),
        ChannelVerb::List => show(&client.get("/channels").await?, output),
        ChannelVerb::Show { name } => show(&client.get(&format!("/channels/{}", escape(&name))).await?, output),
        ChannelVerb::Test { name } => {
            let answer = client.post(&format!("/channels/{}/test", escape(&name)), &json!({})).await?;
            super::done(&answer, &format!("channel {name} took a test"), output)
        }
        ChannelVerb::Delete { name } => {
            super::delete(
                client,
                &format!("/channels/{}", escape(&name)),
                &format!("channel {name} is deleted"),
                output,
            )
            .await
        }
    }
}

fn channel(args: &ChannelArgs) -> Result<Value, CliError> {
    // Secrets come from files: a command line is seen by everybody on the machine.
    let ca = args.channel_ca.as_deref().map(read).transpose()?;
    let mut body = json!({ "name": args.name });
    if let Some(severity) = &args.severity {
        body["severity"] = json!(severity);
    }
    if let Some(url) = &args.webhook {
        let secret = secret(&args.secret_file)?;
        body["webhook"] = json!({ "url": url, "secret": secret, "ca": ca });
    } else {
        let tls = match args.smtp_tls {
            MailTlsArg::Starttls => "starttls",
            MailTlsArg::Tls => "tls",
            MailTlsArg::None => "none",
        };
        body["mail"] = json!({
            "server": args.smtp,
            "tls": tls,
            "user": args.smtp_user,
            "password": secret(&args.smtp_password_file)?,
            "from": args.mail_from,
            "to": args.mail_to,
            "ca": ca,
        });
    }
    Ok(body)
}

fn secret(path: &Option<PathBuf>) -> Result<Option<String>, CliError> {
    let text = path.as_deref().map(read).transpose()?;
    Ok(text.map(|text| text.trim_end_matches(['\r', '\n']).to_owned()))
}

fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(|error| {
        CliError::new(format!("cannot read {}: {error}", path.display()), "name a file that this user can read")
    })
}

fn show(channels: &Value, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(channels)?);
    }
    let list: Vec<&Value> = match channels {
        Value::Array(list) => list.iter().collect(),
        channel => vec![channel],
    };
    let columns = ["/name", "/kind", "/severity", "/to", "/told", "/problem"];
    let rows: Vec<Vec<String>> =
        list.into_iter().map(|channel| columns.map(|column| text(channel, column)).to_vec()).collect();
    Ok(output.table(&["CHANNEL", "KIND", "SEVERITY", "TO", "LAST TOLD", "PROBLEM"], &rows)?)
}
