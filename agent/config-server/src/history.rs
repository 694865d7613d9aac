//! Events: what happened, kept in order.
//!
//! *Consistency.* Events of an agent or a process server are stored in the transaction that notes how far its stream is
//! here, so that each is stored once, whatever is repeated. Ids grow by one in the order of storing. *Retries.* The
//! senders': what was not acknowledged comes again. *Cancellation.* None. *Crash.* Own events that were not written yet
//! are lost; those of others are not.
//!
//! **Epochs.** A restore from a backup brings back the ids of that moment, and what happens after it has ids that others had before.
//! Each incarnation of the configuration server that was restored begins an epoch, and it is kept after which id: whoever has seen
//! everything up to an id of an epoch goes on where the next one began ([`History::resume`]), with nothing told twice or left out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tidemark_base::tally::Tally;
use tidemark_base::{Clock, SystemClock, Timestamp};
use tidemark_proto::control::{EventBatch, Severity};
use tokio::sync::watch;

use crate::backup::content;
use crate::database::{Connection, Database, DatabaseError, Row, Statement, Value};

/// Older events are forgotten.
pub const EVENTS_KEPT: u64 = 100_000;
/// Forgetting is done once in so many.
const PRUNE_EVERY: u64 = 1_000;
/// The most of one answer.
pub const PAGE_MAX: u64 = 1_000;
/// Where epochs are kept among the facts.
const EPOCHS: &str = "event_epochs";

/// An event as it is listed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Stored {
    /// Grows by one from event to event.
    pub id: u64,
    #[schema(value_type = String, format = "date-time")]
    pub time: Timestamp,
    /// `info`, `warning` or `critical`.
    pub severity: String,
    /// Who said so: `agent NAME`, `process server NAME`, or `configuration server`.
    pub source: String,
    /// The machine's name, or its id where the name is not known any more.
    pub machine: Option<String>,
    /// A disk's id.
    pub disk: Option<String>,
    /// For programs.
    pub kind: String,
    pub message: String,
    pub help: String,
    /// Grows with each restore of the configuration from a backup, where ids begin again after those of that backup. To go on after an
    /// event, name both: `after` and `epoch`.
    pub epoch: u64,
    /// The user who did it; absent: nobody asked for it.
    pub actor: Option<Actor>,
    /// Of events that an alert was raised, or is no more: which one.
    pub alert: Option<AlertNote>,
}

/// Who did something.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Actor {
    /// A user of the API.
    pub user: String,
    /// The address that the request came from; absent: not known.
    pub address: Option<String>,
}

/// Which alert an event is about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AlertNote {
    /// The same from when it is raised until it is no more, and as `/alerts` lists it. The same cause later has the same id.
    pub id: String,
    /// Which rule raised it.
    pub kind: String,
    pub state: AlertState,
    /// `warning` or `critical`; also of one that is no more.
    pub severity: String,
    /// When it was raised.
    #[schema(value_type = String, format = "date-time")]
    pub since: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlertState {
    Raised,
    Cleared,
}

/// The ids of an incarnation begin after this one.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Epoch {
    epoch: u64,
    after: u64,
}

/// An event of the configuration server's own.
#[derive(Clone, Debug)]
pub struct News {
    pub severity: Severity,
    pub kind: &'static str,
    pub machine: Option<String>,
    pub message: String,
    pub help: String,
}

/// Which events are asked for.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only later ones than this id, oldest first.
    pub after: Option<u64>,
    /// At most so many: the newest, where `after` is not given.
    pub limit: Option<u64>,
    pub machine: Option<String>,
    /// Of this severity or worse.
    pub severity: Option<Severity>,
}

pub struct History {
    database: Database,
    /// The newest id that is stored.
    newest: Arc<watch::Sender<u64>>,
    /// The id that comes next; touched on the database's thread only.
    next: Arc<AtomicU64>,
    /// Those that a restore began.
    epochs: Vec<Epoch>,
    clock: SystemClock,
    errors: Arc<Tally>,
}

impl History {
    pub fn open(database: Database) -> Result<Self, DatabaseError> {
        let rows = database.read(Statement::new("SELECT MAX(id) FROM events", []))?;
        let newest = rows.first().map_or(0, |row| u64::try_from(row[0].int()).unwrap_or_default());
        Ok(Self {
            epochs: epochs(&database, newest)?,
            database,
            newest: Arc::new(watch::Sender::new(newest)),
            next: Arc::new(AtomicU64::new(newest + 1)),
            clock: SystemClock::new(),
            errors: Arc::default(),
        })
    }

