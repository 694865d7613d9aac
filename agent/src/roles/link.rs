//! A role's stream to the configuration server: dialled, kept, dialled again.
//!
//! *Consistency.* Each command is answered once, on the stream that it came on. *Retries.* Dialling is, for ever, with
//! pauses up to [`PAUSE_MAX`]; commands are not: the configuration server says again what is wanted. *Cancellation.* What a
//! command began goes on when its stream ends; its answer is dropped. *Crash.* Nothing is kept here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidemark_base::meter::Meter;
use tidemark_base::storage::Storage;
use tidemark_base::{Clock, ServerId, SystemClock};
use tidemark_proto::control::wire::control_client::ControlClient;
use tidemark_proto::control::wire::directory_client::DirectoryClient;
use tidemark_proto::control::{
    AgentCommand, Failure, FailureKind, Inventory, Peer, Register, Reply, ServerCommand, Whereabouts, neighbours,
    reply_to, wire,
};
use tidemark_transport::{Expected, Identity, KeyRequest, PeerIdentity, Role};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::known::Known;
use super::looking::{Looking, Told};
use super::outbox::{Draft, Outbox};

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// Process servers that are asked where the configuration server is, of those that a role sends to; it may know of some more.
const NEIGHBOURS_MAX: usize = 4;
const NEIGHBOUR_TIMEOUT: Duration = Duration::from_secs(5);
/// An old configuration server that lives on beside the restored one keeps nobody for longer.
const SUCCESSOR_EVERY: Duration = Duration::from_secs(60);
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Replies and reports that wait to be sent.
const UP_MAX: usize = 64;
/// Commands under way at once; more are refused.
const COMMANDS_MAX: usize = 256;
/// How often it is looked which disks there are.
const INVENTORY_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked whether the certificate is due.
const RENEWAL_EVERY: Duration = Duration::from_secs(600);
/// Commands carry specifications of machines: small.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

#[derive(Debug)]
pub enum Command {
    Agent(AgentCommand),
    Server(Box<ServerCommand>),
}

/// What a role does with commands.
#[tonic::async_trait]
pub trait Handler: Send + Sync + 'static {
    fn register(&self) -> Register;
    /// Asked for its status, it answers with its report.
    async fn execute(&self, command: Command) -> Result<Reply, Failure>;
    /// The same; what takes long says how far it is.
    async fn execute_metered(&self, command: Command, _meter: &Arc<Meter>) -> Result<Reply, Failure> {
        self.execute(command).await
    }
    /// What happened since the last call.
    fn events(&self) -> Vec<Draft> {
        Vec::new()
    }
    /// What disks its host has; `None` where it does not look. Blocks.
    fn inventory(&self) -> Option<Inventory> {
        None
    }
    /// How often that is looked at.
    fn look_every(&self) -> Duration {
        INVENTORY_EVERY
    }
    /// Process servers that may know where the configuration server is now: id and address.
    fn neighbours(&self) -> Vec<(ServerId, String)> {
        Vec::new()
    }
    /// How often they are asked whether the configuration server was restored elsewhere, while a stream to one is open.
    fn ask_neighbours_every(&self) -> Duration {
        SUCCESSOR_EVERY
    }
}

/// What a link keeps on disk, in the role's own folder.
pub struct Kept {
    pub outbox: Outbox,
    pub known: Arc<Known>,
    storage: Arc<dyn Storage>,
    /// The file of the identity.
    identity_file: &'static str,
}

impl Kept {
    /// Blocks.
    pub fn open(storage: Arc<dyn Storage>) -> Arc<Self> {
        let outbox = Outbox::open(storage.clone());
        let known = Known::open(storage.clone());
        Arc::new(Self { outbox, known, storage, identity_file: super::place::IDENTITY_FILE })
    }
}

