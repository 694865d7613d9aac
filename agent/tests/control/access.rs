//! Who may use the API, what it keeps of its secrets, and what it says to requests that make no sense.

use tidemark_base::storage::RealStorage;
use tidemark_config_server::backup;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::*;

const DATABASE: &str = "config-server/config.db";
const AUTHORITY: &str = "authority/authority.pem";
const ASIDE: &str = "aside";

/// As somebody who has this token.
fn client_with(site: &Site, name: &str, token: &str) -> Client {
    let file = site.top.path().join(name);
    File::create(&file).unwrap().write_all(token.as_bytes()).unwrap();
    let api = site.folder.config_server().unwrap().unwrap().api;
    Client::new(&format!("https://{api}"), &file, &site.folder.ca_file()).unwrap()
}

/// Makes a user with a token, which is answered.
async fn user(site: &Site, name: &str, role: &str) -> String {
    let admin = site.client();
    admin.post("/users", &json!({ "name": name, "role": role })).await.unwrap();
    let made = admin.post("/tokens", &json!({ "user": name })).await.unwrap();
    made["token"].as_str().unwrap().to_owned()
}

fn status_of(outcome: Result<Value, ClientError>) -> (u16, String) {
    match outcome {
        Err(ClientError::Refused { status, message, help }) => {
            assert!(!help.is_empty(), "{message}");
            (status, format!("{message}; {help}"))
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_in_the_first_answer_and_nowhere_else() {
    let mut site = Site::start().await;
    site.client().post("/users", &json!({ "name": "ci", "role": "reader" })).await.unwrap();
    let mut secrets = Vec::new();
    for (path, body, field) in
        [("/tokens", r#"{"user":"ci"}"#, "token"), ("/passphrases", r#"{"role":"agent"}"#, "passphrase")]
    {
        let key = [("Idempotency-Key", field)];
        let (status, head, first) = raw(&site, "POST", path, &key, body).await;
        assert_eq!((status, header(&head, "cache-control").as_str()), (200, "no-store"), "{first}");
        secrets.push(first[field].as_str().unwrap().to_owned());
        let (status, head, again) = raw(&site, "POST", path, &key, body).await;
        assert_eq!((status, header(&head, "idempotency-replayed").as_str()), (409, "true"), "{again}");
        let (error, help) = (again["error"].as_str().unwrap(), again["help"].as_str().unwrap());
        assert!(error.contains("shown once") && help.contains(first["id"].as_str().unwrap()), "{again}");
        assert_eq!(site.client().get(path).await.unwrap().as_array().unwrap().len(), 1, "it was made once");
    }
    site.stop_config_server().await;
    let own = site.folder.path().join("config-server");
    for name in ["config.db", "config.db-wal"] {
        let content = std::fs::read(own.join(name)).unwrap_or_default();
        for secret in &secrets {
            let found = content.windows(secret.len()).any(|part| part == secret.as_bytes());
            assert!(!found, "{name} has a secret in plain text");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_token_or_its_user_goes() {
    let site = Site::start().await;
    let api = site.folder.config_server().unwrap().unwrap().api;
    let authority = rustls_pki_types_pem(&std::fs::read(site.folder.ca_file()).unwrap());
    for (path, name, gone) in [("/events/stream", "one", "/tokens/"), ("/jobs/stream", "two", "/users/two")] {
        let token = user(&site, name, "reader").await;
        let tls = tidemark_transport::tls::api_client(&authority).unwrap();
        let stream = tidemark_transport::client::dial(&api.to_string(), tls).await.unwrap();
        let (reader, mut writer) = tokio::io::split(stream);
        let request = format!(
            "GET /api/v1{path} HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        writer.write_all(request.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(reader).lines();
        assert!(lines.next_line().await.unwrap().unwrap().contains("200"));
        let listed = site.client().get("/tokens").await.unwrap();
        let id = listed.as_array().unwrap().iter().find(|of| of["user"] == name).unwrap()["id"].clone();
        let gone = if gone == "/tokens/" { format!("/tokens/{}", id.as_str().unwrap()) } else { gone.to_owned() };
        site.client().request(hyper::Method::DELETE, &gone, None).await.unwrap();
        // What happens from now on is not told.
        site.agent().news.lock().unwrap().push(draft("secret"));
        let _ = site.job("/machines/none/points", json!({})).await;
        let reading = async {
            while let Ok(Some(line)) = lines.next_line().await {
                assert!(!line.contains("secret"), "{line}");
            }
        };
        tokio::time::timeout(SOON, reading).await.unwrap_or_else(|_| panic!("{path} goes on"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_of_the_first_set_up_is_replaced_and_its_user_stays() {
    let mut site = Site::start().await;
    site.stop_config_server().await;
    let key = config_server::new_recovery_key(&site.folder).unwrap();
    site.start_config_server().await;
    let first = client_with(&site, "first", &site.folder.token().unwrap());
    let listed = first.get("/users").await.unwrap();
    assert!(listed[0]["name"] == "admin" && listed[0]["note"].as_str().unwrap().contains("first set-up"), "{listed}");
    let (status, said) = status_of(first.request(hyper::Method::DELETE, "/users/admin", None).await);
    assert!(status == 409 && said.contains("rotate-token"), "{said}");
    let role = json!({ "role": "reader" });
    assert_eq!(status_of(first.request(hyper::Method::PUT, "/users/admin", Some(&role)).await).0, 409);
    let operator = client_with(&site, "operator", &user(&site, "op", "operator").await);
    assert_eq!(status_of(operator.post("/token-file/rotate", &json!({})).await).0, 403);

    // While it runs: refused when the command ends.
    let dir = site.folder.path().to_str().unwrap().to_owned();
    let rotate = ["config-server", "rotate-token", "--dir", &dir];
    let output = site.run(&rotate).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(status_of(first.get("/users").await).0, 401);
    let second = client_with(&site, "second", &site.folder.token().unwrap());
    second.get("/users").await.unwrap();
    // Backups hold the one that is good.
    let made = site.job("/backups", json!({})).await.unwrap();
    let sealed = second.download(&format!("/backups/{}", made["id"].as_str().unwrap())).await.unwrap();
    assert_eq!(backup::open(&key, &sealed).unwrap().1.token, site.folder.token().unwrap());

    // While it does not run.
    site.stop_config_server().await;
    assert!(site.run(&rotate).await.status.success());
    site.start_config_server().await;
    assert_eq!(status_of(client_with(&site, "second", "x").get("/users").await).0, 401);
    assert_eq!(status_of(second.get("/users").await).0, 401);
    site.client().get("/users").await.unwrap();
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(site.folder.token_file()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_is_looked_at_or_refused() {
    let site = Site::start().await;
    let (_, head, _) = raw(&site, "POST", "/policies", &[], r#"{"name":"gold"}"#).await;
    let tag = header(&head, "etag");
    for (method, path, body) in [
        ("PUT", "/users/op", r#"{"role":"reader"}"#),
        ("DELETE", "/users/op", ""),
        ("POST", "/machines/web/pause", ""),
        ("PUT", "/groups/all/machines/web", ""),
        ("POST", "/policies", r#"{"name":"silver"}"#),
    ] {
        let (status, _, refused) = raw(&site, method, path, &[("If-Match", &tag)], body).await;
        assert!(status == 400 && refused["error"].as_str().unwrap().contains("If-Match"), "{path}: {refused}");
    }
    assert_eq!(site.client().get("/policies").await.unwrap().as_array().unwrap().len(), 2, "nothing was done");
    let weak = format!("W/{tag}");
    let patch = async |tag: &str, level: u8| {
        let body = format!(r#"{{"compression":{level}}}"#);
        raw(&site, "PATCH", "/policies/gold", &[("If-Match", tag)], &body).await.0
    };
    assert_eq!(patch(&weak, 3).await, 412, "weak tags match nothing");
    assert_eq!(patch("\"gold\"", 3).await, 412);
    assert_eq!(patch(&format!("\"77\", {tag}"), 3).await, 200);
    assert_eq!(patch(&format!("\"77\", {tag}"), 4).await, 412, "it was changed");
    assert_eq!(patch("*", 4).await, 200);
    let document = site.client().get("/openapi.json").await.unwrap();
    let is_told = |path: &str, method: &str| {
        let parameters = document["paths"][path][method]["parameters"].as_array().cloned().unwrap_or_default();
        parameters.iter().any(|parameter| parameter["name"] == "If-Match")
    };
    for (path, method) in [("/policies/{name}", "patch"), ("/machines/{name}", "delete"), ("/plans/{name}", "put")] {
        assert!(is_told(path, method), "{method} {path}");
    }
    assert!(!is_told("/users/{name}", "put") && !is_told("/policies/{name}", "get"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_the_same_shape() {
    let site = Site::start().await;
    // One byte more than is taken.
    let long = "x".repeat((2 << 20) + 1);
    for (method, path, body, expected) in [
        ("POST", "/policies", long.as_str(), 413),
        ("GET", "/machines/%FF", "", 400),
        ("GET", "/events?after=x", "", 400),
        ("DELETE", "/machines/web?force=perhaps", "", 400),
        ("GET", "/nonesuch", "", 404),
        ("GET", "/machines/nonesuch", "", 404),
        ("PATCH", "/machines", "", 405),
        ("POST", "/policies", "{", 400),
        ("DELETE", "/users/admin", "", 409),
    ] {
        let (status, head, refused) = raw(&site, method, path, &[], body).await;
        assert_eq!((status, header(&head, "content-type").as_str()), (expected, "application/json"), "{path}");
        for field in ["error", "help", "kind"] {
            assert!(refused[field].as_str().is_some_and(|text| !text.is_empty()), "{path}: {refused}");
        }
        let kind = match expected {
            400 => "bad_request",
            404 => "not_found",
            405 => "method_not_allowed",
            409 => "conflict",
            _ => "too_large",
        };
        assert_eq!(refused["kind"], kind, "{path}: {refused}");
    }
    // Those that come before any operation.
    let key = [("Idempotency-Key", "one")];
    assert_eq!(raw(&site, "POST", "/policies", &key, r#"{"name":"gold"}"#).await.0, 200);
    let (status, _, reused) = raw(&site, "POST", "/policies", &key, r#"{"name":"lead"}"#).await;
    assert_eq!((status, &reused["kind"]), (422, &json!("key_reused")));
    let (status, _, refused) = raw(&site, "POST", "/users", &[("If-Match", "\"1\"")], "").await;
    assert_eq!((status, &refused["kind"]), (400, &json!("bad_request")));
    let (status, _, unknown) = raw(&site, "GET", "/users", &[("Authorization", "Bearer x")], "").await;
    assert!(status != 401 || unknown["kind"] == "unauthenticated", "{unknown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_said_in_plain_words() {
    let site = Site::start().await;
    for (method, path, body, words) in [
        ("POST", "/users", r#"{"name":"eve"}"#, "`role` is missing"),
        (
            "POST",
            "/users",
            r#"{"name":"eve","role":"king"}"#,
            "`role` cannot be \"king\"; it can be reader, operator, administrator",
        ),
        (
            "POST",
            "/users",
            r#"{"name":"eve","role":"reader","rank":1}"#,
            "`rank` is not known there; known: name, role",
        ),
        ("POST", "/users", r#"{"name":7,"role":"reader"}"#, "`name` is the number 7, and must be text"),
        ("POST", "/users", "[]", "it is a list, and must be an object"),
        ("POST", "/users", "{\n \"name\": }", "line 2, column 10"),
        (
            "POST",
            "/tokens",
            r#"{"user":"eve","lifetime_seconds":-1}"#,
            "`lifetime_seconds` cannot be the number -1; it must be a whole number, 0 or more",
        ),
        (
            "POST",
            "/plans",
            r#"{"name":"p","steps":[{"action":{"machines":["web"]}},{}]}"#,
            "`steps[1].action` is missing",
        ),
        (
            "POST",
            "/policies",
            r#"{"name":"p","frequency":"7s"}"#,
            "`frequency` cannot be \"7s\"; it can be continuous, 30s, 5m, 15m",
        ),
        ("GET", "/events?after=x", "", "`after` must be a whole number, 0 or more"),
        (
            "GET",
            "/jobs?state=asleep",
            "",
            "`state` cannot be \"asleep\"; it can be running, succeeded, failed, cancelled",
        ),
    ] {
        let (status, _, refused) = raw(&site, method, path, &[], body).await;
        let said = refused["error"].as_str().unwrap_or_default();
        assert!(status == 400 && said.contains(words), "{path} {body}: {refused}");
        for raw in ["at line", "missing field", "unknown variant", "expected struct", "invalid type", "deserialize"] {
            assert!(!said.contains(raw), "{path} {body}: {refused}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_sends_too_much_reads_why_and_the_connection_goes_on() {
    use tokio::io::AsyncReadExt;
    let site = Site::start().await;
    let api = site.folder.config_server().unwrap().unwrap().api;
    let authority = rustls_pki_types_pem(&std::fs::read(site.folder.ca_file()).unwrap());
    let tls = tidemark_transport::tls::api_client(&authority).unwrap();
    let mut stream = tidemark_transport::client::dial(&api.to_string(), tls).await.unwrap();
    let token = site.folder.token().unwrap();
    // Far more than the buffers of a connection hold; the third is refused for its token, without a look at its body.
    let body = vec![b'x'; 24 << 20];
    for (method, path, token, body, expected) in [
        ("POST", "/policies", token.as_str(), body.as_slice(), 413),
        ("GET", "/ready", &token, &[], 200),
        ("POST", "/policies", "nobody's", &body, 401),
        ("POST", "/nonesuch", &token, &body, 404),
        ("GET", "/hosts", &token, &[], 200),
    ] {
        let length = body.len();
        let head = format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut answer = Vec::new();
        let reading = async {
            loop {
                let text = String::from_utf8_lossy(&answer).into_owned();
                if let Some((head, body)) = text.split_once("\r\n\r\n")
                    && body.len() >= header(&head.to_lowercase(), "content-length").parse().unwrap()
                {
                    return (head.to_owned(), body.to_owned());
                }
                assert!(stream.read_buf(&mut answer).await.unwrap() > 0, "{path}: the connection was closed: {text}");
            }
        };
        let (head, body) = tokio::time::timeout(SOON, reading).await.unwrap();
        assert!(head.contains(&format!(" {expected} ")), "{path}: {head}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert!(expected < 400 || answer["help"].as_str().is_some_and(|help| !help.is_empty()), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_lost_its_database_or_its_authority_does_not_begin_anew() {
    let mut site = Site::start().await;
    site.stop_config_server().await;
    let own = site.folder.path().join("config-server");
    let database = own.join("config.db");
    let storage = RealStorage::open_folder(site.folder.path());
    let move_to = |from: &str, to: &str| storage.rename(from, to).unwrap();
    let refused = async |part: &str| {
        let error = config_server::start(&site.folder, Settings::default()).await.err().expect("it does not start");
        assert!(error.message.contains(part) && error.help.contains("restore a backup"), "{}", error.message);
    };
    move_to(DATABASE, ASIDE);
    refused("is empty").await;
    File::create(&database).unwrap();
    refused("is empty").await;
    move_to(ASIDE, DATABASE);
    let _ = std::fs::remove_file(own.join("config.db-wal"));

    let authority = site.folder.path().join(AUTHORITY);
    move_to(AUTHORITY, ASIDE);
    refused("authority.pem is missing").await;
    assert!(!authority.exists());
    // Another one beside this database is refused as well.
    let other = Folder::create(&site.top.path().join("other")).unwrap();
    other.authority().unwrap();
    std::fs::copy(other.path().join(AUTHORITY), &authority).unwrap();
    refused("belongs to the authority").await;
    move_to(ASIDE, AUTHORITY);
    site.start_config_server().await;
    site.settled(2).await;
}
