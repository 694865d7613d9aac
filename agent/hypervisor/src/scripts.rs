//! Hypervisors that others drive: programs in a folder of this host, one a verb.
//!
//! A program is called by its verb's name (`define`, `start`, `stop`, `delete`, `power`, `inventory`, `networks`), gets one
//! JSON document on its input and may answer with one on its output. Exit 0 is done; anything else failed, and what it wrote
//! to its error output says why. `stop` is told `shutdown_seconds`, and with `"turn_off": false` it only asks the guest; it answers
//! `{"stopped": …}` with `was_off`, `by_guest`, `turned_off` or `no`. They are installed by an administrator: a program that others
//! than root and this user may change is not run, and nothing that came over the network names one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use tidemark_base::trust::distrust;
use tokio::process::Command;
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::error::{HypervisorError, store};
use crate::hypervisor::{About, Console, Event, Hypervisor, Listed, Power, Question, Started, Stopped};
use crate::machine::{Machine, Place};
use crate::run::run;

type Result<T> = std::result::Result<T, HypervisorError>;

const LIMIT: Duration = Duration::from_secs(300);

pub struct Scripts {
    folder: PathBuf,
    limit: Duration,
}

impl Scripts {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), limit: LIMIT }
    }

    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    async fn call(&self, verb: &'static str, input: Value) -> Result<Value> {
        let program = self.folder.join(verb);
        trusted(&self.folder)?;
        match trusted(&program) {
            Err(HypervisorError::Store { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(HypervisorError::Unsupported { hypervisor: "the scripts' folder", what: verb });
            }
            other => other?,
        }
        let mut command = Command::new(&program);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let output = run(command, input.to_string().as_bytes(), self.limit).await?;
        if output.code != 0 {
            return Err(HypervisorError::Refused { what: format!("script {verb}"), reason: output.reason() });
        }
        match output.stdout.trim() {
            "" => Ok(Value::Null),
            text => serde_json::from_str(text).map_err(|error| HypervisorError::Refused {
                what: format!("what script {verb} answered"),
                reason: error.to_string(),
            }),
        }
    }
}

impl Scripts {
    /// Asks the guest to shut down, and turns nothing off. `None`: it is still on, as far as the program says.
    pub async fn shut_down(&self, id: Uuid, limit: Duration) -> Result<Option<Stopped>> {
        let input = json!({ "id": id, "shutdown_seconds": limit.as_secs_f64(), "turn_off": false });
        let answer = self.call("stop", input).await?;
        Ok(match answer["stopped"].as_str() {
            Some("was_off") => Some(Stopped::WasOff),
            Some("by_guest") => Some(Stopped::ByGuest),
            _ => None,
        })
    }
}

/// Nobody but root and this user may change it.
fn trusted(path: &Path) -> Result<()> {
    match distrust(path).map_err(store(path.display().to_string()))? {
        None => Ok(()),
        Some(reason) => Err(HypervisorError::Refused {
            what: format!("{}", path.display()),
            reason: format!("{reason}: it must belong to root, and only its owner may write it"),
        }),
    }
}

fn power_of(answer: &Value) -> Result<Power> {
    match answer["power"].as_str() {
        Some("on") => Ok(Power::On),
        Some("paused") => Ok(Power::Paused),
        Some("off") => Ok(Power::Off),
        Some("unknown") => Ok(Power::Unknown),
        _ => Err(HypervisorError::Refused {
            what: "what the script answered".to_owned(),
            reason: "\"power\" is on, paused, off or unknown".to_owned(),
        }),
    }
}

