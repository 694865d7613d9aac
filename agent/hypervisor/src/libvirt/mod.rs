//! Machines of libvirt, driven by its own program `virsh`.
//!
//! A machine carries its description in libvirt's metadata, which says that it is ours; machines without it are listed, and
//! never changed. A card on the isolated network gets a network of the machine's own, which has no address and no way out.
//!
//! *Consistency.* libvirt keeps what is defined. *Retries.* None. *Cancellation.* A call that is dropped ends its `virsh`; what
//! libvirt began goes on. *Crash.* Nothing is kept here but consoles.

mod xml;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use tidemark_base::storage::create_private_folder;
use tokio::process::Command;
use tokio::sync::{OnceCell, broadcast};
use uuid::Uuid;

use crate::error::{HypervisorError, store};
use crate::guest;
use crate::hypervisor::{About, Console, Event, Hypervisor, Listed, Power, Question, Started, Stopped};
use crate::machine::{Machine, Network, Place};
use crate::run::{Output, run};

type Result<T> = std::result::Result<T, HypervisorError>;

const NAME: &str = "libvirt";
const LIMIT: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(300);
const CONSOLE_READ_MAX: u64 = 1 << 20;

#[derive(Clone)]
pub struct LibvirtSettings {
    /// `qemu:///system`, or one with a socket.
    pub uri: String,
    /// Where consoles are kept.
    pub folder: PathBuf,
    pub virsh: PathBuf,
    /// `kvm` or `qemu`; absent: KVM where libvirt offers it.
    pub virt: Option<String>,
}

impl LibvirtSettings {
    pub fn new(uri: impl Into<String>, folder: impl Into<PathBuf>) -> Self {
        Self { uri: uri.into(), folder: folder.into(), virsh: "virsh".into(), virt: None }
    }
}

pub struct Libvirt {
    settings: LibvirtSettings,
    virt: OnceCell<String>,
}

impl Libvirt {
    pub fn open(settings: LibvirtSettings) -> Result<Self> {
        create_private_folder(&settings.folder).map_err(store("the folder of consoles"))?;
        Ok(Self::of_others(settings))
    }

    /// For machines of others, whose consoles are not ours: makes no folder.
    pub fn of_others(settings: LibvirtSettings) -> Self {
        Self { settings, virt: OnceCell::new() }
    }

    async fn virsh(&self, arguments: &[&str], input: &str, limit: Duration) -> Result<Output> {
        let mut command = Command::new(&self.settings.virsh);
        // Messages are looked at, so they come in one language.
        command.env("LC_ALL", "C").args(["-q", "-c", &self.settings.uri]).args(arguments);
        run(command, input.as_bytes(), limit).await
    }

    /// What it says when it succeeds.
    async fn ask(&self, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.virsh(arguments, input, LIMIT).await?;
        if output.code == 0 {
            return Ok(output.stdout);
        }
        Err(refusal(arguments, &output))
    }

    /// The same of one machine.
    async fn of(&self, id: Uuid, verb: &str, more: &[&str]) -> Result<String> {
        let id_text = id.to_string();
        let arguments: Vec<&str> = [verb, &id_text].into_iter().chain(more.iter().copied()).collect();
        let output = self.virsh(&arguments, "", LIMIT).await?;
        if output.code == 0 {
            return Ok(output.stdout);
        }
        Err(match () {
            () if output.stderr.contains("failed to get domain") => HypervisorError::Unknown { id },
            () if output.stderr.contains("domain is not running") => HypervisorError::Off { id },
            () if output.stderr.contains("domain is already running") || output.stderr.contains("already active") => {
                HypervisorError::Running { id }
            }
            () => refusal(&arguments, &output),
        })
    }

    async fn virt(&self) -> Result<&str> {
        let found = self.virt.get_or_try_init(|| async {
            if let Some(virt) = &self.settings.virt {
                return Ok(virt.clone());
            }
            let offered = self.virsh(&["domcapabilities", "--virttype", "kvm"], "", LIMIT).await?;
            Ok(if offered.code == 0 { "kvm" } else { "qemu" }.to_owned())
        });
        found.await.map(String::as_str)
    }

