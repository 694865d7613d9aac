//! A machine that is replicated to several process servers: one that is away, or goes, is no affair of the others.

use std::time::Instant;

use serde_json::Value;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::{Machine, Site, need, tools, wait};

const DISK_BYTES: u64 = 64 * MIB;
const LOG_LIMIT: u64 = 16 * MIB;
/// How far the one that is there may be behind, on a machine that does much else.
const RPO_SECONDS_MAX: f64 = 20.0;

/// A site with two process servers; their ids. The second is the role `second`.
fn site_of_two() -> (Site, String, String) {
    let mut site = Site::start_roles();
    let first = site.peer_ids("process-server").remove(0);
    let second = site.start_process_server("second");
    site.json(&["policy", "create", "short", "--log-limit", "16M"]);
    (site, first, second)
}

fn protect_to_both(site: &Site, first: &str, second: &str) -> Machine {
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 5);
    let extra = ["--policy", "short", "--process-server", first, "--process-server", second];
    let machine = site.protect("db", &[&disk], &extra);
    [first, second].iter().for_each(|id| settled(site, id));
    machine
}

/// How the machine does at one of its process servers.
fn at(status: &Value, id: &str) -> Value {
    let servers = status["process_servers"].as_array().expect("it is a list");
    servers.iter().find(|server| server["id"] == id).unwrap_or_else(|| panic!("{id} is not fed: {status}")).clone()
}

/// Waits until everything is there.
#[track_caller]
fn settled(site: &Site, id: &str) {
    wait::until(&format!("{id} has everything"), LIMIT, || {
        let server = at(&site.status("db"), id);
        let is_settled = server["state"] == "protected" && server["mode"] == "data" && server["pending_bytes"] == 0;
        is_settled.then_some(())
    });
}

/// A point that both have; each is the disk.
#[track_caller]
fn assert_both_are_the_disk(site: &Site, ids: [&str; 2], round: &str) {
    ids.iter().for_each(|id| settled(site, id));
    let point = text(&site.point("db")["id"]);
    wait::until("both have the point", LIMIT, || (holders(site, &point) == 2).then_some(()));
    for (index, id) in ids.iter().enumerate() {
        let to = site.path(&format!("{round}-{index}.raw"));
        let path = to.to_str().unwrap();
        site.json(&["point", "export", "db", &point, "--to", path, "--process-server", id]);
        image::assert_same(&site.path("disk.img"), &to);
    }
}

/// How many process servers have a point.
fn holders(site: &Site, point: &str) -> usize {
    let points = site.json(&["point", "list", "db"]);
    let found = points.as_array().unwrap().iter().find(|listed| listed["id"] == point);
    found.map_or(0, |listed| listed["process_servers"].as_array().unwrap().len())
}

fn fio(site: &Site, machine: &Machine) -> Owned {
    let mut command = tools::command("fio");
    command.args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bs=16k", "--iodepth=8"]);
    // Half of the disk: what changed is told from the whole.
    command.args(["--size=32m", "--time_based", "--runtime=300", "--output=/dev/null", "--rate=6m", "--randrepeat=1"]);
    command.arg(format!("--uri={}", machine.nbd()));
    Owned::start("fio", command, Some(&site.path("fio.log")))
}

