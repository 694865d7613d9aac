//! Who may connect: passphrases that let a role register, certificates, and who is refused although it has one.
//!
//! A host that registers checks the server by the fingerprint of its authority, then shows a passphrase and a request for
//! a certificate; its key never leaves it. A process server waits for an operator's approval. Who is refused is pushed to
//! process servers and agents ([`Registrar::deny_list`]), which look at it during streams as well.
//!
//! *Consistency.* A use of a passphrase and what it led to are one change of the state. *Retries.* A registration that was
//! repeated with the same request answers as before. *Cancellation.* None. *Crash.* What was not stored did not happen:
//! the passphrase still has its use, and no certificate was told to anyone.

mod limit;
mod passphrase;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::{Clock, HostId, ServerId, SystemClock, Timestamp};
use tidemark_proto::control::{
    DenyList, EventBatch, Failure, FailureKind, Inventory, NEIGHBOURS_MAX, Neighbour, Peer, Register, Severity,
};
use tidemark_transport::{Authority, PeerIdentity, Role, certificate_digest};
use tokio::sync::watch;

use crate::history::{Actor, History, News};
use crate::hub::{PeerId, Registry};
use crate::inventory::Told;
use crate::model::{
    Host, IdentityRecord, IssuedCertificate, Passphrase, PeerRole, Registration, Server, Standing, State,
};
use crate::names::{bad_request, check_name};
use crate::store::Store;

use limit::Limiter;
pub use limit::TooMany;

/// A clock that is off by more is named before a certificate is issued: nothing that depends on time would work.
const SKEW_MAX: Duration = Duration::from_secs(600);
const PASSPHRASE_LIFETIME_MAX: Duration = Duration::from_secs(30 * 86_400);
const PASSPHRASE_USES_MAX: u32 = 100_000;
/// Registrations that wait for approval; more are refused.
const WAITING_MAX: usize = 1_000;
/// A request for a certificate is a few hundred bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;

pub struct Registrar {
    store: Arc<Store>,
    history: Arc<History>,
    authority: Authority,
    limiter: Mutex<Limiter>,
    /// Held while a passphrase is looked at. Hashing many at once would also eat the processor.
    turn: Mutex<()>,
    /// Registrations that were rejected and did not hear of it yet.
    rejected: Mutex<VecDeque<String>>,
    /// Grows whenever somebody is refused, or not any more.
    denials: watch::Sender<u64>,
    clock: SystemClock,
}

/// What an administrator asks for.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PassphraseRequest {
    pub role: PeerRole,
    /// How long it can be used.
    #[serde(default = "one_day")]
    pub lifetime_seconds: u64,
    /// How often.
    #[serde(default = "once")]
    pub uses: u32,
    /// The id of a host or process server that was installed again: who registers with it gets this identity, and the
    /// certificates that were issued for it before are refused.
    #[serde(default)]
    pub replaces: Option<String>,
}

fn one_day() -> u64 {
    86_400
}

fn once() -> u32 {
    1
}

/// A passphrase as it is listed; the passphrase itself is shown once, when it is made.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct PassphraseInfo {
    pub id: String,
    pub role: PeerRole,
    #[schema(value_type = String, format = "date-time")]
    pub created: Timestamp,
    #[schema(value_type = String, format = "date-time")]
    pub expires: Timestamp,
    pub uses_left: u32,
    pub replaces: Option<String>,
    /// Only in the answer to its creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase: Option<String>,
}

/// What a host or a process server sends to register.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    pub role: PeerRole,
    /// As people know it.
    pub name: String,
    pub passphrase: String,
    /// PKCS #10, DER, in hex.
    pub request: String,
    /// The clock of the machine that registers.
    #[schema(value_type = String, format = "date-time")]
    pub time: Timestamp,
}

/// How far a registration is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Registered {
    /// An operator must approve; ask again with the same request.
    Waiting { registration: String },
    Issued {
        /// The URI in the certificate.
        identity: String,
        /// X.509, DER, in hex.
        certificate: String,
    },
}

