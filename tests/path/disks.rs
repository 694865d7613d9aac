//! Disks that come to a machine which is protected already, leave it, and grow.

use std::fs::File;

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::{Site, wait};

#[test]
fn a_disk_is_added_and_removed_while_the_other_goes_on_and_every_point_stays() {
    let mut site = Site::start();
    let (one, two) = (site.path("one.img"), site.path("two.img"));
    image::make_mixed(&one, 16 * MIB, 1);
    image::make_mixed(&two, 8 * MIB, 2);
    let machine = site.protect("web", &[&one], &[]);
    site.wait_protected("web");
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(0, &[1; 4096]).unwrap();
    let before = text(&site.point("web")["id"]);
    let before_reference = site.path("before.img");
    image::copy(&one, &before_reference);

    let added = site.json(&["machine", "disk", "add", "web", two.to_str().unwrap()]);
    assert_eq!(added["disks"].as_array().map(Vec::len), Some(2), "{added}");
    // The connection of the other disk is the same, and a point can be made at once.
    client.write(4096, &[2; 4096]).unwrap();
    site.point("web");
    site.wait_protected("web");
    let mut second = Client::connect(&text(&added["disks"][1]["attach"]["nbd"])).unwrap();
    second.write(MIB, &[3; 4096]).unwrap();
    client.write(8192, &[4; 4096]).unwrap();
    let both = text(&site.point("web")["id"]);
    let references = [(&one, site.path("one.reference")), (&two, site.path("two.reference"))];
    references.iter().for_each(|(disk, reference)| image::copy(disk, reference));
    drop(second);

    let compare = |site: &Site, round: &str| {
        let exported = site.export("web", &before, &format!("before-{round}.raw"), "raw");
        image::assert_same(&before_reference, &exported);
        let folder = site.path(&format!("both-{round}"));
        std::fs::create_dir(&folder).unwrap();
        let to = folder.to_str().unwrap();
        let result = site.json(&["point", "export", "web", &both, "--to", to, "--format", "raw"]);
        let files = result["files"].as_array().expect("files");
        assert_eq!(files.len(), 2, "{result}");
        for (disk, (_, reference)) in added["disks"].as_array().unwrap().iter().zip(&references) {
            let id = disk["id"].as_str().unwrap();
            let file = files.iter().find(|file| file["id"].as_str() == Some(id)).expect("the disk's file");
            image::assert_same(reference, std::path::Path::new(&text(&file["path"])));
        }
    };
    compare(&site, "added");
    site.down();
    site.up();
    site.wait_protected("web");
    assert_eq!(site.status("web")["disks"].as_array().map(Vec::len), Some(2), "over a restart");

    site.json(&["machine", "disk", "remove", "web", two.to_str().unwrap()]);
    assert_eq!(site.status("web")["disks"].as_array().map(Vec::len), Some(1));
    assert!(!site.path("two.img.tidemark").exists());
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(12288, &[5; 4096]).unwrap();
    let alone = text(&site.point("web")["id"]);
    image::assert_same(&one, &site.export("web", &alone, "alone.raw", "raw"));
    compare(&site, "removed");
    site.run(&["machine", "disk", "remove", "web", one.to_str().unwrap()]).assert_refused(&["only disk"]);
    site.run(&["machine", "disk", "add", "web", one.to_str().unwrap()]).assert_refused(&["already"]);
    let absent = site.path("absent.img");
    site.run(&["machine", "disk", "add", "web", absent.to_str().unwrap()]).assert_refused(&["absent.img"]);
    assert_eq!(site.status("web")["disks"].as_array().map(Vec::len), Some(1), "nothing of a refused disk stays");
}

#[test]
fn a_disk_that_grows_is_taken_over_by_itself_and_older_points_keep_their_size() {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 8 * MIB, 3);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    Client::connect(machine.nbd()).unwrap().write(0, &[1; 4096]).unwrap();
    let before = text(&site.point("web")["id"]);
    let reference = site.path("before.img");
    image::copy(&disk, &reference);
    File::options().write(true).open(&disk).unwrap().set_len(16 * MIB).unwrap();
    wait::until("the machine has a larger disk", LIMIT, || {
        (site.status("web")["disks"][0]["bytes"] == 16 * MIB).then_some(())
    });
    wait::until("it can be opened at its new size", LIMIT, || {
        let mut client = Client::connect(machine.nbd()).ok()?;
        client.write(12 * MIB, &[7; 8192]).ok()
    });
    site.wait_protected("web");
    let compare = &site.status("web")["compare"];
    let compared = number(&compare["compared_bytes"]) + number(&compare["left_bytes"]);
    assert!(compared <= 9 * MIB, "its new end alone: {compare}");
    let after = text(&site.point("web")["id"]);
    image::assert_same(&disk, &site.export("web", &after, "after.raw", "raw"));
    image::assert_same(&reference, &site.export("web", &before, "before.raw", "raw"));
    File::options().write(true).open(&disk).unwrap().set_len(8 * MIB).unwrap();
    site.run(&["machine", "disk", "resize", "web"]).assert_refused(&["shrank", "16777216"]);
}

/// Two agents' worth of changes of one disk would be two histories of it.
#[test]
fn a_disk_belongs_to_one_machine_by_whatever_name_it_is_called() {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, MIB, 1);
    site.protect("web", &[&disk], &[]);
    let link = site.path("link.img");
    std::os::unix::fs::symlink(&disk, &link).unwrap();
    let (disk, link) = (disk.to_str().unwrap(), link.to_str().unwrap());
    let says = ["protected already", "\"web\"", disk];
    site.run(&["protect", "other", "--disk", link]).assert_refused(&says);
    site.run(&["protect", "other", "--disk", link, "--check"]).assert_refused(&["1 of"]);
    site.run(&["machine", "disk", "add", "web", link]).assert_refused(&["already", disk]);
    let again = site.json(&["protect", "web", "--disk", link]);
    assert_eq!(again["disks"].as_array().map(Vec::len), Some(1), "the same machine: {again}");
}
