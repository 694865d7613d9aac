//! Who runs a machine at its home: a QEMU that others started, libvirt, or programs that an administrator installed. It is asked
//! to shut the machine down before its disks are closed, and to start it when they are open again.
//!
//! *Consistency.* Nothing is remembered: whoever runs the machine says whether it is on. *Retries.* None; asking twice changes
//! nothing. *Cancellation.* A guest that was asked to shut down may do so although nobody waits any more. *Crash.* The same.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tidemark_qemu::qmp::{Qmp, connect_in};
use tokio::net::UnixStream;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use crate::error::HypervisorError;
use crate::guest;
use crate::hypervisor::{Hypervisor, Power, Question, Stopped};
use crate::libvirt::{Libvirt, LibvirtSettings};
use crate::scripts::Scripts;

type Result<T> = std::result::Result<T, HypervisorError>;

const NAME: &str = "the machine's QEMU";
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// How long a guest's agent may take to answer before the power button is pressed instead.
const AGENT_LIMIT: Duration = Duration::from_secs(10);
/// How long a QEMU that was told to end may take.
const QUIT_LIMIT: Duration = Duration::from_secs(30);
/// What a program may take longer than the guest that it waits for.
const PROGRAM_GRACE: Duration = Duration::from_secs(60);

/// Each is named by an administrator of the machine's home, never by what comes over the network.
pub enum Owner {
    /// Started by somebody else, with a QMP socket.
    Qemu {
        qmp: PathBuf,
        guest_agent: Option<PathBuf>,
    },
    Libvirt {
        settings: LibvirtSettings,
        domain: String,
    },
    /// Programs `stop`, `power` and `start`, as of [`crate::scripts`].
    Programs {
        folder: PathBuf,
        id: Uuid,
    },
}

impl Owner {
    pub fn name(&self) -> &'static str {
        match self {
            Owner::Qemu { .. } => "QEMU",
            Owner::Libvirt { .. } => "libvirt",
            Owner::Programs { .. } => "scripts",
        }
    }

    pub async fn power(&self) -> Result<Power> {
        match self {
            Owner::Qemu { qmp, .. } => match connect(qmp).await? {
                Some(qmp) => power_of(&qmp).await,
                None => Ok(Power::Off),
            },
            Owner::Libvirt { .. } => {
                let (libvirt, id) = self.domain().await?;
                libvirt.power(id).await
            }
            Owner::Programs { folder, id } => Scripts::new(folder).power(*id).await,
        }
    }

    /// Asks the guest to shut down and waits for that, for `limit` at most. `None`: it is still on.
    pub async fn shut_down(&self, limit: Duration) -> Result<Option<Stopped>> {
        match self {
            Owner::Qemu { qmp, guest_agent } => shut_down_qemu(qmp, guest_agent.as_deref(), limit).await,
            Owner::Libvirt { .. } => {
                let (libvirt, id) = self.domain().await?;
                if libvirt.power(id).await? == Power::Off {
                    return Ok(Some(Stopped::WasOff));
                }
                Ok(libvirt.shut_down(id, limit).await?.then_some(Stopped::ByGuest))
            }
            Owner::Programs { folder, id } => {
                let programs = Scripts::new(folder).with_limit(limit.saturating_add(PROGRAM_GRACE));
                programs.shut_down(*id, limit).await
            }
        }
    }

    /// As by its switch.
    pub async fn turn_off(&self) -> Result<()> {
        match self {
            Owner::Qemu { qmp, .. } => {
                let Some(qmp) = connect(qmp).await? else { return Ok(()) };
                let mut events = qmp.events();
                // It may end before it answers.
                let told = qmp.execute("quit", json!({}), ANSWER_LIMIT).await;
                match tokio::time::timeout(QUIT_LIMIT, closed(&mut events)).await {
                    Ok(()) => Ok(()),
                    Err(_) => told.map(drop).map_err(HypervisorError::from).and(Err(HypervisorError::TimedOut {
                        what: "the end of the machine".to_owned(),
                        limit: QUIT_LIMIT,
                    })),
                }
            }
            Owner::Libvirt { .. } => {
                let (libvirt, id) = self.domain().await?;
                libvirt.stop(id, None).await.map(drop)
            }
            Owner::Programs { folder, id } => Scripts::new(folder).stop(*id, None).await.map(drop),
        }
    }

    pub async fn start(&self) -> Result<()> {
        match self {
            Owner::Qemu { .. } => Err(HypervisorError::Unsupported {
                hypervisor: "a QEMU that others started",
                what: "start again when it has ended",
            }),
            Owner::Libvirt { .. } => {
                let (libvirt, id) = self.domain().await?;
                libvirt.start(id).await.map(drop)
            }
            Owner::Programs { folder, id } => Scripts::new(folder).start(*id).await.map(drop),
        }
    }

    async fn domain(&self) -> Result<(Libvirt, Uuid)> {
        let Owner::Libvirt { settings, domain } = self else {
            return Err(HypervisorError::Unsupported { hypervisor: self.name(), what: "know domains" });
        };
        let libvirt = Libvirt::of_others(settings.clone());
        let id = libvirt.id_of(domain).await?;
        Ok((libvirt, id))
    }
}

