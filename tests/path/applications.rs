//! App-consistent points of a real database under load.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tempfile::TempDir;
use tidemark_tests::block::{self, Loop, Mount, NbdFile};
use tidemark_tests::image::MIB;
use tidemark_tests::postgres::{EndOnDrop, Server};
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::{Site, need, need_postgres, need_root, wait};

const DISK_BYTES: u64 = 96 * MIB;

/// A folder that PostgreSQL's user can reach.
fn open_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("tidemark-").tempdir().expect("a folder can be made");
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o711)).expect("it is ours");
    folder
}

/// What makes the applications of a machine quiet, as an administrator of its host writes it down.
fn configure(site: &Site, machine: &str, settings: &str) {
    let top = site.state().join("agent/freeze.d");
    let folder = top.join(machine);
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let file = folder.join("application.toml");
    File::create(&file).and_then(|mut file| file.write_all(settings.as_bytes())).expect("it can be written");
    for (path, mode) in [(&top, 0o700), (&folder, 0o700), (&file, 0o600)] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("it is ours");
    }
}

/// Commits rows one after another, in a new session where the database was stopped meanwhile.
fn load(server: &Server, acknowledged: &AtomicU64, stop: &AtomicBool) {
    let mut row = 0;
    while !stop.load(Ordering::SeqCst) {
        let mut session = server.session();
        while !stop.load(Ordering::SeqCst)
            && session.execute(&format!("insert into t values ({}, repeat('x', 900));", row + 1))
        {
            row += 1;
            acknowledged.store(row, Ordering::SeqCst);
        }
        // What was not acknowledged may be there all the same.
        row += 1;
    }
}

/// Opens a point; the last row that it has, and what the database said about how it began.
fn open(site: &Site, folder: &Path, point: &str) -> (u64, String) {
    std::fs::create_dir(folder).expect("a folder can be made");
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o711)).expect("it is ours");
    let image = site.export("db", point, &format!("{point}.raw"), "raw");
    let mount = Mount::device(Loop::attach(&image), &folder.join("mount"), "noatime");
    let server = Server::start(&mount.path().join("data"), &folder.join("run"));
    let rows = server.query("select coalesce(max(i), 0) from t").parse().expect("it is a number");
    server.check();
    let log = server.log();
    server.stop_at_once();
    mount.unmount();
    (rows, log)
}

/// H21: the built-in hook. An app-consistent point is a database that was shut down; a crash-consistent one recovers.
#[test]
fn h21_an_app_consistent_point_of_a_postgresql_under_load_opens_without_recovery() {
    need!("nbdfuse", "losetup", "mke2fs", "e2fsck", "mount", "setpriv");
    need_postgres!();
    need_root!("loop devices and mounts");
    block::private_mounts();
    let site = Site::start();
    let folder = open_folder();
    let disk = site.path("disk.img");
    block::make_ext4(&disk, DISK_BYTES, "^metadata_csum_seed");
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");
    let nbd = NbdFile::mount(machine.nbd(), &folder.path().join("nbd"));
    let mount = Mount::image(nbd.path(), &folder.path().join("mount"));
    std::fs::set_permissions(mount.path(), PermissionsExt::from_mode(0o711)).expect("it is ours");
    let data = mount.path().join("data");
    Server::create(&data);
    let server = Server::start(&data, &folder.path().join("run"));
    let _end = EndOnDrop(data.clone());
    server.query("create table t (i int primary key, v text); create extension amcheck; checkpoint");
    configure(&site, "db", &format!("file-systems = [{:?}]\n[postgresql]\ndata = {data:?}\n", mount.path()));

    let (acknowledged, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let come_on = || {
        let before = acknowledged.load(Ordering::SeqCst);
        wait::until("the load commits", LIMIT, || (acknowledged.load(Ordering::SeqCst) > before + 5).then_some(()));
        acknowledged.load(Ordering::SeqCst)
    };
    let (crash, app) = std::thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _stop = Stop(&stop);
        scope.spawn(|| load(&server, &acknowledged, &stop));
        come_on();
        let crash = (acknowledged.load(Ordering::SeqCst), site.point("db"));
        come_on();
        let before = acknowledged.load(Ordering::SeqCst);
        let app = (before, site.json(&["point", "create", "db", "--app-consistent"]));
        // It goes on.
        come_on();
        (crash, app)
    });
    assert_eq!((&crash.1["consistency"], &app.1["consistency"]), (&"crash".into(), &"app".into()));
    let (rows, log) = open(&site, &folder.path().join("app"), &text(&app.1["id"]));
    assert!(rows >= app.0, "{rows} rows, {} were acknowledged", app.0);
    assert!(log.contains("database system was shut down at"), "{log}");
    assert!(!log.contains("recovery") && !log.contains("not properly shut down"), "{log}");
    let (rows, log) = open(&site, &folder.path().join("crash"), &text(&crash.1["id"]));
    assert!(rows >= crash.0, "{rows} rows, {} were acknowledged", crash.0);
    assert!(log.contains("automatic recovery in progress"), "{log}");
    drop(EndOnDrop(data.clone()));
    drop(server);
    mount.unmount();
    drop(nbd);
}
