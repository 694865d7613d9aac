//! Recovery plans of machines whose disks fail over alone: no hypervisor.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::Value;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::workload::{self, content, nbd};
use tidemark_tests::{Machine, Site, wait};

const BYTES: u64 = 8 * MIB;
const NAMES: [&str; 3] = ["db", "app", "web"];

fn protected(site: &Site) -> Vec<Machine> {
    let protect =
        |(seed, name): (usize, &&str)| workload::protected(site, name, &format!("{name}.img"), BYTES, seed as u64);
    NAMES.iter().enumerate().map(protect).collect()
}

/// Installs a script as an administrator of the configuration server would; returns where it writes.
fn install(site: &Site, name: &str, body: &str) -> PathBuf {
    let folder = site.state().join("config-server/plan.d");
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let (path, said) = (folder.join(name), site.path(&format!("{name}.said")));
    let script = format!("#!/bin/sh\nexec >> {}\n{body}\n", said.display());
    File::create(&path).and_then(|mut file| file.write_all(script.as_bytes())).expect("it can be written");
    for path in [&path, &folder] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).expect("it is ours");
    }
    said
}

fn states(site: &Site) -> Vec<String> {
    NAMES.iter().map(|name| text(&site.status(name)["state"])).collect()
}

fn run_of(site: &Site, plan: &str) -> Value {
    site.json(&["plan", "show", plan])["run"].clone()
}

fn step_states(run: &Value) -> Vec<String> {
    run["steps"].as_array().expect("it is a list").iter().map(|step| text(&step["state"])).collect()
}

fn assert_there(site: &Site, machines: &[Machine]) {
    for machine in machines {
        let shown = site.json(&["failover", "show", &machine.name]);
        let there = content(site, &nbd(&shown["running"]), &format!("{}-there.img", machine.name));
        image::assert_same(&machine.disks[0].path, &there);
    }
}

fn wait_states(site: &Site, state: &str) {
    let all = || states(site).iter().all(|found| found == state).then_some(());
    wait::until(&format!("all machines are {state}"), LIMIT, all);
}