/// One of those who have certificates.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct IdentityInfo {
    /// The URI in its certificates.
    pub identity: String,
    pub name: String,
    /// `good`, `revoked` or `fenced`.
    pub standing: &'static str,
    pub reason: Option<String>,
    #[schema(value_type = String, format = "date-time")]
    pub registered: Timestamp,
    /// Of the certificate that lasts longest.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub expires: Option<Timestamp>,
}

/// Why a registration was refused.
#[derive(Debug)]
pub enum Refused {
    TooMany(TooMany),
    Failure(Failure),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Refused::Failure(failure)
    }
}

impl Registrar {
    pub fn new(store: Arc<Store>, history: Arc<History>, authority: Authority) -> Self {
        Self {
            store,
            history,
            authority,
            limiter: Mutex::default(),
            turn: Mutex::default(),
            rejected: Mutex::default(),
            denials: watch::Sender::default(),
            clock: SystemClock::new(),
        }
    }

    pub fn fingerprint(&self) -> String {
        self.authority.fingerprint()
    }

    /// Makes a passphrase. Blocks: its hash takes time.
    pub fn create_passphrase(&self, request: &PassphraseRequest) -> Result<PassphraseInfo, Failure> {
        let lifetime = Duration::from_secs(request.lifetime_seconds);
        if lifetime.is_zero() || lifetime > PASSPHRASE_LIFETIME_MAX {
            return Err(bad_request(
                format!("a passphrase cannot last {} s", lifetime.as_secs()),
                format!("give 1 s to {} days", PASSPHRASE_LIFETIME_MAX.as_secs() / 86_400),
            ));
        }
        if request.uses == 0 || request.uses > PASSPHRASE_USES_MAX {
            return Err(bad_request(
                format!("a passphrase cannot have {} uses", request.uses),
                format!("give 1 to {PASSPHRASE_USES_MAX}"),
            ));
        }
        if request.replaces.is_some() && request.uses != 1 {
            return Err(bad_request(
                "a passphrase that replaces an identity has one use",
                "leave the number of uses out",
            ));
        }
        let (id, text, hash) = passphrase::make()?;
        let now = self.clock.wall_now();
        let passphrase = self.store.change(|state| {
            let replaces = match &request.replaces {
                Some(text) => Some(find_identity(state, request.role, text)?),
                None => None,
            };
            let expires = Timestamp(now.0.saturating_add(lifetime.as_nanos() as u64));
            // Those that are over need not be kept.
            state.passphrases.retain(|_, known| known.expires > now && known.uses_left > 0);
            let passphrase =
                Passphrase { role: request.role, hash, created: now, expires, uses_left: request.uses, replaces };
            state.passphrases.insert(id.clone(), passphrase.clone());
            Ok(passphrase)
        })?;
        Ok(PassphraseInfo { passphrase: Some(text), ..info(&id, &passphrase) })
    }

    pub fn passphrases(&self) -> Vec<PassphraseInfo> {
        self.store.state().passphrases.iter().map(|(id, passphrase)| info(id, passphrase)).collect()
    }

    pub fn delete_passphrase(&self, id: &str) -> Result<(), Failure> {
        self.store.change(|state| match state.passphrases.remove(id) {
            Some(_) => Ok(()),
            None => Err(not_found(format!("there is no passphrase {}", short(id)), "see `tidemark passphrase list`")),
        })
    }

