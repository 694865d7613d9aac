//! Registering a host or a process server: its key stays here, the passphrase goes to the right server only.
//!
//! *Consistency.* The server is known by the fingerprint of its authority before anything is sent. The key is on disk before
//! the first request, so that one whose answer was lost is repeated with the same key and answered the same. *Retries.*
//! While an operator must approve, every [`ASK_EVERY`]. *Cancellation.* Asking again goes on where it was left. *Crash.* As
//! cancellation; the identity is written as a whole.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::storage::{RealStorage, Storage, create_private_folder, read_file, replace_file};
use tidemark_base::{Clock, SystemClock};
use tidemark_transport::{Identity, KeyRequest, PeerIdentity, Role};

use super::RoleError;
use super::place::IDENTITY_FILE;
use crate::client::Client;

/// The key of a registration that is not complete.
const KEY_FILE: &str = "registering.pem";
/// Where the configuration server was at the registration.
const ADDRESS_FILE: &str = "config-server.json";
const CA_FILE: &str = "ca.pem";
const SMALL_FILE_BYTES_MAX: u64 = 64 << 10;
const ASK_EVERY: Duration = Duration::from_secs(1);

pub struct Registration {
    pub role: Role,
    /// https://HOST:PORT of the API.
    pub server: String,
    pub passphrase: String,
    /// Of the authority, as `config-server init` printed it.
    pub fingerprint: String,
    /// As people know this machine.
    pub name: String,
    /// The role's own folder.
    pub dir: PathBuf,
    /// Whether to wait for the approval.
    pub wait: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Registered {
        identity: PeerIdentity,
        control: String,
    },
    /// Somebody must approve; registering again asks again.
    Waiting {
        registration: String,
    },
}

/// What a role that registered starts with.
#[derive(Serialize, Deserialize)]
pub struct Registered {
    /// Where it dials the configuration server.
    pub control: String,
    /// As people know it; absent where an earlier version registered.
    #[serde(default)]
    pub name: Option<String>,
}

pub fn registered(dir: &Path) -> Option<Registered> {
    let content = std::fs::read(dir.join(ADDRESS_FILE)).ok()?;
    serde_json::from_slice(&content).ok()
}

/// `tell` hears, once, that an approval is waited for.
pub async fn register(registration: Registration, tell: impl Fn(&str)) -> Result<Outcome, RoleError> {
    let Registration { role, server, passphrase, fingerprint, name, dir, wait } = registration;
    let unusable = |error: io::Error| RoleError {
        message: format!("cannot use the folder {}: {error}", dir.display()),
        help: "name a folder of its own that this user can write".to_owned(),
    };
    create_private_folder(&dir).map_err(unusable)?;
    let storage: Arc<dyn Storage> = RealStorage::open_folder(&dir);
    if storage.exists(IDENTITY_FILE).map_err(unusable)? {
        let known = Identity::load(&*storage, IDENTITY_FILE).map(|identity| identity.peer().to_string());
        return Err(RoleError {
            message: format!(
                "{} is registered already, as {}",
                dir.display(),
                known.unwrap_or_else(|_| "somebody".to_owned())
            ),
            help: format!("to register again, move {IDENTITY_FILE} away first"),
        });
    }
    let wrong = |error: tidemark_transport::IdentityError| RoleError::new(&error, error.help());
    let request = match storage.exists(KEY_FILE).map_err(unusable)? {
        true => {
            let pem = read_file(&*storage, KEY_FILE, SMALL_FILE_BYTES_MAX).map_err(unusable)?;
            KeyRequest::from_key_pem(&String::from_utf8_lossy(&pem)).map_err(wrong)?
        }
        false => {
            let request = KeyRequest::new().map_err(wrong)?;
            replace_file(&*storage, KEY_FILE, request.key_pem().as_bytes()).map_err(unusable)?;
            request
        }
    };
    let asked = hex(request.request());
    let (client, shown) =
        Client::registering(&server, &fingerprint).map_err(|error| RoleError::new(&error, error.help()))?;
    let mut is_told = false;
    let mut asks = tokio::time::interval(ASK_EVERY);
    asks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let answer = loop {
        asks.tick().await;
        let body = json!({
            "role": role.to_string(),
            "name": name,
            "passphrase": passphrase.trim(),
            "request": asked,
            "time": SystemClock::new().wall_now(),
        });
        let answer = client.post("/register", &body).await.map_err(|error| RoleError::new(&error, error.help()))?;
        if answer["state"] != "waiting" {
            break answer;
        }
        let id = answer["registration"].as_str().unwrap_or_default().to_owned();
        if !wait {
            return Ok(Outcome::Waiting { registration: id });
        }
        if !is_told {
            tell(&format!("waiting for approval: tidemark process-server approve {id}"));
            is_told = true;
        }
    };
    let (certificate, port) = issued(&answer).ok_or_else(|| RoleError {
        message: format!("the configuration server at {server} gave an answer that makes no sense"),
        help: "run the same version of Tidemark everywhere".to_owned(),
    })?;
    let authority = shown.get().ok_or_else(|| RoleError {
        message: "the configuration server showed no authority".to_owned(),
        help: "run the same version of Tidemark everywhere".to_owned(),
    })?;
    let identity = request.complete(&certificate, authority).map_err(wrong)?;
    if identity.peer().role() != role {
        return Err(RoleError {
            message: format!("the configuration server issued a certificate for {}", identity.peer()),
            help: "run the same version of Tidemark everywhere".to_owned(),
        });
    }
    let control = format!("{}:{port}", client.host());
    let address = Registered { control: control.clone(), name: Some(name) };
    let address = serde_json::to_vec(&address).expect("an address is plain data");
    replace_file(&*storage, ADDRESS_FILE, &address).map_err(unusable)?;
    replace_file(&*storage, CA_FILE, identity.authority_pem().as_bytes()).map_err(unusable)?;
    identity.save(&*storage, IDENTITY_FILE).map_err(wrong)?;
    // It is in the identity now.
    storage.remove(KEY_FILE).map_err(unusable)?;
    Ok(Outcome::Registered { identity: identity.peer(), control })
}

fn issued(answer: &Value) -> Option<(Vec<u8>, u16)> {
    let text = answer["certificate"].as_str().filter(|text| text.len().is_multiple_of(2) && text.is_ascii())?;
    let certificate: Option<Vec<u8>> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect();
    Some((certificate?, u16::try_from(answer["control_port"].as_u64()?).ok()?))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
