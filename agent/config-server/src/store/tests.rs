use std::io::Write as _;

use super::*;
use crate::database::DatabaseSetting;
use crate::model::{DEFAULT_POLICY, Policy};
use tidemark_base::storage::{RealStorage, replace_file};
use tidemark_proto::control::Compression;

fn policy(level: i32) -> Policy {
    Policy { compression: Compression::Level(level), ..Policy::default() }
}

fn set(store: &Store, name: &str, compression: i32) -> Result<(), Failure> {
    store.change(|state| {
        state.policies.insert(name.to_owned(), policy(compression));
        Ok(())
    })
}

/// The same for both databases.
fn changes_survive(setting: &DatabaseSetting, storage: &dyn Storage) {
    let open = || Store::open(Database::open(setting).unwrap(), storage).unwrap();
    let store = open();
    assert!(store.state().policies.contains_key(DEFAULT_POLICY), "a new one begins with the default policy");
    set(&store, "p", 7).unwrap();
    set(&store, "p", 7).unwrap();
    assert_eq!(store.revision("policies", "p"), 1, "the same again is no change");
    set(&store, "p", 8).unwrap();
    set(&store, "it's \"quoted\" — ünïcode", 1).unwrap();
    let refused: Result<(), Failure> = store.change(|state| {
        state.policies.clear();
        Err(Failure::new(FailureKind::Conflict, "no", ""))
    });
    assert!(refused.is_err());
    let before = store.state();
    drop(store);
    let store = open();
    assert_eq!(store.state().policies, before.policies);
    assert_eq!((store.revision("policies", "p"), store.revision("policies", "nobody")), (2, 0));
    store
        .change(|state| {
            state.policies.remove("p");
            Ok(())
        })
        .unwrap();
    drop(store);
    assert!(!open().state().policies.contains_key("p"));
}

#[test]
fn changes_survive_in_sqlite_and_its_files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.db");
    changes_survive(&DatabaseSetting::Sqlite(path.clone()), &*RealStorage::open_folder(folder.path()));
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
}

/// Debian's PostgreSQL on a socket of its own, stopped when it is dropped.
pub(crate) struct Postgres {
    folder: tempfile::TempDir,
    bin: std::path::PathBuf,
    as_user: bool,
}

impl Postgres {
    /// `None` where it is not installed.
    pub(crate) fn start() -> Option<Self> {
        let bin = std::fs::read_dir("/usr/lib/postgresql")
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .find(|bin| bin.join("initdb").exists())?;
        let folder = tempfile::tempdir().unwrap();
        // It refuses to run as root.
        let as_user = nix::unistd::Uid::effective().is_root();
        let postgres = Self { folder, bin, as_user };
        if as_user {
            let user = nix::unistd::User::from_name("postgres").unwrap()?;
            nix::unistd::chown(postgres.folder.path(), Some(user.uid), Some(user.gid)).unwrap();
        }
        let data = postgres.data();
        postgres.run("initdb", &["-D", &data, "-A", "trust", "-U", "postgres", "--no-sync"]);
        postgres.control("start");
        Some(postgres)
    }

    fn data(&self) -> String {
        self.folder.path().join("data").display().to_string()
    }

    fn socket(&self) -> String {
        self.folder.path().display().to_string()
    }

    fn control(&self, verb: &str) {
        let options = format!("-k {} -c listen_addresses='' -c fsync=off", self.socket());
        let log = self.folder.path().join("log").display().to_string();
        let data = self.data();
        let mut arguments = vec!["-D", &data, "-w", "-l", &log, "-m", "immediate"];
        if verb != "stop" {
            arguments.extend(["-o", &options]);
        }
        arguments.push(verb);
        self.run("pg_ctl", &arguments);
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let program = self.bin.join(program);
        let mut command = if self.as_user {
            let mut command = std::process::Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
            command
        } else {
            std::process::Command::new(program)
        };
        let output = command.args(arguments).current_dir("/").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub(crate) fn setting(&self) -> DatabaseSetting {
        self.setting_of("postgres")
    }

    /// `postgres` and `template1` are there, and empty.
    pub(crate) fn setting_of(&self, database: &str) -> DatabaseSetting {
        DatabaseSetting::Postgres(format!("host={} user=postgres dbname={database}", self.socket()))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.control("stop");
    }
}

/// The test command gathers these lines.
pub(crate) fn skipped(why: &str) {
    eprintln!("SKIPPED {why}");
    if let Some(file) = std::env::var_os("TIDEMARK_SKIPPED") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        writeln!(file, "SKIPPED the configuration in PostgreSQL: {why}").unwrap();
    }
}