    /// Registers, or answers how far a registration is. Blocks: the passphrase is hashed.
    pub fn register(&self, from: IpAddr, request: &RegisterRequest) -> Result<Registered, Refused> {
        check_name("host", &request.name)?;
        let der = hex_decode(&request.request).filter(|der| der.len() <= REQUEST_BYTES_MAX).ok_or_else(|| {
            bad_request("the request for a certificate cannot be read", "run the same version everywhere")
        })?;
        let now = self.clock.wall_now();
        let skew = now.saturating_since(request.time).max(request.time.saturating_since(now));
        if skew > SKEW_MAX {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("this machine's clock says {}, the configuration server's {now}", request.time),
                "set the clock that is wrong (NTP on both machines does), then register again",
            )
            .into());
        }
        // By its key, which the request proves: a request that was made anew for the same key is the same registration.
        let key = tidemark_transport::identity::requested_key(&der).map_err(|error| {
            Failure::from_error(FailureKind::BadRequest, &error, "run the same version of Tidemark everywhere")
        })?;
        let waiting_id = hex_encode(&key[..8]);
        // Who asked before, with the same key, proved the passphrase then; nobody else can use what is answered.
        if let Some(registration) = self.store.state().registrations.get(&waiting_id).cloned() {
            return Ok(if registration.approved {
                self.issue_registered(&waiting_id, &registration, &der)?
            } else {
                Registered::Waiting { registration: waiting_id }
            });
        }
        // Its passphrase is used up, and was right: that is no try of a wrong one.
        if self.hears_of_rejection(&waiting_id) {
            return Err(Failure::new(
                FailureKind::Conflict,
                "this registration was rejected by an administrator",
                "ask them why; to register again takes a new passphrase: `tidemark passphrase create`",
            )
            .into());
        }
        let id = self.proven_in_turn(from, request)?;
        match request.role {
            PeerRole::Agent => Ok(self.register_agent(&id, request, &der)?),
            PeerRole::ProcessServer => Ok(self.register_server(&id, from, request, &der, waiting_id)?),
        }
    }

    /// Told once: whoever shows another passphrase with the same key afterwards asks anew.
    fn hears_of_rejection(&self, registration: &str) -> bool {
        let mut rejected = self.rejected.lock().expect("no panic while held");
        let place = rejected.iter().position(|known| known == registration);
        place.and_then(|place| rejected.remove(place)).is_some()
    }

    /// One after the other: what many show at once is counted before the next is looked at.
    fn proven_in_turn(&self, from: IpAddr, request: &RegisterRequest) -> Result<String, Refused> {
        let _turn = self.turn.lock().expect("no panic while held");
        let now = self.clock.monotonic_now();
        self.limiter().check(from, now).map_err(Refused::TooMany)?;
        let proven = self.proven(from, request);
        if proven.is_err() {
            self.limiter().failed(from, self.clock.monotonic_now());
        }
        Ok(proven?)
    }

    /// The passphrase that was shown, when it is a good one.
    fn proven(&self, from: IpAddr, request: &RegisterRequest) -> Result<String, Failure> {
        // One answer for all that is wrong: it does not tell what exists.
        let refused = || {
            Failure::new(
                FailureKind::Conflict,
                "the passphrase is wrong, used up, expired, or for another role",
                "have an administrator make a new one: `tidemark passphrase create`",
            )
        };
        let (id, secret) = passphrase::parts(&request.passphrase).ok_or_else(refused)?;
        let state = self.store.state();
        let known = state.passphrases.get(id);
        let is_right = passphrase::verify(known.map(|known| known.hash.as_str()), secret);
        match known {
            Some(known) if is_right && known.role == request.role && usable(known, self.clock.wall_now()) => {
                Ok(id.to_owned())
            }
            _ => {
                self.history.note(News {
                    severity: Severity::Warning,
                    kind: "registration_refused",
                    machine: None,
                    message: format!("a registration from {from} showed no good passphrase"),
                    help: "make sure that it was one of yours".to_owned(),
                });
                Err(refused())
            }
        }
    }

    fn register_agent(&self, passphrase: &str, request: &RegisterRequest, der: &[u8]) -> Result<Registered, Failure> {
        let (peer, issued) = self.store.change(|state| {
            let known = self.take_use(state, passphrase)?;
            let peer = match &known.replaces {
                Some(uri) => identity_of(uri)?,
                None => PeerIdentity::Agent(HostId::random()),
            };
            let issued = self.issue(state, peer, &request.name, der, known.replaces.is_some())?;
            Ok((peer, issued))
        })?;
        self.told_registered(peer, &request.name);
        Ok(issued)
    }

    fn register_server(
        &self,
        passphrase: &str,
        from: IpAddr,
        request: &RegisterRequest,
        der: &[u8],
        waiting_id: String,
    ) -> Result<Registered, Failure> {
        // A request that no certificate can be made for is refused now, not when it was approved.
        self.sign(PeerIdentity::ProcessServer(ServerId::random()), der)?;
        self.store.change(|state| {
            if state.registrations.len() >= WAITING_MAX {
                return Err(Failure::new(
                    FailureKind::Unavailable,
                    format!("{WAITING_MAX} registrations wait for approval, which is the limit"),
                    "approve or reject some: `tidemark process-server list`",
                ));
            }
            let known = self.take_use(state, passphrase)?;
            let identity = match &known.replaces {
                Some(uri) => uri.clone(),
                None => PeerIdentity::ProcessServer(ServerId::random()).to_string(),
            };
            let registration = Registration {
                role: PeerRole::ProcessServer,
                name: request.name.clone(),
                identity,
                request: request.request.clone(),
                asked: self.clock.wall_now(),
                address: from.to_string(),
                approved: false,
                replaces: known.replaces.is_some(),
            };
            state.registrations.insert(waiting_id.clone(), registration);
            Ok(())
        })?;
        self.history.note(News {
            severity: Severity::Warning,
            kind: "approval_needed",
            machine: None,
            message: format!("process server {} at {from} waits for approval", request.name),
            help: format!("approve it with `tidemark process-server approve {waiting_id}`, if it is yours"),
        });
        Ok(Registered::Waiting { registration: waiting_id })
    }

    fn issue_registered(&self, id: &str, registration: &Registration, der: &[u8]) -> Result<Registered, Failure> {
        let peer = identity_of(&registration.identity)?;
        // It stays until it connects: an answer may be lost on its way.
        let issued = self.store.change(|state| {
            let first = state.identities.get(&registration.identity);
            let replaces = registration.replaces && first.is_none_or(|known| known.registered < registration.asked);
            let issued = self.issue(state, peer, &registration.name, der, replaces)?;
            if let Some(waiting) = state.registrations.get_mut(id) {
                waiting.replaces = false;
            }
            Ok(issued)
        })?;
        self.told_registered(peer, &registration.name);
        Ok(issued)
    }

    fn take_use(&self, state: &mut State, id: &str) -> Result<Passphrase, Failure> {
        let used_up = || {
            Failure::new(
                FailureKind::Conflict,
                "the passphrase was used up meanwhile",
                "have an administrator make a new one: `tidemark passphrase create`",
            )
        };
        let known = state.passphrases.get_mut(id).ok_or_else(used_up)?;
        if !usable(known, self.clock.wall_now()) {
            return Err(used_up());
        }
        known.uses_left -= 1;
        let taken = known.clone();
        if taken.uses_left == 0 {
            state.passphrases.remove(id);
        }
        Ok(taken)
    }

    fn sign(&self, peer: PeerIdentity, der: &[u8]) -> Result<Vec<u8>, Failure> {
        let signed = self.authority.sign(peer, der);
        signed.map(|certificate| certificate.to_vec()).map_err(|error| {
            Failure::from_error(FailureKind::BadRequest, &error, "run the same version of Tidemark everywhere")
        })
    }

    /// Signs, and notes what was signed. `replaces`: nothing that was issued before is taken any more.
    fn issue(
        &self,
        state: &mut State,
        peer: PeerIdentity,
        name: &str,
        der: &[u8],
        replaces: bool,
    ) -> Result<Registered, Failure> {
        let certificate = self.sign(peer, der)?;
        let now = self.clock.wall_now();
        let uri = peer.to_string();
        let record = state.identities.entry(uri.clone()).or_insert_with(|| IdentityRecord {
            name: name.to_owned(),
            registered: now,
            certificates: Vec::new(),
            standing: Standing::Good,
            deleted: false,
        });
        if replaces {
            record.certificates.iter_mut().for_each(|certificate| certificate.denied = true);
            record.standing = Standing::Good;
            record.registered = now;
        }
        record.deleted &= record.standing != Standing::Good;
        record.name = name.to_owned();
        note_certificate(record, &certificate, now);
        Ok(Registered::Issued { identity: uri, certificate: hex_encode(&certificate) })
    }

    fn told_registered(&self, peer: PeerIdentity, name: &str) {
        self.denials.send_modify(|version| *version += 1);
        self.history.note(News {
            severity: Severity::Info,
            kind: "registered",
            machine: None,
            message: format!("{} {name} was registered", peer.role()),
            help: String::new(),
        });
    }

    pub fn registrations(&self) -> Vec<(String, Registration)> {
        self.store.state().registrations.iter().map(|(id, waiting)| (id.clone(), waiting.clone())).collect()
    }

    /// By id, or by name where only one has it.
    pub fn decide(&self, id: &str, approve: bool, by: Option<Actor>) -> Result<Registration, Failure> {
        let decided = self.store.change(|state| {
            let named: Vec<String> = state
                .registrations
                .iter()
                .filter(|(known, waiting)| *known == id || waiting.name == id)
                .map(|(known, _)| known.clone())
                .collect();
            let [known] = named.as_slice() else {
                return Err(not_found(
                    format!("no registration, or more than one, is called {}", short(id)),
                    "see `tidemark process-server list`",
                ));
            };
            let waiting = state.registrations.get_mut(known).expect("it was found");
            waiting.approved = approve;
            let decided = waiting.clone();
            if !approve {
                state.registrations.remove(known);
            }
            Ok((known.clone(), decided))
        })?;
        let (registration, decided) = decided;
        if !approve {
            let mut rejected = self.rejected.lock().expect("no panic while held");
            rejected.truncate(WAITING_MAX);
            rejected.push_front(registration);
        }
        let news = News {
            severity: Severity::Info,
            kind: if approve { "registration_approved" } else { "registration_rejected" },
            machine: None,
            message: format!(
                "the registration of process server {} was {}",
                decided.name,
                if approve { "approved" } else { "rejected" }
            ),
            help: String::new(),
        };
        self.history.note_by(by, news);
        Ok(decided)
    }

    pub fn identities(&self) -> Vec<IdentityInfo> {
        let state = self.store.state();
        state
            .identities
            .iter()
            .map(|(uri, record)| {
                let (standing, reason) = match &record.standing {
                    Standing::Good => ("good", None),
                    Standing::Revoked { reason, .. } => ("revoked", Some(reason.clone())),
                    Standing::Fenced { .. } => ("fenced", Some("two live processes showed it".to_owned())),
                };
                IdentityInfo {
                    identity: uri.clone(),
                    name: record.name.clone(),
                    standing,
                    reason,
                    registered: record.registered,
                    expires: record.certificates.iter().filter(|of| !of.denied).map(|of| of.expires).max(),
                }
            })
            .collect()
    }

    /// Refuses an identity from now on, or, with no reason, takes it again.
    pub fn set_standing(&self, id: &str, revoke: Option<String>, by: Option<Actor>) -> Result<IdentityInfo, Failure> {
        let now = self.clock.wall_now();
        let uri = self.store.change(|state| {
            let uri = find_any_identity(state, id)?;
            if let Some(record) = state.identities.get_mut(&uri) {
                record.standing = match &revoke {
                    Some(reason) => Standing::Revoked { since: now, reason: reason.clone() },
                    None => Standing::Good,
                };
                record.deleted &= revoke.is_some();
            }
            Ok(uri)
        })?;
        self.tell_denials();
        let name = self.store.state().identities.get(&uri).map_or_else(String::new, |record| record.name.clone());
        let news = match &revoke {
            Some(reason) => News {
                severity: Severity::Warning,
                kind: "identity_revoked",
                machine: None,
                message: format!("{uri} ({name}) is refused from now on: {reason}"),
                help: String::new(),
            },
            None => News {
                severity: Severity::Info,
                kind: "identity_restored",
                machine: None,
                message: format!("{uri} ({name}) is taken again"),
                help: String::new(),
            },
        };
        self.history.note_by(by, news);
        let known = self.identities().into_iter().find(|known| known.identity == uri);
        known.ok_or_else(|| not_found(format!("{uri} is gone"), "see `tidemark identity list`"))
    }

    /// Who is refused changed.
    pub fn tell_denials(&self) {
        self.denials.send_modify(|version| *version += 1);
    }

    /// Who is refused, for process servers and agents.
    pub fn deny_list(&self) -> DenyList {
        let (state, now) = (self.store.state(), self.clock.wall_now());
        let mut list = DenyList::default();
        for (uri, record) in &state.identities {
            if record.standing != Standing::Good {
                list.identities.push(uri.clone());
            }
            let denied =
                record.certificates.iter().filter(|certificate| certificate.denied && !is_over(certificate, now));
            let digest = |certificate: &IssuedCertificate| -> Option<[u8; 32]> {
                hex_decode(&certificate.digest)?.try_into().ok()
            };
            list.certificates.extend(denied.filter_map(digest));
        }
        list
    }

    /// Tells of every change of the list.
    pub fn denials(&self) -> watch::Receiver<u64> {
        self.denials.subscribe()
    }

    fn limiter(&self) -> std::sync::MutexGuard<'_, Limiter> {
        self.limiter.lock().expect("no panic while held")
    }
}

