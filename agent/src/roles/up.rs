//! All roles in one process, talking to each other exactly as they would apart.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tidemark_config_server::identity::PassphraseRequest;
use tidemark_config_server::model::PeerRole;
use tidemark_proto::control::Failure;
use tidemark_transport::Role;

use super::place::Place;
use super::register::{Outcome, Registration, register};
use super::{RoleError, agent, config_server, process_server};
use crate::folder::Folder;

/// How long the roles may take to find each other. Re-attaching disks after a crash reads what was written last.
const READY_LIMIT: Duration = Duration::from_secs(120);

pub struct Up {
    config_server: config_server::RunningConfigServer,
    process_server: process_server::RunningProcessServer,
    agent: agent::RunningAgent,
}

impl Up {
    /// Returns when everything answers.
    pub async fn start(folder: &Folder, listen: Option<SocketAddr>) -> Result<Self, RoleError> {
        // All locks first: whether the folder is in use is said before anything is begun.
        let locks = (folder.lock(Role::Agent)?, folder.lock(Role::ProcessServer)?);
        if tidemark_config_server::backup::keeper(&*folder.role(Role::ConfigServer))?.is_none() {
            // Nobody sees this start: it is kept beside what it opens until somebody moves it away.
            folder.keep_recovery_key(&config_server::new_recovery_key(folder)?.text())?;
        }
        let settings = config_server::Settings { listen, ..config_server::Settings::default() };
        let config_server = config_server::start(folder, settings).await?;
        for role in [Role::ProcessServer, Role::Agent] {
            if !folder.has_identity(role)? {
                enrol(folder, &config_server, role).await?;
            }
        }
        drop(locks);
        let (agent_place, server_place) =
            (Place::in_folder(folder, Role::Agent)?, Place::in_folder(folder, Role::ProcessServer)?);
        let process_server = process_server::start(server_place).await?;
        let agent = agent::start(agent_place).await?;
        let up = Self { config_server, process_server, agent };
        if tokio::time::timeout(READY_LIMIT, up.config_server.server.wait_settled(2)).await.is_err() {
            up.stop().await;
            return Err(RoleError {
                message: "the roles did not find each other in time".to_owned(),
                help: "see the log; a busy machine may need another try".to_owned(),
            });
        }
        Ok(up)
    }

    /// What `up` prints, once.
    pub fn ready_line(&self, folder: &Folder) -> String {
        let api = format!("https://{}", self.config_server.addresses.api);
        let ready = json!({
            "console": format!("{api}/"),
            "api": format!("{api}/api/v1"),
            "token_file": folder.token_file(),
            "ca_file": folder.ca_file(),
        });
        format!("ready {ready}")
    }

    /// Agents first: what they hold is flushed while the others still listen.
    pub async fn stop(self) {
        self.agent.stop().await;
        self.process_server.stop().await;
        self.config_server.server.stop().await;
    }
}

/// Registers a role as on a machine of its own: with a passphrase, over TLS, and with an approval where one is needed.
async fn enrol(
    folder: &Folder,
    config_server: &config_server::RunningConfigServer,
    role: Role,
) -> Result<(), RoleError> {
    let registrar = config_server.server.registrar().clone();
    let fingerprint = registrar.fingerprint();
    let request = PassphraseRequest {
        role: if role == Role::Agent { PeerRole::Agent } else { PeerRole::ProcessServer },
        lifetime_seconds: 600,
        uses: 1,
        replaces: None,
    };
    let made = {
        let registrar = registrar.clone();
        blocking(move || registrar.create_passphrase(&request)).await?
    };
    let registration = |wait| Registration {
        role,
        server: format!("https://{}", config_server.addresses.api),
        passphrase: made.passphrase.clone().unwrap_or_default(),
        fingerprint: fingerprint.clone(),
        name: super::plain_host_name(),
        dir: folder.role_path(role),
        wait,
    };
    if let Outcome::Waiting { registration: id } = register(registration(false), |_| ()).await? {
        // Whoever may start everything here may approve it as well.
        blocking(move || registrar.decide(&id, true, None)).await?;
        register(registration(true), |_| ()).await?;
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, RoleError> {
    let failed = |error: tokio::task::JoinError| RoleError { message: error.to_string(), help: "see the log".into() };
    Ok(tokio::task::spawn_blocking(work).await.map_err(failed)??)
}
