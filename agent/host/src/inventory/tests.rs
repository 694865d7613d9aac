use std::path::Path;

use tidemark_proto::control::HostDisk;

use super::{Places, look};

/// A system that tells of its disks in a folder.
struct System {
    folder: tempfile::TempDir,
    places: Places,
}

impl System {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let places = Places {
            devices: at("class"),
            nodes: at("dev"),
            mounts: at("mountinfo"),
            swaps: at("swaps"),
            found: at("udev"),
        };
        std::fs::create_dir_all(places.nodes.join("mapper")).unwrap();
        std::fs::create_dir_all(&places.devices).unwrap();
        Self { folder, places }
    }

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::io::Write::write_all(&mut std::fs::File::create(path).unwrap(), text.as_bytes()).unwrap();
    }

    /// `place`: below the devices, a partition in the folder of its disk.
    fn device(&self, place: &str, number: &str, sectors: u64, files: &[(&str, &str)]) {
        let folder = self.folder.path().join("devices").join(place);
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        Self::write(&folder.join("dev"), number);
        Self::write(&folder.join("size"), &sectors.to_string());
        for (name, text) in files {
            Self::write(&folder.join(name), text);
        }
        std::os::unix::fs::symlink(&folder, self.places.devices.join(&name)).unwrap();
        let node = match files.iter().find(|(name, _)| *name == "dm/name") {
            Some((_, mapped)) => self.places.nodes.join("mapper").join(mapped.trim()),
            None => self.places.nodes.join(name.replace('!', "/")),
        };
        Self::write(&node, "");
    }

    fn look(&self) -> Vec<HostDisk> {
        look(&self.places).unwrap().into_iter().map(|found| found.disk).collect()
    }

    fn node(&self, name: &str) -> String {
        self.places.nodes.join(name).to_str().unwrap().to_owned()
    }
}

fn one<'a>(disks: &'a [HostDisk], path: &str) -> &'a HostDisk {
    disks.iter().find(|disk| disk.path == path).unwrap_or_else(|| panic!("no {path} in {disks:#?}"))
}

fn used<'a>(disk: &'a HostDisk, kind: &str) -> Vec<&'a str> {
    disk.uses.iter().filter(|of| of.kind == kind).map(|of| of.at.as_str()).collect()
}

