//! Who runs a machine at its home, as an administrator of its host wrote down in `owner.d/<machine>/`: it is asked to shut the
//! machine down before a planned failover, and to start it when it comes back. Where nothing is written down, as for physical
//! servers, the machine is only kept from its disks.
//!
//! | there is | runs it |
//! |---|---|
//! | `owner.toml`: `[qemu]` | a QEMU that somebody else started: its guest agent is asked, or else its power button is pressed |
//! | `owner.toml`: `[libvirt]` | libvirt |
//! | `stop`, `power`, `start` | these programs ([`tidemark_hypervisor::scripts`]) |
//!
//! ```toml
//! [qemu]
//! qmp = "/run/shop/qmp.sock"
//! guest-agent = "/run/shop/guest-agent.sock"   # absent: the power button alone
//! ```
//!
//! ```toml
//! [libvirt]
//! domain = "shop"
//! uri = "qemu:///system"                       # absent: this one
//! ```
//!
//! *Consistency*, *Retries*, *Cancellation*, *Crash.* As [`tidemark_hypervisor::owner`] says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tidemark_base::trust::folder_of;
use tidemark_host::freeze::check_owner;
use tidemark_hypervisor::call::{Asked, OwnerAnswer, OwnerCall, decode, encode};
use tidemark_hypervisor::hypervisor::{Power, Stopped};
use tidemark_hypervisor::libvirt::LibvirtSettings;
use tidemark_hypervisor::owner::Owner;
use tidemark_proto::control::{Failure, FailureKind};
use uuid::Uuid;

use super::machines::failed;

