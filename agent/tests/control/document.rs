//! The document of the API is complete, and what is answered is what it says.

use std::collections::BTreeSet;

use super::*;

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// The document, and what does not hold.
struct Document {
    text: Value,
}

/// What an answer may have besides what was looked at.
#[derive(Default)]
struct Known {
    names: BTreeSet<String>,
    is_open: bool,
}

impl Document {
    fn operations(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        let paths = self.text["paths"].as_object().unwrap().iter();
        paths.flat_map(|(path, item)| {
            METHODS.iter().filter_map(move |method| Some((path.as_str(), *method, item.get(method)?)))
        })
    }

    fn resolve<'a>(&'a self, mut schema: &'a Value) -> &'a Value {
        while let Some(place) = schema["$ref"].as_str() {
            schema = self.text.pointer(place.trim_start_matches('#')).unwrap_or_else(|| panic!("{place} is nowhere"));
        }
        schema
    }

    /// Each part of a schema says what it is. Parts of one that is looked at already are not looked at again.
    fn incomplete(&self, schema: &Value, at: &str, seen: &mut BTreeSet<String>, found: &mut Vec<String>) {
        if let Some(place) = schema["$ref"].as_str()
            && !seen.insert(place.to_owned())
        {
            return;
        }
        let schema = self.resolve(schema);
        for kind in ["oneOf", "anyOf", "allOf"] {
            for (number, part) in schema[kind].as_array().into_iter().flatten().enumerate() {
                self.incomplete(part, &format!("{at}/{kind}/{number}"), seen, found);
            }
        }
        let kinds = kinds(schema);
        let is_put_together = ["oneOf", "anyOf", "allOf"].iter().any(|kind| schema[kind].is_array());
        if kinds.is_empty() && !is_put_together && !schema["enum"].is_array() {
            found.push(format!("{at} has no type"));
        }
        if kinds.contains(&"array") {
            match schema.get("items") {
                Some(items) => self.incomplete(items, &format!("{at}[]"), seen, found),
                None => found.push(format!("{at} is a list of nobody knows what")),
            }
        }
        if kinds.contains(&"object") {
            let properties = schema["properties"].as_object();
            let others = schema.get("additionalProperties");
            for (name, part) in properties.into_iter().flatten() {
                self.incomplete(part, &format!("{at}.{name}"), seen, found);
            }
            if let Some(others) = others.filter(|others| others.is_object()) {
                self.incomplete(others, &format!("{at}.*"), seen, found);
            }
            // Nothing is what some answers hold, and they say so.
            let is_empty = schema["description"].as_str().is_some_and(|text| text.starts_with("Nothing"));
            if properties.is_none() && others.is_none() && !is_empty {
                found.push(format!("{at} is an object of nobody knows what"));
            }
        }
    }

    /// Whether a value is as the schema says, with nothing in it that the schema does not know.
    fn check(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        let known = self.fits(schema, value, at)?;
        if let Some(object) = value.as_object().filter(|_| !known.is_open)
            && let Some(name) = object.keys().find(|name| !known.names.contains(*name))
        {
            return Err(format!("{at}.{name} is not in the document"));
        }
        Ok(())
    }