    /// Events that are no mere information, since we started: by machine, kind and severity.
    pub fn errors(&self) -> &Tally {
        &self.errors
    }

    /// Tells of the newest id.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// From where whoever has seen everything up to `after` of an epoch goes on; without an epoch: of whichever one has that id.
    pub fn resume(&self, after: u64, epoch: Option<u64>) -> u64 {
        let newest = *self.newest.borrow();
        let begun = match epoch {
            Some(seen) => self.epochs.iter().filter(|of| of.epoch > seen).map(|of| of.after).min(),
            // That id is of before a restore, if there was one.
            None => self.epochs.last().map(|of| of.after).filter(|_| after > newest),
        };
        begun.map_or(after, |begun| after.min(begun)).min(newest)
    }

    fn epoch_of(&self, id: u64) -> u64 {
        self.epochs.iter().filter(|of| id > of.after).map(|of| of.epoch).max().unwrap_or(1)
    }

    /// Notes an event of our own, soon.
    pub fn note(&self, news: News) {
        self.keep(news, None, None);
    }

    /// The same, of what somebody did.
    pub fn note_by(&self, actor: Option<Actor>, news: News) {
        self.keep(news, actor, None);
    }

    /// The same, of an alert.
    pub fn note_alert(&self, alert: AlertNote, news: News) {
        self.keep(news, None, Some(alert));
    }

    fn keep(&self, news: News, actor: Option<Actor>, alert: Option<AlertNote>) {
        let News { severity, kind, machine, message, help } = news;
        let stored = Stored {
            id: 0,
            time: self.clock.wall_now(),
            severity: severity_name(severity).to_owned(),
            source: "configuration server".to_owned(),
            machine,
            disk: None,
            kind: kind.to_owned(),
            message,
            help,
            epoch: 0,
            actor,
            alert,
        };
        let (newest, next, errors) = (self.newest.clone(), self.next.clone(), self.errors.clone());
        let posted = self.database.post(move |connection| {
            if let Err(error) = store(connection, vec![stored], Vec::new(), &newest, &next, &errors) {
                tracing::warn!(%error, "an event cannot be stored");
            }
        });
        if let Err(error) = posted {
            tracing::warn!(%error, "an event cannot be stored");
        }
    }

    /// Stores what is new in a batch of `source`, once; answers how far its stream is here. Blocks.
    pub fn take(
        &self,
        source: &str,
        shown: String,
        batch: EventBatch,
        machine_name: impl Fn(&str) -> Option<String> + Send + 'static,
    ) -> Result<u64, DatabaseError> {
        let (source, newest, next) = (source.to_owned(), self.newest.clone(), self.next.clone());
        let errors = self.errors.clone();
        self.database.run(move |connection| {
            let sql = "SELECT stream, sequence FROM event_streams WHERE source = $1";
            let rows = connection.read(Statement::new(sql, [source.as_str().into()]))?;
            let stream = batch.stream.to_string();
            let known = match rows.first() {
                Some(row) if row[0].text() == stream => u64::try_from(row[1].int()).unwrap_or_default(),
                _ => 0,
            };
            let Some(last) = batch.events.last().map(|event| event.sequence).filter(|last| *last > known) else {
                return Ok(known);
            };
            let new = batch.events.into_iter().filter(|event| event.sequence > known);
            let stored = new.map(|event| {
                let machine = event.machine.map(|machine| machine.to_string());
                Stored {
                    id: 0,
                    time: event.time,
                    severity: severity_name(event.severity).to_owned(),
                    source: shown.clone(),
                    machine: machine.map(|id| machine_name(&id).unwrap_or(id)),
                    disk: event.disk.map(|disk| disk.to_string()),
                    kind: event.kind,
                    message: event.message,
                    help: event.help,
                    epoch: 0,
                    actor: None,
                    alert: None,
                }
            });
            let sql = "INSERT INTO event_streams (source, stream, sequence) VALUES ($1, $2, $3) \
                       ON CONFLICT (source) DO UPDATE SET stream = excluded.stream, sequence = excluded.sequence";
            let noted = Statement::new(sql, [source.into(), stream.into(), last.into()]);
            store(connection, stored.collect(), vec![noted], &newest, &next, &errors)?;
            Ok(last)
        })
    }

