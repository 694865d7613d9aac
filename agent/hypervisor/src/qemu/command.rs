//! The command line of a machine's QEMU, from its description alone.
//!
//! Everything that has a name or a path goes as JSON, where no comma or quote has a meaning. Sockets and files of the machine
//! itself are relative: QEMU runs in the machine's folder.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::accelerator::Accelerator;
use crate::machine::{Bus, CardModel, Firmware, Machine, Network, Place, prefix_of};

/// How long a machine's disk waits for an NBD server that is away, such as one that is started again.
const RECONNECT_SECONDS: u64 = 300;

pub const QMP: &str = "qmp.sock";
pub const AGENT: &str = "agent.sock";
pub const CONSOLE: &str = "console.log";
pub const PID: &str = "pid";
pub const VARIABLES: &str = "uefi-variables.fd";

/// The node of a disk's content, after so many moves.
pub fn node(disk: usize, moves: u32) -> String {
    format!("disk{disk}-{moves}")
}

/// The nodes that show a place as a disk: the content, and what it lies on.
pub fn blockdev(node: &str, place: &Place) -> Value {
    let file = match place {
        Place::Raw { path } => json!({ "driver": "file", "filename": path }),
        Place::Device { path } => json!({ "driver": "host_device", "filename": path }),
        Place::Nbd { socket, export } => json!({
            "driver": "nbd",
            "server": { "type": "unix", "path": socket },
            "export": export,
            "reconnect-delay": RECONNECT_SECONDS,
        }),
    };
    let mut file = file;
    file["node-name"] = format!("{node}-file").into();
    file["discard"] = "unmap".into();
    json!({ "driver": "raw", "node-name": node, "discard": "unmap", "file": file })
}

/// The device id of a disk, for events.
fn device(machine: &Machine, disk: usize, moves: u32) -> Value {
    let bus = machine.hardware.bus(disk);
    // Its place among the disks of the same bus.
    let place = (0..disk).filter(|other| machine.hardware.bus(*other) == bus).count();
    let mut device = match bus {
        Bus::Ide => json!({ "driver": "ide-hd", "bus": format!("ide.{}", place / 2), "unit": place % 2 }),
        Bus::Sata => json!({ "driver": "ide-hd", "bus": format!("sata.{place}") }),
        Bus::Scsi => json!({ "driver": "scsi-hd", "bus": "scsi.0", "scsi-id": place }),
        Bus::Virtio => json!({ "driver": "virtio-blk-pci" }),
        Bus::Nvme => json!({ "driver": "nvme" }),
    };
    device["drive"] = node(disk, moves).into();
    device["id"] = format!("device{disk}").into();
    device["serial"] = format!("{}-{disk}", &machine.id.simple().to_string()[..12]).into();
    // 0 is the kernel's, where one is named.
    device["bootindex"] = (disk + 1).into();
    if bus != Bus::Nvme {
        // A guest that cannot write waits, and goes on where it was when there is room again.
        device["werror"] = "stop".into();
        device["rerror"] = "stop".into();
    }
    device
}

fn netdev(machine: &Machine, index: usize) -> String {
    let card = &machine.hardware.cards[index];
    match &card.network {
        // A bridge's name was checked: no comma.
        Network::Bridge(name) => format!("bridge,id=net{index},br={name}"),
        Network::Isolated => {
            let mut text = format!("user,id=net{index},restrict=on");
            // The guest gets its own address, in a network that only it is in.
            let ipv4 = card.addresses.iter().filter_map(|address| prefix_of(address));
            if let Some((std::net::IpAddr::V4(address), length)) = ipv4.into_iter().find(|(ip, _)| ip.is_ipv4())
                && let Some((net, host)) = network_around(address, length)
            {
                text.push_str(&format!(",net={net}/{length},host={host},dhcpstart={address}"));
            }
            if index == 0 {
                // Port 0: a free one, which is asked for afterwards.
                for port in &machine.ports {
                    text.push_str(&format!(",hostfwd=tcp:127.0.0.1:0-:{port}"));
                }
            }
            text
        }
    }
}

