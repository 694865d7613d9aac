//! `kill -9` again and again, at any moment, of agent, process server or both, while fio and a writer of ours load the
//! disk.

use std::time::Duration;

use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::process::Owned;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::{Machine, Site, need, tools, wait};

use crate::whole::{BLOCK, Load, assert_recovered};

const DISK_BYTES: u64 = 64 * MIB;
const QUICK_ROUNDS: u64 = 8;
const LONG_ROUNDS: u64 = 150;
/// After the kill of an agent nothing is sent but what was written since the last point, and at most one part in so many of
/// the disk.
const RESENT_SHARE: u64 = 100;
const FIO_WRITES_PER_SECOND: u64 = 1500;
/// At most one part in so many of the disk is compared.
const COMPARED_SHARE: u64 = 100;
/// From the start of a role until a new recovery point is made.
const AT_WORK_AGAIN_MAX: Duration = Duration::from_secs(5);

fn fio(site: &Site, machine: &Machine, seed: u64) -> Owned {
    let mut command = tools::command("fio");
    command.args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"]);
    command.args(["--offset=32m", "--size=32m", "--time_based", "--runtime=120", "--output=/dev/null", "--fsync=200"]);
    // Not as fast as it can: the disks of this machine are shared.
    command.arg(format!("--randseed={seed}")).arg(format!("--rate_iops={FIO_WRITES_PER_SECOND}"));
    command.arg(format!("--uri={}", machine.nbd()));
    Owned::start("fio", command, Some(&site.path("fio.log")))
}

#[test]
fn killed_again_and_again_under_load_nothing_is_lost() {
    need!("fio");
    // Another round of a long run kills other roles at other moments.
    let seed = std::env::var("TIDEMARK_SEED").map_or(6, |seed| seed.parse().expect("TIDEMARK_SEED is a number"));
    let mut site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 5);
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");
    let first = site.point("db");
    let reference = site.path("reference.img");
    image::copy(&disk, &reference);
    let mut seeded = Seeded(seed);
    let (mut kills, mut longest) = (0, Duration::ZERO);
    for round in 0..if tools::is_long() { LONG_ROUNDS } else { QUICK_ROUNDS } {
        let load = Load::start(machine.nbd(), 0, DISK_BYTES / 2, seed * 1000 + round);
        let loaded = std::time::Instant::now();
        let mut fio = fio(&site, &machine, seed * 1000 + round);
        let before = number(&site.status("db")["written_bytes"]);
        let wanted = before + 64 * 1024 + seeded.below(2 * MIB);
        wait::until("the load is on its way", LIMIT, || {
            (number(&site.status("db")["written_bytes"]) > wanted).then_some(())
        });
        let roles: &[&str] = match seeded.below(5) {
            0 | 1 => &["agent"],
            2 | 3 => &["process-server"],
            _ => &["process-server", "agent"],
        };
        for role in roles {
            site.kill_role(role);
            kills += 1;
        }
        let fio_writes = (loaded.elapsed().as_secs() + 1) * FIO_WRITES_PER_SECOND;
        // Sometimes they are away for longer, and what is left of the site writes on.
        wait::until_passed(std::time::Instant::now() + Duration::from_millis(seeded.below(300)));
        let written = match roles.contains(&"agent") {
            true => load.join(),
            false => load.finish(),
        };
        fio.kill_9();
        let begin = std::time::Instant::now();
        for role in roles {
            site.start_role(role);
        }
        wait::until("a point is made again", LIMIT, || (site.run(&["point", "create", "db"]).code == 0).then_some(()));
        longest = longest.max(begin.elapsed());
        if roles == ["agent"] {
            // A new process counts from nothing: what it sent is what the old one had not, and what it looked at anew.
            let status = site.status("db");
            let sent = number(&status["sent_bytes"]);
            let limit = (written.count + fio_writes) * BLOCK + DISK_BYTES / RESENT_SHARE + MIB;
            assert!(sent <= limit, "{sent} bytes sent, at most {limit} were to be: {status}");
            let compare = &status["compare"];
            let compared = number(&compare["compared_bytes"]) + number(&compare["left_bytes"]);
            assert!(compared <= DISK_BYTES / COMPARED_SHARE, "{compared} bytes of {DISK_BYTES} compared: {status}");
        }
        assert_recovered(&site, &machine, &[written]);
        println!("round {round}: {roles:?}, {kills} kills so far, at work again within {longest:?}");
    }
    image::assert_same(&reference, &site.export("db", &text(&first["id"]), "first.raw", "raw"));
    assert!(longest <= AT_WORK_AGAIN_MAX, "it took {longest:?} until a point could be made again");
    println!("{kills} kills, at work again after {longest:?} at the latest");
    tools::counted("kills of a real role under load", kills);
    site.down();
}