    fn fits(&self, schema: &Value, value: &Value, at: &str) -> Result<Known, String> {
        let schema = self.resolve(schema);
        let mut known = Known::default();
        for part in schema["allOf"].as_array().into_iter().flatten() {
            let more = self.fits(part, value, at)?;
            known.names.extend(more.names);
            known.is_open |= more.is_open;
        }
        for kind in ["oneOf", "anyOf"] {
            let Some(parts) = schema[kind].as_array() else { continue };
            let tried: Vec<Result<Known, String>> = parts
                .iter()
                .map(|part| self.check(part, value, at).and_then(|()| self.fits(part, value, at)))
                .collect();
            let reasons: Vec<String> = tried.iter().filter_map(|tried| tried.as_ref().err().cloned()).collect();
            let Some(more) = tried.into_iter().find_map(Result::ok) else {
                return Err(format!("{at}: {value} is none of what it may be: {}", reasons.join("; ")));
            };
            known.names.extend(more.names);
            known.is_open |= more.is_open;
        }
        if let Some(words) = schema["enum"].as_array()
            && !words.contains(value)
        {
            return Err(format!("{at}: {value} is none of {words:?}"));
        }
        let kinds = kinds(schema);
        let is_kind = |kind: &&str| match *kind {
            "null" => value.is_null(),
            "boolean" => value.is_boolean(),
            "string" => value.is_string(),
            "integer" => value.is_u64() || value.is_i64(),
            "number" => value.is_number(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            other => panic!("{at}: {other}"),
        };
        if !kinds.is_empty() && !kinds.iter().any(is_kind) {
            return Err(format!("{at}: {value} is none of {kinds:?}"));
        }
        if let Some(text) = value.as_str() {
            let is_sound = match schema["format"].as_str() {
                Some("uuid") => text.parse::<uuid::Uuid>().is_ok(),
                Some("date-time") => Timestamp::parse(text).is_ok(),
                _ => true,
            };
            if !is_sound {
                return Err(format!("{at}: {text:?} is no {}", schema["format"]));
            }
        }
        for (number, item) in value.as_array().into_iter().flatten().enumerate() {
            self.check(&schema["items"], item, &format!("{at}[{number}]"))?;
        }
        let Some(object) = value.as_object() else { return Ok(known) };
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                return Err(format!("{at}.{name} is missing"));
            }
        }
        let properties = schema["properties"].as_object();
        for (name, part) in properties.into_iter().flatten() {
            known.names.insert(name.clone());
            if let Some(value) = object.get(name) {
                self.check(part, value, &format!("{at}.{name}"))?;
            }
        }
        match schema.get("additionalProperties") {
            Some(Value::Bool(true)) => known.is_open = true,
            Some(others) if others.is_object() => {
                known.is_open = true;
                let is_other = |name: &String| properties.is_none_or(|known| !known.contains_key(name));
                for (name, value) in object.iter().filter(|(name, _)| is_other(name)) {
                    self.check(others, value, &format!("{at}.{name}"))?;
                }
            }
            _ => {}
        }
        Ok(known)
    }
}

fn kinds(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(kind) => vec![kind],
        kinds => kinds.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
    }
}