impl Registry for Registrar {
    fn note(&self, register: &Register) -> Result<bool, Failure> {
        let last_seen = self.clock.wall_now();
        self.store.change(|state| match &register.peer {
            Peer::Agent { id } => {
                name_identity(state, PeerIdentity::Agent(*id), &register.name);
                state.hosts.insert(*id, Host { name: register.name.clone(), last_seen });
                Ok(false)
            }
            Peer::ProcessServer { id, address } => {
                name_identity(state, PeerIdentity::ProcessServer(*id), &register.name);
                let server = Server { name: register.name.clone(), address: address.clone(), last_seen };
                let before = state.servers.insert(*id, server);
                Ok(before.is_some_and(|before| before.address != *address))
            }
        })
    }

    fn admit(&self, identity: PeerIdentity, certificate: Option<[u8; 32]>, name: &str) -> Result<(), Failure> {
        let (uri, digest) = (identity.to_string(), certificate.map(|digest| hex_encode(&digest)));
        let state = self.store.state();
        let refused = |why: &str| {
            Err(Failure::new(
                FailureKind::Conflict,
                format!("the certificate of {uri} is refused: {why}"),
                "an administrator sees why with `tidemark identity list`, and decides",
            ))
        };
        if let Some(record) = state.identities.get(&uri) {
            match &record.standing {
                Standing::Good => {}
                Standing::Revoked { reason, since } => return refused(&format!("revoked since {since}: {reason}")),
                Standing::Fenced { since } => {
                    return refused(&format!("two live processes showed it at {since}, perhaps a copied machine"));
                }
            }
            let known = record.certificates.iter().find(|known| Some(&known.digest) == digest.as_ref());
            if shows_denied(record, certificate) {
                return refused("this host was registered again, and has a newer one");
            }
            let is_waiting = state.registrations.values().any(|waiting| waiting.identity == uri);
            if known.is_some() && !is_waiting {
                return Ok(());
            }
        }
        // One that the authority signed in its own folder, as `up` does for its roles.
        self.store.change(|state| {
            let now = self.clock.wall_now();
            // It has its certificate: nothing waits any more.
            state.registrations.retain(|_, waiting| waiting.identity != uri);
            let record = state.identities.entry(uri.clone()).or_insert_with(|| IdentityRecord {
                name: name.to_owned(),
                registered: now,
                certificates: Vec::new(),
                standing: Standing::Good,
                deleted: false,
            });
            if let Some(digest) = digest.filter(|digest| record.certificates.iter().all(|of| of.digest != *digest)) {
                let expires = Timestamp(now.0 + tidemark_transport::identity::LEAF_LIFETIME.as_nanos() as u64);
                record.certificates.push(IssuedCertificate { digest, expires, denied: false });
            }
            Ok(())
        })
    }