const SETTINGS: &str = "owner.toml";

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Settings {
    qemu: Option<QemuOwner>,
    libvirt: Option<LibvirtOwner>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QemuOwner {
    qmp: PathBuf,
    #[serde(default)]
    guest_agent: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct LibvirtOwner {
    domain: String,
    #[serde(default = "system")]
    uri: String,
}

fn system() -> String {
    "qemu:///system".to_owned()
}

pub struct Owners {
    folder: PathBuf,
}

impl Owners {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The answer to a call of the control plane.
    pub async fn execute(&self, call: &str) -> Result<String, Failure> {
        let call: OwnerCall = decode(call).map_err(|error| {
            Failure::new(FailureKind::BadRequest, error.to_string(), "let both ends be of the same version")
        })?;
        let Some(owner) = self.find(&call)? else {
            return Ok(encode(&OwnerAnswer { owner: None, power: Power::Unknown, stopped: None }));
        };
        let said = Some(owner.name().to_owned());
        let answer = match call.what {
            Asked::Power => OwnerAnswer { owner: said, power: owner.power().await.map_err(failed)?, stopped: None },
            Asked::ShutDown { limit_seconds, turn_off } => {
                let stopped = shut_down(&owner, &call.name, Duration::from_secs(limit_seconds), turn_off).await?;
                OwnerAnswer { owner: said, power: Power::Off, stopped: Some(stopped) }
            }
            Asked::Start => {
                if owner.power().await.map_err(failed)? == Power::Off {
                    owner.start().await.map_err(failed)?;
                }
                OwnerAnswer { owner: said, power: Power::On, stopped: None }
            }
        };
        Ok(encode(&answer))
    }

    fn find(&self, call: &OwnerCall) -> Result<Option<Owner>, Failure> {
        let name = &call.name;
        // Names of machines are plain words: the configuration server sees to that.
        let folder = folder_of(&self.folder, name);
        let folder = folder.ok_or_else(|| wrong(Path::new(name), "that is no name of a machine"))?;
        if !folder.exists() {
            return Ok(None);
        }
        let path = folder.join(SETTINGS);
        // Whoever can change it can have programs run as the agent.
        for path in [&self.folder, &folder].into_iter().chain(path.exists().then_some(&path)) {
            check_owner(path).map_err(|error| Failure::from_error(FailureKind::Conflict, &error, error.help()))?;
        }
        if !path.exists() {
            let id = Uuid::from_bytes(*call.machine.as_bytes());
            return Ok(Some(Owner::Programs { folder, id }));
        }
        let text = std::fs::read_to_string(&path).map_err(|error| wrong(&path, &error.to_string()))?;
        let settings: Settings =
            toml::from_str(&text).map_err(|error| wrong(&path, &super::settings_in_words(&text, &error)))?;
        match settings {
            Settings { qemu: Some(QemuOwner { qmp, guest_agent }), libvirt: None } => {
                Ok(Some(Owner::Qemu { qmp, guest_agent }))
            }
            Settings { qemu: None, libvirt: Some(LibvirtOwner { domain, uri }) } => {
                let settings = LibvirtSettings::new(uri, folder);
                Ok(Some(Owner::Libvirt { settings, domain }))
            }
            _ => Err(wrong(&path, "it names not one of [qemu] and [libvirt]")),
        }
    }
}

fn wrong(path: &Path, reason: &str) -> Failure {
    Failure::new(
        FailureKind::Conflict,
        format!("who runs the machine cannot be read from {}: {reason}", path.display()),
        "mend it on the machine's host; without its folder the machine is only kept from its disks",
    )
}

async fn shut_down(owner: &Owner, name: &str, limit: Duration, turn_off: bool) -> Result<Stopped, Failure> {
    if let Some(stopped) = owner.shut_down(limit).await.map_err(failed)? {
        return Ok(stopped);
    }
    if !turn_off {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("the guest of machine {name:?} did not shut down within {} s", limit.as_secs()),
            "see what keeps it, give it longer (--shutdown-limit), or have it turned off then (--turn-off)",
        ));
    }
    tracing::warn!(machine = name, ?limit, "the guest did not shut down and is turned off");
    owner.turn_off().await.map_err(failed)?;
    Ok(Stopped::TurnedOff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tidemark_base::MachineId;

    fn install(path: &Path, content: &str) {
        std::io::Write::write_all(&mut std::fs::File::create(path).unwrap(), content.as_bytes()).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
    }

    async fn ask(owners: &Owners, name: &str, what: Asked) -> Result<OwnerAnswer, Failure> {
        let call = OwnerCall { machine: MachineId::random(), name: name.to_owned(), what };
        owners.execute(&encode(&call)).await.map(|answer| decode(&answer).unwrap())
    }

    #[tokio::test]
    async fn a_guest_that_does_not_shut_down_is_refused_or_turned_off_and_who_runs_it_is_written_down_safely() {
        let top = tempfile::tempdir().unwrap();
        let owners = Owners::new(top.path().join("owner.d"));
        let patient = Asked::ShutDown { limit_seconds: 1, turn_off: false };
        let nobody = ask(&owners, "web", patient).await.unwrap();
        assert_eq!((nobody.owner, nobody.stopped), (None, None), "nothing is written down");
        let folder = top.path().join("owner.d/web");
        std::fs::create_dir_all(&folder).unwrap();
        for folder in [&folder, &top.path().join("owner.d")] {
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        let said = top.path().join("said");
        install(
            &folder.join("stop"),
            &format!("#!/bin/sh\ngrep -o '\"turn_off\":false' >> {} || echo off >> {0}\n", said.display()),
        );
        let refused = ask(&owners, "web", patient).await.unwrap_err();
        assert!(refused.message.contains("within 1 s") && refused.help.contains("--turn-off"), "{refused}");
        assert_eq!(std::fs::read_to_string(&said).unwrap(), "\"turn_off\":false\n", "it was asked, and left on");
        let stopped = ask(&owners, "web", Asked::ShutDown { limit_seconds: 1, turn_off: true }).await.unwrap();
        assert_eq!((stopped.owner.as_deref(), stopped.stopped), (Some("scripts"), Some(Stopped::TurnedOff)));
        assert!(std::fs::read_to_string(&said).unwrap().ends_with("off\n"));
        // One that is on is not started again.
        install(&folder.join("power"), "#!/bin/sh\necho '{\"power\": \"on\"}'\n");
        install(&folder.join("start"), &format!("#!/bin/sh\necho started >> {}\n", said.display()));
        ask(&owners, "web", Asked::Start).await.unwrap();
        assert!(!std::fs::read_to_string(&said).unwrap().contains("started"));
        install(&folder.join("power"), "#!/bin/sh\necho '{\"power\": \"off\"}'\n");
        ask(&owners, "web", Asked::Start).await.unwrap();
        assert!(std::fs::read_to_string(&said).unwrap().contains("started"));

        for text in ["[qemu]\n", "[xen]\n", "", "[qemu]\nqmp = \"/q\"\n[libvirt]\ndomain = \"web\"\n"] {
            install(&folder.join(SETTINGS), text);
            let wrong = ask(&owners, "web", Asked::Power).await.unwrap_err();
            assert!(wrong.message.contains("owner.toml"), "{text}: {wrong}");
        }
        install(&folder.join(SETTINGS), "[qemu]\nqmp = \"/nowhere/qmp.sock\"\n");
        let gone = ask(&owners, "web", Asked::Power).await;
        assert!(gone.is_ok_and(|answer| answer.power == Power::Off) || !Path::new("/nowhere").exists());
        std::fs::set_permissions(folder.join(SETTINGS), std::fs::Permissions::from_mode(0o722)).unwrap();
        assert!(ask(&owners, "web", Asked::Power).await.unwrap_err().message.contains("others may write it"));
        for name in ["", "..", "a/b"] {
            assert!(ask(&owners, name, Asked::Power).await.is_err(), "{name:?}");
        }
    }
}