async fn document(site: &Site) -> Document {
    Document { text: site.client().get("/openapi.json").await.unwrap() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_says_what_it_takes_and_what_it_answers() {
    let site = Site::start().await;
    let document = document(&site).await;
    let (mut found, mut count) = (Vec::new(), 0);
    for (path, method, operation) in document.operations() {
        count += 1;
        let at = format!("{method} {path}");
        let answers = operation["responses"].as_object().unwrap();
        if !answers.keys().any(|status| status.starts_with('2')) {
            found.push(format!("{at} has no answer"));
        }
        for status in ["400", "401", "403", "404", "409", "413", "429", "500", "503"] {
            if !answers.contains_key(status) {
                found.push(format!("{at} says nothing of {status}"));
            }
        }
        let bodies = answers.iter().map(|(status, answer)| (format!("{at} {status}"), answer));
        let takes = operation.get("requestBody").map(|body| (format!("{at} body"), body));
        for (at, body) in bodies.chain(takes) {
            let content = body["content"].as_object().filter(|content| !content.is_empty());
            let Some(content) = content else {
                found.push(format!("{at} has no content"));
                continue;
            };
            for schema in content.values().map(|content| &content["schema"]) {
                document.incomplete(schema, &at, &mut BTreeSet::new(), &mut found);
            }
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let at = format!("{at} ?{}", parameter["name"]);
            document.incomplete(&parameter["schema"], &at, &mut BTreeSet::new(), &mut found);
        }
        // What changes something takes a body, or is known to need none.
        let needs_none = [
            "pause", "resume", "resync", "resize", "cancel", "commit", "cleanup", "verify", "continue", "confirm",
            "renew", "migrate", "approve", "reject", "restore", "rotate", "test", "backups", "lock", "machine}",
        ];
        let is_change = ["post", "put", "patch"].contains(&method);
        if is_change && operation.get("requestBody").is_none() && !needs_none.iter().any(|end| path.ends_with(end)) {
            found.push(format!("{at} takes nobody knows what"));
        }
    }
    assert!(count > 90, "{count} operations");
    found.sort();
    found.dedup();
    assert!(found.is_empty(), "{found:#?}");
}

/// What a process server says of a machine that runs there.
fn running(call: &str, point: &PointInfo, disk: DiskId) -> String {
    use tidemark_hypervisor::call::{Call, FailedOver, FailedOverDisk, Lost, Promotion, decode, encode};
    use tidemark_hypervisor::hypervisor::Power;
    match decode::<Call>(call).unwrap() {
        Call::Loss { .. } => encode(&Lost { point: point.id, time: point.time, newest: point.time, bytes: 7 }),
        Call::Check => json!({ "name": "QEMU", "version": "10", "accelerator": "kvm", "why": null }).to_string(),
        _ => encode(&FailedOver {
            point: point.id,
            time: point.time,
            disks: vec![FailedOverDisk { id: disk, nbd: Some("nbd+unix:///x".into()), plain: "/srv/x".into() }],
            hypervisor: "QEMU".into(),
            power: Power::On,
            first_instruction_seconds: Some(0.5),
            committed: false,
            stopped: false,
            promotion: Promotion::No,
            done_bytes: 0,
            total_bytes: 1,
            problem: None,
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_answered_is_as_the_document_says() {
    let site = Site::start().await;
    let client = site.client();
    let document = document(&site).await;
    let disks = [site.disk("a.img", 1 << 20), site.disk("b.img", 1 << 20), site.disk("c.img", 1 << 20)];
    let way = DiskWay { via: "bpf".into(), obstacle: String::new() };
    let uses = vec![DiskUse { kind: "swap".into(), at: String::new() }];
    let seen = HostDisk { path: "/dev/sdb".into(), kind: "disk".into(), ways: vec![way], uses, ..HostDisk::default() };
    *site.agent().inventory.lock().unwrap() = Some(Inventory { time: Timestamp(1), disks: vec![seen], left_out: 0 });
    let first = &site.protect("web", &[&disks[0]]).await.unwrap()["disks"][0]["id"];
    let first: DiskId = first.as_str().unwrap().parse().unwrap();
    site.protect("db", &[&disks[1]]).await.unwrap();
    let point = site.job("/machines/web/points", json!({ "label": "x" })).await.unwrap();
    let held = site.server().points.lock().unwrap()[0].clone();
    *site.server().hypervisor.lock().unwrap() = Some(Box::new(move |call| running(call, &held, first)));
    let described = json!({ "hardware": { "memory_mib": 512, "cards": [{ "network": { "bridge": "br0" } }] },
        "sign": { "port": { "port": 22 } } });
    client.request(hyper::Method::PUT, "/machines/web/description", Some(&described)).await.unwrap();
    // A replica that was left behind.
    site.protect("gone", &[&disks[2]]).await.unwrap();
    let job = client.request(hyper::Method::DELETE, "/machines/gone", None).await.unwrap();
    client.finish(job, |_| {}).await.unwrap();
    for (path, body) in [
        ("/policies", json!({ "name": "gold", "throttle_schedule": [{ "days": [1], "bytes_per_second": 9 << 20 }] })),
        ("/groups", json!({ "name": "shop", "machines": ["web", "db"] })),
        ("/plans", json!({ "name": "all", "steps": [{ "action": { "machines": ["web"] } }] })),
        ("/channels", json!({ "name": "hook", "webhook": { "url": "https://127.0.0.1:1/x" } })),
        ("/users", json!({ "name": "eve", "role": "reader" })),
        ("/tokens", json!({ "user": "eve", "lifetime_seconds": 60 })),
        ("/passphrases", json!({ "role": "process-server" })),
    ] {
        client.post(path, &body).await.unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    let backup = site.job("/backups", json!({})).await.unwrap();
    // It need not get to its end for a report to be there.
    let _ = site.job("/plans/all/test", json!({ "disks_only": true })).await;
    let over = site.job("/machines/web/failover/unplanned", json!({ "disks_only": true })).await;
    over.expect("it fails over");
    *site.agent().problems.lock().unwrap() =
        vec![Problem { critical: true, message: "it burns".into(), help: "put it out".into() }];

    let jobs = client.get("/jobs").await.unwrap();
    let (host, server) = (client.get("/hosts").await.unwrap(), client.get("/process-servers").await.unwrap());
    let id_of = |path: &str| match path {
        "/jobs/{id}" => jobs[0]["id"].as_str().unwrap().to_owned(),
        "/backups/{id}" => backup["id"].as_str().unwrap().to_owned(),
        "/hosts/{id}" => host[0]["id"].as_str().unwrap().to_owned(),
        "/process-servers/{id}" => server[0]["id"].as_str().unwrap().to_owned(),
        other => panic!("{other}: nobody knows an id for it"),
    };
    let point = point["id"].as_str().unwrap();
    let mut told = BTreeSet::new();
    for (path, _, operation) in document.operations().filter(|(_, method, _)| *method == "get") {
        if path.ends_with("/stream") {
            continue;
        }
        let name = path.split('/').nth(1).unwrap();
        let name = match name {
            "machines" => "web",
            "policies" => "gold",
            "groups" => "shop",
            "plans" => "all",
            "channels" => "hook",
            _ => "",
        };
        let asked = match path.contains("{id}") {
            true => path.replace("{id}", &id_of(path)),
            false => path.replace("{name}", name).replace("{point}", point),
        };
        let (status, head, answer) = raw(&site, "GET", &asked, &[], "").await;
        assert_eq!(status, 200, "{asked}: {answer}");
        let content = operation["responses"]["200"]["content"].as_object().unwrap();
        let (of, content) = content.iter().next().unwrap();
        assert!(header(&head, "content-type").starts_with(of.as_str()), "{asked}: {head}");
        if of == "application/json" {
            document.check(&content["schema"], &answer, &asked).unwrap_or_else(|error| panic!("{error}"));
            if answer.as_array().is_none_or(|list| !list.is_empty()) {
                told.insert(path);
            }
        }
    }
    // Lists that hold nothing prove nothing; these may be empty here, and their parts are looked at elsewhere.
    let empty = ["/registrations", "/alerts", "/groups/{name}/points"];
    let all = document.operations().filter(|(path, method, _)| *method == "get" && !empty.contains(path));
    let silent: Vec<&str> = all.map(|(path, _, _)| path).filter(|path| !told.contains(path)).collect();
    let others = ["/jobs/stream", "/events/stream", "/metrics", "/backups/{id}"];
    assert!(silent.iter().all(|path| others.contains(path)), "nothing was answered: {silent:?}");
}

/// Whoever checks must be able to say no.
#[test]
fn a_schema_refuses_what_is_not_of_it() {
    let document = Document {
        text: json!({ "components": { "schemas": {
            "A": { "type": "object", "required": ["x"], "properties": { "x": { "type": "string", "format": "uuid" },
                "y": { "type": ["integer", "null"] } } },
            "B": { "allOf": [{ "$ref": "#/components/schemas/A" },
                { "type": "object", "properties": { "z": { "enum": ["one"] } } }] },
            "C": { "oneOf": [{ "type": "null" }, { "$ref": "#/components/schemas/B" }] },
            "D": { "type": "array", "items": { "$ref": "#/components/schemas/C" } },
        } } }),
    };
    let of = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let id = "6f1c1c5e-3a9b-4d1d-8a57-000000000001";
    for (name, value, is_sound) in [
        ("A", json!({ "x": id }), true),
        ("A", json!({ "x": id, "y": null }), true),
        ("A", json!({ "x": "no" }), false),
        ("A", json!({}), false),
        ("A", json!({ "x": id, "y": 1.5 }), false),
        ("A", json!({ "x": id, "more": 1 }), false),
        ("B", json!({ "x": id, "z": "one" }), true),
        ("B", json!({ "x": id, "z": "two" }), false),
        ("B", json!({ "z": "one" }), false),
        ("C", json!(null), true),
        ("C", json!({ "x": id, "more": 1 }), false),
        ("D", json!([{ "x": id }, null]), true),
        ("D", json!([1]), false),
    ] {
        assert_eq!(document.check(&of(name), &value, "").is_ok(), is_sound, "{name} {value}");
    }
    let mut found = Vec::new();
    for schema in [json!({}), json!({ "type": "object" }), json!({ "type": "array" }), json!({ "properties": {} })] {
        document.incomplete(&schema, "", &mut BTreeSet::new(), &mut found);
    }
    assert_eq!(found.len(), 4, "{found:?}");
}