/// The network of an address, and another address in it for its gateway.
fn network_around(address: std::net::Ipv4Addr, length: u8) -> Option<(std::net::Ipv4Addr, std::net::Ipv4Addr)> {
    if !(8..=28).contains(&length) {
        return None;
    }
    let bits = u32::from(address);
    let net = bits & (u32::MAX << (32 - length));
    // User-mode networks put a name server and leases behind the gateway's neighbours: any that are not the guest's do.
    let host = (1..=4).map(|step| net + step).find(|candidate| *candidate != bits)?;
    Some((net.into(), host.into()))
}

pub struct Firmwares {
    /// Code, and the template of its variables; needed for UEFI.
    pub uefi: Option<(PathBuf, PathBuf)>,
}

/// Where Debian and others put the firmware.
pub fn find_uefi() -> Option<(PathBuf, PathBuf)> {
    let pairs = [
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ];
    let found = pairs.into_iter().find(|(code, variables)| Path::new(code).exists() && Path::new(variables).exists());
    found.map(|(code, variables)| (code.into(), variables.into()))
}

/// The arguments, for a machine whose disks moved so often.
pub fn arguments(machine: &Machine, moves: &[u32], accelerator: Accelerator, uefi: Option<&Path>) -> Vec<String> {
    let hardware = &machine.hardware;
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    let model = if hardware.firmware == Firmware::Uefi { "q35" } else { "pc" };
    add(&["-nodefaults", "-no-user-config", "-daemonize", "-S", "-pidfile", PID]);
    add(&["-name", &machine.name, "-uuid", &machine.id.to_string()]);
    add(&["-machine", model, "-accel", accelerator.name()]);
    add(&["-cpu", if accelerator == Accelerator::Kvm { "host" } else { "max" }]);
    add(&["-m", &format!("{}M", hardware.memory_mib), "-smp", &hardware.processors.to_string()]);
    add(&["-rtc", "base=utc", "-display", "none", "-device", "VGA"]);
    // More cannot be denied: it becomes a process of its own under these rules.
    add(&["-sandbox", "on,obsolete=deny,resourcecontrol=deny"]);
    add(&["-chardev", &format!("socket,id=qmp,path={QMP},server=on,wait=off"), "-mon", "chardev=qmp,mode=control"]);
    add(&["-chardev", &format!("file,id=console,path={CONSOLE},append=on"), "-serial", "chardev:console"]);
    add(&["-device", "virtio-serial-pci", "-chardev", &format!("socket,id=agent,path={AGENT},server=on,wait=off")]);
    add(&["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
    if let Some(code) = uefi {
        let flash = |node: &str, path: &Path, read_only: bool| {
            json!({ "driver": "raw", "node-name": node, "read-only": read_only,
                "file": { "driver": "file", "filename": path } })
            .to_string()
        };
        add(&["-blockdev", &flash("uefi-code", code, true)]);
        add(&["-blockdev", &flash("uefi-variables", Path::new(VARIABLES), false)]);
        add(&["-machine", "pflash0=uefi-code,pflash1=uefi-variables"]);
    }
    if let Some(kernel) = &hardware.kernel {
        add(&["-kernel", &kernel.image.to_string_lossy()]);
        if let Some(initrd) = &kernel.initrd {
            add(&["-initrd", &initrd.to_string_lossy()]);
        }
        add(&["-append", &kernel.command_line]);
    }
    let has = |bus| (0..machine.disks.len()).any(|disk| hardware.bus(disk) == bus);
    if has(Bus::Sata) {
        add(&["-device", "ich9-ahci,id=sata"]);
    }
    if has(Bus::Scsi) {
        add(&["-device", "virtio-scsi-pci,id=scsi"]);
    }
    for (disk, place) in machine.disks.iter().enumerate() {
        let moves = moves.get(disk).copied().unwrap_or_default();
        add(&["-blockdev", &blockdev(&node(disk, moves), place).to_string()]);
        add(&["-device", &device(machine, disk, moves).to_string()]);
    }
    for (index, card) in hardware.cards.iter().enumerate() {
        add(&["-netdev", &netdev(machine, index)]);
        let driver = match card.model {
            CardModel::Virtio => "virtio-net-pci",
            CardModel::E1000e => "e1000e",
        };
        // No boot from the network, and no time lost for trying.
        let card =
            json!({ "driver": driver, "netdev": format!("net{index}"), "mac": machine.mac(index), "romfile": "" });
        add(&["-device", &card.to_string()]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Card, Hardware, Purpose};
    use uuid::Uuid;

    fn machine(buses: &[Bus], disks: usize) -> Machine {
        let card = Card {
            network: Network::Isolated,
            mac: None,
            model: CardModel::Virtio,
            addresses: vec!["10.4.0.1/16".to_owned()],
        };
        Machine {
            id: Uuid::from_u128(0x0102_0304 << 96),
            name: "web".into(),
            hardware: Hardware { buses: buses.to_vec(), cards: vec![card], ..Hardware::default() },
            disks: (0..disks).map(|disk| Place::Raw { path: format!("/d,\"{disk}").into() }).collect(),
            purpose: Purpose::Drill,
            ports: vec![22],
        }
    }

    /// The JSON devices after `-device`, and the nodes after `-blockdev`.
    fn json_after(arguments: &[String], option: &str) -> Vec<Value> {
        let pairs = arguments.windows(2).filter(|pair| pair[0] == option);
        pairs.filter_map(|pair| serde_json::from_str(&pair[1]).ok()).collect()
    }

    #[test]
    fn disks_keep_their_order_on_every_bus() {
        let buses = [Bus::Ide, Bus::Scsi, Bus::Ide, Bus::Ide, Bus::Nvme, Bus::Scsi, Bus::Sata, Bus::Virtio];
        let all = arguments(&machine(&buses, 8), &[0, 3], Accelerator::Tcg, None);
        let devices: Vec<Value> =
            json_after(&all, "-device").into_iter().filter(|device| device.get("drive").is_some()).collect();
        let order: Vec<u64> = devices.iter().map(|device| device["bootindex"].as_u64().unwrap()).collect();
        assert_eq!(order, [1, 2, 3, 4, 5, 6, 7, 8]);
        let place = |device: &Value| format!("{} {}", device["bus"], device.get("unit").unwrap_or(&device["scsi-id"]));
        assert_eq!(place(&devices[0]), "\"ide.0\" 0");
        assert_eq!(place(&devices[2]), "\"ide.0\" 1");
        assert_eq!(place(&devices[3]), "\"ide.1\" 0");
        assert_eq!(place(&devices[5]), "\"scsi.0\" 1");
        assert_eq!(devices[1]["drive"], "disk1-3");
        assert!(devices[4].get("werror").is_none() && devices[1]["werror"] == "stop");
        let nodes = json_after(&all, "-blockdev");
        assert_eq!(nodes[1]["file"]["filename"], "/d,\"1");
        assert_eq!(nodes[1]["node-name"], "disk1-3");
    }

    #[test]
    fn a_drill_reaches_nothing() {
        let all = arguments(&machine(&[], 1), &[], Accelerator::Tcg, None);
        let netdev = all.iter().find(|word| word.starts_with("user,")).unwrap();
        assert!(netdev.contains("restrict=on"), "{netdev}");
        assert!(netdev.contains("net=10.4.0.0/16,host=10.4.0.2,dhcpstart=10.4.0.1"), "{netdev}");
        assert!(netdev.ends_with("hostfwd=tcp:127.0.0.1:0-:22"), "{netdev}");
        assert!(all.iter().any(|word| word.contains("52:54:00:01:02:03")), "{all:?}");
        assert!(!all.iter().any(|word| word.starts_with("bridge")));
    }
}