    fn is_denied(&self, identity: PeerIdentity, certificate: Option<[u8; 32]>) -> bool {
        let state = self.store.state();
        let Some(record) = state.identities.get(&identity.to_string()) else { return false };
        record.standing != Standing::Good || shows_denied(record, certificate)
    }

    fn fence(&self, identity: PeerIdentity) {
        let (uri, since) = (identity.to_string(), self.clock.wall_now());
        let name = self.store.state().identities.get(&uri).map_or_else(String::new, |record| record.name.clone());
        let fenced = self.store.change(|state| {
            if let Some(record) = state.identities.get_mut(&uri) {
                record.standing = Standing::Fenced { since };
            }
            Ok(())
        });
        if let Err(failure) = fenced {
            tracing::error!(%identity, %failure, "an identity that is used twice cannot be fenced");
        }
        self.denials.send_modify(|version| *version += 1);
        self.history.note(News {
            severity: Severity::Critical,
            kind: "identity_used_twice",
            machine: None,
            message: format!(
                "two live processes show the identity of {} {name} ({uri}); both are refused",
                identity.role()
            ),
            help: "stop the copy, then `tidemark identity restore`, or register one of them again".to_owned(),
        });
    }

    fn renew(&self, identity: PeerIdentity, certificate: Option<[u8; 32]>, request: &[u8]) -> Result<Vec<u8>, Failure> {
        let shown = certificate;
        if request.len() > REQUEST_BYTES_MAX {
            return Err(bad_request("the request for a certificate is too long", "run the same version everywhere"));
        }
        let certificate = self.sign(identity, request)?;
        let now = self.clock.wall_now();
        self.store.change(|state| {
            let uri = identity.to_string();
            let record = state
                .identities
                .get_mut(&uri)
                .filter(|record| record.standing == Standing::Good && !shows_denied(record, shown))
                .ok_or_else(|| not_found(format!("{uri} is not registered, or refused"), "register it again"))?;
            note_certificate(record, &certificate, now);
            Ok(())
        })?;
        tracing::info!(%identity, "a certificate was renewed");
        Ok(certificate)
    }

