//! A role's place in the folder of an all-in-one.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tidemark_transport::Role;

use super::{Place, RoleError};
use crate::folder::Folder;

impl Place {
    pub fn in_folder(folder: &Folder, role: Role) -> Result<Self, RoleError> {
        let lock = folder.lock(role)?;
        let identity = folder.identity(role, &[])?;
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
        let (asking, noting) = (folder.clone(), folder.clone());
        Ok(Self {
            identity,
            name: crate::roles::host_name(),
            state: folder.role_path(role),
            run: folder.path().join("run"),
            listen: folder.process_server()?.unwrap_or(loopback),
            metrics: None,
            // It may move while we run.
            config_server: Arc::new(move || Some(asking.config_server().ok()??.control.to_string())),
            note: Some(Box::new(move |address| Ok(noting.note_process_server(address)?))),
            _lock: Some(Box::new(lock)),
        })
    }
}
