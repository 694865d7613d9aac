use super::*;
use crate::database::Statement;
use crate::history::Query;
use crate::model::{ApiToken, Passphrase, PeerRole, Policy, User, UserRole};
use crate::store::Store;
use crate::store::tests::{Postgres, skipped};
use tidemark_base::storage::RealStorage;
use tidemark_proto::control::{Event, EventBatch};
use uuid::Uuid;

const AUTHORITY: &str = "-----BEGIN PRIVATE KEY-----\nthe key itself\n";

struct Site {
    folder: tempfile::TempDir,
    key: RecoveryKey,
    database: Database,
    store: Store,
    backups: Backups,
}

fn open_in(folder: &std::path::Path, database: Database) -> (Store, Backups) {
    let storage = RealStorage::open_folder(folder);
    let store = Store::open(database.clone(), &*storage).unwrap();
    let options = BackupOptions {
        authority: AUTHORITY.into(),
        fingerprint: "f".into(),
        token: "secret token".into(),
        name: "cs".into(),
    };
    let incarnation = content::incarnation(&database).unwrap();
    (store, Backups::open(storage, database, options, incarnation).unwrap())
}

/// With something in every kind of row that counts.
fn site(setting: impl Fn(&std::path::Path) -> DatabaseSetting) -> Site {
    let folder = tempfile::tempdir().unwrap();
    let key = new_recovery_key(&*RealStorage::open_folder(folder.path())).unwrap();
    let database = Database::open(&setting(folder.path())).unwrap();
    let (store, backups) = open_in(folder.path(), database.clone());
    store
        .change(|state| {
            state.policies.insert("it's \"quoted\" — ünïcode".into(), Policy::default());
            state.users.insert("alice".into(), User { role: UserRole::Operator, created: Timestamp(5) });
            let digest = "d".repeat(64);
            let token =
                ApiToken { user: "alice".into(), label: "x".into(), digest, created: Timestamp(5), expires: None };
            state.tokens.insert("t".into(), token);
            let passphrase = Passphrase {
                role: PeerRole::Agent,
                hash: "argon".into(),
                created: Timestamp(1),
                expires: Timestamp(u64::MAX / 2),
                uses_left: 1,
                replaces: None,
            };
            state.passphrases.insert("p".into(), passphrase);
            Ok(())
        })
        .unwrap();
    let history = crate::history::History::open(database.clone()).unwrap();
    let event = Event {
        sequence: 7,
        time: Timestamp(9),
        severity: Severity::Info,
        machine: None,
        disk: None,
        kind: "test".into(),
        message: "what happened".into(),
        help: String::new(),
    };
    let batch = EventBatch { stream: Uuid::from_bytes([1; 16]), events: vec![event] };
    history.take("agent a", "agent a".into(), batch, |_| None).unwrap();
    Site { folder, key, database, store, backups }
}

fn sqlite(folder: &std::path::Path) -> DatabaseSetting {
    DatabaseSetting::Sqlite(folder.join("config.db"))
}

