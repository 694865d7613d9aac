//! The role as a whole: start, addresses, stop.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::storage::Storage;
use tidemark_proto::control::{ADDRESSES_MAX, Failure, Severity, Whereabouts};
use tidemark_proto::health::{Serving, health_server};
use tidemark_transport::{Authority, ByPath, Identity, PeerIdentity, TlsListener, tls};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api::{Access, router};
use crate::backup::{self, BackupOptions, Backups};
use crate::core::Core;
use crate::database::{Database, DatabaseError, DatabaseSetting};
use crate::history::{History, News};
use crate::hub::{Hub, control_server};
use crate::identity::{PassphraseRequest, Registrar};
use crate::installation::{self, InstallationError};
use crate::jobs::Jobs;
use crate::model::PeerRole;
use crate::store::{Store, StoreError};
use crate::{alerts, announce, api, deliver, denials, plans, reconcile, serves};

/// How often it is looked whether the database answers.
const HEALTH_EVERY: Duration = Duration::from_secs(5);

pub struct Options {
    /// Holds the state of older versions, and the embedded database.
    pub storage: Arc<dyn Storage>,
    pub database: DatabaseSetting,
    pub identity: Identity,
    /// Issues certificates.
    pub authority: Authority,
    /// As agents and process servers are told.
    pub name: String,
    /// The bearer token of the REST API, as `token` in `storage` holds it.
    pub token: String,
    /// Key and certificate of the authority, PEM, for backups.
    pub authority_pem: String,
    /// Names and addresses under which agents and process servers reach it; none: its control address.
    pub reached_at: Vec<String>,
    /// Where the REST API listens; port 0: any.
    pub api: SocketAddr,
    /// Where agents and process servers dial; port 0: any.
    pub control: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Installation(#[from] InstallationError),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Passphrase(Failure),
    #[error(transparent)]
    Backup(Failure),
    #[error("the server's certificate cannot be used: {0}")]
    Certificate(String),
}

impl StartError {
    pub fn help(&self) -> &'static str {
        match self {
            StartError::Store(error) => error.help(),
            StartError::Database(error) => error.help(),
            StartError::Installation(error) => error.help(),
            StartError::Listen { .. } => "choose an address of this machine and a free port; port 0 takes any free one",
            StartError::Passphrase(_) => "see the log",
            StartError::Backup(_) => "make a new recovery key: `tidemark config-server recovery-key`",
            StartError::Certificate(_) => "issue a new certificate for the configuration server",
        }
    }
}

/// The first set-up: a database, and a passphrase for an agent and one for a process server. Blocks.
pub fn init(storage: &dyn Storage, setting: &DatabaseSetting, authority: Authority) -> Result<[String; 2], StartError> {
    let database = Database::open(setting)?;
    let made = first_passphrases(storage, database.clone(), authority);
    database.close();
    made
}

