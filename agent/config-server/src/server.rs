//! The role as a whole: start, addresses, stop.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tidemark_base::storage::Storage;
use tidemark_transport::{Identity, TlsListener, tls};
use tokio::task::JoinHandle;

use crate::api::{Token, router};
use crate::core::Core;
use crate::hub::{Hub, control_server};
use crate::jobs::Jobs;
use crate::store::{Store, StoreError};
use crate::{api, reconcile, serves};

pub struct Options {
    /// Holds the state.
    pub storage: Arc<dyn Storage>,
    pub identity: Identity,
    /// As agents and process servers are told.
    pub name: String,
    /// The bearer token of the REST API.
    pub token: String,
    /// Where the REST API listens; port 0: any.
    pub api: SocketAddr,
    /// Where agents and process servers dial; port 0: any.
    pub control: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the server's certificate cannot be used: {0}")]
    Certificate(String),
}

impl StartError {
    pub fn help(&self) -> &'static str {
        match self {
            StartError::Store(error) => error.help(),
            StartError::Listen { .. } => "choose an address of this machine and a free port; port 0 takes any free one",
            StartError::Certificate(_) => "issue a new certificate for the configuration server",
        }
    }
}

/// A running configuration server.
pub struct ConfigServer {
    core: Arc<Core>,
    api: SocketAddr,
    control: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
}

impl ConfigServer {
    /// Answers on both addresses when this returns.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let (hub, events) = Hub::new();
        let core = Core::new(Store::open(options.storage.clone())?, hub.clone(), Jobs::open(options.storage));
        let api_config =
            tls::api_server(&options.identity).map_err(|error| StartError::Certificate(error.to_string()))?;
        let control_config =
            tls::mutual_server(&options.identity).map_err(|error| StartError::Certificate(error.to_string()))?;
        let api_listener = TlsListener::bind(options.api, api_config)
            .await
            .map_err(|source| StartError::Listen { address: options.api, source })?;
        let control_listener = TlsListener::bind(options.control, control_config)
            .await
            .map_err(|source| StartError::Listen { address: options.control, source })?;
        let (api, control) = (api_listener.local_address(), control_listener.local_address());

        let router = router(core.clone(), Token::new(&options.token));
        let service = control_server(hub, options.name);
        let stop = core.stop.clone();
        let tasks = vec![
            tokio::spawn(reconcile::run(core.clone(), events)),
            tokio::spawn(serves::sweep(core.clone())),
            tokio::spawn(api::serve(api_listener, router, stop.clone())),
            tokio::spawn(async move {
                let stopped = stop.cancelled_owned();
                if let Err(error) = tidemark_transport::serve(control_listener, service, stopped).await {
                    tracing::error!(%error, "the control service ended");
                }
            }),
        ];
        let saving = tokio::spawn({
            let (jobs, stop) = (core.jobs.clone(), core.stop.clone());
            async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = jobs.clone().keep_saved() => {}
                }
                jobs.save();
            }
        });
        tracing::info!(%api, %control, "the configuration server is up");
        Ok(Self { core, api, control, tasks: tasks.into_iter().chain([saving]).collect() })
    }

    pub fn api_address(&self) -> SocketAddr {
        self.api
    }

    pub fn control_address(&self) -> SocketAddr {
        self.control
    }

    /// Waits until so many peers are connected and were told everything that concerns them.
    pub async fn wait_settled(&self, peers: usize) {
        let mut settled = self.core.settled_peers.subscribe();
        // The sender lives as long as the server.
        let _ = settled.wait_for(|settled| settled.len() >= peers).await;
    }

    /// Ends everything; streams and requests have a short time to finish.
    pub async fn stop(self) {
        self.core.stop.cancel();
        for task in self.tasks {
            let _ = task.await;
        }
    }
}
