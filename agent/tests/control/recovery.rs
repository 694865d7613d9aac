//! The configuration server is lost: it is restored elsewhere, and everybody comes back.

use tidemark::roles::{agent, process_server};
use tidemark_config_server::database::{Database, DatabaseSetting, Statement};
use tidemark_process_server::offline;
use tidemark_process_server::points::PointSelector;
use tidemark_transport::recovery::RecoveryKey;

use super::*;

/// Real roles, each with its own part of one folder; the configuration server can be another folder's.
struct Whole {
    top: TempDir,
    folder: Folder,
    key: RecoveryKey,
    config_server: Option<RunningConfigServer>,
    agent: Option<agent::RunningAgent>,
    process_server: Option<process_server::RunningProcessServer>,
}

async fn settled(server: &RunningConfigServer, peers: usize, what: &str) {
    tokio::time::timeout(SOON, server.server.wait_settled(peers)).await.unwrap_or_else(|_| panic!("{what}"));
}

async fn finished(client: &Client, path: &str, body: Value) -> Value {
    let job = client.post(path, &body).await.unwrap();
    client.finish(job, |_| {}).await.unwrap()
}

impl Whole {
    async fn start() -> Self {
        let top = tempfile::tempdir().unwrap();
        let folder = Folder::create(&top.path().join("site")).unwrap();
        let key = config_server::new_recovery_key(&folder).unwrap();
        let config_server = Some(config_server::start(&folder, Settings::default()).await.unwrap());
        let mut whole = Self { top, folder, key, config_server, agent: None, process_server: None };
        whole.start_process_server().await;
        whole.agent = Some(agent::start(Place::in_folder(&whole.folder, Role::Agent).unwrap()).await.unwrap());
        settled(whole.config_server.as_ref().unwrap(), 2, "both connect").await;
        whole
    }

    async fn start_process_server(&mut self) {
        let place = Place::in_folder(&self.folder, Role::ProcessServer).unwrap();
        self.process_server = Some(process_server::start(place).await.unwrap());
    }

    fn client(&self) -> Client {
        Client::of_folder(self.folder.path()).unwrap()
    }

    /// A protected disk with some content and a point of it.
    async fn protect(&self) -> Vec<u8> {
        let content: Vec<u8> = (0..1 << 20).map(|byte: u32| (byte / 4096) as u8).collect();
        let path = self.top.path().join("disk.img");
        File::create(&path).unwrap().write_all(&content).unwrap();
        let client = self.client();
        finished(&client, "/machines", json!({ "name": "web", "disks": [path] })).await;
        finished(&client, "/machines/web/points", json!({})).await;
        content
    }

    /// The newest backup that the process server keeps.
    fn kept(&self) -> PathBuf {
        let folder = self.folder.path().join("process-server/config-backups");
        let mut names: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.retain(|path| path.extension().is_some_and(|end| end == "tidemark"));
        names.sort();
        names.pop().expect("the process server keeps a backup")
    }

    async fn restored(&self) -> Folder {
        let folder = Folder::create(&self.top.path().join("elsewhere")).unwrap();
        let sealed = std::fs::read(self.kept()).unwrap();
        let key = RecoveryKey::parse(&self.key.text()).unwrap();
        config_server::restore(&folder, &Settings::default(), sealed, key).await.unwrap();
        folder
    }