#[async_trait]
impl Hypervisor for Scripts {
    fn name(&self) -> &'static str {
        "scripts"
    }

    async fn check(&self) -> Result<About> {
        trusted(&self.folder)?;
        Ok(About { name: self.name(), version: String::new(), accelerator: "theirs".to_owned(), why: None })
    }

    async fn inventory(&self) -> Result<Vec<Listed>> {
        let answer = self.call("inventory", Value::Null).await?;
        let listed = answer.as_array().into_iter().flatten().map(|machine| {
            let id = machine["id"].as_str().and_then(|id| id.parse().ok());
            let (Some(id), Some(name)) = (id, machine["name"].as_str()) else {
                return Err(HypervisorError::Refused {
                    what: "what script inventory answered".to_owned(),
                    reason: "each machine has an \"id\" (a UUID) and a \"name\"".to_owned(),
                });
            };
            let ours = machine["ours"] == true;
            Ok(Listed { id, name: name.to_owned(), power: power_of(machine)?, ours })
        });
        listed.collect()
    }

    async fn power(&self, id: Uuid) -> Result<Power> {
        power_of(&self.call("power", json!({ "id": id })).await?)
    }

    async fn define(&self, machine: &Machine) -> Result<()> {
        machine.check()?;
        self.call("define", serde_json::to_value(machine).expect("plain data")).await.map(drop)
    }

    async fn describe(&self, id: Uuid) -> Result<Machine> {
        let answer = self.call("describe", json!({ "id": id })).await?;
        serde_json::from_value(answer).map_err(|error| HypervisorError::Refused {
            what: "what script describe answered".to_owned(),
            reason: error.to_string(),
        })
    }

    async fn start(&self, id: Uuid) -> Result<Started> {
        self.call("start", json!({ "id": id })).await?;
        Ok(Started { first_instruction: Instant::now() })
    }

    async fn stop(&self, id: Uuid, shutdown: Option<Duration>) -> Result<Stopped> {
        let limit = shutdown.map(|limit| limit.as_secs_f64());
        let answer = self.call("stop", json!({ "id": id, "shutdown_seconds": limit })).await?;
        Ok(match answer["stopped"].as_str() {
            Some("was_off") => Stopped::WasOff,
            Some("by_guest") => Stopped::ByGuest,
            _ => Stopped::TurnedOff,
        })
    }

    async fn delete(&self, id: Uuid) -> Result<()> {
        self.call("delete", json!({ "id": id })).await.map(drop)
    }

    async fn networks(&self) -> Result<Vec<String>> {
        let answer = self.call("networks", Value::Null).await?;
        Ok(answer.as_array().into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect())
    }

    async fn move_disk(&self, id: Uuid, disk: usize, to: &Place, limit: Duration) -> Result<()> {
        let input = json!({ "id": id, "disk": disk, "to": to, "limit_seconds": limit.as_secs_f64() });
        self.call("move_disk", input).await.map(drop)
    }

    async fn events(&self, _: Uuid) -> Result<broadcast::Receiver<Event>> {
        Err(HypervisorError::Unsupported { hypervisor: "scripts", what: "tell what happens to a machine" })
    }

    async fn console(&self, id: Uuid, from: u64) -> Result<Console> {
        let answer = self.call("console", json!({ "id": id, "from": from })).await?;
        let text = answer["text"].as_str().unwrap_or_default();
        Ok(Console { from: answer["from"].as_u64().unwrap_or(from), bytes: text.as_bytes().to_vec() })
    }

    async fn screenshot(&self, id: Uuid, to: &Path) -> Result<()> {
        self.call("screenshot", json!({ "id": id, "to": to })).await.map(drop)
    }

    async fn reach(&self, id: Uuid, port: u16) -> Result<std::net::SocketAddr> {
        let answer = self.call("reach", json!({ "id": id, "port": port })).await?;
        let address = answer["address"].as_str().and_then(|address| address.parse().ok());
        address.ok_or_else(|| HypervisorError::Refused {
            what: "what script reach answered".to_owned(),
            reason: "\"address\" is an IP address with a port".to_owned(),
        })
    }

    async fn ask_guest(&self, id: Uuid, question: Question, limit: Duration) -> Result<Value> {
        let (command, arguments) = crate::guest::command_of(&question);
        let input =
            json!({ "id": id, "execute": command, "arguments": arguments, "limit_seconds": limit.as_secs_f64() });
        self.call("guest", input).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Hardware, Purpose};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn script(folder: &Path, verb: &str, text: &str) -> PathBuf {
        let path = folder.join(verb);
        std::fs::File::create(&path).unwrap().write_all(format!("#!/bin/sh\n{text}\n").as_bytes()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn verbs_are_programs_with_json() {
        let folder = tempfile::tempdir().unwrap();
        let scripts = Scripts::new(folder.path()).with_limit(Duration::from_secs(60));
        let id = Uuid::new_v4();
        let machine = Machine {
            id,
            name: "web".into(),
            hardware: Hardware::default(),
            disks: vec![Place::Raw { path: "/d".into() }],
            purpose: Purpose::Failover,
            ports: Vec::new(),
        };
        let heard = folder.path().join("heard");
        script(folder.path(), "define", &format!("cat > {}", heard.display()));
        script(folder.path(), "power", "cat > /dev/null; echo '{\"power\": \"off\"}'");
        script(folder.path(), "start", "echo no licence is left >&2; exit 3");
        script(folder.path(), "stop", "exec tail -f /dev/null");
        scripts.define(&machine).await.unwrap();
        let told: Machine = serde_json::from_slice(&std::fs::read(&heard).unwrap()).unwrap();
        assert_eq!(told, machine);
        assert_eq!(scripts.power(id).await.unwrap(), Power::Off);
        let refused = scripts.start(id).await.unwrap_err().to_string();
        assert!(refused.contains("no licence is left"), "{refused}");
        let absent = scripts.delete(id).await.unwrap_err();
        assert!(matches!(absent, HypervisorError::Unsupported { what: "delete", .. }), "{absent}");
        let hanging = Scripts::new(folder.path()).with_limit(Duration::from_millis(200));
        assert!(matches!(hanging.stop(id, None).await, Err(HypervisorError::TimedOut { .. })));
    }

    #[tokio::test]
    async fn a_program_that_others_may_change_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let ran = folder.path().join("ran");
        let path = script(folder.path(), "delete", &format!("touch {}", ran.display()));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let refused = Scripts::new(folder.path()).delete(Uuid::new_v4()).await.unwrap_err();
        assert!(refused.to_string().contains("others may write it"), "{refused}");
        assert!(!ran.exists());
    }
}
