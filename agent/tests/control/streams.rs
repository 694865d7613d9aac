//! What the control streams carry and refuse, and how health is told.

use std::sync::atomic::{AtomicU64, Ordering};

use tidemark::roles::{agent, process_server};
use tidemark_nbd::client::Client as NbdClient;
use tidemark_proto::control::wire::{self, control_client::ControlClient};
use tidemark_proto::health::wire::HealthCheckRequest;
use tidemark_proto::health::wire::health_check_response::ServingStatus;
use tidemark_proto::health::wire::health_client::HealthClient;
use tidemark_transport::Expected;
use tokio::net::{TcpListener, TcpStream};

use super::*;

const DISK_BYTES: usize = 24 << 20;

/// Passes everything on to `target`, and counts it.
async fn counting(target: std::net::SocketAddr) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let counted = Arc::new(AtomicU64::new(0));
    let counter = counted.clone();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let counter = counter.clone();
            tokio::spawn(async move {
                let Ok(mut to) = TcpStream::connect(target).await else { return };
                let (mut from_read, mut from_write) = from.split();
                let (mut to_read, mut to_write) = to.split();
                let up = pass(&mut from_read, &mut to_write, &counter);
                let down = pass(&mut to_read, &mut from_write, &counter);
                tokio::join!(up, down);
            });
        }
    });
    (address, counted)
}

async fn pass(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    counter: &AtomicU64,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = vec![0; 64 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..bytes]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// Bytes that nothing compresses.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(next).flat_map(u64::to_le_bytes).take(bytes).collect()
}