    /// The id of a domain that is known by its name, or by its id.
    pub async fn id_of(&self, domain: &str) -> Result<Uuid> {
        let said = self.ask(&["domuuid", "--domain", domain], "").await?;
        said.trim().parse().map_err(|_| HypervisorError::Refused {
            what: format!("the id of domain {domain:?}"),
            reason: format!("libvirt says {:?}", said.trim()),
        })
    }

    /// Asks the guest to shut down; whether it is off within the limit. Nothing is turned off.
    pub async fn shut_down(&self, id: Uuid, limit: Duration) -> Result<bool> {
        self.of(id, "shutdown", &[]).await?;
        self.wait_off(id, limit).await
    }

    fn console_file(&self, id: Uuid) -> PathBuf {
        self.settings.folder.join(format!("{id}-console.log"))
    }

    async fn make_network(&self, machine: &Machine) -> Result<()> {
        let isolated = |card: &crate::machine::Card| card.network == Network::Isolated;
        if !machine.hardware.cards.iter().any(isolated) {
            return Ok(());
        }
        let name = xml::network_name(machine);
        self.ask(&["net-define", "/dev/stdin"], &xml::network(machine)).await?;
        let info = self.ask(&["net-info", &name], "").await?;
        let active = info.lines().any(|line| line.starts_with("Active:") && line.ends_with("yes"));
        if !active {
            self.ask(&["net-start", &name], "").await?;
        }
        Ok(())
    }

    async fn remove_network(&self, machine: &Machine) {
        let network = xml::network_name(machine);
        // Neither is there where no card was isolated.
        for verb in ["net-destroy", "net-undefine"] {
            if let Err(error) = self.ask(&[verb, &network], "").await {
                tracing::debug!(network, %error, "no network to be removed");
            }
        }
    }

    async fn define_xml(&self, machine: &Machine) -> Result<()> {
        let virt = self.virt().await?;
        let xml = xml::domain(machine, virt, &self.console_file(machine.id))?;
        self.ask(&["define", "/dev/stdin"], &xml).await.map(drop)
    }

