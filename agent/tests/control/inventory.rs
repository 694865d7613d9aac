//! Hosts with their disks, and process servers: as they are told, kept and shown.

use super::*;

fn sound(path: &str, kind: &str) -> HostDisk {
    HostDisk { path: path.to_owned(), bytes: 1 << 30, kind: kind.to_owned(), ..HostDisk::default() }
}

fn found(disks: Vec<HostDisk>) -> Option<Inventory> {
    Some(Inventory { time: Timestamp(5), disks, left_out: 2 })
}

/// What is at `path`, once it is as expected.
async fn once(client: &Client, path: &str, is: impl Fn(&Value) -> bool) -> Value {
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let mut last = Value::Null;
    let waiting = async {
        loop {
            ticks.tick().await;
            last = client.get(path).await.unwrap();
            if is(&last) {
                return last.clone();
            }
        }
    };
    match tokio::time::timeout(SOON, waiting).await {
        Ok(found) => found,
        Err(_) => panic!("{path} did not come to be as expected: {last}"),
    }
}

fn paths(disks: &Value) -> Vec<String> {
    disks.as_array().unwrap().iter().map(|disk| disk["path"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_listed_as_their_hosts_tell_of_them_also_after_a_restart() {
    let mut site = Site::start().await;
    let (image, device) = (site.disk("a.img", 1 << 20), site.disk("b.img", 1 << 20));
    let client = site.client();
    let host = &client.get("/hosts").await.unwrap()[0];
    assert_eq!((&host["name"], &host["disks_told"]), (&json!("fake-agent"), &Value::Null), "it told of none yet");

    let mounted = HostDisk {
        in_use: true,
        uses: vec![DiskUse { kind: "file_system".into(), at: "/".into() }],
        ways: vec![
            DiskWay { via: "nbd".into(), obstacle: "it is mounted".into() },
            DiskWay { via: "bpf".into(), obstacle: String::new() },
        ],
        ..sound("/dev/sda", "disk")
    };
    let other = sound(device.to_str().unwrap(), "loop");
    *site.agent().inventory.lock().unwrap() = found(vec![mounted.clone(), other.clone()]);
    let disks = once(&client, "/disks", |disks| disks.as_array().unwrap().len() == 2).await;
    assert_eq!((&disks[0]["protected"], &disks[0]["uses"][0]["at"]), (&json!(false), &json!("/")));
    assert_eq!(
        disks[0]["ways"],
        json!([
            { "via": "nbd", "possible": false, "obstacle": "it is mounted" },
            { "via": "bpf", "possible": true, "obstacle": null },
        ])
    );
    assert!(disks[0]["told"].is_string() && disks[0]["host"] == "fake-agent");

    // One that the host tells of, by its path and then by its id, and a file that it does not.
    let protected = site.protect("web", &[&device, &image]).await.unwrap();
    let is_known = |disks: &Value| disks[1]["machine"] == "web" && disks[2]["machine"] == "web";
    let disks = once(&client, "/disks", is_known).await;
    assert_eq!((&disks[1]["kind"], &disks[1]["via"], &disks[1]["ways"]), (&json!("loop"), &json!("nbd"), &json!([])));
    assert_eq!(
        (&disks[2]["path"], &disks[2]["kind"], &disks[2]["told"]),
        (&json!(image), &json!("image"), &Value::Null)
    );
    let id: DiskId = protected["disks"][0]["id"].as_str().unwrap().parse().unwrap();
    let renamed = HostDisk { disk: Some(id), ..sound("/dev/loop7", "loop") };
    *site.agent().inventory.lock().unwrap() = found(vec![mounted, renamed]);
    let disks = once(&client, "/disks", |disks| disks[1]["path"] == "/dev/loop7").await;
    assert_eq!((&disks[1]["machine"], disks.as_array().unwrap().len()), (&json!("web"), 3), "{disks}");
    assert_eq!(paths(&client.get("/disks?unprotected=true").await.unwrap()), ["/dev/sda"]);
    assert_eq!(client.get("/disks?host=fake-agent").await.unwrap(), disks);
    let (status, _, refused) = raw(&site, "GET", "/disks?host=nobody", &[], "").await;
    assert!(status == 404 && refused["error"].as_str().unwrap().contains("nobody"), "{refused}");

    let shown = client.get("/hosts/fake-agent").await.unwrap();
    assert_eq!(shown["inventory"], disks);
    assert_eq!(
        (&shown["disks"], &shown["unprotected_disks"], &shown["disks_left_out"]),
        (&json!(3), &json!(1), &json!(2))
    );
    assert_eq!(
        (&shown["connected"], &shown["version"], &shown["machines"]),
        (&json!(true), &json!("test"), &json!(["web"]))
    );
    assert_eq!(client.get(&format!("/hosts/{}", shown["id"].as_str().unwrap())).await.unwrap()["name"], "fake-agent");
    assert_eq!(raw(&site, "GET", "/hosts/nobody", &[], "").await.0, 404);

    // The host is away, and the server was restarted since.
    drop(site.agent.take());
    site.stop_config_server().await;
    site.start_config_server().await;
    let client = site.client();
    assert_eq!(client.get("/disks").await.unwrap(), disks);
    let shown = client.get("/hosts/fake-agent").await.unwrap();
    assert_eq!((&shown["connected"], &shown["version"]), (&json!(false), &Value::Null));
    assert!(shown["last_seen"].is_string() && shown["since"].is_null(), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inventory_that_is_hostile_is_refused_and_the_one_of_before_stays() {
    let site = Site::start().await;
    let client = site.client();
    *site.agent().inventory.lock().unwrap() = found(vec![sound("/dev/sda", "disk")]);
    let before = once(&client, "/disks", |disks| disks.as_array().unwrap().len() == 1).await;
    for disks in [
        vec![sound("/dev/\u{1b}]0;x\u{7}", "disk")],
        vec![sound("/dev/sda", "../x")],
        vec![sound(&"x".repeat(INVENTORY_TEXT_BYTES_MAX + 1), "disk")],
        vec![sound("/dev/sda", "disk"); INVENTORY_DISKS_MAX + 1],
    ] {
        *site.agent().inventory.lock().unwrap() = found(disks);
        once(&client, "/hosts", |hosts| hosts[0]["connected"] == false).await;
        let mut now = client.get("/disks").await.unwrap();
        // Told again by each stream that followed.
        now[0]["told"] = before[0]["told"].clone();
        assert_eq!(now, before);
        *site.agent().inventory.lock().unwrap() = found(vec![sound("/dev/sda", "disk")]);
        once(&client, "/hosts", |hosts| hosts[0]["connected"] == true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn process_servers_are_listed_with_their_volume_and_whoever_reads_may_see_them() {
    let mut site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    let client = site.client();
    let servers = once(&client, "/process-servers", |servers| servers[0]["volume"].is_object()).await;
    let server = &servers[0];
    assert_eq!(server["volume"], json!({ "bytes": 10u64 << 30, "free_bytes": 4u64 << 30 }));
    assert_eq!((&server["name"], &server["address"]), (&json!("fake-process-server"), &json!("127.0.0.1:1")));
    assert_eq!(
        (&server["approval"], &server["connected"], &server["version"]),
        (&json!("approved"), &json!(true), &json!("test"))
    );
    assert_eq!(server["machines"], json!(["web"]));
    let id = server["id"].as_str().unwrap().to_owned();
    let by_name = client.get("/process-servers/fake-process-server").await.unwrap();
    assert_eq!(
        (&by_name["id"], &client.get(&format!("/process-servers/{id}")).await.unwrap()["name"]),
        (&json!(id), &server["name"])
    );
    assert_eq!(raw(&site, "GET", "/process-servers/nobody", &[], "").await.0, 404);

    client.post("/users", &json!({ "name": "eve", "role": "reader" })).await.unwrap();
    let token = client.post("/tokens", &json!({ "user": "eve" })).await.unwrap()["token"].as_str().unwrap().to_owned();
    let file = site.top.path().join("token");
    File::create(&file).unwrap().write_all(token.as_bytes()).unwrap();
    let api = site.folder.config_server().unwrap().unwrap().api;
    let reader = Client::new(&format!("https://{api}"), &file, &site.folder.ca_file()).unwrap();
    for path in ["/hosts", "/hosts/fake-agent", "/disks", "/process-servers", &format!("/process-servers/{id}")] {
        reader.get(path).await.unwrap();
    }

    drop(site.server.take());
    let gone = once(&client, &format!("/process-servers/{id}"), |server| server["connected"] == false).await;
    assert!(gone["volume"].is_null() && gone["last_seen"].is_string() && gone["stored_bytes"].is_null(), "{gone}");
    let identity = format!("tidemark://process-server/{id}");
    client.post(&format!("/identities/{}/revoke", tidemark::client::escape(&identity)), &json!({})).await.unwrap();
    assert_eq!(client.get(&format!("/process-servers/{id}")).await.unwrap()["approval"], "revoked");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shows_hosts_disks_and_process_servers() {
    let site = Site::start().await;
    let way = DiskWay { via: "bpf".into(), obstacle: String::new() };
    let free = HostDisk { ways: vec![way], ..sound("/dev/sdb", "disk") };
    *site.agent().inventory.lock().unwrap() = found(vec![free]);
    let disk = site.disk("a.img", 1 << 20);
    site.protect("web", &[&disk]).await.unwrap();
    once(&site.client(), "/disks", |disks| disks.as_array().unwrap().len() == 2).await;
    once(&site.client(), "/process-servers", |servers| servers[0]["volume"].is_object()).await;
    for (arguments, parts) in [
        (&["host", "list"][..], &["HOST", "fake-agent", "approved", "web"][..]),
        (&["host", "show", "fake-agent"], &["/dev/sdb", "a.img", "possible: bpf"]),
        (&["disk", "list"], &["/dev/sdb", "a.img", "web", "1.0 GiB"]),
        (&["disk", "list", "--unprotected", "--host", "fake-agent"], &["/dev/sdb", "possible: bpf"]),
        (&["process-server", "list"], &["fake-process-server", "approved", "4.0 GiB", "10.0 GiB", "web"]),
        (&["process-server", "show", "fake-process-server"], &["127.0.0.1:1"]),
    ] {
        let output = site.run(arguments).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        for part in parts {
            assert!(text.contains(part), "{arguments:?}: {part} in {text}");
        }
        let output = site.run(&[arguments, &["--json"]].concat()).await;
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(json.is_array() || json.is_object(), "{json}");
    }
    let output = site.run(&["disk", "list", "--unprotected"]).await;
    assert!(!String::from_utf8_lossy(&output.stdout).contains("a.img"));
    site.refused(&["disk", "list", "--host", "nobody"], "nobody").await;
    site.refused(&["host", "show", "nobody"], "nobody").await;
    site.refused(&["process-server", "show", "nobody"], "nobody").await;
}