    fn keep_inventory(&self, host: HostId, inventory: Inventory) -> Result<(), Failure> {
        let time = self.clock.wall_now();
        Ok(self.store.inventories().keep(host, Told { time, inventory })?)
    }

    fn neighbours(&self) -> Vec<Neighbour> {
        let state = self.store.state();
        let is_good = |id: &ServerId| {
            let record = state.identities.get(&PeerIdentity::ProcessServer(*id).to_string());
            record.is_none_or(|record| record.standing == Standing::Good)
        };
        let mut known: Vec<_> =
            state.servers.iter().filter(|(id, server)| is_good(id) && !server.address.is_empty()).collect();
        // Those that were there last, where there are many; in an order that stays.
        known.sort_by_key(|(_, server)| std::cmp::Reverse(server.last_seen));
        let told = known.into_iter().take(NEIGHBOURS_MAX);
        let mut told: Vec<Neighbour> =
            told.map(|(id, server)| Neighbour { server: *id, address: server.address.clone() }).collect();
        told.sort();
        told
    }

    fn take_events(&self, peer: PeerId, name: &str, batch: EventBatch) -> Result<u64, Failure> {
        let state = self.store.state();
        let shown = match peer {
            PeerId::Agent(_) => format!("agent {name}"),
            PeerId::ProcessServer(_) => format!("process server {name}"),
        };
        let machine_name = move |id: &str| {
            let found = state.machines.values().find(|machine| machine.id.to_string() == id);
            found.map(|machine| machine.name.clone())
        };
        Ok(self.history.take(&peer.to_string(), shown, batch, machine_name)?)
    }
}