#[test]
fn one_dead_process_server_beside_a_live_one_steps_down_alone() {
    need!("fio");
    let (mut site, live, dead) = site_of_two();
    let machine = protect_to_both(&site, &live, &dead);
    let before = text(&site.point("db")["id"]);
    wait::until("both have the first point", LIMIT, || (holders(&site, &before) == 2).then_some(()));
    let reference = site.path("reference.img");
    image::copy(&site.path("disk.img"), &reference);
    let sent_before = number(&at(&site.status("db"), &dead)["sent_bytes"]);

    site.kill_role("second");
    let written_before = number(&site.status("db")["written_bytes"]);
    let mut fio = fio(&site, &machine);
    let (mut rpo_max, mut steps, begin) = (0f64, 0, Instant::now());
    let stepped_down = wait::until("the dead one steps down, several logs later", 2 * LIMIT, || {
        let status = site.status("db");
        assert!(fio.is_running(), "fio ended: {}", fio.log_tail());
        let there = at(&status, &live);
        assert_eq!(there["mode"], "data", "the live one: {status}");
        assert!(number(&status["log_bytes"]) <= LOG_LIMIT + MIB, "{status}");
        rpo_max = rpo_max.max(there["rpo_seconds"].as_f64().expect("it has an RPO"));
        steps += 1;
        let written = number(&status["written_bytes"]) - written_before;
        (at(&status, &dead)["mode"] == "bitmap" && written > 4 * LOG_LIMIT).then_some(status)
    });
    println!("the live one's RPO was {rpo_max:.2} s at most, of {steps} looks in {:?}", begin.elapsed());
    assert!(rpo_max < RPO_SECONDS_MAX, "{rpo_max} s");
    let away = at(&stepped_down, &dead);
    assert!(text(&away["mode_reason"]).contains("too far behind"), "{away}");
    assert!(number(&away["pending_bytes"]) > 0, "{away}");
    assert_eq!((&stepped_down["mode"], &stepped_down["state"]), (&"data".into(), &"protected".into()));
    assert_eq!(stepped_down["process_server"]["id"], live.as_str(), "the machine is judged by the one that is there");
    let kinds: Vec<&str> =
        stepped_down["reasons"].as_array().unwrap().iter().filter_map(|r| r["kind"].as_str()).collect();
    assert!(kinds.contains(&"stepped_down"), "{kinds:?}");
    // Points go on.
    let meanwhile = text(&site.point("db")["id"]);
    assert_eq!(holders(&site, &meanwhile), 1);

    site.start_process_server_again("second");
    wait::until("it is back", LIMIT, || (at(&site.status("db"), &dead)["state"] == "protected").then_some(()));
    fio.kill_9();
    assert_both_are_the_disk(&site, [&live, &dead], "back");
    let sent = number(&at(&site.status("db"), &dead)["sent_bytes"]) - sent_before;
    println!("{sent} bytes were sent to the one that was away");
    // The point of before, at the one that was killed.
    let old = site.path("old.raw");
    site.json(&["point", "export", "db", &before, "--to", old.to_str().unwrap(), "--process-server", &dead]);
    image::assert_same(&reference, &old);
    site.down();
}

#[test]
fn process_servers_come_and_go_and_the_machine_fails_over_where_least_is_lost() {
    let (mut site, first, second) = site_of_two();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 5);
    let machine = site.protect("db", &[&disk], &["--policy", "short", "--process-server", &first]);
    settled(&site, &first);
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(MIB, &[1; 8192]).unwrap();

    let added = site.json(&["machine", "process-server", "add", "db", &second]);
    assert_eq!(added["process_servers"].as_array().unwrap().len(), 2, "{added}");
    // The workload's connection is the one of before.
    client.write(2 * MIB, &[2; 8192]).unwrap();
    assert_both_are_the_disk(&site, [&first, &second], "added");
    assert_eq!(number(&site.status("db")["compare"]["compared_bytes"]), 0);
    site.run(&["machine", "process-server", "add", "db", "nowhere"]).assert_refused(&["nowhere"]);
    site.run(&["machine", "process-server", "remove", "db", "nowhere"]).assert_refused(&["nowhere"]);
    let both = ["--process-server", &first, "--process-server", &first];
    let twice = site.run(&[&["protect", "web", "--disk", "/dev/null"], &both[..]].concat());
    twice.assert_refused(&["named twice"]);

    // The first one dies, and the machine writes on: least is lost at the second.
    site.kill_role("process-server");
    client.write(3 * MIB, &[3; 8192]).unwrap();
    wait::until("the second has it", LIMIT, || {
        let server = at(&site.status("db"), &second);
        (server["pending_bytes"] == 0 && server["rpo_seconds"].as_f64() < Some(5.0)).then_some(())
    });
    let newest = text(&site.point("db")["id"]);
    assert_eq!(holders(&site, &newest), 1, "made where somebody is");
    let nowhere = site.run(&["failover", "unplanned", "db", "--disks-only", "--process-server", "nowhere"]);
    nowhere.assert_refused(&["nowhere"]);
    let result = site.json(&["failover", "unplanned", "db", "--disks-only"]);
    assert_eq!(result["machine"], "db");
    let status = site.status("db");
    assert_eq!((&status["state"], &status["process_server"]["id"]), (&"failed_over".into(), &second.as_str().into()));
    assert!(client.write(4 * MIB, &[4; 8192]).is_err(), "its source is kept out");
    site.json(&["failover", "cancel", "db"]);

    // Both go on with what they had.
    site.start_role("process-server");
    let mut client = wait::until("the source has its disk again", LIMIT, || Client::connect(machine.nbd()).ok());
    wait::until("it can be written to", LIMIT, || client.write(5 * MIB, &[5; 8192]).ok());
    assert_both_are_the_disk(&site, [&first, &second], "cancelled");

    // One of them is left while it is away; it learns of it when it comes back.
    site.kill_role("second");
    wait::until("it is gone", LIMIT, || (site.peer_ids("process-server") == [first.as_str()]).then_some(()));
    let removed = site.json(&["machine", "process-server", "remove", "db", &second, "--delete-replica", "--force"]);
    assert_eq!((removed["process_servers"].as_array().unwrap().len(), &removed["complete"]), (1, &false.into()));
    client.write(6 * MIB, &[6; 8192]).unwrap();
    let last = site.run(&["machine", "process-server", "remove", "db", &first]);
    last.assert_refused(&["only process server"]);
    let replicas = site.path("second").join("process-server");
    site.start_process_server_again("second");
    wait::until("its replica is deleted", LIMIT, || {
        let id = &machine.disks[0].id;
        let mut names = vec![replicas.clone()];
        while let Some(folder) = names.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().contains(id.as_str()) {
                    return None;
                }
                if entry.path().is_dir() {
                    names.push(entry.path());
                }
            }
        }
        Some(())
    });
    settled(&site, &first);
    site.point("db");
    image::assert_same(&disk, &site.export("db", "latest", "alone.raw", "raw"));
    let health = site.status("db");
    assert_eq!(health["process_servers"].as_array().unwrap().len(), 1, "{health}");
    client.disconnect().unwrap();
    site.down();
}

