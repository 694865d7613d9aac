//! Alerts told to people and programs elsewhere: by webhook and by mail.
//!
//! *Consistency.* Each channel goes through the stored events in their order and remembers the last one that it is done with;
//! an event may be told twice, and says its id. *Retries.* After 1, 2, 4, 8 and then every 10 minutes, [`ATTEMPTS_MAX`] times
//! for one event; then it is given up, which is an event itself. *Cancellation.* At the server's stop, between two events.
//! *Crash.* What was told and not yet remembered is told again.

mod mail;
mod webhook;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, Severity};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use crate::core::Core;
use crate::database::Statement;
use crate::history::{News, Query, Stored, severity_name};
use crate::names::{Expected, bad_request, check_name};
use mail::Refused;

/// Tries for one event; the pauses between them sum up to more than a day.
const ATTEMPTS_MAX: usize = 150;
const PAUSES: [Duration; 5] = [
    Duration::from_secs(60),
    Duration::from_secs(120),
    Duration::from_secs(240),
    Duration::from_secs(480),
    Duration::from_secs(600),
];
/// One try, from dialling to the answer.
const TRY_LIMIT: Duration = Duration::from_secs(30);
const CHANNELS_MAX: usize = 32;
const RECIPIENTS_MAX: usize = 32;
const SECRET_BYTES_MIN: usize = 16;
const READ_AGAIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Certificates of one authority.
const CA_BYTES_MAX: usize = 64 << 10;

/// Where alerts are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Channel {
    /// `warning` or `critical`: of that and worse. That an alert ended is told to those that hear of warnings.
    #[serde(default = "warning")]
    #[schema(value_type = String)]
    pub severity: Severity,
    #[serde(default)]
    pub webhook: Option<Webhook>,
    #[serde(default)]
    pub mail: Option<Mail>,
}

fn warning() -> Severity {
    Severity::Warning
}

/// An event as JSON, by POST: as `/events` lists it. Its `alert` names the alert by an `id` that is the same from `raised` to `cleared`, with
/// its severity and since when; it is null in tests of the channel and where an identity was used twice. The header `Tidemark-Event` is the
/// event's id, which is told again where it is not known to have arrived; `Tidemark-Signature: t=SECONDS,v1=HEX` is an HMAC-SHA256 with the
/// secret over `SECONDS.BODY`. What is answered with a status of 2xx was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// `https://…`; `http://` to this machine only.
    pub url: String,
    /// Signs what is sent: HMAC-SHA256 over time and body. Not shown again.
    #[serde(default)]
    pub secret: Option<String>,
    /// PEM of the authority that the server's certificate is checked with; absent: those of the system.
    #[serde(default)]
    pub ca: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Mail {
    /// HOST:PORT of the mail server.
    pub server: String,
    #[serde(default)]
    pub tls: MailTls,
    #[serde(default)]
    pub user: Option<String>,
    /// Not shown again.
    #[serde(default)]
    pub password: Option<String>,
    pub from: String,
    pub to: Vec<String>,
    /// PEM of the authority that the server's certificate is checked with; absent: those of the system.
    #[serde(default)]
    pub ca: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MailTls {
    /// Begun in plain text and refused when TLS is not offered.
    #[default]
    Starttls,
    /// From the first byte.
    Tls,
    /// To this machine only.
    None,
}

/// A channel as it is shown: without what is secret.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ShownChannel {
    pub name: String,
    pub severity: String,
    /// `webhook` or `mail`.
    pub kind: &'static str,
    /// The URL, or the mail server.
    pub to: String,
    pub recipients: Vec<String>,
    pub signed: bool,
    /// The id of the last event that it is done with.
    pub done: u64,
    /// Why the last try failed; absent when it did not.
    pub problem: Option<String>,
    /// When something was told last.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub told: Option<Timestamp>,
}

/// How the channels do.
#[derive(Default)]
pub struct Deliveries(Mutex<BTreeMap<String, Standing>>);

