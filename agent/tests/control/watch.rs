//! What is watched goes on over a restart of the configuration server, and over its restore from a backup.

use tidemark_base::storage::RealStorage;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command as Process};

use super::*;

/// The command, and what it prints.
fn watching(site: &Site, arguments: &[&str]) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut command = Process::new(env!("CARGO_BIN_EXE_tidemark"));
    command.args(arguments).env("TIDEMARK_DIR", site.folder.path()).stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

/// Reads until one is as wanted; all of them.
async fn read_until(lines: &mut Lines<BufReader<ChildStdout>>, what: &str, is: impl Fn(&Value) -> bool) -> Vec<Value> {
    let mut read: Vec<Value> = Vec::new();
    let reading = async {
        loop {
            let line = lines.next_line().await.unwrap().unwrap_or_else(|| panic!("{what}: the watch ended"));
            read.push(serde_json::from_str(&line).unwrap());
            if is(read.last().unwrap()) {
                return;
            }
        }
    };
    let found = tokio::time::timeout(SOON, reading).await;
    assert!(found.is_ok(), "{what}: {read:#?}");
    read
}

fn says(part: &str) -> impl Fn(&Value) -> bool {
    let part = part.to_owned();
    move |event| event["message"].as_str().is_some_and(|message| message.contains(&part))
}

async fn user(site: &Site, name: &str) {
    site.client().post("/users", &json!({ "name": name, "role": "reader" })).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_followed_over_a_restart_and_over_a_restore_with_none_twice_and_none_left_out() {
    let mut site = Site::start().await;
    site.stop_config_server().await;
    let key = config_server::new_recovery_key(&site.folder).unwrap();
    site.start_config_server().await;
    site.settled(2).await;
    let (child, mut lines) = watching(&site, &["events", "--watch", "--after", "0", "--json"]);
    user(&site, "one").await;
    let mut all = read_until(&mut lines, "the first", says("user one")).await;

    site.stop_config_server().await;
    site.start_config_server().await;
    user(&site, "two").await;
    all.extend(read_until(&mut lines, "over a restart", says("user two")).await);

    // What happens after the backup, the watch has seen; the restored server has not.
    let made = site.job("/backups", json!({})).await.unwrap();
    let sealed = site.client().download(&format!("/backups/{}", made["id"].as_str().unwrap())).await.unwrap();
    for name in ["lost-1", "lost-2", "lost-3", "lost-4", "lost-5", "lost-6", "lost-7", "lost-8"] {
        user(&site, name).await;
    }
    all.extend(read_until(&mut lines, "after the backup", says("user lost-8")).await);
    (site.agent, site.server) = (None, None);
    site.stop_config_server().await;
    let elsewhere = Folder::create(&site.top.path().join("elsewhere")).unwrap();
    config_server::restore(&elsewhere, &Settings::default(), sealed, key).await.unwrap();
    drop(elsewhere);
    let top = RealStorage::open_folder(site.top.path());
    top.rename("site", "lost").unwrap();
    top.rename("elsewhere", "site").unwrap();
    site.folder = Folder::create(&site.top.path().join("site")).unwrap();
    site.start_config_server().await;
    user(&site, "three").await;
    let after = read_until(&mut lines, "over a restore", says("user three")).await;
    assert!(
        after.iter().any(|event| event["kind"] == "configuration_restored"),
        "the first of what came after: {after:#?}"
    );
    assert!(after.iter().all(|event| event["epoch"] == 2), "{after:#?}");
    let ids: Vec<u64> = after.iter().map(|event| event["id"].as_u64().unwrap()).collect();
    let expected: Vec<u64> = (ids[0]..).take(ids.len()).collect();
    assert_eq!(ids, expected, "each once, in order");
    let highest = all.last().unwrap()["id"].as_u64().unwrap();
    assert!(ids[0] <= highest, "ids began again below what was seen");
    let listed = site.client().get("/events?limit=1000").await.unwrap();
    let of_epoch = listed.as_array().unwrap().iter().filter(|event| event["epoch"] == 2);
    assert_eq!(of_epoch.map(|event| event["id"].as_u64().unwrap()).next(), Some(ids[0]), "nothing was left out");
    drop(child);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_status_and_a_watched_job_go_on_over_a_restart_and_a_server_that_is_not_there_is_said_at_once() {
    let mut site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    site.job("/machines/web/points", json!({})).await.unwrap();
    let (_status, mut lines) = watching(&site, &["status", "web", "--watch", "--json"]);
    read_until(&mut lines, "the status", |status| status["name"] == "web").await;
    *site.server().halfway.lock().unwrap() = Some(Arc::default());
    let to = site.top.path().join("out.img");
    let job = site.client().post("/machines/web/points/latest/export", &json!({ "to": to })).await.unwrap();
    let id = job["id"].as_str().unwrap().to_owned();
    let (mut watched, mut told) = watching(&site, &["job", "watch", &id, "--json"]);
    let running = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        while site.client().get(&format!("/jobs/{id}")).await.unwrap()["progress"].is_null() {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, running).await.expect("it runs");
    site.stop_config_server().await;
    let output = site.run(&["events", "--watch"]).await;
    assert_eq!(output.status.code(), Some(1), "one that never answered is not waited for");
    site.start_config_server().await;
    site.settled(2).await;
    let back = Timestamp::now();
    let is_new = |status: &Value| {
        let since = status["host"]["since"].as_str().and_then(|since| Timestamp::parse(since).ok());
        status["host"]["connected"] == true && since.is_some_and(|since| since.0 + 5_000_000_000 > back.0)
    };
    read_until(&mut lines, "the status of after the restart", is_new).await;
    // The job was cut by the restart, and says so.
    let ended = read_until(&mut told, "the job", |job| job["id"] == id.as_str()).await;
    assert!(
        ended.last().unwrap()["failure"]["error"].as_str().unwrap().contains("stopped while the job ran"),
        "{ended:?}"
    );
    assert!(!tokio::time::timeout(SOON, watched.wait()).await.unwrap().unwrap().success());
}