/// Points of a group, `latest-group` and a plan use whichever process server of a machine is there and has the point.
#[test]
fn a_group_and_its_plan_go_on_with_one_process_server_away() {
    const NAMES: [&str; 2] = ["db", "web"];
    let (mut site, first, second) = site_of_two();
    let machines = NAMES.map(|name| {
        let disk = site.path(&format!("{name}.img"));
        image::make_mixed(&disk, 8 * MIB, 3);
        site.protect(name, &[&disk], &["--process-server", &first, "--process-server", &second])
    });
    for (name, id) in NAMES.iter().flat_map(|name| [(name, &first), (name, &second)]) {
        wait::until(&format!("{id} has {name}"), LIMIT, || {
            (at(&site.status(name), id)["state"] == "protected").then_some(())
        });
    }
    site.json(&["group", "create", "shop", "db", "web", "--interval", "0s", "--hold-limit", "2s"]);
    site.json(&["plan", "create", "all", "--step", "group:shop"]);
    let both = text(&site.json(&["group", "point", "shop"])["id"]);
    let group_points = |site: &Site| -> Vec<String> {
        let points = site.json(&["group", "points", "shop"]);
        points.as_array().expect("it is a list").iter().map(|point| text(&point["id"])).collect()
    };
    assert_eq!(group_points(&site), [both.as_str()]);

    site.kill_role("process-server");
    wait::until("the first one is gone", LIMIT, || {
        (site.peer_ids("process-server") == [second.as_str()]).then_some(())
    });
    assert_eq!(group_points(&site), [both.as_str()], "it is at the other one as well");
    for (number, machine) in (1..).zip(&machines) {
        Client::connect(machine.nbd()).unwrap().write(MIB, &[number; 4096]).unwrap();
    }
    let made = site.json(&["group", "point", "shop"]);
    assert_eq!(made["group_consistent"], true, "{made}");
    let point = text(&made["id"]);
    assert_eq!(group_points(&site), [both.as_str(), point.as_str()]);
    let tested = site.json(&["plan", "test", "all", "--disks-only"]);
    assert_eq!(tested["state"], "succeeded", "{tested}");
    let ran = site.json(&["plan", "run", "all", "--unplanned", "--disks-only", "--point", "latest-group"]);
    assert_eq!(ran["state"], "succeeded", "{ran}");
    for name in NAMES {
        let status = site.status(name);
        assert_eq!(
            (&status["state"], &status["process_server"]["id"]),
            (&"failed_over".into(), &second.as_str().into())
        );
        assert_eq!(site.json(&["failover", "show", name])["failover"]["point"], point.as_str(), "{name}");
    }
    site.json(&["plan", "cancel", "all"]);

    // The one that was away holds the point of before, and is told that it is the group's no more when it is back.
    site.start_role("process-server");
    let newest = wait::until("a point is made at both", 2 * LIMIT, || {
        let made = site.run(&["group", "point", "shop", "--json"]);
        let point = serde_json::from_str::<Value>(&made.stdout).ok()?["id"].as_str()?.to_owned();
        Some(point)
    });
    wait::until("both know of it", LIMIT, || {
        let points = site.json(&["point", "list", "web"]);
        let listed = points.as_array().unwrap().iter().find(|listed| listed["id"] == newest.as_str())?.clone();
        let is_known = listed["flags"].as_array().unwrap().contains(&"group".into());
        (is_known && listed["process_servers"].as_array().unwrap().len() == 2).then_some(())
    });
    site.down();
}