#[test]
fn disks_are_told_with_what_they_are_and_who_uses_them() {
    let system = System::new();
    let model = [("device/model", "QEMU HARDDISK  \n"), ("device/vendor", "QEMU"), ("device/serial", "s-1\n")];
    system.device("sda", "8:0", 2048, &model);
    // Ten partitions, so that their order by name is another one.
    for number in 1..=10 {
        system.device(&format!("sda/sda{number}"), &format!("8:{number}"), 64, &[("partition", "1")]);
    }
    system.device("sdb", "8:16", 4096, &[("ro", "1\n"), ("removable", "1\n")]);
    system.device("dm-0", "254:0", 32, &[("dm/name", "vg-root\n"), ("dm/uuid", "LVM-abc")]);
    system.device("dm-1", "254:1", 32, &[("dm/name", "swap"), ("dm/uuid", "CRYPT-LUKS2-ab-swap")]);
    system.device("md0", "9:0", 32, &[("md/level", "raid1")]);
    system.device("loop0", "7:0", 8, &[("loop/backing_file", "/srv/x.img\n")]);
    system.device("cciss!c0d0", "104:0", 8, &[]);
    // What holds nothing, and what is not for programs.
    system.device("loop1", "7:1", 0, &[]);
    system.device("nvme0c0n1", "259:0", 64, &[("hidden", "1")]);
    // An LVM on the second partition, whose volume is mounted; a RAID on the third.
    let sda2 = system.folder.path().join("devices/sda/sda2/holders");
    std::fs::create_dir_all(sda2.join("dm-0")).unwrap();
    std::fs::create_dir_all(system.folder.path().join("devices/sda/sda3/holders/md0")).unwrap();
    System::write(
        &system.places.mounts,
        &format!(
            "1 0 8:1 / /my\\040files rw,relatime shared:1 - ext4 /dev/somewhere rw\n\
         2 0 254:0 / / rw - xfs /dev/mapper/vg-root rw\n3 0 254:0 /x /again rw - xfs /dev/mapper/vg-root rw\n\
         4 0 0:27 / /pool rw - btrfs {} rw\n5 0 0:5 / /proc rw - proc proc rw\nnonsense\n",
            system.node("cciss/c0d0")
        ),
    );
    System::write(
        &system.places.swaps,
        &format!("Filename Type Size Used Priority\n{} partition 16 0 -2\n", system.node("dm-1")),
    );
    System::write(&system.places.found.join("b8:0"), "S:disk/by-id/x\nE:ID_PART_TABLE_TYPE=gpt\n");
    System::write(&system.places.found.join("b8:1"), "E:ID_FS_TYPE=ext4\nE:ID_PART_TABLE_TYPE=gpt\n");

    let disks = system.look();
    assert_eq!(disks.len(), 17, "{disks:#?}");
    let order: Vec<&str> = disks.iter().map(|disk| disk.path.as_str()).filter(|path| path.contains("sda")).collect();
    assert!(order[0].ends_with("sda") && order[2].ends_with("sda2") && order[10].ends_with("sda10"), "{order:?}");

    let sda = one(&disks, &system.node("sda"));
    assert_eq!((sda.bytes, sda.kind.as_str(), sda.content.as_str()), (1 << 20, "disk", "gpt"));
    assert_eq!((sda.description.as_str(), sda.serial.as_str()), ("QEMU QEMU HARDDISK", "s-1"));
    assert!(sda.in_use && used(sda, "partition").len() == 10, "{sda:?}");
    let first = one(&disks, &system.node("sda1"));
    assert_eq!(
        (first.kind.as_str(), first.content.as_str(), used(first, "file_system")),
        ("partition", "ext4", vec!["/my files"])
    );
    assert!(first.in_use && first.description == sda.description);
    assert_eq!(used(one(&disks, &system.node("sda2")), "holder"), [system.node("mapper/vg-root")]);
    assert_eq!(used(one(&disks, &system.node("sda3")), "holder"), [system.node("md0")]);
    assert!(!one(&disks, &system.node("sda4")).in_use);
    let unused = one(&disks, &system.node("sdb"));
    assert!(unused.read_only && unused.removable && !unused.in_use && unused.uses.is_empty());
    let root = one(&disks, &system.node("mapper/vg-root"));
    assert_eq!((root.kind.as_str(), used(root, "file_system")), ("logical_volume", vec!["/", "/again"]));
    let swap = one(&disks, &system.node("mapper/swap"));
    assert_eq!((swap.kind.as_str(), used(swap, "swap"), swap.in_use), ("crypt", vec![""], true));
    let raid = one(&disks, &system.node("md0"));
    assert_eq!((raid.kind.as_str(), raid.description.as_str(), raid.in_use), ("raid", "raid1", false));
    let looped = one(&disks, &system.node("loop0"));
    assert_eq!((looped.kind.as_str(), looped.description.as_str()), ("loop", "/srv/x.img"));
    // By what the mount names: its file system has a number of its own.
    assert_eq!(used(one(&disks, &system.node("cciss/c0d0")), "file_system"), ["/pool"]);
}

#[test]
fn a_system_that_tells_nothing_has_no_disks() {
    let system = System::new();
    assert!(system.look().is_empty());
    std::fs::remove_dir(&system.places.devices).unwrap();
    assert!(system.look().is_empty());
}

/// The kernel's own list, which is made elsewhere.
#[test]
fn the_disks_of_this_machine_are_those_of_its_kernel() {
    let Ok(list) = std::fs::read_to_string("/proc/partitions") else { return };
    let found = look(&Places::default()).unwrap();
    for line in list.lines().skip(2) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [major, minor, blocks, name] = fields[..] else { panic!("{line}") };
        let number = (major.parse().unwrap(), minor.parse().unwrap());
        let folder = Places::default().devices.join(name);
        // Of another container, or gone meanwhile.
        if !folder.exists() {
            continue;
        }
        let found = found.iter().find(|found| found.number == number).unwrap_or_else(|| panic!("{line}: not found"));
        assert_eq!(found.disk.bytes / 1024, blocks.parse::<u64>().unwrap(), "{line}");
    }
    for mount in std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines() {
        let number = mount.split(' ').nth(2).unwrap();
        let number = number.split_once(':').map(|(major, minor)| (major.parse().unwrap(), minor.parse().unwrap()));
        if let Some(found) = found.iter().find(|found| Some(found.number) == number) {
            assert!(found.disk.in_use, "{mount}");
        }
    }
}