/// Whether a certificate, of which this is the digest, was replaced by a registration with consent.
fn shows_denied(record: &IdentityRecord, certificate: Option<[u8; 32]>) -> bool {
    let Some(digest) = certificate.map(|digest| hex_encode(&digest)) else { return false };
    record.certificates.iter().any(|known| known.denied && known.digest == digest)
}

fn note_certificate(record: &mut IdentityRecord, certificate: &[u8], now: Timestamp) {
    record.certificates.retain(|known| !is_over(known, now));
    let expires = tidemark_transport::identity::validity(certificate).map_or(now, |validity| validity.expires);
    let digest = hex_encode(&certificate_digest(certificate));
    record.certificates.push(IssuedCertificate { digest, expires, denied: false });
}

/// Of a host or a process server that is gone for good: it is refused, and nothing is shown of it. Its record stays until its certificates are
/// over: without one it would be taken for new.
pub fn forget(state: &mut State, identity: PeerIdentity, name: &str, now: Timestamp) {
    let uri = identity.to_string();
    state.identities.retain(|_, record| !record.deleted || record.certificates.iter().any(|of| !is_over(of, now)));
    state.passphrases.retain(|_, passphrase| passphrase.replaces.as_ref() != Some(&uri));
    state.registrations.retain(|_, waiting| waiting.identity != uri);
    let record = state.identities.entry(uri).or_insert_with(|| IdentityRecord {
        name: name.to_owned(),
        registered: now,
        certificates: Vec::new(),
        standing: Standing::Good,
        deleted: true,
    });
    record.standing = Standing::Revoked { since: now, reason: "it was deleted".to_owned() };
    record.deleted = true;
}