/// The same for both databases: restored into another one everything is there, but what is good for one use.
fn round_trip(from: impl Fn(&std::path::Path) -> DatabaseSetting, to: &DatabaseSetting) {
    let site = site(from);
    let made = site.backups.make(&site.store.state()).unwrap();
    let sealed = site.backups.read(&made.id).unwrap();
    let (head, content) = open(&site.key, &sealed).unwrap();
    assert_eq!((head.incarnation, content.incarnation, content.authority.as_str()), (1, 1, AUTHORITY));
    assert_eq!(content.token, "secret token");
    content.restore(to, Timestamp(77)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let database = Database::open(to).unwrap();
    let (store, _) = open_in(folder.path(), database.clone());
    let (before, after) = (site.store.state(), store.state());
    assert_eq!((&after.policies, &after.users, &after.tokens), (&before.policies, &before.users, &before.tokens));
    assert_eq!(after.revisions.get(&("users", "alice".into())), Some(&1), "changes are told apart as before");
    assert!(!before.passphrases.is_empty() && after.passphrases.is_empty(), "a passphrase may have been used since");
    let history = crate::history::History::open(database.clone()).unwrap();
    assert_eq!(history.list(&Query::default()).unwrap().last().unwrap().message, "what happened");
    // What came before comes again to nobody.
    let batch = EventBatch { stream: Uuid::from_bytes([1; 16]), events: Vec::new() };
    assert_eq!(history.take("agent a", "agent a".into(), batch, |_| None).unwrap(), 7);
    assert_eq!(content::incarnation(&database).unwrap(), 2, "it is not the one that made the backup");
    let told = content::take_restored(&database).unwrap().unwrap();
    assert!(told.contains(&head.created.to_string()), "{told}");
    assert_eq!(content::take_restored(&database).unwrap(), None, "told once");
    database.close();
    let again = content.restore(to, Timestamp(78)).unwrap_err();
    assert!(matches!(again, content::FillError::NotEmpty { .. }) && !again.help().is_empty(), "{again}");
}

#[test]
fn a_backup_of_sqlite_is_restored_into_another_and_never_over_one_in_use() {
    let folder = tempfile::tempdir().unwrap();
    round_trip(sqlite, &sqlite(folder.path()));
}

#[test]
fn a_backup_of_postgresql_is_restored_into_sqlite_and_the_other_way_round() {
    let Some(postgres) = Postgres::start() else {
        skipped("PostgreSQL is not installed");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    round_trip(|_| postgres.setting(), &sqlite(folder.path()));
    round_trip(sqlite, &postgres.setting_of("template1"));
}

#[test]
fn what_was_written_is_opened_again_and_a_backup_that_does_not_prove_itself_is_none() {
    let site = site(sqlite);
    let made = site.backups.make(&site.store.state()).unwrap();
    assert_eq!(site.backups.list().unwrap().len(), 1);
    let text = String::from_utf8_lossy(&site.backups.read(&made.id).unwrap()).into_owned();
    assert!(!text.contains("alice") && !text.contains("the key itself"), "nothing of it is to be read");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&made.path).unwrap().permissions().mode() & 0o777, 0o600);
    // A row that no start could read: such a backup is refused when it is made, not when it is needed.
    let sql = "UPDATE users SET body = '{' WHERE id = 'alice'";
    site.database.write(vec![Statement::new(sql, [])]).unwrap();
    let refused = site.backups.make(&site.store.state()).unwrap_err();
    assert!(refused.message.contains("cannot be read") && !refused.help.is_empty(), "{refused}");
    assert_eq!(site.backups.list().unwrap().len(), 1, "the one before stays");
    let alert = site.backups.alert(&State::default()).unwrap();
    assert_eq!((alert.kind.as_str(), alert.severity), ("backup_failed", Severity::Warning));
    let rest: Vec<_> = std::fs::read_dir(site.folder.path().join("backups")).unwrap().collect();
    assert_eq!(rest.len(), 1, "nothing that was only for checking stays: {rest:?}");
}

#[test]
fn a_backup_that_was_changed_is_refused_where_it_is_listed_and_where_it_is_opened() {
    let site = site(sqlite);
    let made = site.backups.make(&site.store.state()).unwrap();
    let mut sealed = std::fs::read(&made.path).unwrap();
    let last = sealed.len() - 40;
    sealed[last] ^= 1;
    let mut file = std::fs::File::create(&made.path).unwrap();
    std::io::Write::write_all(&mut file, &sealed).unwrap();
    assert_eq!(site.backups.read(&made.id).unwrap_err().kind, FailureKind::Damaged);
    assert!(site.backups.list().unwrap().is_empty());
    assert_eq!(open(&site.key, &sealed).unwrap_err().kind, FailureKind::Damaged);
    let other = RecoveryKey::generate().unwrap();
    assert!(open(&other, &sealed).unwrap_err().help.contains("recovery key"));
    for wrong in ["../config.db", "backup-1.tidemark", ""] {
        assert_eq!(site.backups.read(wrong).unwrap_err().kind, FailureKind::NotFound, "{wrong}");
    }
}