    async fn wait_off(&self, id: Uuid, limit: Duration) -> Result<bool> {
        let off = async {
            let mut again = tokio::time::interval(ASK_AGAIN);
            loop {
                again.tick().await;
                if self.power(id).await? == Power::Off {
                    return Ok(());
                }
            }
        };
        match tokio::time::timeout(limit, off).await {
            Ok(off) => off.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    async fn ask_agent(&self, id: Uuid, command: &str, arguments: &Value, limit: Duration) -> Result<Value> {
        let question = json!({ "execute": command, "arguments": arguments }).to_string();
        let seconds = limit.as_secs().max(1).to_string();
        let answer =
            self.of(id, "qemu-agent-command", &["--timeout", &seconds, &question]).await.map_err(
                |error| match error {
                    HypervisorError::Refused { reason, .. } => HypervisorError::Guest { reason },
                    other => other,
                },
            )?;
        let mut answer: Value =
            serde_json::from_str(&answer).map_err(|error| HypervisorError::Guest { reason: error.to_string() })?;
        Ok(answer["return"].take())
    }
}

fn refusal(arguments: &[&str], output: &Output) -> HypervisorError {
    let reason = output.reason();
    if output.stderr.contains("failed to connect to the hypervisor") {
        return HypervisorError::Unreachable { hypervisor: NAME, reason };
    }
    HypervisorError::Refused { what: format!("virsh {}", arguments.first().unwrap_or(&"")), reason }
}

#[async_trait]
impl Hypervisor for Libvirt {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn check(&self) -> Result<About> {
        let version = self.ask(&["version"], "").await?;
        let running = version.lines().find_map(|line| line.strip_prefix("Running hypervisor: "));
        let version = running.unwrap_or_default().trim().to_owned();
        let accelerator = self.virt().await?.to_owned();
        Ok(About { name: NAME, version, accelerator, why: None })
    }

    async fn inventory(&self) -> Result<Vec<Listed>> {
        let text = self.ask(&["list", "--all", "--uuid", "--name"], "").await?;
        let mut all = Vec::new();
        for line in text.lines() {
            let Some((id, name)) = line.trim().split_once(char::is_whitespace) else { continue };
            let Ok(id) = id.parse::<Uuid>() else { continue };
            let power = match self.power(id).await {
                // It was undefined meanwhile.
                Err(HypervisorError::Unknown { .. }) => continue,
                other => other?,
            };
            let ours = self.describe(id).await.is_ok();
            all.push(Listed { id, name: name.trim().to_owned(), power, ours });
        }
        Ok(all)
    }

    async fn power(&self, id: Uuid) -> Result<Power> {
        Ok(match self.of(id, "domstate", &[]).await?.trim() {
            "running" | "idle" | "in shutdown" => Power::On,
            "paused" | "pmsuspended" => Power::Paused,
            "shut off" | "crashed" => Power::Off,
            _ => Power::Unknown,
        })
    }

    async fn define(&self, machine: &Machine) -> Result<()> {
        machine.check()?;
        for listed in self.inventory().await? {
            match listed {
                Listed { id, name, .. } if id != machine.id && name == machine.name => {
                    return Err(HypervisorError::Exists { name, id });
                }
                Listed { id, power: Power::On | Power::Paused, .. } if id == machine.id => {
                    return Err(HypervisorError::Running { id });
                }
                _ => {}
            }
        }
        let made = async {
            self.make_network(machine).await?;
            self.define_xml(machine).await
        };
        let made = made.await;
        if made.is_err() {
            self.remove_network(machine).await;
        }
        made
    }

    async fn describe(&self, id: Uuid) -> Result<Machine> {
        let text = self.of(id, "metadata", &["--uri", xml::METADATA, "--config"]).await?;
        let json = text.split_once('>').and_then(|(_, rest)| rest.rsplit_once("</")).map(|(json, _)| json);
        serde_json::from_str(&xml::unescape(json.unwrap_or_default())).map_err(|error| HypervisorError::Refused {
            what: format!("the description of machine {id}"),
            reason: error.to_string(),
        })
    }

    async fn start(&self, id: Uuid) -> Result<Started> {
        self.of(id, "start", &[]).await?;
        Ok(Started { first_instruction: Instant::now() })
    }

    async fn stop(&self, id: Uuid, shutdown: Option<Duration>) -> Result<Stopped> {
        if self.power(id).await? == Power::Off {
            return Ok(Stopped::WasOff);
        }
        if let Some(limit) = shutdown {
            let told = self.of(id, "shutdown", &[]).await;
            if told.is_ok() && self.wait_off(id, limit).await? {
                return Ok(Stopped::ByGuest);
            }
        }
        match self.of(id, "destroy", &[]).await {
            Ok(_) | Err(HypervisorError::Off { .. }) => Ok(Stopped::TurnedOff),
            Err(error) => Err(error),
        }
    }

    async fn delete(&self, id: Uuid) -> Result<()> {
        let machine = match self.describe(id).await {
            Err(HypervisorError::Unknown { .. }) => return Ok(()),
            // Whose machine it is cannot be told: it stays.
            other => other?,
        };
        self.stop(id, None).await?;
        self.of(id, "undefine", &["--nvram"]).await?;
        self.remove_network(&machine).await;
        match std::fs::remove_file(self.console_file(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(store("the console's log")(error)),
            _ => Ok(()),
        }
    }

    async fn networks(&self) -> Result<Vec<String>> {
        let names = self.ask(&["net-list", "--all", "--name"], "").await?;
        let named = names.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned);
        Ok(std::iter::once("isolated".to_owned()).chain(named).collect())
    }

    async fn move_disk(&self, id: Uuid, disk: usize, to: &Place, limit: Duration) -> Result<()> {
        let mut machine = self.describe(id).await?;
        if disk >= machine.disks.len() {
            let reason = format!("it has {} disks", machine.disks.len());
            return Err(HypervisorError::Refused { what: format!("the move of disk {disk}"), reason });
        }
        let (id_text, target) = (id.to_string(), xml::target(&machine, disk)?);
        let xml = xml::disk(&machine, disk, to, false)?;
        let seconds = limit.as_secs().max(1).to_string();
        let arguments = [
            "blockcopy",
            &id_text,
            &target,
            "--xml",
            "/dev/stdin",
            "--reuse-external",
            "--transient-job",
            "--synchronous-writes",
            "--wait",
            "--timeout",
            &seconds,
        ];
        // Its own time-out first, which ends the copy; then ours.
        let output = self.virsh(&arguments, &xml, limit + LIMIT).await?;
        if output.code != 0 {
            return Err(refusal(&arguments, &output));
        }
        // Both places are the same from here on. The description first: a crash before the pivot starts from the new one.
        let before = std::mem::replace(&mut machine.disks[disk], to.clone());
        let defined = self.define_xml(&machine).await;
        let arguments = match &defined {
            Ok(()) => ["blockjob", &id_text, &target, "--pivot"],
            Err(_) => ["blockjob", &id_text, &target, "--abort"],
        };
        let output = self.virsh(&arguments, "", LIMIT).await?;
        defined?;
        if output.code != 0 {
            machine.disks[disk] = before;
            self.define_xml(&machine).await?;
            return Err(refusal(&arguments, &output));
        }
        Ok(())
    }

    async fn events(&self, _: Uuid) -> Result<broadcast::Receiver<Event>> {
        Err(HypervisorError::Unsupported { hypervisor: NAME, what: "tell events by virsh" })
    }

    async fn console(&self, id: Uuid, from: u64) -> Result<Console> {
        use std::os::unix::fs::FileExt;
        let file = match std::fs::File::open(self.console_file(id)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Console::default()),
            other => other.map_err(store("the console's log"))?,
        };
        let end = file.metadata().map_err(store("the console's log"))?.len();
        let from = from.max(end.saturating_sub(CONSOLE_READ_MAX)).min(end);
        let mut bytes = vec![0; (end - from) as usize];
        file.read_exact_at(&mut bytes, from).map_err(store("the console's log"))?;
        Ok(Console { from, bytes })
    }

    async fn screenshot(&self, id: Uuid, to: &Path) -> Result<()> {
        self.of(id, "screenshot", &[&to.to_string_lossy()]).await.map(drop)
    }

    async fn reach(&self, _: Uuid, _: u16) -> Result<SocketAddr> {
        Err(HypervisorError::Unsupported { hypervisor: NAME, what: "reach a port of an isolated guest" })
    }

    async fn ask_guest(&self, id: Uuid, question: Question, limit: Duration) -> Result<Value> {
        let (command, arguments) = guest::command_of(&question);
        if question == Question::Shutdown {
            return self.of(id, "shutdown", &["--mode", "agent"]).await.map(|_| Value::Null);
        }
        let answer = self.ask_agent(id, command, &arguments, limit).await?;
        if !matches!(question, Question::Run { .. }) {
            return Ok(answer);
        }
        let status = json!({ "pid": answer["pid"] });
        let ended = async {
            let mut again = tokio::time::interval(ASK_AGAIN);
            loop {
                again.tick().await;
                let answer = self.ask_agent(id, "guest-exec-status", &status, limit).await?;
                if answer["exited"] == true {
                    return Ok(answer);
                }
            }
        };
        let late = || HypervisorError::Guest { reason: format!("the program did not end within {limit:?}") };
        tokio::time::timeout(limit, ended).await.map_err(|_| late())?
    }
}