#[test]
fn changes_survive_in_postgresql_which_one_server_uses_at_a_time_and_that_may_restart() {
    let Some(postgres) = Postgres::start() else {
        skipped("PostgreSQL is not installed");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let storage = RealStorage::open_folder(folder.path());
    changes_survive(&postgres.setting(), &*storage);

    let store = Store::open(Database::open(&postgres.setting()).unwrap(), &*storage).unwrap();
    let second = Database::open(&postgres.setting()).err().unwrap();
    assert!(matches!(second, DatabaseError::Locked { .. }), "{second}");

    // It goes away: changes are refused by name; it comes back: they go on.
    postgres.control("stop");
    let failure = set(&store, "away", 1).unwrap_err();
    assert!(failure.kind == FailureKind::Unavailable && failure.message.contains("reached"), "{failure:?}");
    assert!(!store.state().policies.contains_key("away"));
    postgres.control("start");
    set(&store, "back", 1).unwrap();
    assert!(store.state().policies.contains_key("back"));

    let sql = "UPDATE schema SET version = 99";
    store.database().write(vec![Statement::new(sql, [])]).unwrap();
    drop(store);
    let newer = Database::open(&postgres.setting()).err().unwrap();
    assert!(matches!(newer, DatabaseError::Newer { version: 99, .. }), "{newer}");
}

#[test]
fn a_database_that_is_locked_full_newer_or_damaged_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let storage = RealStorage::open_folder(folder.path());
    let path = folder.path().join("config.db");
    let setting = DatabaseSetting::Sqlite(path.clone());
    let named = |error: DatabaseError, part: &str| {
        let text = error.to_string();
        assert!(text.contains("config.db") && text.contains(part) && !error.help().is_empty(), "{text}");
    };

    let store = Store::open(Database::open(&setting).unwrap(), &*storage).unwrap();
    named(Database::open(&setting).err().unwrap(), "in use");
    drop(store);

    // Full: the change did not happen, later ones that fit do.
    let store = Store::open(Database::open_with(&setting, Some(60)).unwrap(), &*storage).unwrap();
    let wide = "x".repeat(400_000);
    let failure = set(&store, &wide, 1).unwrap_err();
    assert!(failure.message.contains("no room") && failure.help.contains("nothing was changed"), "{failure:?}");
    assert!(!store.state().policies.contains_key(&wide));
    store.database().check().expect("what is smaller is stored again");
    set(&store, "small", 1).unwrap();
    drop(store);
    let store = Store::open(Database::open(&setting).unwrap(), &*storage).unwrap();
    assert!(store.state().policies.contains_key("small") && !store.state().policies.contains_key(&wide));

    store.database().write(vec![Statement::new("UPDATE schema SET version = 99", [])]).unwrap();
    drop(store);
    named(Database::open(&setting).err().unwrap(), "newer");

    std::fs::File::create(&path).unwrap().write_all(&[7; 8192]).unwrap();
    named(Database::open(&setting).err().unwrap(), "damaged");
}

/// Whoever asks whether the server is ready must not hear yes from one that can store nothing.
#[test]
fn a_database_that_refused_a_write_is_asked_for_one_before_it_counts_as_ready() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::open(&DatabaseSetting::Sqlite(folder.path().join("config.db"))).unwrap();
    database.check().unwrap();
    let run = |sql: &str| database.write(vec![Statement::new(sql, [])]);
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON facts BEGIN SELECT RAISE(ABORT, 'no more'); END";
    run(refuse).unwrap();
    database.check().expect("nobody wrote yet");
    run("INSERT INTO facts (id, value) VALUES ('a', 'b')").unwrap_err();
    for _ in 0..2 {
        assert!(database.check().unwrap_err().to_string().contains("no more"));
    }
    run("DROP TRIGGER refuse").unwrap();
    database.check().unwrap();
}

#[test]
fn a_row_that_makes_no_sense_is_named_and_not_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let storage = RealStorage::open_folder(folder.path());
    let setting = DatabaseSetting::Sqlite(folder.path().join("config.db"));
    let database = Database::open(&setting).unwrap();
    let sql = "INSERT INTO machines (id, revision, body) VALUES ('web', 1, '{}')";
    database.write(vec![Statement::new(sql, [])]).unwrap();
    let error = Store::open(database, &*storage).err().unwrap().to_string();
    assert!(error.contains("web") && error.contains("machines"), "{error}");
}

#[test]
fn the_file_of_an_older_version_is_taken_over_once() {
    let folder = tempfile::tempdir().unwrap();
    let storage = RealStorage::open_folder(folder.path());
    let setting = DatabaseSetting::Sqlite(folder.path().join("config.db"));
    let open = || Store::open(Database::open(&setting).unwrap(), &*storage);
    for (content, part) in [("{\"version\": 1, ", "damaged"), ("{\"version\": 99, \"else\": 1}", "newer")] {
        replace_file(&*storage, FILE, content.as_bytes()).unwrap();
        let error = open().err().unwrap().to_string();
        assert!(error.contains(part) && error.contains(FILE), "{error}");
    }
    let older = r#"{"version":1,"machines":{},"policies":{"gold":{"frequency":"30s"}},"hosts":{},"servers":{}}"#;
    replace_file(&*storage, FILE, older.as_bytes()).unwrap();
    let store = open().unwrap();
    assert_eq!(store.state().policies.keys().collect::<Vec<_>>(), ["gold"]);
    assert!(!storage.exists(FILE).unwrap() && storage.exists(IMPORTED).unwrap());
    set(&store, "gold", 9).unwrap();
    drop(store);
    // Even if it comes back, as after a crash before the renaming: what was changed since stays.
    replace_file(&*storage, FILE, older.as_bytes()).unwrap();
    assert_eq!(open().unwrap().state().policies["gold"].compression, Compression::Level(9));
}