#[test]
fn backups_are_due_after_changes_and_days_and_old_ones_go() {
    let site = site(sqlite);
    let state = site.store.state();
    assert!(!site.backups.is_due(&State::default(), None), "nothing is there yet");
    let now = site.backups.clock.wall_now();
    let head = |age: Duration, of: &State| Head {
        created: Timestamp(now.0 - age.as_nanos() as u64),
        name: "cs".into(),
        incarnation: 1,
        authority: String::new(),
        key: site.backups.keeper.as_ref().unwrap().id(),
        software: String::new(),
        machines: 0,
        state: digest(of),
    };
    let other_key = Head { key: String::new(), ..head(Duration::from_secs(60), &state) };
    assert!(site.backups.is_due(&state, Some(&other_key)), "the newest is sealed for another key");
    let ahead = Head { created: Timestamp(now.0 + 3_600_000_000_000), ..head(Duration::ZERO, &state) };
    assert!(site.backups.is_due(&state, Some(&ahead)), "the clock was ahead");
    let (minute, hours, day) = (Duration::from_secs(60), 2 * CHANGED_EVERY, EVERY + Duration::from_secs(1));
    for (age, of, due) in [
        (minute, State::default(), false),
        (hours, State::default(), true),
        (hours, State::clone(&state), false),
        (day, State::clone(&state), true),
    ] {
        assert_eq!(site.backups.is_due(&state, Some(&head(age, &of))), due, "{age:?}");
    }
    let mut ids = Vec::new();
    for _ in 0..KEPT_MAX + 2 {
        ids.push(site.backups.make(&state).unwrap().id);
    }
    let listed: Vec<String> = site.backups.list().unwrap().into_iter().map(|backup| backup.id).collect();
    let kept: Vec<String> = ids.iter().rev().take(KEPT_MAX).cloned().collect();
    assert_eq!(listed, kept);
}

/// A state with something in it that would be lost.
fn with_a_machine() -> State {
    let machine = serde_json::json!({
        "id": uuid::Uuid::nil(), "name": "web", "host": uuid::Uuid::nil(), "server": uuid::Uuid::nil(),
        "policy": "continuous", "disks": [], "wanted": "protected", "created": Timestamp(1),
    });
    let machine: crate::model::Machine = serde_json::from_value(machine).unwrap();
    State { machines: [("web".to_owned(), machine)].into(), ..State::default() }
}

#[test]
fn without_a_recovery_key_a_backup_says_how_to_make_one_and_an_alert_tells_that_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let (store, backups) = open_in(folder.path(), Database::open(&sqlite(folder.path())).unwrap());
    assert!(backups.alert(&State::default()).is_none(), "nothing would be lost");
    let alert = backups.alert(&with_a_machine()).unwrap();
    assert_eq!((alert.kind.as_str(), alert.severity), ("backup_missing", Severity::Warning));
    let refused = backups.make(&store.state()).unwrap_err();
    assert!(refused.help.contains("recovery-key"), "{refused}");
}

#[test]
fn a_configuration_whose_newest_backup_is_old_is_an_alert_although_none_failed() {
    let mut site = site(sqlite);
    let state = with_a_machine();
    assert!(site.backups.alert(&state).is_none(), "it has just started");
    let old = Timestamp(site.backups.clock.wall_now().0 - (OLD + Duration::from_secs(60)).as_nanos() as u64);
    site.backups.started = old;
    let alert = site.backups.alert(&state).unwrap();
    assert_eq!((alert.kind.as_str(), alert.severity), ("backup_missing", Severity::Critical));
    site.backups.make(&site.store.state()).unwrap();
    assert!(site.backups.alert(&state).is_none());
    *site.backups.newest_at.lock().unwrap() = Some(old);
    assert!(site.backups.alert(&state).unwrap().message.contains(&old.to_string()));
}

#[test]
fn a_backup_of_newer_tables_is_refused_and_nothing_is_made() {
    let site = site(sqlite);
    let made = site.backups.make(&site.store.state()).unwrap();
    let (_, content) = open(&site.key, &site.backups.read(&made.id).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let newer = Content { schema: content.schema + 1, ..content.clone() };
    let refused = newer.restore(&sqlite(folder.path()), Timestamp(1)).unwrap_err();
    assert!(matches!(refused, content::FillError::NewerTables { .. }) && !folder.path().join("config.db").exists());
    // Names of tables go into SQL: those that are none of ours do not.
    let mut alien = content.clone();
    let rows = alien.tables.remove("users").unwrap();
    alien.tables.insert("users; DROP TABLE hosts".into(), rows);
    assert!(matches!(alien.restore(&sqlite(folder.path()), Timestamp(1)), Err(content::FillError::Unknown(_))));
}
