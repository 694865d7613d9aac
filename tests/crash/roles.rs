//! `kill -9` of one role while the others live.

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::{Machine, Site, wait};

use crate::whole::{Load, assert_recovered};

const DISK_BYTES: u64 = 64 * MIB;

fn protected(seed: u64) -> (Site, Machine) {
    let site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, seed);
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");
    (site, machine)
}

fn wait_load(site: &Site) {
    let before = number(&site.status("db")["written_bytes"]);
    wait::until("the load is on its way", LIMIT, || {
        (number(&site.status("db")["written_bytes"]) > before + 2 * MIB).then_some(())
    });
}

#[test]
fn an_agent_that_is_killed_loses_nothing() {
    let (mut site, machine) = protected(1);
    let first = site.point("db");
    let mut written = Vec::new();
    for round in 0..2 {
        let half = DISK_BYTES / 2;
        let load = Load::start(machine.nbd(), round * half, half, 10 + round);
        wait_load(&site);
        site.kill_role("agent");
        written.push(load.join());
        site.start_role("agent");
        assert_recovered(&site, &machine, &written);
    }
    assert_eq!(site.run(&["point", "verify", "db", &text(&first["id"])]).code, 0);
}

#[test]
fn a_process_server_that_is_killed_stops_no_guest() {
    let (mut site, machine) = protected(2);
    let first = site.point("db");
    let reference = site.path("reference.img");
    image::copy(&machine.disks[0].path, &reference);
    let load = Load::start(machine.nbd(), 0, DISK_BYTES, 20);
    wait_load(&site);
    site.kill_role("process-server");
    // The guest goes on: more is written while nobody receives.
    wait_load(&site);
    site.start_role("process-server");
    wait_load(&site);
    site.kill_role("process-server");
    site.start_role("process-server");
    // Caught up under load, before the load ends.
    wait::until("a point is durable again", LIMIT, || (site.run(&["point", "create", "db"]).code == 0).then_some(()));
    site.kill_role("agent");
    let written = [load.join()];
    site.start_role("agent");
    assert_recovered(&site, &machine, &written);
    image::assert_same(&reference, &site.export("db", &text(&first["id"]), "first.raw", "raw"));
}

#[test]
fn a_process_server_that_is_killed_in_the_initial_replication_begins_no_other() {
    let mut site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 256 * MIB, 3);
    let machine = site.protect("db", &[&disk], &[]);
    let state = wait::until("something was sent", LIMIT, || {
        let status = site.status("db");
        (number(&status["sent_bytes"]) > 4 * MIB).then(|| status["state"].clone())
    });
    assert_ne!(state, "protected", "the initial replication was over before it could be interrupted");
    site.kill_role("process-server");
    Client::connect(machine.nbd()).unwrap().write(MIB, &vec![7; 1 << 20]).unwrap();
    site.start_role("process-server");
    assert_recovered(&site, &machine, &[]);
}

#[test]
fn without_its_configuration_server_replication_goes_on() {
    let (mut site, machine) = protected(4);
    let load = Load::start(machine.nbd(), 0, DISK_BYTES - MIB, 40);
    wait_load(&site);
    site.kill_role("config-server");
    // Nobody can be asked now. What is written arrives all the same: with the agent gone too, only what the process
    // server has durable can come back, and the replica must still be a state that the disk had.
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(DISK_BYTES - MIB, &vec![9; 1 << 20]).unwrap();
    client.flush().unwrap();
    site.start_role("config-server");
    site.wait_connected();
    wait_load(&site);
    site.kill_role("agent");
    let written = [load.join()];
    site.start_role("agent");
    assert_recovered(&site, &machine, &written);
}