/// F23: machines fail over by a plan, in its order; F25: not when one of them has no point. It is told beforehand, tested, run, taken
/// back, run again from the group's common point (F27), and committed.
#[test]
fn f23_f25_a_plan_fails_three_machines_over_in_order_with_a_script_and_a_person_between() {
    let site = Site::start();
    let machines = protected(&site);
    site.json(&["group", "create", "front", "app", "web", "--interval", "0s", "--hold-limit", "2s"]);
    let steps = ["machines:db", "script:switch@1m", "manual:look at the database", "group:front"];
    let arguments: Vec<&str> =
        ["plan", "create", "shop"].into_iter().chain(steps.iter().flat_map(|step| ["--step", step])).collect();
    site.json(&arguments);
    site.run(&["plan", "create", "odd", "--step", "machines:db", "--step", "machines:db"]).assert_refused(&["twice"]);
    site.run(&["plan", "create", "odd", "--step", "machines:nobody"]).assert_refused(&["no machine", "nobody"]);
    site.run(&["plan", "create", "odd", "--step", "manual:wait"]).assert_refused(&["no machines"]);

    // Everything that is in the way is said, and nothing is begun.
    site.run(&["plan", "run", "shop", "--disks-only"]).assert_refused(&["no script", "switch", "nothing was begun"]);
    let said = install(&site, "switch", "echo $TIDEMARK_RUN $TIDEMARK_STEP $TIDEMARK_MACHINES");
    site.run(&["plan", "run", "shop"]).assert_refused(&["step 1, db", "no description", "step 4, web"]);
    site.json(&["policy", "create", "slow", "--throttle", "1K"]);
    let late = site.path("late.img");
    image::make_mixed(&late, BYTES, 9);
    site.protect("late", &[&late], &["--policy", "slow"]);
    site.json(&["plan", "create", "early", "--step", "machines:db,late"]);
    for verb in [vec!["--unplanned"], vec!["--unplanned", "--dry-run"], vec![]] {
        let refused = site.run(&[&["plan", "run", "early", "--disks-only"][..], &verb].concat());
        refused.assert_refused(&["machine \"late\" has no point", "nothing was begun"]);
    }
    site.run(&["plan", "test", "early", "--disks-only"]).assert_refused(&["machine \"late\" has no point"]);
    site.json(&["plan", "delete", "early"]);
    assert_eq!(states(&site), ["protected"; 3]);

    let dry = site.json(&["plan", "run", "shop", "--disks-only", "--dry-run"]);
    let looked: Vec<_> = dry["steps"].as_array().expect("it is a list").iter().map(|step| step["ok"] == true).collect();
    assert_eq!(looked, [true; 5], "three machines, a script and a person: {dry}");
    assert_eq!(run_of(&site, "shop"), Value::Null, "a dry run is none");

    // A test: beside the machines, and gone when it ends. Nobody is waited for.
    let tested = site.json(&["plan", "test", "shop", "--disks-only"]);
    assert_eq!(
        (&tested["state"], tested["machines"].as_array().map(Vec::len)),
        (&"succeeded".into(), Some(3)),
        "{tested}"
    );
    assert_eq!(step_states(&run_of(&site, "shop")), ["done", "done", "skipped", "done"]);
    assert_eq!(std::fs::read_to_string(&said).expect("it ran"), "test 2 db\n");
    assert_eq!(states(&site), ["protected"; 3]);
    site.run(&["plan", "commit", "shop"]).assert_refused(&["has not failed over"]);

    let started = site.json(&["plan", "run", "shop", "--disks-only", "--no-wait"]);
    let waiting = || (step_states(&run_of(&site, "shop"))[2] == "waiting").then_some(());
    wait::until("the plan waits for a person", LIMIT, waiting);
    assert_eq!(states(&site), ["failed_over", "protected", "protected"], "one step after the other");
    assert!(std::fs::read_to_string(&said).expect("it ran").ends_with("planned 2 db\n"));
    site.run(&["plan", "run", "shop", "--disks-only"]).assert_refused(&["runs"]);
    site.run(&["plan", "delete", "shop"]).assert_refused(&["runs"]);
    site.json(&["plan", "confirm", "shop"]);
    let job = site.json(&["job", "watch", &text(&started["job"])]);
    assert_eq!(job["state"], "succeeded", "{job}");
    site.run(&["plan", "confirm", "shop"]).assert_refused(&["waits for nobody"]);
    let report = site.json(&["plan", "report", "shop"]);
    let rto = |machine: &str| {
        let all = report["machines"].as_array().expect("it is a list");
        let found = all.iter().find(|of| of["machine"] == machine).unwrap_or_else(|| panic!("no {machine}: {report}"));
        assert_eq!((&found["state"], &found["lost_bytes"]), (&"done".into(), &0.into()), "{found}");
        let (own, all) = (found["own_seconds"].as_f64(), found["rto_seconds"].as_f64());
        assert!(own.is_some_and(|own| own > 0.0) && own <= all, "{found}");
        all.expect("it was measured")
    };
    assert!(
        rto("db") < rto("web") && rto("db") < rto("app"),
        "what comes later takes longer since the command: {report}"
    );
    assert_there(&site, &machines);

    // Back, and again from the points that the machines of the group have in common.
    assert_eq!(site.json(&["plan", "cancel", "shop"])["undone"].as_array().map(Vec::len), Some(3));
    wait_states(&site, "protected");
    site.run(&["plan", "cancel", "shop"]).assert_refused(&["taken back already"]);
    let point = text(&site.json(&["group", "point", "front"])["id"]);
    for name in ["app", "web"] {
        Client::connect(machines[NAMES.iter().position(|known| *known == name).expect("it is one")].nbd())
            .expect("the disk can be opened")
            .write(0, &[7; 4096])
            .expect("it can be written");
        site.point(name);
    }
    site.json(&["plan", "set", "shop", "--step", "group:front"]);
    let again = site.json(&["plan", "run", "shop", "--unplanned", "--point", "latest-group", "--disks-only"]);
    let points: Vec<String> =
        again["machines"].as_array().expect("it is a list").iter().map(|of| text(&of["point"])).collect();
    assert_eq!(points, [point.clone(), point]);
    site.json(&["plan", "commit", "shop"]);
    assert_eq!(states(&site), ["protected", "committed", "committed"]);
    site.run(&["plan", "cancel", "shop"]).assert_refused(&["committed"]);
}

