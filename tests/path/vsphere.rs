//! A machine of a vCenter (`tests/src/vcenter.rs`: a simulated one) that goes on as it is: VMware's changed-block tracking tells what changes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::vcenter::{DATACENTER, PASSWORD, Vcenter};
use tidemark_tests::{Site, wait};

const SOON: Duration = Duration::from_secs(60);

fn write_file(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all_at(bytes, 0).unwrap();
}

/// Files below a folder that hold these bytes.
fn holding(folder: &Path, wanted: &[u8], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            holding(&entry.path(), wanted, found);
        } else if kind.is_file() && entry.metadata().unwrap().len() < 16 << 20 {
            let content = std::fs::read(entry.path()).unwrap_or_default();
            if content.windows(wanted.len()).any(|window| window == wanted) {
                found.push(entry.path());
            }
        }
    }
}

#[test]
fn a_machine_of_a_vcenter_is_recovered_to_its_points() {
    let mut site = Site::start();
    let mut images = Vec::new();
    for disk in 0..2u64 {
        let path = site.path(&format!("machine-{disk}.img"));
        image::make_mixed(&path, 24 * MIB, 5 + disk);
        images.push(path);
    }
    let vcenter = Vcenter::start(site.folder(), &images);
    let agent = site.state().join("agent");
    let disk = |slot: &str| format!("vsphere:lab/{DATACENTER}/vm/web/{slot}");
    let (first, second) = (disk("scsi0:0"), disk("scsi0:1"));

    // Not before it is known who answers.
    site.run(&["protect", "web", "--disk", &first, "--via", "vsphere"]).assert_refused(&["lab.toml"]);
    vcenter.connect_with(&agent, "lab", "");
    let refused = site.run(&["protect", "web", "--disk", &first, "--via", "vsphere"]);
    refused.assert_refused(&["thumbprint", vcenter.thumbprint()]);
    vcenter.connect(&agent, "lab");
    let refused = site.run(&["protect", "web", "--disk", &disk("scsi0:9"), "--via", "vsphere"]);
    refused.assert_refused(&["scsi0:0", "scsi0:1"]);
    assert_eq!(vcenter.calls("CreateSnapshot_Task"), 0, "nothing was changed");

    let protected = site.json(&["protect", "web", "--disk", &first, &second, "--via", "vsphere"]);
    let disks = protected["disks"].as_array().unwrap();
    assert!(disks.iter().all(|disk| disk["attach"]["nbd"].is_null()), "{protected}");
    site.wait_protected("web");
    assert_eq!(
        site.json(&["protect", "web", "--disk", &first, &second])["disks"],
        protected["disks"],
        "the same again"
    );

    let mut references: Vec<(String, [PathBuf; 2])> = Vec::new();
    let reference = |site: &Site, name: &str| {
        [0, 1].map(|disk| {
            let path = site.path(&format!("reference-{name}-{disk}.img"));
            write_file(&path, &vcenter.content(disk));
            path
        })
    };
    for round in 1..=3u8 {
        vcenter.write(0, u64::from(round) * 5 * MIB + 512, &[round; 5000]);
        vcenter.write(1, u64::from(round) * 3 * MIB, &vec![round; (u64::from(round) * MIB) as usize]);
        let point = site.point("web");
        references.push((text(&point["id"]), reference(&site, &round.to_string())));
    }
    let quiesced = site.json(&["point", "create", "web", "--app-consistent"]);
    assert_eq!(quiesced["consistency"], "app");
    vcenter.state().faults.quiesce = true;
    site.run(&["point", "create", "web", "--app-consistent"])
        .assert_refused(&["made quiet", "ApplicationQuiesceFault"]);
    vcenter.state().faults.quiesce = false;

    // Killed while a snapshot is there; the machine goes on, and its sessions end.
    wait::until("a snapshot is there", SOON, || (!vcenter.snapshot_names().is_empty()).then_some(()));
    site.kill_9();
    vcenter.write(0, 20 * MIB, &[9; 70_000]);
    vcenter.state().sessions.clear();
    site.up();
    site.wait_protected("web");
    let point = site.point("web");
    references.push((text(&point["id"]), reference(&site, "killed")));
    let events = || site.run(&["events", "--json"]).stdout;
    assert!(!events().contains("did not see every write"), "nothing is compared: {}", events());

    // What VMware forgot is compared.
    vcenter.write(1, 9 * MIB, &[11; 4096]);
    vcenter.reset_tracking(1);
    vcenter.write(1, 10 * MIB, &[12; 4096]);
    wait::until("the gap is found", SOON, || events().contains("began to track its changes anew").then_some(()));
    site.wait_protected("web");
    let point = site.point("web");
    references.push((text(&point["id"]), reference(&site, "reset")));

    for (number, (point, expected)) in references.iter().enumerate() {
        let folder = site.path(&format!("exported-{number}"));
        std::fs::create_dir(&folder).unwrap();
        let to = folder.to_str().unwrap();
        let result = site.json(&["point", "export", "web", point, "--to", to, "--format", "raw"]);
        let files = result["files"].as_array().expect("files");
        for (disk, expected) in disks.iter().zip(expected) {
            let file = files.iter().find(|file| file["id"] == disk["id"]).expect("the disk's file");
            image::assert_same(expected, Path::new(&text(&file["path"])));
        }
    }

    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    wait::until("no snapshot stays", SOON, || vcenter.snapshot_names().is_empty().then_some(()));
    assert_eq!(std::fs::read_dir(agent.join("vsphere")).unwrap().count(), 0, "no change id stays");
    site.down();
    let mut found = Vec::new();
    holding(site.folder(), PASSWORD.as_bytes(), &mut found);
    assert_eq!(found, [agent.join("vsphere.d/lab.password")], "the password is where it was put, and nowhere else");
}