    /// Oldest first.
    pub fn list(&self, query: &Query) -> Result<Vec<Stored>, DatabaseError> {
        let mut conditions = Vec::new();
        let mut values: Vec<Value> = Vec::new();
        let mut condition = |sql: &str, value: Value| {
            values.push(value);
            conditions.push(format!("{sql} ${}", values.len()));
        };
        condition("id >", query.after.unwrap_or(0).into());
        if let Some(machine) = &query.machine {
            condition("machine =", machine.as_str().into());
        }
        match query.severity {
            None | Some(Severity::Info) => {}
            Some(Severity::Warning) => condition("severity <>", "info".into()),
            Some(Severity::Critical) => condition("severity =", "critical".into()),
        }
        values.push(query.limit.unwrap_or(PAGE_MAX).min(PAGE_MAX).into());
        let order = if query.after.is_some() { "ASC" } else { "DESC" };
        let sql = format!(
            "SELECT id, time, severity, source, machine, disk, kind, message, help, actor, alert FROM events WHERE {} \
             ORDER BY id {order} LIMIT ${}",
            conditions.join(" AND "),
            values.len()
        );
        let mut found: Vec<Stored> =
            self.database.read(Statement::new(sql, values))?.iter().map(|row| self.stored_of(row)).collect();
        if query.after.is_none() {
            found.reverse();
        }
        Ok(found)
    }

    fn stored_of(&self, row: &Row) -> Stored {
        let text = |column: usize| row[column].text().to_owned();
        let number = |column: usize| u64::try_from(row[column].int()).unwrap_or_default();
        Stored {
            id: number(0),
            time: Timestamp(number(1)),
            severity: text(2),
            source: text(3),
            machine: row[4].optional_text().map(str::to_owned),
            disk: row[5].optional_text().map(str::to_owned),
            kind: text(6),
            message: text(7),
            help: text(8),
            epoch: self.epoch_of(number(0)),
            actor: row[9].optional_text().and_then(|text| serde_json::from_str(text).ok()),
            alert: row[10].optional_text().and_then(|text| serde_json::from_str(text).ok()),
        }
    }
}

/// Those of before, and that of this incarnation where a restore just began it: before its first event.
fn epochs(database: &Database, newest: u64) -> Result<Vec<Epoch>, DatabaseError> {
    let known = content::fact(database, EPOCHS)?;
    let mut epochs: Vec<Epoch> = known.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let incarnation = content::incarnation(database)?;
    if incarnation > epochs.last().map_or(1, |of| of.epoch) {
        epochs.push(Epoch { epoch: incarnation, after: newest });
        let text = serde_json::to_string(&epochs).expect("epochs are plain data");
        let sql = "INSERT INTO facts (id, value) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET value = excluded.value";
        database.write(vec![Statement::new(sql, [EPOCHS.into(), text.into()])])?;
    }
    Ok(epochs)
}

/// On the database's thread: numbers them, writes them with `also`, and tells.
fn store(
    connection: &mut Connection<'_>,
    events: Vec<Stored>,
    also: Vec<Statement>,
    newest: &watch::Sender<u64>,
    next: &AtomicU64,
    errors: &Tally,
) -> Result<(), DatabaseError> {
    let first = next.load(Ordering::Relaxed);
    let after = first + events.len() as u64;
    let sql = "INSERT INTO events (id, time, severity, source, machine, disk, kind, message, help, actor, alert) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";
    let counted: Vec<[String; 3]> = events
        .iter()
        .filter(|event| event.severity != severity_name(Severity::Info))
        .map(|event| [event.machine.clone().unwrap_or_default(), event.kind.clone(), event.severity.clone()])
        .collect();
    let mut statements: Vec<Statement> = (first..)
        .zip(events)
        .map(|(id, event)| {
            let json = |text: Option<serde_json::Result<String>>| text.and_then(Result::ok);
            let values: [Value; 11] = [
                id.into(),
                event.time.0.into(),
                event.severity.into(),
                event.source.into(),
                event.machine.into(),
                event.disk.into(),
                event.kind.into(),
                event.message.into(),
                event.help.into(),
                json(event.actor.map(|actor| serde_json::to_string(&actor))).into(),
                json(event.alert.map(|alert| serde_json::to_string(&alert))).into(),
            ];
            Statement::new(sql, values)
        })
        .collect();
    statements.extend(also);
    if first / PRUNE_EVERY != after / PRUNE_EVERY {
        let oldest = after.saturating_sub(EVENTS_KEPT);
        statements.push(Statement::new("DELETE FROM events WHERE id < $1", [oldest.into()]));
    }
    if let Err(error) = connection.write(&statements) {
        if error.is_unknown() {
            // They may be there: their numbers are not used again.
            next.store(after, Ordering::Relaxed);
        }
        return Err(error);
    }
    next.store(after, Ordering::Relaxed);
    newest.send_replace(after - 1);
    for [machine, kind, severity] in &counted {
        errors.add(&[("machine", machine), ("kind", kind), ("severity", severity)]);
    }
    Ok(())
}