/// `None`: nobody listens any more, so the machine has ended.
async fn connect(socket: &Path) -> Result<Option<Qmp>> {
    let unreachable = |reason: String| HypervisorError::Unreachable { hypervisor: NAME, reason };
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name().and_then(|name| name.to_str())) else {
        return Err(unreachable(format!("{} is no socket", socket.display())));
    };
    match connect_in(folder, name).await {
        Ok(stream) => Ok(Some(Qmp::over(stream).await?)),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(error) => Err(unreachable(format!("{}: {error}", socket.display()))),
    }
}

async fn power_of(qmp: &Qmp) -> Result<Power> {
    let status = qmp.execute("query-status", json!({}), ANSWER_LIMIT).await?;
    Ok(match &status {
        status if status["running"] == true => Power::On,
        // It stays when it was started with `-no-shutdown`, and its processors never run again.
        status if status["status"] == "shutdown" => Power::Off,
        _ => Power::Paused,
    })
}

async fn shut_down_qemu(socket: &Path, agent: Option<&Path>, limit: Duration) -> Result<Option<Stopped>> {
    let Some(qmp) = connect(socket).await? else { return Ok(Some(Stopped::WasOff)) };
    if power_of(&qmp).await? == Power::Off {
        return Ok(Some(Stopped::WasOff));
    }
    // Before the guest is told, so that nothing is missed.
    let mut events = qmp.events();
    let told = match agent {
        Some(agent) => ask_agent(agent, limit.min(AGENT_LIMIT)).await,
        None => false,
    };
    if !told {
        qmp.execute("system_powerdown", json!({}), ANSWER_LIMIT).await?;
    }
    let ended = tokio::time::timeout(limit, ended(&qmp, &mut events)).await.is_ok();
    Ok(ended.then_some(Stopped::ByGuest))
}

async fn ask_agent(socket: &Path, limit: Duration) -> bool {
    let asking = async {
        let stream = UnixStream::connect(socket).await;
        let stream = stream.map_err(|error| HypervisorError::Guest { reason: error.to_string() })?;
        guest::ask(stream, &Question::Shutdown, limit).await
    };
    match asking.await {
        Ok(_) => true,
        Err(error) => {
            tracing::info!(%error, "the guest's agent does not shut it down; its power button is pressed");
            false
        }
    }
}