/// Where the configuration server is now; `None` while that is not known yet.
pub type Address = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// Keeps the stream until `stop`.
pub async fn run(
    identity: Identity,
    address: Address,
    handler: Arc<dyn Handler>,
    kept: Arc<Kept>,
    stop: CancellationToken,
) {
    // Also while nobody takes them: what happened then is told later.
    let collecting = tokio::spawn(collect(handler.clone(), kept.clone(), stop.clone()));
    let mut register = handler.register();
    // One for each process: two that live with the same identity are told apart by it.
    register.instance.get_or_insert_with(Uuid::new_v4);
    let (successor, looking) = (watch::Sender::default(), Arc::new(Looking::default()));
    let link = Arc::new(Link { identity, register, handler, kept, successor, looking });
    let looking = tokio::spawn(look_for_successor(link.clone(), stop.clone()));
    let mut pause = PAUSE_MIN;
    let mut last_reason = String::new();
    let mut turn = 0;
    loop {
        let mut candidates = link.kept.known.candidates(address().as_deref());
        turn %= candidates.len().max(1);
        if let Some(successor) = link.successor.send_replace(None) {
            // It is tried once, first; when it is the right one it is among the others from then on.
            candidates.insert(0, successor);
            turn = 0;
        }
        let outcome = match candidates.get(turn) {
            None => Err("the configuration server's address is not known yet".to_owned()),
            Some(address) => tokio::select! {
                () = stop.cancelled() => break,
                outcome = link.keep(address) => outcome,
            },
        };
        let is_established = outcome.is_ok();
        let reason = match outcome {
            Ok(()) => {
                pause = PAUSE_MIN;
                "the configuration server ended the stream".to_owned()
            }
            Err(reason) => reason,
        };
        // Once for each reason: the configuration server may be away for days.
        if reason != last_reason {
            tracing::info!(reason, "no stream to the configuration server; dialling again");
            last_reason = reason;
        }
        if !is_established {
            // The next address; where there is none left, whoever may know of another.
            turn += 1;
            if turn < candidates.len() {
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = link.ask_neighbours() => {}
            }
        }
        if tokio::time::timeout(pause, stop.cancelled()).await.is_ok() {
            break;
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
    let _ = collecting.await;
    let _ = looking.await;
}

/// Agents hear of a configuration server that was restored elsewhere from the process servers that they send to, also while the
/// one of before still answers them. What process servers say is not believed: who answers there must prove to be one.
async fn look_for_successor(link: Arc<Link>, stop: CancellationToken) {
    let every = link.handler.ask_neighbours_every();
    while tokio::time::timeout(every, stop.cancelled()).await.is_err() {
        let Some((incarnation, _)) = link.whom() else { continue };
        let looking = async {
            for found in link.located().await.into_iter().filter(|found| found.incarnation > incarnation) {
                for address in found.addresses {
                    let dialled =
                        tidemark_transport::connect(&address, Expected::Role(Role::ConfigServer), &link.identity);
                    if matches!(tokio::time::timeout(NEIGHBOUR_TIMEOUT, dialled).await, Ok(Ok(_))) {
                        link.successor.send_replace(Some(address));
                        return;
                    }
                }
            }
        };
        tokio::select! {
            () = looking => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn collect(handler: Arc<dyn Handler>, kept: Arc<Kept>, stop: CancellationToken) {
    loop {
        let is_last = tokio::time::timeout(REPORT_EVERY, stop.cancelled()).await.is_ok();
        let (handler, kept) = (handler.clone(), kept.clone());
        let _ = tokio::task::spawn_blocking(move || kept.outbox.add(handler.events())).await;
        if is_last {
            return;
        }
    }
}

struct Link {
    identity: Identity,
    register: Register,
    handler: Arc<dyn Handler>,
    kept: Arc<Kept>,
    /// Where a configuration server was restored, until it was dialled.
    successor: watch::Sender<Option<String>>,
    looking: Arc<Looking>,
}

impl Link {
    /// One stream, to its end. `Ok` when it was established.
    async fn keep(&self, address: &str) -> Result<(), String> {
        let handler = &self.handler;
        let channel = tidemark_transport::connect(address, Expected::Role(Role::ConfigServer), &self.identity)
            .await
            .map_err(|error| format!("{error}; {}", error.help()))?;
        let mut client = ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (up, up_receiver) = mpsc::channel(UP_MAX);
        let now = SystemClock::new().wall_now();
        let register = Register { time: Some(now), ..self.register.clone() };
        let register = wire::Up { body: Some(wire::up::Body::Register((&register).into())) };
        up.try_send(register).map_err(|error| error.to_string())?;
        let mut down = client
            .connect(ReceiverStream::new(up_receiver))
            .await
            .map_err(|status| status.message().to_owned())?
            .into_inner();
        let commands = Arc::new(Commands::default());
        let reporting = Arc::new(Semaphore::new(1));
        let mut reports = tokio::time::interval(REPORT_EVERY);
        reports.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let told = Told::nothing(self.looking.clone());
        let mut looks = tokio::time::interval(handler.look_every());
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut renewals = tokio::time::interval(RENEWAL_EVERY);
        renewals.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut established = false;
        let mut successor = self.successor.subscribe();
        successor.mark_unchanged();
        // Whom this stream leads to, once that is known.
        let mut serving = None;
        // A request for a certificate that was sent, and a batch of events: one of each at a time.
        let mut renewing: Option<KeyRequest> = None;
        let mut telling = false;
        loop {
            if established && !telling {
                telling = self.tell_events(&up);
            }
            if established && self.whom() != serving {
                // Another one was restored from its backup, and announced itself by another way.
                return Err(format!("the configuration server at {address} is of before a restore; stop it"));
            }
            let message = tokio::select! {
                message = down.message() => message,
                _ = reports.tick(), if established => {
                    // Beside the stream, one at a time: what a report waits for must not hold up commands.
                    if let Ok(permit) = reporting.clone().try_acquire_owned() {
                        let (handler, up, commands) = (handler.clone(), up.clone(), commands.clone());
                        let told = told.clone();
                        tokio::spawn(async move {
                            send_report(&handler, &up, &commands, &told).await;
                            drop(permit);
                        });
                    }
                    continue;
                }
                _ = looks.tick(), if established => {
                    self.looking.begin(handler.clone());
                    continue;
                }
                _ = renewals.tick(), if established => {
                    renewing = self.ask_renewal(&up, renewing);
                    continue;
                }
                () = self.kept.outbox.added(), if established && !telling => continue,
                Ok(()) = successor.changed(), if established => match &*successor.borrow_and_update() {
                    Some(next) => {
                        return Err(format!("the configuration server at {address} may be of before a restore; asking {next}"));
                    }
                    None => continue,
                },
            };
            match message {
                Ok(Some(wire::Down { body: Some(wire::down::Body::Registered(registered)), .. })) => {
                    self.take_whereabouts(&registered).await.map_err(|refusal| {
                        format!("the configuration server at {address} is refused: {refusal}; stop it")
                    })?;
                    self.take_neighbours(registered.process_servers).await;
                    if established {
                        // Only what it told of process servers changed.
                        continue;
                    }
                    tracing::info!(address, name = registered.name, "connected to the configuration server");
                    established = true;
                    serving = self.whom();
                    renewals.reset_immediately();
                }
                Ok(Some(wire::Down { body: Some(wire::down::Body::EventsTaken(taken)), .. })) => {
                    telling = false;
                    if let Ok(stream) = Uuid::from_slice(&taken.stream) {
                        let kept = self.kept.clone();
                        let keeping = tokio::task::spawn_blocking(move || kept.outbox.taken(stream, taken.sequence));
                        let _ = keeping.await;
                    }
                }
                Ok(Some(wire::Down { body: Some(wire::down::Body::Renewed(renewed)), .. })) => {
                    if let Some(request) = renewing.take() {
                        self.take_renewal(request, renewed).await;
                    }
                }
                Ok(Some(down)) if established => take(handler, &up, &commands, down),
                Ok(Some(_)) => return Err("it commands before it answered to the registration".to_owned()),
                Ok(None) => return Ok(()),
                Err(status) if established => {
                    tracing::debug!(reason = status.message(), "the control stream broke");
                    return Ok(());
                }
                Err(status) => return Err(status.message().to_owned()),
            }
        }
    }

    /// Asks process servers where the configuration server is now.
    async fn ask_neighbours(&self) {
        let found: Vec<String> = self.located().await.into_iter().flat_map(|known| known.addresses).collect();
        if !found.is_empty() {
            self.kept.known.hint(found);
        }
    }

    /// Those that the role sends to, then those that the configuration server told of.
    fn neighbours(&self) -> Vec<(ServerId, String)> {
        let mut neighbours = self.handler.neighbours();
        neighbours.truncate(NEIGHBOURS_MAX);
        for told in self.kept.known.neighbours() {
            if !neighbours.iter().any(|(server, address)| (server, address) == (&told.server, &told.address)) {
                neighbours.push((told.server, told.address));
            }
        }
        neighbours
    }

    /// What process servers say of it.
    async fn located(&self) -> Vec<Whereabouts> {
        let asking = self.neighbours().into_iter().map(|(server, address)| async move {
            let peer = PeerIdentity::ProcessServer(server);
            let channel = tidemark_transport::connect(&address, peer, &self.identity).await.ok()?;
            let mut client = DirectoryClient::new(channel);
            let asked = client.locate(wire::Empty {});
            let answer = tokio::time::timeout(NEIGHBOUR_TIMEOUT, asked).await.ok()?.ok()?;
            Whereabouts::try_from(answer.into_inner()).ok()
        });
        let mut found = Vec::new();
        for asked in asking {
            found.extend(asked.await);
        }
        found
    }

    /// Whether a batch was sent.
    fn tell_events(&self, up: &mpsc::Sender<wire::Up>) -> bool {
        let Some(batch) = self.kept.outbox.batch() else { return false };
        up.try_send(wire::Up { body: Some(wire::up::Body::Events((&batch).into())) }).is_ok()
    }

    /// Keeps where it says that it is; `Err` when another one is the right one.
    /// The configuration server that counts.
    fn whom(&self) -> Option<(u64, ServerId)> {
        self.kept.known.get().map(|known| (known.incarnation, known.server))
    }

    async fn take_whereabouts(&self, registered: &wire::Registered) -> Result<(), String> {
        let whereabouts = wire::Whereabouts {
            incarnation: registered.incarnation,
            server: registered.server.clone(),
            addresses: registered.addresses.clone(),
        };
        // An older version says nothing of it.
        let Ok(whereabouts) = Whereabouts::try_from(whereabouts) else { return Ok(()) };
        let kept = self.kept.clone();
        tokio::task::spawn_blocking(move || kept.known.take(whereabouts)).await.map_err(|error| error.to_string())?
    }

    /// Keeps which process servers there are. What makes no sense, or more than is asked, is left out.
    async fn take_neighbours(&self, told: Vec<wire::Neighbour>) {
        if !matches!(self.register.peer, Peer::Agent { .. }) {
            return;
        }
        let Ok(neighbours) = neighbours(told) else { return };
        let kept = self.kept.clone();
        let _ = tokio::task::spawn_blocking(move || kept.known.meet(neighbours)).await;
    }

    fn ask_renewal(&self, up: &mpsc::Sender<wire::Up>, asked: Option<KeyRequest>) -> Option<KeyRequest> {
        if asked.is_some() || !self.identity.renewal_due(SystemClock::new().wall_now()) {
            return asked;
        }
        let request = KeyRequest::new()
            .inspect_err(|error| tracing::warn!(%error, "no key can be made for a new certificate"))
            .ok()?;
        let renew = wire::Renew { request: request.request().to_vec() };
        up.try_send(wire::Up { body: Some(wire::up::Body::Renew(renew)) }).ok().map(|()| request)
    }

    async fn take_renewal(&self, request: KeyRequest, renewed: wire::Renewed) {
        if renewed.certificate.is_empty() {
            let failure = renewed.failure.unwrap_or_default();
            tracing::warn!(reason = failure.message, help = failure.help, "the certificate was not renewed");
            return;
        }
        let (identity, kept) = (self.identity.clone(), self.kept.clone());
        let taking = tokio::task::spawn_blocking(move || {
            identity.renew(request, &renewed.certificate)?;
            identity.save(&*kept.storage, kept.identity_file)
        });
        match taking.await {
            Ok(Ok(())) => tracing::info!(until = %self.identity.expires(), "the certificate was renewed"),
            Ok(Err(error)) => tracing::warn!(%error, help = error.help(), "a new certificate cannot be used"),
            Err(error) => tracing::error!(%error, "a new certificate cannot be used"),
        }
    }
}

async fn send_report(handler: &Arc<dyn Handler>, up: &mpsc::Sender<wire::Up>, commands: &Commands, told: &Told) {
    let status = match handler.register().peer {
        Peer::Agent { .. } => Command::Agent(AgentCommand::Status),
        Peer::ProcessServer { .. } => Command::Server(Box::new(ServerCommand::Status)),
    };
    let mut news = None;
    let body = match handler.execute(status).await {
        Ok(Reply::Agent(report)) => {
            news = told.news();
            let inventory = news.as_ref().map(Into::into);
            wire::up::Body::AgentReport(wire::AgentReport { inventory, ..(&report).into() })
        }
        Ok(Reply::Server(report)) => {
            let report = wire::ServerReport { working: commands.working(), ..(&report).into() };
            wire::up::Body::ServerReport(report)
        }
        Ok(other) => return tracing::error!(reply = other.kind(), "the status is no report"),
        Err(failure) => return tracing::warn!(%failure, "no report can be made"),
    };
    // Where there is no room, the next one is as good.
    if up.try_send(wire::Up { body: Some(body) }).is_ok()
        && let Some(news) = news
    {
        told.note(news);
    }
}

/// Those that are under way on a stream, by request.
#[derive(Default)]
struct Commands(Mutex<BTreeMap<u64, Arc<Meter>>>);

/// One of them.
struct Slot {
    commands: Arc<Commands>,
    request: u64,
    meter: Arc<Meter>,
}

impl Commands {
    /// `None`: there are too many.
    fn begin(self: Arc<Self>, request: u64) -> Option<Slot> {
        let mut running = self.0.lock().expect("no panic while held");
        if running.len() >= COMMANDS_MAX || running.contains_key(&request) {
            return None;
        }
        let meter = running.entry(request).or_default().clone();
        drop(running);
        Some(Slot { commands: self, request, meter })
    }

    fn working(&self) -> Vec<wire::Working> {
        let running = self.0.lock().expect("no panic while held");
        let read = |(&request, meter): (&u64, &Arc<Meter>)| {
            meter.read().map(|(done_bytes, total_bytes)| wire::Working { request, done_bytes, total_bytes })
        };
        running.iter().filter_map(read).collect()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.commands.0.lock().expect("no panic while held").remove(&self.request);
    }
}

/// Runs a command beside the stream; its answer goes up when it is done.
fn take(handler: &Arc<dyn Handler>, up: &mpsc::Sender<wire::Up>, commands: &Arc<Commands>, down: wire::Down) {
    let request = down.request;
    let command = match down.body {
        Some(wire::down::Body::Agent(command)) => AgentCommand::try_from(command).map(Command::Agent),
        Some(wire::down::Body::Server(command)) => {
            ServerCommand::try_from(command).map(|command| Command::Server(Box::new(command)))
        }
        _ => Err(tidemark_proto::control::WireError::Invalid("command")),
    };
    let slot = commands.clone().begin(request);
    let (handler, up) = (handler.clone(), up.clone());
    tokio::spawn(async move {
        let outcome = match (command, &slot) {
            (Ok(command), Some(slot)) => handler.execute_metered(command, &slot.meter).await,
            (Err(error), _) => {
                Err(Failure::from_error(FailureKind::BadRequest, &error, "run the same version of Tidemark everywhere"))
            }
            (_, None) => Err(Failure::new(
                FailureKind::Unavailable,
                format!("{COMMANDS_MAX} commands are under way, which is the limit"),
                "wait for some of them, then try again",
            )),
        };
        let reply = wire::Up { body: Some(wire::up::Body::Reply(reply_to(request, &outcome))) };
        drop(slot);
        // The stream may have ended; who asked was told so.
        let _ = up.send(reply).await;
    });
}

/// The answer to a command of another role.
pub fn not_mine() -> Failure {
    Failure::new(
        FailureKind::BadRequest,
        "this command is for another role",
        "run the same version of Tidemark everywhere",
    )
}