fn first_passphrases(
    storage: &dyn Storage,
    database: Database,
    authority: Authority,
) -> Result<[String; 2], StartError> {
    let fingerprint = authority.fingerprint();
    installation::check(&database, storage, &fingerprint)?;
    let history = Arc::new(History::open(database.clone())?);
    let store = Arc::new(Store::open(database.clone(), storage)?);
    installation::note(&database, storage, &fingerprint)?;
    let registrar = Registrar::new(store, history, authority);
    let make = |role| -> Result<String, StartError> {
        let request = PassphraseRequest { role, lifetime_seconds: 86_400, uses: 1, replaces: None };
        let made = registrar.create_passphrase(&request).map_err(StartError::Passphrase)?;
        Ok(made.passphrase.unwrap_or_default())
    };
    Ok([make(PeerRole::Agent)?, make(PeerRole::ProcessServer)?])
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
        let database_setting = options.database.clone();
        let database = blocking(move || Database::open(&database_setting)).await??;
        // Everything that was opened is closed again when the rest cannot be.
        let started = Self::start_with(options, database.clone()).await;
        if started.is_err() {
            let _ = blocking(move || database.close()).await;
        }
        started
    }

    async fn start_with(options: Options, database: Database) -> Result<Self, StartError> {
        let storage = options.storage.clone();
        let access = Access::new(&options.token, storage.clone());
        let folder = storage.path("");
        let backup_options = BackupOptions {
            authority: options.authority_pem,
            fingerprint: options.authority.fingerprint(),
            token: options.token.clone(),
            name: options.name.clone(),
        };
        let fingerprint = options.authority.fingerprint();
        let opened = blocking(move || -> Result<_, StartError> {
            installation::check(&database, &*storage, &fingerprint)?;
            let history = Arc::new(History::open(database.clone())?);
            let jobs = Jobs::open(database.clone(), history.clone(), &*storage)?;
            let store = Arc::new(Store::open(database.clone(), &*storage)?);
            installation::note(&database, &*storage, &fingerprint)?;
            api::repeat::forget_secrets(&database)?;
            let incarnation = backup::content::incarnation(&database)?;
            if let Some(restored) = backup::content::take_restored(&database)? {
                history.note(News {
                    severity: Severity::Warning,
                    kind: "configuration_restored",
                    machine: None,
                    message: format!("the configuration was restored {restored}"),
                    help: "what was changed after that backup is not known here: protect again what is missing, and \
                           revoke again what was revoked"
                        .to_owned(),
                });
            }
            let backups = Backups::open(storage, database, backup_options, incarnation).map_err(StartError::Backup)?;
            Ok((store, history, jobs, backups, incarnation))
        });
        let (store, history, jobs, backups, incarnation) = opened.await??;
        let registrar = Arc::new(Registrar::new(store.clone(), history.clone(), options.authority));
        let (hub, events) = Hub::new(registrar.clone());
        let core = Core::new(store, hub.clone(), jobs, history, registrar, backups);
        core.set_folder(folder);
        if let Err(failure) = plans::interrupt(&core) {
            tracing::error!(%failure, "runs of plans that an earlier process left cannot be noted");
        }
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

        let addresses = match options.reached_at.as_slice() {
            [] => vec![control.to_string()],
            names => names.iter().map(|name| with_port(name, control.port())).collect(),
        };
        let addresses = addresses.into_iter().take(ADDRESSES_MAX).collect();
        if let PeerIdentity::ConfigServer(server) = options.identity.peer() {
            hub.set_whereabouts(Whereabouts { incarnation, server, addresses });
        }
        let (serving_sender, serving) = watch::channel(serving(true));

        let router = router(core.clone(), access, control.port());
        let service = control_server(hub, options.name);
        let service = ByPath::new("/grpc.health.v1.Health/", health_server(serving), service);
        let stop = core.stop.clone();
        let tasks = vec![
            tokio::spawn(reconcile::run(core.clone(), events)),
            tokio::spawn(serves::sweep(core.clone())),
            tokio::spawn(alerts::watch(core.clone())),
            tokio::spawn(denials::push(core.clone())),
            tokio::spawn(crate::disks::watch(core.clone())),
            tokio::spawn(crate::groups::watch::watch(core.clone())),
            tokio::spawn(backup::run(core.clone())),
            tokio::spawn(announce::run(core.clone(), options.identity.clone())),
            tokio::spawn(look_after_health(core.clone(), serving_sender)),
            tokio::spawn(deliver::run(core.clone())),
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
                let _ = tokio::task::spawn_blocking(move || jobs.save()).await;
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
        // What still runs finds it closed; another process may open it now.
        let database = self.core.store.database().clone();
        let _ = blocking(move || database.close()).await;
    }

    pub fn registrar(&self) -> &Arc<Registrar> {
        &self.core.registrar
    }
}

/// HOST:PORT, also of an IPv6 address.
fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{}]:{port}", host.trim_matches(['[', ']'])) } else { format!("{host}:{port}") }
}

fn serving(works: bool) -> Serving {
    Serving::from([(String::new(), works), ("tidemark.control.v1.Control".to_owned(), works)])
}

/// It works while its database answers.
async fn look_after_health(core: Arc<Core>, serving_sender: watch::Sender<Serving>) {
    while tokio::time::timeout(HEALTH_EVERY, core.stop.cancelled()).await.is_err() {
        let asked = core.clone();
        let works = tokio::task::spawn_blocking(move || asked.is_ready().is_ok()).await.unwrap_or(false);
        serving_sender.send_if_modified(|now| {
            let next = serving(works);
            let differs = *now != next;
            *now = next;
            differs
        });
    }
    serving_sender.send_replace(serving(false));
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StartError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| StartError::Certificate(error.to_string()))
}
