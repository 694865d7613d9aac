//! Room for what is replicated, before and while it is.

use super::silence::until_alerts;
use super::*;

/// A full volume is in the way. One that may fill up, and a log without room, are not, and are said.
#[tokio::test(flavor = "multi_thread")]
async fn room_is_looked_at_before_anything_is_touched() {
    let site = Site::start().await;
    let disk = site.disk("a.img", 1 << 20);
    let told = |free_bytes| *site.server().volume.lock().unwrap() = Volume { bytes: 10 << 30, free_bytes };
    told(VOLUME_RESERVE_BYTES - 1);
    match site.protect("web", &[&disk]).await {
        Err(ClientError::Refused { message, help, .. }) => {
            assert!(
                message.contains("is full: 64.0 MiB of 10.0 GiB are free") && help.contains("room"),
                "{message} {help}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(site.server().was_told("authorise"), 0);

    told(VOLUME_RESERVE_BYTES + 1000);
    let log = LogRoom { folder: "/images".into(), free_bytes: 1 << 20, needed_bytes: 128 << 20 };
    *site.agent().log_room.lock().unwrap() = Some(log);
    let looked = site.run(&["protect", "web", "--disk", disk.to_str().unwrap(), "--check"]).await;
    let shown = String::from_utf8(looked.stdout).unwrap();
    assert!(looked.status.success(), "{shown}");
    for part in ["may fill up", "1.0 MiB are free in /images"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let protected = site.protect("web", &[&disk]).await.unwrap();
    assert_eq!(protected["warnings"].as_array().unwrap().len(), 2, "{protected}");
    // It goes on filling up: an alert, of the process server and not of each of its machines.
    site.job("/machines", json!({ "name": "db", "disks": [site.disk("b.img", 1 << 20)] })).await.unwrap();
    let is_one = |alerts: &[Value]| {
        let of: Vec<&Value> = alerts.iter().filter(|alert| alert["kind"] == "room").collect();
        of.len() == 1 && of[0]["severity"] == "critical" && of[0]["machines"].as_array().unwrap().len() == 2
    };
    until_alerts(&site.client(), "the volume is one alert", is_one).await;
}
