//! config-server backup, restore, recovery-key.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::CliError;
use super::args::{RestoreArgs, RoleArgs, WaitArgs};
use super::output::{Output, bytes_at, text};
use super::replica::read_recovery_key;
use super::run::config_server_place;
use crate::client::{Client, escape};
use crate::roles::config_server;
use tidemark_config_server::backup as backups;

pub async fn backup(client: &Client, to: Option<PathBuf>, list: bool, output: &Output) -> Result<(), CliError> {
    if list {
        let backups = client.get("/backups").await?;
        if output.is_json() {
            return Ok(output.json(&backups)?);
        }
        let rows: Vec<Vec<String>> = backups.as_array().into_iter().flatten().map(row).collect();
        return Ok(output.table(&["BACKUP", "MADE", "SIZE", "MACHINES", "RECOVERY KEY"], &rows)?);
    }
    // Before one is made and kept everywhere.
    if let Some(there) = to.as_ref().filter(|to| to.exists()) {
        return Err(CliError::new(format!("{} is there already", there.display()), "name a new file"));
    }
    let job = client.post("/backups", &json!({})).await?;
    let Some(mut made) = super::job::finish(client, job, &WaitArgs { no_wait: false }, output).await? else {
        return Ok(());
    };
    if let Some(to) = to {
        let sealed = client.download(&format!("/backups/{}", escape(&text(&made, "/id")))).await?;
        write_new(&to, &sealed)?;
        made["path"] = json!(to);
    }
    if output.is_json() {
        return Ok(output.json(&made)?);
    }
    output.line(&format!("{} ({}), checked", text(&made, "/path"), bytes_at(&made, "/bytes")))?;
    let keepers = made["process_servers"].as_array().map_or(0, Vec::len);
    output.line(&format!(
        "kept by {keepers} process servers as well; opened by the recovery key {}",
        text(&made, "/key")
    ))?;
    for left in made["not_kept_by"].as_array().into_iter().flatten() {
        output.line(&format!("not kept by {}: {}", text(left, "/process_server"), text(left, "/error")))?;
    }
    Ok(())
}

fn row(backup: &Value) -> Vec<String> {
    let size = bytes_at(backup, "/bytes");
    vec![text(backup, "/id"), text(backup, "/created"), size, text(backup, "/machines"), text(backup, "/key")]
}

/// Nothing that is there is written over, and nobody else may read it.
fn write_new(path: &PathBuf, content: &[u8]) -> Result<(), CliError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let write = || {
        let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|error| {
        CliError::new(
            format!("cannot write {}: {error}", path.display()),
            "name a new file in a folder that this user can write",
        )
    })
}

pub async fn restore(args: RestoreArgs, output: &Output) -> Result<(), CliError> {
    let sealed = std::fs::read(&args.file).map_err(|error| {
        CliError::new(format!("cannot read {}: {error}", args.file.display()), "name the file of a backup")
    })?;
    let key = read_recovery_key(&args.key_file)?;
    if args.check {
        let (head, _) = backups::open(&key, &sealed).map_err(|failure| CliError::new(failure.message, failure.help))?;
        let value = serde_json::to_value(&head).unwrap_or_default();
        if output.is_json() {
            return Ok(output.json(&value)?);
        }
        return Ok(output.line(&format!(
            "sound: made at {} by {}",
            text(&value, "/created"),
            text(&value, "/name")
        ))?);
    }
    let (folder, settings) = config_server_place(&args.role)?;
    let restored = config_server::restore(&folder, &settings, sealed, key).await?;
    if output.is_json() {
        return Ok(output.json(&json!({
            "created": restored.head.created,
            "machines": restored.head.machines,
            "incarnation": restored.incarnation,
            "ca_fingerprint": restored.fingerprint,
            "ca_file": folder.ca_file(),
            "token_file": folder.token_file(),
            "hosts_to_tell": restored.hosts_untold,
        }))?);
    }
    output
        .line(&format!("restored from the backup of {}, {} machines", restored.head.created, restored.head.machines))?;
    output.line("Start it here: it tells the process servers where it is, and they the hosts, protected or not.")?;
    if !restored.hosts_untold.is_empty() {
        output.line(&format!(
            "The backup names no process server that could tell its hosts: write the new address as `config-server` into the \
             tidemark.toml of {}, and restart the agent there.",
            restored.hosts_untold.join(", ")
        ))?;
    }
    output.line("Passphrases for registration are to be made anew.")?;
    output.line(
        "The configuration server that made the backup is refused from then on; see that it does not run any more.",
    )?;
    Ok(())
}

pub fn recovery_key(args: RoleArgs, output: &Output) -> Result<(), CliError> {
    let (folder, _) = config_server_place(&args)?;
    let key = config_server::new_recovery_key(&folder)?.text();
    if output.is_json() {
        return Ok(output.json(&json!({ "recovery_key": key }))?);
    }
    output.line(
        "Shown this once; it opens every backup that is made from now on, older ones are opened by the key before:",
    )?;
    Ok(output.line(&key)?)
}