fn stored(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(of) if of.is_dir() => stored(&entry.path()),
        Ok(of) => std::os::unix::fs::MetadataExt::blocks(&of) * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_data_passes_through_the_configuration_server_and_replication_goes_on_without_it() {
    let top = tempfile::tempdir().unwrap();
    let folder = Folder::create(&top.path().join("site")).unwrap();
    let mut running = Some(config_server::start(&folder, Settings::default()).await.unwrap());
    let (through, counted) = counting(running.as_ref().unwrap().addresses.control).await;
    let place = |role| {
        let mut place = Place::in_folder(&folder, role).unwrap();
        let through = through.clone();
        place.config_server = Arc::new(move || Some(through.clone()));
        place
    };
    let process_server = process_server::start(place(Role::ProcessServer)).await.unwrap();
    let agent = agent::start(place(Role::Agent)).await.unwrap();
    tokio::time::timeout(SOON, running.as_ref().unwrap().server.wait_settled(2)).await.unwrap();
    let path = top.path().join("disk.img");
    let mut content = noise(1, DISK_BYTES);
    File::create(&path).unwrap().write_all(&content).unwrap();
    let client = Client::of_folder(folder.path()).unwrap();
    let job = client.post("/machines", &json!({ "name": "web", "disks": [path] })).await.unwrap();
    let protected = client.finish(job, |_| {}).await.unwrap();
    let nbd = protected["disks"][0]["attach"]["nbd"].as_str().unwrap().to_owned();
    let (export, socket) = nbd.strip_prefix("nbd+unix:///").unwrap().split_once("?socket=").unwrap();
    let (export, socket) = (export.to_owned(), PathBuf::from(socket));
    let point = || async {
        let job = client.post("/machines/web/points", &json!({})).await.unwrap();
        client.finish(job, |_| {}).await.unwrap()
    };
    point().await;
    let replicas = folder.path().join("process-server/replicas");
    assert!(stored(&replicas) >= DISK_BYTES as u64, "the data is at the process server");
    let passed = counted.load(Ordering::Relaxed);
    assert!(passed > 1000, "both dial through what counts");
    assert!(passed < DISK_BYTES as u64 / 20, "{passed} bytes passed through the configuration server");

    // It is away: what the guest writes arrives all the same.
    running.take().unwrap().server.stop().await;
    let before = stored(&replicas);
    let written = noise(2, DISK_BYTES / 2);
    content[..written.len()].copy_from_slice(&written);
    tokio::task::spawn_blocking(move || {
        let mut guest = NbdClient::connect_unix(&socket, &export).unwrap();
        for (index, block) in written.chunks(256 << 10).enumerate() {
            guest.write((index * (256 << 10)) as u64, block).unwrap();
        }
        guest.flush().unwrap();
        guest.close().unwrap();
    })
    .await
    .unwrap();
    until("what was written arriving without a configuration server", || {
        stored(&replicas) >= before + DISK_BYTES as u64 / 2 - (1 << 20)
    })
    .await;
    let config_server = config_server::start(&folder, Settings::default()).await.unwrap();
    tokio::time::timeout(SOON, config_server.server.wait_settled(2)).await.unwrap();
    point().await;
    let image = top.path().join("image.raw");
    let job =
        client.post("/machines/web/points/latest/export", &json!({ "to": image, "format": "raw" })).await.unwrap();
    client.finish(job, |_| {}).await.unwrap();
    assert!(std::fs::read(&image).unwrap() == content);
    agent.stop().await;
    process_server.stop().await;
    config_server.server.stop().await;
}

/// Says who it is over a real connection, with this protocol version.
async fn register_with(site: &Site, version: u32) -> tonic::Status {
    let place = site.agent.as_ref().unwrap();
    let control = site.folder.config_server().unwrap().unwrap().control.to_string();
    let expected = Expected::Role(Role::ConfigServer);
    let channel = tidemark_transport::connect(&control, expected, &place.place.identity).await.unwrap();
    let mut register = wire::Register::from(&place.fake.register);
    register.version = version;
    let up = wire::Up { body: Some(wire::up::Body::Register(register)) };
    match ControlClient::new(channel).connect(tokio_stream::iter([up])).await {
        Ok(answer) => answer.into_inner().message().await.expect_err("a refusal"),
        Err(status) => status,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_protocol_is_refused_by_name_and_health_is_told_to_all_that_ask() {
    let site = Site::start().await;
    let identity = site.agent.as_ref().unwrap().place.identity.peer().to_string();
    for version in [0, 2, 99] {
        let refused = register_with(&site, version).await;
        let text = refused.message();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
        let parts = [identity.as_str(), "fake-agent", "version 1", &format!("version {version}"), "run versions"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let connected = site.client().get("/peers").await.unwrap()["connected"].clone();
    assert_eq!(connected.as_array().unwrap().len(), 2, "the good stream goes on");

    let control = site.folder.config_server().unwrap().unwrap().control.to_string();
    let place = &site.server.as_ref().unwrap().place;
    let expected = Expected::Role(Role::ConfigServer);
    let channel = tidemark_transport::connect(&control, expected, &place.identity).await.unwrap();
    let mut health = HealthClient::new(channel);
    for service in ["", "tidemark.control.v1.Control"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status(), ServingStatus::Serving, "{service}");
    }
    let api = site.folder.config_server().unwrap().unwrap().api;
    let authority = rustls_pki_types_pem(&std::fs::read(site.folder.ca_file()).unwrap());
    for (path, status) in [("/health", "ok"), ("/ready", "ready"), ("/api/v1/ready", "ready")] {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let tls = tidemark_transport::tls::api_client(&authority).unwrap();
        let mut stream = tidemark_transport::client::dial(&api.to_string(), tls).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {api}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&format!("{status:?}")), "{path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_followed_as_they_change() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let site = Site::start().await;
    let api = site.folder.config_server().unwrap().unwrap().api;
    let authority = rustls_pki_types_pem(&std::fs::read(site.folder.ca_file()).unwrap());
    let tls = tidemark_transport::tls::api_client(&authority).unwrap();
    let stream = tidemark_transport::client::dial(&api.to_string(), tls).await.unwrap();
    let (reader, mut writer) = tokio::io::split(stream);
    let token = site.folder.token().unwrap();
    let request = format!("GET /api/v1/jobs/stream HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\n\r\n");
    writer.write_all(request.as_bytes()).await.unwrap();
    let mut lines = BufReader::new(reader).lines();
    let mut states = Vec::new();
    let reading = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.is_empty() {
                break;
            }
        }
        // It is followed now: what begins is seen from its begin.
        let disk = site.disk("a.img", 1 << 20);
        site.client().post("/machines", &json!({ "name": "web", "disks": [disk] })).await.unwrap();
        loop {
            let line = lines.next_line().await.unwrap().expect("the stream goes on");
            if let Some(job) = line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok()) {
                states.push((job["steps"].as_array().unwrap().len(), job["state"].as_str().unwrap().to_owned()));
                if job["state"] != "running" {
                    break;
                }
            }
        }
    };
    tokio::time::timeout(SOON, reading).await.unwrap();
    assert_eq!(states.first().unwrap(), &(0, "running".to_owned()));
    assert_eq!(states.last().unwrap().1, "succeeded");
    assert!(states.windows(2).all(|pair| pair[0].0 <= pair[1].0) && states.len() >= 4, "{states:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_how_far_the_process_server_is() {
    let site = Site::start().await;
    site.protect("web", &[&site.disk("a.img", 1 << 20)]).await.unwrap();
    let go_on = Arc::new(tokio::sync::Notify::new());
    *site.server().halfway.lock().unwrap() = Some(go_on.clone());
    let client = site.client();
    let body = json!({ "to": site.top.path().join("out.img"), "format": "raw" });
    let job = client.post("/machines/web/points/latest/export", &body).await.unwrap();
    let path = format!("/jobs/{}", job["id"].as_str().unwrap());
    let half = json!({ "done_bytes": 40, "total_bytes": 100 });
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let waiting = async {
        while client.get(&path).await.unwrap()["progress"] != half {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(SOON, waiting).await.expect("the job says how far it is");
    go_on.notify_one();
    client.finish(job, |_| {}).await.unwrap();
}