#[derive(Clone, Debug, Default)]
struct Standing {
    done: u64,
    problem: Option<String>,
    told: Option<Timestamp>,
}

impl Deliveries {
    fn with<T>(&self, name: &str, change: impl FnOnce(&mut Standing) -> T) -> T {
        change(self.0.lock().expect("no panic while held").entry(name.to_owned()).or_default())
    }

    fn forget(&self, name: &str) {
        self.0.lock().expect("no panic while held").remove(name);
    }
}

// ---- what operators ask for

pub fn list(core: &Core) -> Vec<ShownChannel> {
    core.store.state().channels.iter().map(|(name, channel)| show(core, name, channel)).collect()
}

pub fn get(core: &Core, name: &str) -> Result<ShownChannel, Failure> {
    let state = core.store.state();
    state.channels.get(name).map(|channel| show(core, name, channel)).ok_or_else(|| unknown(name))
}

pub fn create(core: &Core, name: &str, channel: Channel) -> Result<ShownChannel, Failure> {
    check_name("channel", name)?;
    check(&channel)?;
    // From now on: what happened before is no news.
    let newest = *core.history.newest().borrow();
    remember(core, name, newest)?;
    core.store.change(|state| {
        if state.channels.contains_key(name) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("there is a channel {name:?} already"),
                "delete it first, or choose another name",
            ));
        }
        if state.channels.len() >= CHANNELS_MAX {
            return Err(bad_request(format!("there are {CHANNELS_MAX} channels, which is the limit"), "delete one"));
        }
        state.channels.insert(name.to_owned(), channel.clone());
        Ok(())
    })?;
    Ok(show(core, name, &channel))
}

pub fn delete(core: &Core, name: &str, expected: Expected) -> Result<(), Failure> {
    core.store.change(|state| {
        expected.check(state, "channels", name)?;
        state.channels.remove(name).map(drop).ok_or_else(|| unknown(name))
    })?;
    core.deliveries.forget(name);
    Ok(())
}

/// Tells a channel something now, once.
pub async fn test(core: &Core, name: &str) -> Result<(), Failure> {
    let channel = core.store.state().channels.get(name).cloned().ok_or_else(|| unknown(name))?;
    let event = Stored {
        id: 0,
        time: core.clock.wall_now(),
        severity: severity_name(Severity::Info).to_owned(),
        source: "configuration server".to_owned(),
        machine: None,
        disk: None,
        kind: "channel_test".to_owned(),
        message: format!("this is a test of channel {name}"),
        help: String::new(),
        epoch: 0,
        actor: None,
        alert: None,
    };
    let unavailable = |reason: String| {
        Failure::new(FailureKind::Unavailable, format!("channel {name:?}: {reason}"), "check address and credentials")
    };
    let recipients = channel.mail.as_ref().map_or_else(Vec::new, |mail| mail.to.clone());
    let refused = tell(core, &channel, &recipients, &event).await.map_err(unavailable)?;
    refused.first().map_or(Ok(()), |refused| Err(unavailable(refused.to_string())))
}

fn unknown(name: &str) -> Failure {
    let shown: String = name.chars().take(80).collect();
    Failure::new(FailureKind::NotFound, format!("there is no channel {shown:?}"), "see `tidemark channel list`")
}

fn show(core: &Core, name: &str, channel: &Channel) -> ShownChannel {
    let Standing { done, problem, told } = core.deliveries.with(name, |standing| standing.clone());
    let webhook = channel.webhook.as_ref();
    let mail = channel.mail.as_ref();
    ShownChannel {
        name: name.to_owned(),
        severity: severity_name(channel.severity).to_owned(),
        kind: if webhook.is_some() { "webhook" } else { "mail" },
        to: webhook.map(|webhook| webhook.url.clone()).or(mail.map(|mail| mail.server.clone())).unwrap_or_default(),
        recipients: mail.map_or_else(Vec::new, |mail| mail.to.clone()),
        signed: webhook.is_some_and(|webhook| webhook.secret.is_some()),
        done,
        problem,
        told,
    }
}

