//! All roles in one process, talking to each other exactly as they would apart.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tidemark_transport::Role;

use super::place::Place;
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
        // All places first: whether the folder is in use is said before anything is begun.
        let (agent_place, server_place) =
            (Place::in_folder(folder, Role::Agent)?, Place::in_folder(folder, Role::ProcessServer)?);
        let config_server = config_server::start(folder, listen, None).await?;
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
