//! Home without where the machine ran: its process server is lost while the home disks follow it (F21, F29, F31).

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::workload::{content, nbd, protected, write};
use tidemark_tests::{Site, wait};

const BYTES: u64 = 32 * MIB;

/// The home disks stay at their last instant, are handed over and written; a process server that comes back serves nobody, and
/// replication to it goes on after the commit.
#[test]
fn f31_a_reprotected_machine_goes_on_at_home_when_where_it_ran_is_lost() {
    for commits_without_it in [false, true] {
        let mut site = Site::start_roles();
        let machine = protected(&site, "web", "disk.img", BYTES, 1);
        let home = machine.disks[0].path.clone();
        let failed = site.json(&["failover", "planned", "web", "--disks-only"]);
        let there = nbd(&failed);
        let unplanned = ["failback", "web", "--unplanned"];
        site.run(&unplanned).assert_refused(&["failed over"]);
        site.json(&["commit", "web"]);
        write(&there, MIB, 65_536, 9);
        site.run(&unplanned).assert_refused(&["cannot go on without where it runs"]);
        site.json(&["reprotect", "web"]);
        site.run(&unplanned).assert_refused(&["process server", "nothing need be lost"]);
        write(&there, 2 * MIB, 65_536, 8);
        let level = content(&site, &there, "level.img");
        wait::until("the home disk follows", LIMIT, || {
            image::first_difference(&level, &home).expect("both can be read").is_none().then_some(())
        });
        site.kill_role("process-server");
        wait::until("its end is seen", LIMIT, || (site.connected() == Some(1)).then_some(()));

        let back = site.json(&unplanned);
        assert!(back["lost_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{back}");
        assert_eq!(text(&back["disks"][0]["attach"]["nbd"]), machine.nbd(), "{back}");
        image::assert_same(&level, &home);
        write(machine.nbd(), 3 * MIB, 65_536, 7);
        assert_eq!(site.status("web")["state"], "failed_back");
        assert!(site.json(&unplanned)["disks"].is_array(), "asking again changes nothing");
        if commits_without_it {
            assert_eq!(site.json(&["commit", "web"])["home"], true);
        }
        site.start_role("process-server");
        site.wait_connected();
        let closed = || Client::connect(&there).is_err().then_some(());
        wait::until("nobody opens its disks there", LIMIT, closed);
        if !commits_without_it {
            assert_eq!(site.json(&["commit", "web"])["home"], true);
        }
        wait::until("nothing is left there", LIMIT, || {
            let folder = site.state().join("process-server/failed-over");
            folder.read_dir().is_ok_and(|mut all| all.next().is_none()).then_some(())
        });
        site.wait_protected("web");
        site.point("web");
        image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));
    }
}