fn check(channel: &Channel) -> Result<(), Failure> {
    let ca =
        channel.webhook.as_ref().map_or(channel.mail.as_ref().and_then(|mail| mail.ca.as_ref()), |of| of.ca.as_ref());
    if ca.is_some_and(|pem| pem.len() > CA_BYTES_MAX || webhook::roots(Some(pem)).is_err()) {
        return Err(bad_request("ca holds no certificates", "give the authority's certificate as PEM"));
    }
    match (&channel.webhook, &channel.mail) {
        (Some(hook), None) => {
            webhook::Target::of(&hook.url).map_err(|reason| bad_request(reason, "give https://HOST[:PORT]/PATH"))?;
            if hook.secret.as_ref().is_some_and(|secret| secret.len() < SECRET_BYTES_MIN) {
                return Err(bad_request(
                    format!("a secret of less than {SECRET_BYTES_MIN} bytes signs nothing"),
                    "make one with `openssl rand -hex 32`",
                ));
            }
            Ok(())
        }
        (None, Some(mail)) => {
            if mail.to.is_empty() || mail.to.len() > RECIPIENTS_MAX {
                return Err(bad_request(
                    format!("mail goes to {} recipients", mail.to.len()),
                    format!("name 1 to {RECIPIENTS_MAX}"),
                ));
            }
            if mail.user.is_some() != mail.password.is_some() {
                return Err(bad_request("user and password go together", "give both, or none"));
            }
            mail::check(mail).map_err(|reason| bad_request(reason, "give HOST:PORT, and addresses as name@example.org"))
        }
        _ => Err(bad_request("a channel is a webhook or mail", "give exactly one of them")),
    }
}

// ---- telling

/// One task a channel; it ends when the channel is changed or deleted.
pub async fn run(core: Arc<Core>) {
    let mut running: BTreeMap<String, (Channel, CancellationToken)> = BTreeMap::new();
    while tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_err() {
        let state = core.store.state();
        running.retain(|name, (channel, stop)| {
            let is_same = state.channels.get(name) == Some(channel);
            if !is_same {
                stop.cancel();
            }
            is_same
        });
        for (name, channel) in &state.channels {
            if !running.contains_key(name) {
                let stop = core.stop.child_token();
                running.insert(name.clone(), (channel.clone(), stop.clone()));
                let (core, name, channel) = (core.clone(), name.clone(), channel.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = follow(&core, &name, &channel) => {}
                    }
                });
            }
        }
    }
}

/// Tells what happens, in order. Ends with its task.
async fn follow(core: &Core, name: &str, channel: &Channel) {
    let mut newest = core.history.newest();
    let mut again = tokio::time::interval(READ_AGAIN);
    let mut done = loop {
        match remembered(core, name) {
            Ok(done) => break done.unwrap_or_else(|| *newest.borrow()),
            // From which event on cannot be said now: none is passed over for it.
            Err(failure) => {
                tracing::warn!(channel = name, %failure, "how far it is cannot be read; trying again");
                again.reset();
                again.tick().await;
            }
        }
    };
    loop {
        core.deliveries.with(name, |standing| standing.done = done);
        let query = Query { after: Some(done), ..Query::default() };
        let history = core.history.clone();
        let Ok(Ok(page)) = tokio::task::spawn_blocking(move || history.list(&query)).await else {
            // The history cannot be read now: nothing is passed over for it.
            again.reset();
            again.tick().await;
            continue;
        };
        let Some(last) = page.last().map(|event| event.id) else {
            if newest.wait_for(|newest| *newest > done).await.is_err() {
                return;
            }
            continue;
        };
        for event in page.iter().filter(|event| is_told(channel, event)) {
            insist(core, name, channel, event).await;
            done = event.id;
            note(core, name, done);
        }
        if done < last {
            done = last;
            note(core, name, done);
        }
    }
}