/// No grace is left for it.
fn is_over(certificate: &IssuedCertificate, now: Timestamp) -> bool {
    now.saturating_since(certificate.expires) > tidemark_transport::tls::EXPIRY_GRACE
}

fn usable(passphrase: &Passphrase, now: Timestamp) -> bool {
    passphrase.uses_left > 0 && now < passphrase.expires
}

fn info(id: &str, passphrase: &Passphrase) -> PassphraseInfo {
    PassphraseInfo {
        id: id.to_owned(),
        role: passphrase.role,
        created: passphrase.created,
        expires: passphrase.expires,
        uses_left: passphrase.uses_left,
        replaces: passphrase.replaces.clone(),
        passphrase: None,
    }
}

fn identity_of(uri: &str) -> Result<PeerIdentity, Failure> {
    PeerIdentity::from_str(uri).map_err(|error| Failure::from_error(FailureKind::Failed, &error, error.help()))
}

/// It is known as it calls itself now, not as it once registered.
fn name_identity(state: &mut State, identity: PeerIdentity, name: &str) {
    if let Some(record) = state.identities.get_mut(&identity.to_string()) {
        record.name = name.to_owned();
    }
}

/// A URI, an id, or a name that only one has.
fn find_any_identity(state: &State, text: &str) -> Result<String, Failure> {
    let is_meant = |uri: &str, record: &IdentityRecord| {
        // Whoever was deleted has no name any more: another one may have it by now.
        uri == text || uri.ends_with(&format!("/{text}")) || record.name == text && !record.deleted
    };
    let found: Vec<&String> =
        state.identities.iter().filter(|(uri, record)| is_meant(uri, record)).map(|(uri, _)| uri).collect();
    match found.as_slice() {
        [uri] => Ok((*uri).clone()),
        [] => Err(not_found(format!("nobody is registered as {}", short(text)), "see `tidemark identity list`")),
        _ => Err(bad_request(
            format!("more than one is registered as {}", short(text)),
            "give the id or the URI that `tidemark identity list` shows",
        )),
    }
}

fn find_identity(state: &State, role: PeerRole, text: &str) -> Result<String, Failure> {
    let mut of_role = State { identities: state.identities.clone(), ..State::default() };
    let wanted = match role {
        PeerRole::Agent => Role::Agent,
        PeerRole::ProcessServer => Role::ProcessServer,
    };
    of_role.identities.retain(|uri, _| identity_of(uri).is_ok_and(|identity| identity.role() == wanted));
    find_any_identity(&of_role, text)
}

fn not_found(message: String, help: &str) -> Failure {
    Failure::new(FailureKind::NotFound, message, help)
}

/// For messages: what somebody sent may be long.
fn short(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

pub fn hex_encode(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn hex_decode(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
pub(crate) mod tests;