    async fn stop(mut self) {
        if let Some(agent) = self.agent.take() {
            agent.stop().await;
        }
        if let Some(server) = self.process_server.take() {
            server.stop().await;
        }
        if let Some(server) = self.config_server.take() {
            server.server.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_configuration_server_is_restored_at_another_address_and_everybody_comes_back() {
    let mut whole = Whole::start().await;
    whole.protect().await;
    let made = finished(&whole.client(), "/backups", json!({})).await;
    assert_eq!(made["process_servers"].as_array().unwrap().len(), 1, "{made}");
    assert!(made["not_kept_by"].as_array().unwrap().is_empty());
    let client = whole.client();
    let sealed = client.download(&format!("/backups/{}", made["id"].as_str().unwrap())).await.unwrap();
    assert!(sealed == std::fs::read(whole.kept()).unwrap(), "the same is kept there");
    let jobs = client.get("/jobs").await.unwrap();
    assert!(jobs.as_array().unwrap().iter().any(|job| job["kind"] == "backup" && job["state"] == "succeeded"));

    // The host is gone, with everything on it; the backup comes from the process server.
    let before = whole.config_server.as_ref().unwrap().addresses;
    let points = client.get("/machines/web/points").await.unwrap();
    whole.config_server.take().unwrap().server.stop().await;
    let elsewhere = whole.restored().await;
    let key = RecoveryKey::parse(&whole.key.text()).unwrap();
    let again = config_server::restore(&elsewhere, &Settings::default(), sealed, key).await.err().unwrap();
    assert!(again.message.contains("already"), "nothing in use is written over: {}", again.message);
    let restored = config_server::start(&elsewhere, Settings::default()).await.unwrap();
    assert_ne!(restored.addresses.control, before.control);
    settled(&restored, 2, "agent and process server find the restored server").await;
    let client = Client::of_folder(elsewhere.path()).unwrap();
    let mut status = Value::Null;
    for _ in 0..50 {
        status = client.get("/machines/web").await.unwrap();
        if status["state"] == "protected" && status["health"] == "ok" {
            break;
        }
    }
    assert_eq!((&status["state"], &status["health"]), (&json!("protected"), &json!("ok")), "{status}");
    let kept = client.get("/machines/web/points").await.unwrap();
    let kept: Vec<&Value> = kept.as_array().unwrap().iter().map(|point| &point["id"]).collect();
    assert!(points.as_array().unwrap().iter().all(|point| kept.contains(&&point["id"])), "no point went");
    let point = finished(&client, "/machines/web/points", json!({})).await;
    assert_eq!(point["consistency"], "crash");
    let events = client.get("/events?limit=1000").await.unwrap();
    let has = |events: &Value, kind: &str| events.as_array().unwrap().iter().any(|event| event["kind"] == kind);
    assert!(has(&events, "configuration_restored"));
    assert!(!has(&events, "resync_started"), "nothing is compared or sent again for it");

    // The old one comes up again: nobody takes it, and it says so.
    let old = config_server::start(&whole.folder, Settings::default()).await.unwrap();
    let client = whole.client();
    let told = async {
        loop {
            let events = client.get("/events?severity=critical").await.unwrap();
            if has(&events, "superseded") {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, told).await.expect("the old one hears that it was superseded");
    let peers = client.get("/peers").await.unwrap();
    assert_eq!(peers["connected"], json!([]), "both stay with the restored one");
    old.server.stop().await;
    whole.config_server = Some(restored);
    whole.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_lowers_no_generation_and_says_which_machine_was_failed_over() {
    let mut whole = Whole::start().await;
    let content = whole.protect().await;
    finished(&whole.client(), "/backups", json!({})).await;
    whole.config_server.take().unwrap().server.stop().await;
    whole.process_server.take().unwrap().stop().await;

    // No configuration server is left: the machine is failed over with the recovery key.
    let root = whole.folder.path().join("process-server");
    let image = whole.top.path().join("recovered.raw");
    let done = offline::failover(&root, Some("web"), PointSelector::Latest, &[], None, &whole.key).unwrap();
    done.export(&image, &tidemark_base::stop::Stop::new()).unwrap();
    assert!(std::fs::read(&image).unwrap() == content);
    let generation = done.record.disks.values().next().unwrap().generation;
    drop(done);

    // Then a configuration server is restored that knows nothing of that.
    let elsewhere = whole.restored().await;
    whole.start_process_server().await;
    whole.config_server = Some(config_server::start(&elsewhere, Settings::default()).await.unwrap());
    settled(whole.config_server.as_ref().unwrap(), 2, "both come back").await;
    let client = Client::of_folder(elsewhere.path()).unwrap();
    let critical = async {
        loop {
            let status = client.get("/machines/web").await.unwrap();
            let told = status["reasons"].to_string() + &status["problems"].to_string();
            if status["health"] == "critical" && told.contains(&format!("generation {generation}")) {
                break;
            }
        }
    };
    tokio::time::timeout(SOON, critical).await.expect("the machine's status says why");
    let authorised = std::fs::read_to_string(root.join("authorisations.json")).unwrap();
    assert!(authorised.contains(&format!("\"generation\": {}", generation.0)), "{authorised}");
    let records = || offline::records(tidemark_base::storage::RealStorage::open_folder(&root)).unwrap().len();
    assert_eq!(records(), 1);

    // What cannot work says so at once, and how the source goes on, where that is what is wanted.
    let job = client.post("/machines/web/resync", &json!({})).await.unwrap();
    let refused = client.finish(job, |_| {}).await.unwrap_err();
    assert!(refused.help().contains("tidemark failover cancel"), "{refused}");
    let taken_back = finished(&client, "/machines/web/failover/cancel", json!({})).await;
    assert_eq!((&taken_back["source"], records()), (&json!("goes on"), 0), "{taken_back}");
    assert!(taken_back["by_recovery_key"]["point_time"].is_string(), "{taken_back}");
    let protected = async {
        loop {
            let status = client.get("/machines/web").await.unwrap();
            if status["state"] == "protected" && status["health"] == "ok" {
                break;
            }
        }
    };
    tokio::time::timeout(SOON, protected).await.expect("it is protected again");
    assert_eq!(finished(&client, "/machines/web/points", json!({})).await["consistency"], "crash");
    assert!(client.post("/machines/web/failover/cancel", &json!({})).await.is_err(), "there is none any more");
    whole.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_by_the_recovery_key_is_one_alert_with_one_remedy() {
    let mut whole = Whole::start().await;
    let client = whole.client();
    // Soon the RPO is over its limit as well.
    client.post("/policies", &json!({ "name": "strict", "alarm_rpo_seconds": 1 })).await.unwrap();
    let disks = ["a.img", "b.img"].map(|name| whole.top.path().join(name));
    disks.iter().for_each(|disk| File::create(disk).unwrap().set_len(1 << 20).unwrap());
    finished(&client, "/machines", json!({ "name": "web", "disks": disks, "policy": "strict" })).await;
    finished(&client, "/machines/web/points", json!({})).await;
    finished(&client, "/backups", json!({})).await;
    whole.process_server.take().unwrap().stop().await;
    let root = whole.folder.path().join("process-server");
    drop(offline::failover(&root, Some("web"), PointSelector::Latest, &[], None, &whole.key).unwrap());
    whole.start_process_server().await;

    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    let (mut alike, mut last) = (0, Value::Null);
    let looking = async {
        // For longer than a look, a cycle and the limit of the RPO.
        while alike < 30 {
            ticks.tick().await;
            last = client.get("/alerts").await.unwrap();
            let is_one = last.as_array().is_some_and(|all| all.len() == 1 && all[0]["kind"] == "taken_over");
            alike = if is_one { alike + 1 } else { 0 };
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(90), looking).await;
    assert!(found.is_ok(), "one cause is one alert: {last:#}");
    let (message, help) = (last[0]["message"].as_str().unwrap(), last[0]["help"].as_str().unwrap());
    assert!(message.contains("with the recovery key") && message.contains("generation 2"), "{message}");
    assert!(help.contains("`tidemark failover cancel web`") && last[0]["severity"] == "critical", "{help}");
    let status = client.get("/machines/web").await.unwrap();
    assert_eq!(status["problems"].as_array().unwrap().len(), 1, "{status:#}");

    finished(&client, "/machines/web/failover/cancel", json!({})).await;
    let over = async {
        while client.get("/alerts").await.unwrap() != json!([]) {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, over).await.expect("and it is over");

    // The other way: what was recovered goes on, and the source stays off.
    whole.process_server.take().unwrap().stop().await;
    drop(offline::failover(&root, Some("web"), PointSelector::Latest, &[], None, &whole.key).unwrap());
    whole.start_process_server().await;
    let again = async {
        while client.get("/alerts").await.unwrap()[0]["kind"] != "taken_over" {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, again).await.expect("it is told again");
    let job = client.request(hyper::Method::DELETE, "/machines/web", None).await.unwrap();
    client.finish(job, |_| {}).await.unwrap();
    assert_eq!(client.get("/machines").await.unwrap(), json!([]));
    assert_eq!(client.get("/replicas").await.unwrap().as_array().unwrap().len(), 1, "with the point that it went to");
    whole.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_protects_nothing_finds_the_restored_configuration_server_as_well() {
    let mut whole = Whole::start().await;
    let told = whole.folder.path().join("agent/process-servers-known.json");
    until("it is told of the process server", || {
        std::fs::read_to_string(&told).is_ok_and(|told| told.contains("address"))
    })
    .await;
    finished(&whole.client(), "/backups", json!({})).await;
    whole.config_server.take().unwrap().server.stop().await;
    let elsewhere = whole.restored().await;
    let restored = config_server::start(&elsewhere, Settings::default()).await.unwrap();
    settled(&restored, 2, "the process server, and the host without a machine, find it").await;
    whole.config_server = Some(restored);
    whole.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_nobody_can_tell_are_named_when_it_is_restored() {
    let mut whole = Whole::start().await;
    let sealed = |whole: &Whole| {
        let id = |made: &Value| made["id"].as_str().unwrap().to_owned();
        let client = whole.client();
        async move {
            let made = finished(&client, "/backups", json!({})).await;
            client.download(&format!("/backups/{}", id(&made))).await.unwrap()
        }
    };
    let with_server = sealed(&whole).await;
    let untold = async |whole: &Whole, folder: &str, sealed: Vec<u8>| {
        let folder = Folder::create(&whole.top.path().join(folder)).unwrap();
        let key = RecoveryKey::parse(&whole.key.text()).unwrap();
        config_server::restore(&folder, &Settings::default(), sealed, key).await.unwrap().hosts_untold
    };
    assert!(untold(&whole, "first", with_server).await.is_empty());
    // As one that has no process server.
    whole.process_server.take().unwrap().stop().await;
    whole.config_server.take().unwrap().server.stop().await;
    let setting = DatabaseSetting::Sqlite(whole.folder.path().join("config-server/config.db"));
    let database = Database::open(&setting).unwrap();
    database.write(vec![Statement::new("DELETE FROM process_servers", [])]).unwrap();
    database.close();
    whole.config_server = Some(config_server::start(&whole.folder, Settings::default()).await.unwrap());
    settled(whole.config_server.as_ref().unwrap(), 1, "the agent comes back").await;
    let without = sealed(&whole).await;
    assert_eq!(untold(&whole, "second", without).await, [tidemark::roles::plain_host_name()]);
    whole.stop().await;
}

/// Asks often.
struct Asking {
    register: tidemark_proto::control::Register,
    neighbours: Vec<(tidemark_base::ServerId, String)>,
}

#[tonic::async_trait]
impl Handler for Asking {
    fn register(&self) -> tidemark_proto::control::Register {
        self.register.clone()
    }

    async fn execute(&self, command: Command) -> Result<Reply, Failure> {
        match command {
            Command::Agent(AgentCommand::Status) => {
                Ok(Reply::Agent(AgentReport { time: Timestamp(1), disks: Vec::new() }))
            }
            _ => Ok(Reply::Done),
        }
    }

    fn neighbours(&self) -> Vec<(tidemark_base::ServerId, String)> {
        self.neighbours.clone()
    }

    fn ask_neighbours_every(&self) -> std::time::Duration {
        std::time::Duration::from_millis(200)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_leaves_a_configuration_server_that_lives_on_beside_the_restored_one_and_late_backups_are_kept() {
    let mut whole = Whole::start().await;
    whole.agent.take().unwrap().stop().await;
    finished(&whole.client(), "/backups", json!({})).await;
    // A backup that is made while the process server is away comes to it all the same.
    let first = whole.kept();
    whole.process_server.take().unwrap().stop().await;
    let made = finished(&whole.client(), "/backups", json!({})).await;
    assert!(made["process_servers"].as_array().unwrap().is_empty(), "{made}");
    whole.start_process_server().await;
    let kept = async {
        while whole.kept() == first {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, kept).await.expect("it is given the newest backup");
    assert!(whole.kept().ends_with(made["id"].as_str().unwrap()));

    let elsewhere = whole.restored().await;
    let place = Place::in_folder(&whole.folder, Role::Agent).unwrap();
    let PeerIdentity::Agent(id) = place.identity.peer() else { panic!("an agent") };
    let peers = whole.client().get("/peers").await.unwrap();
    let (server, place_of_it) = peers["process_servers"].as_object().unwrap().iter().next().unwrap();
    let asking = Asking {
        register: tidemark_proto::control::Register {
            peer: Peer::Agent { id },
            name: "host".into(),
            software: "0.1.0".into(),
            boot: String::new(),
            instance: None,
            time: None,
        },
        neighbours: vec![(server.parse().unwrap(), place_of_it["address"].as_str().unwrap().to_owned())],
    };
    let stop = CancellationToken::new();
    let link =
        link::run(place.identity.clone(), place.config_server.clone(), Arc::new(asking), place.kept(), stop.clone());
    let link = tokio::spawn(link);
    settled(whole.config_server.as_ref().unwrap(), 2, "both are with the old one").await;
    // The old one stays where it is, and answers.
    let restored = config_server::start(&elsewhere, Settings::default()).await.unwrap();
    settled(&restored, 2, "both leave the old one for the restored one").await;
    stop.cancel();
    link.await.unwrap();
    restored.server.stop().await;
    whole.stop().await;
}
