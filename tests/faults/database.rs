//! ext4 and PostgreSQL on a protected disk. Each recovery point, made while a load commits, must be a disk after a power
//! cut: the file system's journal makes it sound, the database recovers by itself, and holds every row whose commit was
//! acknowledged before the point, and none that was sent after it.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tempfile::TempDir;
use tidemark_tests::block::{self, Loop, Mount, NbdFile};
use tidemark_tests::image::MIB;
use tidemark_tests::postgres::{Server, Session, own};
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, need_postgres, need_root, tools, wait};

const DISK_BYTES: u64 = 96 * MIB;
const QUICK_POINTS: usize = 60;
const LONG_POINTS: usize = 500;
/// Every so many points the judge works on a served point instead of an exported one.
const SERVED_EVERY: usize = 8;
/// Judges at once: one waits for disks while the other computes.
const JUDGES: usize = 2;

/// A folder that PostgreSQL's user can reach.
fn open_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("tidemark-").tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o711)).unwrap();
    folder
}

/// What the client of the database knows.
#[derive(Default)]
struct Commits {
    /// The last row that was sent.
    sent: AtomicU64,
    /// The last row whose commit was acknowledged.
    acknowledged: AtomicU64,
}

struct Point {
    id: String,
    /// Acknowledged before the point was asked for.
    at_least: u64,
    /// Sent before it was there.
    at_most: u64,
}

/// Commits one row after another until `stop`, or until the server is gone.
fn load(session: &mut Session, commits: &Commits, stop: &AtomicBool) {
    let first = commits.sent.load(Ordering::SeqCst) + 1;
    for row in first.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        commits.sent.store(row, Ordering::SeqCst);
        let statement = format!(
            "begin; insert into t values ({row}, repeat(md5('{row}'), 40)); update c set last = {row}; commit;{}",
            if row % 200 == 0 { " checkpoint;" } else { "" }
        );
        if !session.execute(&statement) {
            return;
        }
        commits.acknowledged.store(row, Ordering::SeqCst);
    }
}

/// Makes a cluster in a mounted file system, ready for [`load`].
fn create(mount: &Path, run: &Path) -> Server {
    std::fs::set_permissions(mount, PermissionsExt::from_mode(0o711)).unwrap();
    let data = mount.join("data");
    own(&data);
    Server::create(&data);
    let server = Server::start(&data, run);
    server.query(
        "create table t (i int primary key, v text); create table c (last int); insert into c values (0);
         create extension amcheck; checkpoint",
    );
    server
}

/// The judge. `image` is changed: file system and database recover on it.
fn judge(image: &Path, folder: &Path, point: &Point) {
    // A loop device: e2fsck writes single bytes to files, which NBD cannot.
    let device = Loop::attach(image);
    block::assert_sound_ext4(device.path());
    let mount = Mount::device(device, &folder.join("mount"), "noatime");
    let server = Server::start(&mount.path().join("data"), &folder.join("run"));
    let found = server.query(
        "select count(*), coalesce(max(i), 0), count(*) filter (where v <> repeat(md5(i::text), 40)),
                (select max(last) from c) from t",
    );
    let numbers: Vec<u64> = found.split('|').map(|number| number.parse().unwrap()).collect();
    let [count, last, wrong, noted] = numbers[..] else { panic!("four numbers in {found}") };
    let Point { id, at_least, at_most } = point;
    assert!(count >= *at_least, "point {id} lost commits: {count} rows, {at_least} were acknowledged");
    assert!(count <= *at_most, "point {id} knows the future: {count} rows, {at_most} were sent");
    assert!(count == last && last == noted && wrong == 0, "point {id}: count|max|wrong|noted {found}");
    server.check();
    server.stop_at_once();
    mount.unmount();
}

