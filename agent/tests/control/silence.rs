//! Somebody is not heard of: that is no all-clear, and nothing is done behind anyone's back.

use super::*;

/// Looks until the alerts are as they should be.
pub(super) async fn until_alerts(client: &Client, what: &str, is: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    let mut last = Vec::new();
    let looking = async {
        loop {
            ticks.tick().await;
            last = client.get("/alerts").await.unwrap().as_array().unwrap().clone();
            if is(&last) {
                return;
            }
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(90), looking).await;
    assert!(found.is_ok(), "{what}: {last:?}");
    last
}

fn has(alerts: &[Value], kind: &str, severity: &str) -> bool {
    alerts.iter().any(|alert| alert["kind"] == kind && alert["severity"] == severity)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_the_agent_did_not_hear_is_none_and_a_resume_is_kept() {
    let mut site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    let client = site.client();
    site.agent = None;
    let away = async |client: &Client| {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while client.get("/machines/web").await.unwrap()["host"]["connected"] == true {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, away(&client)).await.expect("the agent is gone");
    let output = site.run(&["pause", "web"]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("was not paused and is not going to be"), "{said}");
    site.agent = Some(Dialling::start(&site.folder, Role::Agent));
    site.settled(2).await;
    assert_eq!(client.get("/machines/web").await.unwrap()["state"], "protected");

    site.job("/machines/web/pause", json!({})).await.unwrap();
    site.agent = None;
    tokio::time::timeout(SOON, away(&client)).await.expect("the agent is gone again");
    let output = site.run(&["resume", "web"]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("goes on as soon as the agent is back"), "{said}");
    site.agent = Some(Dialling::start(&site.folder, Role::Agent));
    site.settled(2).await;
    assert_eq!(client.get("/machines/web").await.unwrap()["state"], "protected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_silent_has_an_rpo_and_keeps_its_alerts_over_a_restart_of_the_configuration_server() {
    let mut site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    let policy = json!({ "name": "strict", "alarm_rpo_seconds": 5, "alarm_no_contact_seconds": 1 });
    site.client().post("/policies", &policy).await.unwrap();
    *site.server().durable.lock().unwrap() = Some(Timestamp(Timestamp::now().0 - 600_000_000_000));
    let problem = Problem { critical: true, message: "the disk is on fire".into(), help: "extinguish it".into() };
    site.agent().problems.lock().unwrap().push(problem);
    site.job("/machines", json!({ "name": "web", "disks": [disk], "policy": "strict" })).await.unwrap();
    let other = site.disk("b.img", 1 << 20);
    site.job("/machines", json!({ "name": "db", "disks": [other], "policy": "strict" })).await.unwrap();
    let client = site.client();
    let status = client.get("/machines/web").await.unwrap();
    assert_eq!(status["rpo_seconds"], 0.25, "as the host says");
    until_alerts(&client, "the problem", |alerts| has(alerts, "problem", "critical")).await;

    site.agent = None;
    let alerts = until_alerts(&client, "its silence", |alerts| {
        has(alerts, "no_contact", "critical") && has(alerts, "rpo", "critical")
    })
    .await;
    assert!(has(&alerts, "problem", "critical"), "what it said last still holds");
    let silence: Vec<&Value> = alerts.iter().filter(|alert| alert["kind"] == "no_contact").collect();
    assert_eq!(silence.len(), 1, "one cause is one alert: {alerts:?}");
    assert_eq!((&silence[0]["machine"], &silence[0]["machines"]), (&Value::Null, &json!(["db", "web"])));
    let says = |alert: &&Value, words: &str| alert["message"].as_str().is_some_and(|message| message.contains(words));
    assert!(says(&silence[0], "machines: db, web"), "{silence:?}");
    assert!(!alerts.iter().any(|alert| says(&alert, "is not connected")), "said twice: {alerts:?}");
    let output = site.run(&["alert", "list"]).await;
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 machines"));
    let status = client.get("/machines/web").await.unwrap();
    assert!(status["rpo_seconds"].as_f64().unwrap() >= 600.0, "as old as what the replica holds: {status}");

    // It was never seen by the next one: that is no reason to wait for ever.
    site.stop_config_server().await;
    site.start_config_server().await;
    let client = site.client();
    let told = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        let is_told = |status: &Value| {
            let mut reasons = status["reasons"].as_array().unwrap().iter();
            reasons.any(|reason| reason["kind"] == "no_contact" && reason["health"] == "critical")
        };
        while !is_told(&client.get("/machines/web").await.unwrap()) {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, told).await.expect("its silence since the start");
    let events = client.get("/events?limit=1000").await.unwrap();
    let cleared = |event: &&Value| {
        event["kind"] == "alert_cleared"
            && event["message"].as_str().is_some_and(|message| message.contains("nothing was heard"))
    };
    assert!(events.as_array().unwrap().iter().find(cleared).is_none(), "a restart is no all-clear: {events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_is_refused_while_machines_depend_on_it_is_a_critical_alert() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    let client = site.client();
    let PeerIdentity::Agent(host) = site.agent.as_ref().unwrap().place.identity.peer() else { panic!("an agent") };
    let output = site.run(&["identity", "revoke", &host.to_string()]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let alerts = until_alerts(&client, "it is told", |alerts| has(alerts, "identity_refused", "critical")).await;
    let alert = alerts.iter().find(|alert| alert["kind"] == "identity_refused").unwrap();
    assert!(alert["message"].as_str().unwrap().contains("web"), "whom it leaves without protection: {alert}");
    let output = site.run(&["identity", "restore", &host.to_string()]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    until_alerts(&client, "it is over", |alerts| !has(alerts, "identity_refused", "critical")).await;
}

/// Nobody told anything yet: that is not nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_told_since_the_start_is_not_shown_as_zero() {
    let mut site = Site::start().await;
    site.protect("web", &[&site.disk("a.img", 1 << 20)]).await.unwrap();
    let figures = ["pending_bytes", "written_bytes", "sent_bytes", "log_bytes", "stored_bytes", "points"];
    let status = site.client().get("/machines/web").await.unwrap();
    assert!(
        figures.iter().filter(|figure| **figure != "stored_bytes").all(|figure| status[figure].is_u64()),
        "{status}"
    );
    (site.agent, site.server) = (None, None);
    site.stop_config_server().await;
    site.start_config_server().await;
    let status = site.client().get("/machines/web").await.unwrap();
    assert!(figures.iter().all(|figure| status[figure].is_null()), "{status}");
    assert!(status["disks"][0]["sent_bytes"].is_null() && status["process_servers"][0]["points"].is_null(), "{status}");
    let output = site.run(&["status"]).await;
    assert!(!String::from_utf8_lossy(&output.stdout).contains("0 B"), "{output:?}");
}