/// Until the guest runs no more: its QEMU ends, or stays without it.
async fn ended(qmp: &Qmp, events: &mut broadcast::Receiver<Value>) {
    loop {
        match events.recv().await {
            Ok(event) if matches!(event["event"].as_str(), Some("SHUTDOWN" | "STOP")) => {
                // One that answers no more is ending.
                if power_of(qmp).await.is_ok_and(|power| power == Power::Off) {
                    return;
                }
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

async fn closed(events: &mut broadcast::Receiver<Value>) {
    while !matches!(events.recv().await, Err(RecvError::Closed)) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    /// A QEMU that answers `query-status` by what it is given, one connection after another, and ends by `ends_by`.
    async fn qemu(listener: UnixListener, ends_by: &'static str) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            write.write_all(b"{\"QMP\": {}}\n").await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let question: Value = serde_json::from_str(&line).unwrap();
                let command = question["execute"].as_str().unwrap();
                let value = match command {
                    "query-status" => json!({ "running": true, "status": "running" }),
                    _ => json!({}),
                };
                let answer = json!({ "return": value, "id": question["id"] });
                write.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
                if command == ends_by {
                    write.write_all(b"{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true}}\n").await.unwrap();
                    return;
                }
            }
        }
    }

    fn owner(folder: &Path, ends_by: &'static str) -> Owner {
        let qmp = folder.join("qmp");
        tokio::spawn(qemu(UnixListener::bind(&qmp).unwrap(), ends_by));
        Owner::Qemu { qmp, guest_agent: Some(folder.join("nobody")) }
    }

    #[tokio::test]
    async fn a_guest_is_asked_and_only_then_turned_off() {
        let folder = tempfile::tempdir().unwrap();
        let deaf = owner(folder.path(), "quit");
        assert_eq!(deaf.power().await.unwrap(), Power::On);
        assert_eq!(deaf.shut_down(Duration::from_millis(200)).await.unwrap(), None, "it does not listen, and is on");
        assert_eq!(deaf.power().await.unwrap(), Power::On);
        deaf.turn_off().await.unwrap();
        assert_eq!(deaf.power().await.unwrap(), Power::Off);
        assert_eq!(deaf.shut_down(Duration::from_secs(60)).await.unwrap(), Some(Stopped::WasOff));
        deaf.turn_off().await.unwrap();
        assert!(matches!(deaf.start().await, Err(HypervisorError::Unsupported { .. })));
    }

    #[tokio::test]
    async fn a_guest_whose_agent_is_away_gets_its_power_button_pressed() {
        let folder = tempfile::tempdir().unwrap();
        let listens = owner(folder.path(), "system_powerdown");
        assert_eq!(listens.shut_down(Duration::from_secs(60)).await.unwrap(), Some(Stopped::ByGuest));
    }

    #[tokio::test]
    async fn programs_say_what_came_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let install = |verb: &str, text: &str| {
            let path = folder.path().join(verb);
            let text = format!("#!/bin/sh\ncat >> {}/heard\n{text}\n", folder.path().display());
            std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        };
        let owner = Owner::Programs { folder: folder.path().to_owned(), id: Uuid::new_v4() };
        for (answer, stopped) in [
            ("{\"stopped\": \"by_guest\"}", Some(Stopped::ByGuest)),
            ("{\"stopped\": \"was_off\"}", Some(Stopped::WasOff)),
            ("{\"stopped\": \"no\"}", None),
            ("", None),
        ] {
            install("stop", &format!("echo '{answer}'"));
            assert_eq!(owner.shut_down(Duration::from_secs(5)).await.unwrap(), stopped, "{answer}");
        }
        let heard = std::fs::read_to_string(folder.path().join("heard")).unwrap();
        assert!(heard.contains("\"turn_off\":false") && heard.contains("\"shutdown_seconds\":5.0"), "{heard}");
        install("stop", "echo the door is locked >&2; exit 1");
        let refused = owner.shut_down(Duration::from_secs(5)).await.unwrap_err().to_string();
        assert!(refused.contains("the door is locked"), "{refused}");
        assert!(matches!(owner.start().await, Err(HypervisorError::Unsupported { what: "start", .. })));
    }
}