fn is_told(channel: &Channel, event: &Stored) -> bool {
    match event.kind.as_str() {
        "alert_raised" => event.severity == "critical" || channel.severity <= Severity::Warning,
        // Also where no machine suffers from it.
        "identity_used_twice" => true,
        "alert_cleared" => channel.severity <= Severity::Warning,
        _ => false,
    }
}

/// Until it was told, or given up.
async fn insist(core: &Core, name: &str, channel: &Channel, event: &Stored) {
    // Of a mail: those who have not got it.
    let mut recipients = channel.mail.as_ref().map_or_else(Vec::new, |mail| mail.to.clone());
    for attempt in 0..ATTEMPTS_MAX {
        let reason = match tell(core, channel, &recipients, event).await {
            Ok(refused) => {
                let now = core.clock.wall_now();
                core.deliveries.with(name, |standing| standing.told = Some(now));
                // One mailbox that is refused holds up nobody else.
                recipients = refused.iter().filter(|refused| !refused.is_final).map(|of| of.to.clone()).collect();
                let Some(first) = refused.first().map(ToString::to_string) else {
                    core.deliveries.with(name, |standing| standing.problem = None);
                    return;
                };
                first
            }
            Err(reason) => reason,
        };
        // Once for each reason: the other end may be away for a day.
        let is_new =
            core.deliveries.with(name, |standing| standing.problem.replace(reason.clone())) != Some(reason.clone());
        if is_new {
            tracing::warn!(channel = name, reason, "an alert was not taken");
        }
        if recipients.is_empty() && channel.mail.is_some() {
            if is_new {
                core.history.note(News {
                    severity: Severity::Warning,
                    kind: "delivery_refused",
                    machine: event.machine.clone(),
                    message: format!("channel {name}: {reason}"),
                    help: "delete the channel and make it again with addresses that the mail server takes".to_owned(),
                });
            }
            return;
        }
        let pause = PAUSES[attempt.min(PAUSES.len() - 1)];
        if tokio::time::timeout(pause, core.stop.cancelled()).await.is_ok() {
            // Told at the next start: it is not done.
            return std::future::pending().await;
        }
    }
    core.history.note(News {
        severity: Severity::Warning,
        kind: "delivery_given_up",
        machine: event.machine.clone(),
        message: format!("channel {name} never took event {}: {}", event.id, event.message),
        help: "see `tidemark channel list` for why, and `tidemark events` for what it missed".to_owned(),
    });
}

/// Mail: to these recipients. `Ok`: it was taken, but for those that are named.
async fn tell(core: &Core, channel: &Channel, to: &[String], event: &Stored) -> Result<Vec<Refused>, String> {
    let telling = async {
        match (&channel.webhook, &channel.mail) {
            (Some(hook), _) => webhook::send(hook, event, core.clock.wall_now()).await.map(|()| Vec::new()),
            (_, Some(mail)) => mail::send(mail, to, event).await,
            _ => Err("it has neither webhook nor mail".to_owned()),
        }
    };
    let late = || Err(format!("no answer within {} s", TRY_LIMIT.as_secs()));
    tokio::time::timeout(TRY_LIMIT, telling).await.unwrap_or_else(|_| late())
}

// ---- how far each is

fn fact(name: &str) -> String {
    format!("channel/{name}")
}

fn remembered(core: &Core, name: &str) -> Result<Option<u64>, Failure> {
    let sql = "SELECT value FROM facts WHERE id = $1";
    let rows = core.store.database().read(Statement::new(sql, [fact(name).into()]))?;
    Ok(rows.first().and_then(|row| row[0].text().parse().ok()))
}

fn remember(core: &Core, name: &str, done: u64) -> Result<(), Failure> {
    let sql = "INSERT INTO facts (id, value) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET value = excluded.value";
    let statement = Statement::new(sql, [fact(name).into(), done.to_string().into()]);
    core.store.database().write(vec![statement]).map_err(Failure::from)
}

fn note(core: &Core, name: &str, done: u64) {
    if let Err(failure) = remember(core, name, done) {
        tracing::warn!(channel = name, %failure, "how far it is cannot be stored: it may be told some again");
    }
}