/// A step that fails or takes too long is named, and leaves a state that can be gone on with or taken back.
#[test]
fn f23_a_step_that_fails_or_times_out_is_named_and_the_plan_goes_on_or_back() {
    let site = Site::start();
    let machines = protected(&site);
    install(&site, "switch", "echo because >&2; exit 3");
    site.json(&[
        "plan",
        "create",
        "shop",
        "--step",
        "machines:db",
        "--step",
        "script:switch",
        "--step",
        "machines:app,web",
    ]);
    let failed = site.run(&["plan", "run", "shop", "--disks-only"]);
    failed.assert_refused(&["step 2 of 3", "script switch", "exit status: 3", "because"]);
    assert!(failed.stderr.contains("plan continue") && failed.stderr.contains("plan cancel"), "{}", failed.describe());
    assert_eq!(step_states(&run_of(&site, "shop")), ["done", "failed", "pending"]);
    assert_eq!(states(&site), ["failed_over", "protected", "protected"]);
    site.run(&["plan", "run", "shop", "--disks-only"]).assert_refused(&["stopped in the middle"]);
    let events = site.json(&["events", "--severity", "critical"]);
    let told =
        events.as_array().expect("it is a list").iter().any(|event| text(&event["message"]).contains("step 2 of 3"));
    assert!(told, "{events}");
    // Mended, it goes on where it stopped.
    install(&site, "switch", "true");
    let report = site.json(&["plan", "continue", "shop"]);
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_there(&site, &machines);
    site.run(&["plan", "continue", "shop"]).assert_refused(&["did not stop in the middle"]);
    site.json(&["plan", "cancel", "shop"]);
    wait_states(&site, "protected");

    // Nobody confirms, a script hangs: the step says so when its time is over.
    for (step, words) in [("manual:look@1s", "manual: look"), ("script:hang@1s", "script hang")] {
        install(&site, "hang", "sleep 1000");
        site.json(&["plan", "set", "shop", "--step", "machines:db,app", "--step", step, "--step", "machines:web"]);
        let late = site.run(&["plan", "run", "shop", "--disks-only"]);
        late.assert_refused(&["step 2 of 3", words, "within 1 s"]);
        assert_eq!(states(&site), ["failed_over", "failed_over", "protected"]);
        site.json(&["plan", "cancel", "shop"]);
        wait_states(&site, "protected");
        assert_eq!(run_of(&site, "shop")["state"], "cancelled");
    }
}

/// The configuration server is killed in the middle of a plan: nothing goes on by itself, and nothing is forgotten.
#[test]
fn f23_a_plan_outlives_its_configuration_server_and_is_gone_on_with_or_taken_back() {
    let mut site = Site::start_roles();
    let machines = protected(&site);
    site.json(&[
        "plan",
        "create",
        "shop",
        "--step",
        "machines:db",
        "--step",
        "manual:look",
        "--step",
        "machines:app,web",
    ]);
    let killed_in = |site: &mut Site, until: &dyn Fn(&Value) -> bool| {
        site.json(&["plan", "run", "shop", "--disks-only", "--no-wait"]);
        wait::until("the plan is where it is killed", LIMIT, || {
            let run = run_of(site, "shop");
            (run.is_object() && until(&run)).then_some(())
        });
        site.kill_role("config-server");
        site.start_role("config-server");
        site.wait_connected();
        assert_eq!(run_of(site, "shop")["state"], "interrupted");
    };
    killed_in(&mut site, &|run| run["state"] == "running" && step_states(run)[1] == "waiting");
    assert_eq!(states(&site), ["failed_over", "protected", "protected"]);
    site.run(&["plan", "run", "shop", "--disks-only"]).assert_refused(&["stopped in the middle"]);
    let going = site.json(&["plan", "continue", "shop", "--no-wait"]);
    wait::until("it waits again", LIMIT, || (step_states(&run_of(&site, "shop"))[1] == "waiting").then_some(()));
    site.json(&["plan", "confirm", "shop"]);
    assert_eq!(site.json(&["job", "watch", &text(&going["job"])])["state"], "succeeded");
    assert_there(&site, &machines);
    site.json(&["plan", "cancel", "shop"]);
    wait_states(&site, "protected");
    // In the middle of the machines: each is gone on with from where it is.
    site.json(&["plan", "set", "shop", "--step", "machines:db,app,web"]);
    killed_in(&mut site, &|run| run["state"] == "running" && step_states(run)[0] == "running");
    let report = site.json(&["plan", "continue", "shop"]);
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_there(&site, &machines);
    site.json(&["plan", "cancel", "shop"]);
    wait_states(&site, "protected");
    // And taken back instead.
    killed_in(&mut site, &|run| run["state"] == "running" && step_states(run)[0] == "running");
    site.json(&["plan", "cancel", "shop"]);
    wait_states(&site, "protected");
    machines.iter().for_each(|machine| drop(site.point(&machine.name)));
}
