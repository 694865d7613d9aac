//! A clean stop and a start again.

use tidemark_tests::Site;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{number, text};

#[test]
fn a_restarted_site_carries_on_where_it_was() {
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 64 * MIB, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(MIB, &vec![1; 1 << 20]).unwrap();
    client.disconnect().unwrap();
    let point = site.point("web");
    let first = site.path("first.img");
    image::copy(&disk, &first);
    for round in 2..4u8 {
        site.down();
        site.up();
        // The addresses stay, and protecting the same again prints them.
        assert_eq!(site.protect("web", &[&disk], &[]), machine);
        site.wait_protected("web");
        let mut client = Client::connect(machine.nbd()).unwrap();
        client.write(u64::from(round) * MIB, &vec![round; 1 << 20]).unwrap();
        client.disconnect().unwrap();
        site.point("web");
        // Counters may go on or begin again; either way a second initial replication would show.
        let sent = number(&site.status("web")["sent_bytes"]);
        let all = number(&site.status("web")["written_bytes"]) + 48 * MIB;
        assert!(sent < all, "{sent} bytes sent: {}", site.status("web"));
        image::assert_same(&disk, &site.export("web", "latest", &format!("recovered-{round}.raw"), "raw"));
    }
    // The old point is still what it was.
    image::assert_same(&first, &site.export("web", &text(&point["id"]), "old.raw", "raw"));
}

#[test]
fn writes_that_were_never_sent_arrive_after_a_restart() {
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 64 * MIB, 2);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    site.point("web");
    site.json(&["pause", "web"]);
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut data = vec![0; 4096];
    let mut seeded = image::Seeded(3);
    for _ in 0..500 {
        seeded.fill(&mut data);
        client.write(seeded.below(64 * MIB / 4096) * 4096, &data).unwrap();
    }
    client.disconnect().unwrap();
    site.down();
    site.up();
    site.json(&["resume", "web"]);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
    let sent = number(&site.status("web")["sent_bytes"]);
    assert!(sent < 64 * MIB, "{sent} bytes sent for 2 MB of changes");
}

#[test]
fn a_disk_that_changed_while_nobody_watched_is_compared() {
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 16 * MIB, 4);
    site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    site.point("web");
    site.down();
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&vec![0x77; 1 << 20], 5 * MIB).unwrap();
    drop(file);
    site.up();
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}
