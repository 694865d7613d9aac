//! Who did what to users, tokens, policies, passphrases and identities; and hosts that are gone for good.

use super::*;

/// Of the events of a kind: what was done and by whom.
async fn noted(client: &Client, kind: &str) -> Vec<(String, Value)> {
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let waiting = async {
        loop {
            ticks.tick().await;
            let events = client.get("/events?limit=1000").await.unwrap();
            let found = events.as_array().unwrap().iter().filter(|event| event["kind"] == kind);
            let found: Vec<(String, Value)> =
                found.map(|event| (event["message"].as_str().unwrap().to_owned(), event["actor"].clone())).collect();
            if !found.is_empty() {
                return found;
            }
        }
    };
    tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("nothing is told of {kind}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_changes_who_may_do_what_is_named_with_what_and_from_where() {
    let site = Site::start().await;
    let admin = site.client();
    admin.post("/users", &json!({ "name": "root", "role": "administrator" })).await.unwrap();
    let token = admin.post("/tokens", &json!({ "user": "root", "label": "laptop" })).await.unwrap();
    let file = site.top.path().join("token-of-root");
    File::create(&file).unwrap().write_all(token["token"].as_str().unwrap().as_bytes()).unwrap();
    let api = site.folder.config_server().unwrap().unwrap().api;
    let root = Client::new(&format!("https://{api}"), &file, &site.folder.ca_file()).unwrap();
    let put = async |path: &str, body: Value| root.request(hyper::Method::PUT, path, Some(&body)).await.unwrap();
    let delete = async |path: String| root.request(hyper::Method::DELETE, &path, None).await.unwrap();

    root.post("/users", &json!({ "name": "eve", "role": "reader" })).await.unwrap();
    put("/users/eve", json!({ "role": "operator" })).await;
    let of_eve =
        root.post("/tokens", &json!({ "user": "eve", "label": "phone", "lifetime_seconds": 60 })).await.unwrap();
    delete(format!("/tokens/{}", of_eve["id"].as_str().unwrap())).await;
    delete("/users/eve".to_owned()).await;
    root.post("/policies", &json!({ "name": "gold", "retention_count": 7 })).await.unwrap();
    root.request(hyper::Method::PATCH, "/policies/gold", Some(&json!({ "compression": 9 }))).await.unwrap();
    delete("/policies/gold".to_owned()).await;
    let passphrase = root.post("/passphrases", &json!({ "role": "agent", "uses": 3 })).await.unwrap();
    delete(format!("/passphrases/{}", passphrase["id"].as_str().unwrap())).await;
    root.post("/channels", &json!({ "name": "ops", "webhook": { "url": "https://127.0.0.1:1/x" } })).await.unwrap();
    delete("/channels/ops".to_owned()).await;
    root.post("/identities/fake-agent/revoke", &json!({ "reason": "stolen" })).await.unwrap();
    root.post("/identities/fake-agent/restore", &json!({})).await.unwrap();

    let actor = json!({ "user": "root", "address": "127.0.0.1" });
    for (kind, part) in [
        ("user_created", "eve was created, with the role reader"),
        ("user_changed", "eve, who was reader, is operator"),
        ("user_deleted", "eve"),
        ("token_created", "(\"phone\") of user eve was made; it expires"),
        ("token_deleted", "(\"phone\") of user eve"),
        ("policy_created", "gold was created: retention_count 7"),
        ("policy_changed", "gold was changed: compression 9"),
        ("policy_deleted", "gold"),
        ("passphrase_created", "3 registrations of the role agent"),
        ("passphrase_deleted", passphrase["id"].as_str().unwrap()),
        ("channel_created", "ops was created: webhook to https://127.0.0.1:1/x"),
        ("channel_deleted", "ops"),
        ("identity_revoked", "(fake-agent) is refused from now on: stolen"),
        ("identity_restored", "(fake-agent) is taken again"),
    ] {
        let found = noted(&admin, kind).await;
        let (message, by) = found.last().unwrap();
        assert!(message.contains(part), "{kind}: {message}");
        assert_eq!(by, &actor, "{kind}");
    }
    assert_eq!(noted(&admin, "user_created").await[0].1["user"], "admin");
    let secrets = [token["token"].as_str().unwrap(), passphrase["passphrase"].as_str().unwrap()];
    let all = admin.get("/events?limit=1000").await.unwrap().to_string();
    assert!(secrets.iter().all(|secret| !all.contains(secret)), "no secret is told");
    assert!(noted(&admin, "connected").await[0].1.is_null(), "nobody asked for that");
    let output = site.run(&["events"]).await;
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("root from 127.0.0.1"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_are_decided_by_somebody() {
    let site = Site::start().await;
    let client = site.client();
    let server = format!("https://{}", site.folder.config_server().unwrap().unwrap().api);
    let fingerprint = site.folder.authority().unwrap().fingerprint();
    for (name, verb, kind) in
        [("ps-1", "approve", "registration_approved"), ("ps-2", "reject", "registration_rejected")]
    {
        let made = client.post("/passphrases", &json!({ "role": "process-server" })).await.unwrap();
        let registration = tidemark::roles::register::Registration {
            role: Role::ProcessServer,
            server: server.clone(),
            passphrase: made["passphrase"].as_str().unwrap().to_owned(),
            fingerprint: fingerprint.clone(),
            name: name.to_owned(),
            dir: site.top.path().join(name),
            wait: false,
        };
        tidemark::roles::register::register(registration, |_| ()).await.unwrap();
        assert!(site.run(&["process-server", verb, name]).await.status.success());
        let (message, by) = noted(&client, kind).await.pop().unwrap();
        assert!(message.contains(name) && by == json!({ "user": "admin", "address": "127.0.0.1" }), "{message}: {by}");
    }
}

async fn gone(site: &Site, path: &str) {
    let client = site.client();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let away = async {
        while client.get(path).await.unwrap()["connected"] == true {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, away).await.expect("it is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_gone_for_good_leaves_the_inventory_and_is_refused_when_it_comes_back() {
    let mut site = Site::start().await;
    let client = site.client();
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    site.refused(&["host", "delete", "fake-agent"], "is connected").await;
    let place = site.agent.as_ref().unwrap().place.identity.peer();
    site.agent = None;
    gone(&site, "/hosts/fake-agent").await;
    site.refused(&["host", "delete", "fake-agent"], "has machines: web").await;
    site.refused(&["host", "delete", "nobody"], "nobody").await;

    // Its machine waits for it to hear that its protection ended: that comes to its end as well.
    let output = site.run(&["unprotect", "web"]).await;
    assert_eq!(output.status.code(), Some(1), "the host is away");
    assert_eq!(client.get("/machines").await.unwrap().as_array().unwrap().len(), 1);
    let output = site.run(&["host", "delete", "fake-agent"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for path in ["/hosts", "/disks", "/machines"] {
        assert_eq!(client.get(path).await.unwrap(), json!([]), "{path}");
    }
    assert_eq!(client.get("/replicas").await.unwrap().as_array().unwrap().len(), 1, "its replica is kept");
    assert_eq!(noted(&client, "host_deleted").await[0].1["user"], "admin");
    let identities = client.get("/identities").await.unwrap();
    let known = |identities: &Value| {
        identities.as_array().unwrap().iter().find(|of| of["identity"] == place.to_string()).cloned().unwrap()
    };
    assert_eq!(
        (&known(&identities)["standing"], &known(&identities)["reason"]),
        (&json!("revoked"), &json!("it was deleted"))
    );

    // It comes back all the same: nobody takes it, nor after a restart, until an administrator says so.
    site.agent = Some(Dialling::start(&site.folder, Role::Agent));
    site.stop_config_server().await;
    site.start_config_server().await;
    site.settled(1).await;
    let client = site.client();
    let refused = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        loop {
            ticks.tick().await;
            let figures = client.download("/metrics").await.unwrap();
            if String::from_utf8_lossy(&figures).contains("not_admitted") {
                return;
            }
        }
    };
    tokio::time::timeout(SOON, refused).await.expect("it dials, and is refused");
    assert_eq!(client.get("/hosts").await.unwrap(), json!([]));
    let output = site.run(&["identity", "restore", &place.to_string()]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    site.settled(2).await;
    assert_eq!(client.get("/hosts").await.unwrap()[0]["name"], "fake-agent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_server_that_is_gone_for_good_leaves_with_the_replicas_that_are_given_up() {
    let mut site = Site::start().await;
    let client = site.client();
    let (first, second) = (site.disk("a.img", 1 << 20), site.disk("b.img", 1 << 20));
    site.protect("web", &[&first]).await.unwrap();
    site.protect("old", &[&second]).await.unwrap();
    assert!(site.run(&["unprotect", "old"]).await.status.success());
    let name = "fake-process-server";
    site.refused(&["process-server", "delete", name], "is connected").await;
    site.server = None;
    gone(&site, "/process-servers/fake-process-server").await;
    site.refused(&["process-server", "delete", name], "replicated to process server fake-process-server: web").await;
    assert_eq!(site.run(&["unprotect", "web"]).await.status.code(), Some(1), "the process server is away");
    site.refused(&["process-server", "delete", name], "keeps the replicas of old").await;
    let output = site.run(&["process-server", "delete", name, "--force"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for path in ["/process-servers", "/machines", "/replicas"] {
        assert_eq!(client.get(path).await.unwrap(), json!([]), "{path}");
    }
    assert_eq!(noted(&client, "process_server_deleted").await[0].1["user"], "admin");
}
