//! The configuration server as a process runs it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tidemark_base::storage::Storage;
use tidemark_config_server::{ConfigServer, Options, StartError};
use tidemark_transport::{Identity, Role};

use super::RoleError;
use crate::folder::{ConfigServerAddresses, Folder, RoleLock};

pub struct RunningConfigServer {
    pub server: ConfigServer,
    pub addresses: ConfigServerAddresses,
    _lock: RoleLock,
}

/// Starts the role in an all-in-one's folder. Ports that were used before are used again where they are free.
pub async fn start(
    folder: &Folder,
    listen: Option<SocketAddr>,
    control_listen: Option<SocketAddr>,
) -> Result<RunningConfigServer, RoleError> {
    let lock = folder.lock(Role::ConfigServer)?;
    let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    let (wanted, control_wanted) = (listen.unwrap_or(loopback), control_listen.unwrap_or(loopback));
    let mut hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    if !wanted.ip().is_unspecified() && !hosts.contains(&wanted.ip().to_string()) {
        hosts.push(wanted.ip().to_string());
    }
    let identity = folder.identity(Role::ConfigServer, &hosts)?;
    let token = folder.token()?;
    let before = folder.config_server()?;
    let again = |wanted: SocketAddr, before: Option<SocketAddr>| match before {
        Some(before) if wanted.port() == 0 && before.ip() == wanted.ip() => before,
        _ => wanted,
    };
    let api = again(wanted, before.map(|before| before.api));
    let control = again(control_wanted, before.map(|before| before.control));
    let storage = folder.role(Role::ConfigServer);
    let server = match try_start(&storage, &identity, &token, api, control).await {
        // Someone else took a port meanwhile.
        Err(StartError::Listen { .. }) if (api, control) != (wanted, control_wanted) => {
            try_start(&storage, &identity, &token, wanted, control_wanted).await?
        }
        other => other?,
    };
    let addresses = ConfigServerAddresses { api: server.api_address(), control: server.control_address() };
    folder.note_config_server(&addresses)?;
    Ok(RunningConfigServer { server, addresses, _lock: lock })
}

async fn try_start(
    storage: &Arc<dyn Storage>,
    identity: &Identity,
    token: &str,
    api: SocketAddr,
    control: SocketAddr,
) -> Result<ConfigServer, StartError> {
    ConfigServer::start(Options {
        storage: storage.clone(),
        identity: identity.clone(),
        name: super::host_name(),
        token: token.to_owned(),
        api,
        control,
    })
    .await
}