pub fn severity_name(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Critical => "critical",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::DatabaseSetting;
    use tidemark_proto::control::Event;
    use uuid::Uuid;

    fn event(sequence: u64) -> Event {
        Event {
            sequence,
            time: Timestamp(sequence),
            severity: if sequence.is_multiple_of(2) { Severity::Warning } else { Severity::Info },
            machine: None,
            disk: None,
            kind: "test".into(),
            message: format!("event {sequence}"),
            help: String::new(),
        }
    }

    fn batch(stream: Uuid, sequences: std::ops::RangeInclusive<u64>) -> EventBatch {
        EventBatch { stream, events: sequences.map(event).collect() }
    }

    /// As a database of which this incarnation is, with so many events.
    fn reopened(path: &std::path::Path, incarnation: u64, events: std::ops::RangeInclusive<u64>) -> History {
        let database = Database::open(&DatabaseSetting::Sqlite(path.to_owned())).unwrap();
        let sql = "INSERT INTO facts (id, value) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET value = excluded.value";
        database.write(vec![Statement::new(sql, ["incarnation".into(), incarnation.to_string().into()])]).unwrap();
        let history = History::open(database).unwrap();
        history.take("a", "agent a".to_owned(), batch(Uuid::new_v4(), events), |_| None).unwrap();
        history
    }

    #[test]
    fn whoever_follows_goes_on_after_a_restore_with_nothing_twice_and_nothing_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.db");
        drop(reopened(&path, 1, 1..=3));
        // Restored with three events; somebody has seen seven that were there once.
        let history = reopened(&path, 2, 11..=12);
        let epochs = |history: &History| -> Vec<(u64, u64)> {
            history.list(&Query::default()).unwrap().iter().map(|event| (event.epoch, event.id)).collect()
        };
        assert_eq!(epochs(&history), [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]);
        assert_eq!(history.resume(7, Some(1)), 3);
        assert_eq!(history.resume(2, Some(1)), 2, "whoever had not seen all of before goes on there");
        assert_eq!(history.resume(4, Some(2)), 4);
        assert_eq!(history.resume(7, None), 3, "an id that is none was given before");
        assert_eq!(history.resume(99, Some(2)), 5);
        drop(history);
        // Once more, from a backup of then; and a start that is no restore begins none.
        drop(reopened(&path, 3, 21..=29));
        let history = reopened(&path, 3, 31..=31);
        assert_eq!(history.resume(9, Some(2)), 5);
        assert_eq!(history.resume(7, Some(1)), 3, "two restores back");
        assert_eq!(epochs(&history).last(), Some(&(3, 15)));
    }

    #[test]
    fn each_event_is_stored_once_whatever_is_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let setting = DatabaseSetting::Sqlite(folder.path().join("config.db"));
        let open = || History::open(Database::open(&setting).unwrap()).unwrap();
        let take = |history: &History, source: &str, batch| {
            history.take(source, format!("agent {source}"), batch, |_| None).unwrap()
        };
        let messages = |history: &History| -> Vec<(u64, String)> {
            let found = history.list(&Query::default()).unwrap();
            found.into_iter().map(|event| (event.id, event.message)).collect()
        };
        let (stream, other) = (Uuid::new_v4(), Uuid::new_v4());
        let history = open();
        assert_eq!(take(&history, "a", batch(stream, 1..=3)), 3);
        assert_eq!(take(&history, "a", batch(stream, 2..=4)), 4, "a batch that overlaps adds what is new");
        assert_eq!(take(&history, "a", batch(stream, 1..=2)), 4, "an older one adds nothing");
        assert_eq!(take(&history, "b", batch(stream, 1..=1)), 1, "every sender has its own");
        drop(history);
        let history = open();
        assert_eq!(take(&history, "a", batch(stream, 3..=4)), 4, "a restart forgets none");
        assert_eq!(take(&history, "a", batch(other, 1..=1)), 1, "a new stream begins anew");
        let found = messages(&history);
        let expected: Vec<(u64, String)> =
            (1..).zip([1, 2, 3, 4, 1, 1].map(|sequence| format!("event {sequence}"))).collect();
        assert_eq!(found, expected);
        let worse = Query { severity: Some(Severity::Warning), after: Some(2), ..Query::default() };
        assert_eq!(history.list(&worse).unwrap().iter().map(|event| event.id).collect::<Vec<_>>(), [4]);
        let newest = Query { limit: Some(2), ..Query::default() };
        assert_eq!(history.list(&newest).unwrap().iter().map(|event| event.id).collect::<Vec<_>>(), [5, 6]);
    }
}