#[test]
fn postgresql_accepts_every_recovery_point_of_its_disk() {
    need!("nbdfuse", "losetup", "mke2fs", "e2fsck", "mount");
    need_postgres!();
    need_root!("loop devices and mounts");
    block::private_mounts();
    let wanted = if tools::is_long() { LONG_POINTS } else { QUICK_POINTS };
    let site = Site::start();
    let folder = open_folder();
    let disk = site.path("disk.img");
    block::make_ext4(&disk, DISK_BYTES, "^metadata_csum_seed");
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");

    let nbd = NbdFile::mount(machine.nbd(), &folder.path().join("nbd"));
    let mount = Mount::image(nbd.path(), &folder.path().join("mount"));
    let server = create(mount.path(), &folder.path().join("run"));
    let (commits, stop) = (Commits::default(), AtomicBool::new(false));
    let mut points = Vec::new();
    std::thread::scope(|scope| {
        let mut session = server.session();
        let (commits, stop) = (&commits, &stop);
        let load = scope.spawn(move || load(&mut session, commits, stop));
        while points.len() < wanted {
            let at_least = commits.acknowledged.load(Ordering::SeqCst);
            // Points of a database that stands still are all the same.
            wait::until("the load commits", tidemark_tests::site::LIMIT, || {
                assert!(!load.is_finished(), "the load ended early");
                (commits.acknowledged.load(Ordering::SeqCst) > at_least).then_some(())
            });
            let at_least = commits.acknowledged.load(Ordering::SeqCst);
            let id = text(&site.point("db")["id"]);
            points.push(Point { id, at_least, at_most: commits.sent.load(Ordering::SeqCst) });
        }
        stop.store(true, Ordering::SeqCst);
        load.join().unwrap();
    });
    server.stop_at_once();
    mount.unmount();
    drop(nbd);

    let queue = Mutex::new(points.iter().enumerate());
    std::thread::scope(|scope| {
        for judge_number in 0..JUDGES {
            let (queue, site, folder) = (&queue, &site, folder.path().join(format!("judge-{judge_number}")));
            std::fs::create_dir(&folder).unwrap();
            std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o711)).unwrap();
            scope.spawn(move || {
                while let Some((index, point)) = { queue.lock().unwrap().next() } {
                    if index % SERVED_EVERY == 0 {
                        let served = site.serve("db", &point.id, &["--writable"]);
                        let file = NbdFile::mount(served.nbd(), &folder.join("served"));
                        judge(file.path(), &folder, point);
                    } else {
                        let image = site.export("db", &point.id, &format!("judged-{judge_number}.raw"), "raw");
                        judge(&image, &folder, point);
                        std::fs::remove_file(image).unwrap();
                    }
                }
            });
        }
    });
    assert_judge_sees_two_times(&site, &folder.path().join("judge-0"), &points);
    let rows = commits.acknowledged.load(Ordering::SeqCst);
    assert!(rows > wanted as u64, "{rows} rows are hardly a load");
    tools::counted("recovery points judged by PostgreSQL", points.len() as u64);
    println!("{rows} rows, {} points, the first with {} rows", points.len(), points[0].at_least);
}

/// The control of the experiment: a disk of two times, as a replica without order of writes would be, is refused.
fn assert_judge_sees_two_times(site: &Site, folder: &Path, points: &[Point]) {
    let (first, last) = (&points[points.len() / 2], &points[points.len() - 1]);
    let mixed = site.export("db", &first.id, "mixed.raw", "raw");
    let later = site.export("db", &last.id, "later.raw", "raw");
    let (mixed_file, later_file) =
        (std::fs::File::options().write(true).open(&mixed).unwrap(), std::fs::File::open(&later).unwrap());
    let mut block = vec![0; 32 << 10];
    for offset in (0..DISK_BYTES).step_by(2 * block.len()) {
        later_file.read_exact_at(&mut block, offset).unwrap();
        mixed_file.write_all_at(&block, offset).unwrap();
    }
    let point = Point { id: format!("{} mixed with {}", first.id, last.id), ..*last };
    let accepted = std::panic::catch_unwind(|| judge(&mixed, folder, &point));
    assert!(accepted.is_err(), "the judge accepted a disk of two times");
}
