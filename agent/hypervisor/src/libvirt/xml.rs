//! A machine as libvirt describes it.

use std::fmt::Write;
use std::path::Path;

use crate::error::HypervisorError;
use crate::machine::{Bus, CardModel, Firmware, Machine, Network, Place};

/// Whose metadata it is: no address, a name.
pub const METADATA: &str = "urn:tidemark:machine";

pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            other => escaped.push(other),
        }
    }
    escaped
}

pub fn unescape(text: &str) -> String {
    let pairs = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    pairs.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// The name of the network that only this machine is on.
pub fn network_name(machine: &Machine) -> String {
    format!("tidemark-{}", &machine.id.simple().to_string()[..8])
}

/// A network without addresses and without a way out: not even the host is on it.
pub fn network(machine: &Machine) -> String {
    let id = machine.id.simple().to_string();
    format!(
        "<network><name>{}</name><bridge name='tm{}' stp='off' delay='0'/></network>",
        network_name(machine),
        &id[..8]
    )
}

/// What the guest's disk is called at libvirt.
pub fn target(machine: &Machine, disk: usize) -> Result<String, HypervisorError> {
    let bus = machine.hardware.bus(disk);
    let prefix = match bus {
        Bus::Ide => "hd",
        Bus::Sata | Bus::Scsi => "sd",
        Bus::Virtio => "vd",
        Bus::Nvme => {
            return Err(HypervisorError::Unsupported { hypervisor: "libvirt", what: "connect a disk by NVMe" });
        }
    };
    // Disks of both buses that share a prefix share its letters.
    let shares = |other: Bus| match bus {
        Bus::Sata | Bus::Scsi => matches!(other, Bus::Sata | Bus::Scsi),
        _ => other == bus,
    };
    let mut number = (0..disk).filter(|other| shares(machine.hardware.bus(*other))).count();
    let mut letters = String::new();
    loop {
        letters.insert(0, char::from(b'a' + (number % 26) as u8));
        match number / 26 {
            0 => return Ok(format!("{prefix}{letters}")),
            rest => number = rest - 1,
        }
    }
}

/// `<disk>` with its source, as a machine has it and as a copy's destination is told.
pub fn disk(machine: &Machine, disk: usize, place: &Place, with_boot: bool) -> Result<String, HypervisorError> {
    let (kind, source) = match place {
        Place::Raw { path } => ("file", format!("<source file='{}'/>", escape(&path.to_string_lossy()))),
        Place::Device { path } => ("block", format!("<source dev='{}'/>", escape(&path.to_string_lossy()))),
        Place::Nbd { socket, export } => {
            let (export, socket) = (escape(export), escape(&socket.to_string_lossy()));
            let host = format!("<host transport='unix' socket='{socket}'/>");
            ("network", format!("<source protocol='nbd' name='{export}'>{host}</source>"))
        }
    };
    let bus = match machine.hardware.bus(disk) {
        Bus::Ide => "ide",
        Bus::Sata => "sata",
        Bus::Scsi => "scsi",
        Bus::Virtio | Bus::Nvme => "virtio",
    };
    let target = target(machine, disk)?;
    let boot = if with_boot { format!("<boot order='{}'/>", disk + 1) } else { String::new() };
    let driver = "<driver name='qemu' type='raw' discard='unmap' error_policy='stop' rerror_policy='stop'/>";
    Ok(format!("<disk type='{kind}' device='disk'>{driver}{source}<target dev='{target}' bus='{bus}'/>{boot}</disk>"))
}

/// The machine; `virt` is `kvm` or `qemu`, `console` the file of its first serial line.
pub fn domain(machine: &Machine, virt: &str, console: &Path) -> Result<String, HypervisorError> {
    let hardware = &machine.hardware;
    let json = serde_json::to_string(machine).expect("plain data");
    let mut xml = String::new();
    let mut add = |text: &str| xml.push_str(text);
    add(&format!("<domain type='{virt}'><name>{}</name><uuid>{}</uuid>", escape(&machine.name), machine.id));
    add(&format!("<metadata><tm:machine xmlns:tm='{METADATA}'>{}</tm:machine></metadata>", escape(&json)));
    add(&format!("<memory unit='MiB'>{}</memory><vcpu>{}</vcpu>", hardware.memory_mib, hardware.processors));
    let (model, firmware) = match hardware.firmware {
        Firmware::Bios => ("pc", ""),
        Firmware::Uefi => ("q35", " firmware='efi'"),
    };
    add(&format!("<os{firmware}><type arch='x86_64' machine='{model}'>hvm</type>"));
    if let Some(kernel) = &hardware.kernel {
        add(&format!("<kernel>{}</kernel>", escape(&kernel.image.to_string_lossy())));
        if let Some(initrd) = &kernel.initrd {
            add(&format!("<initrd>{}</initrd>", escape(&initrd.to_string_lossy())));
        }
        add(&format!("<cmdline>{}</cmdline>", escape(&kernel.command_line)));
    }
    add("</os><features><acpi/><apic/></features><clock offset='utc'/><on_reboot>restart</on_reboot>");
    add("<on_crash>destroy</on_crash><devices>");
    if (0..machine.disks.len()).any(|disk| hardware.bus(disk) == Bus::Scsi) {
        add("<controller type='scsi' model='virtio-scsi'/>");
    }
    for (index, place) in machine.disks.iter().enumerate() {
        add(&disk(machine, index, place, true)?);
    }
    for (index, card) in hardware.cards.iter().enumerate() {
        let model = match card.model {
            CardModel::Virtio => "virtio",
            CardModel::E1000e => "e1000e",
        };
        let (kind, source) = match &card.network {
            Network::Isolated => ("network", format!("<source network='{}'/>", network_name(machine))),
            Network::Bridge(name) => ("bridge", format!("<source bridge='{}'/>", escape(name))),
        };
        let mac = machine.mac(index);
        add(&format!("<interface type='{kind}'>{source}<mac address='{mac}'/><model type='{model}'/></interface>"));
    }
    add(&format!("<serial type='file'><source path='{}'/></serial>", escape(&console.to_string_lossy())));
    add("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>");
    add("<graphics type='vnc' autoport='yes' listen='127.0.0.1'/><video><model type='vga'/></video>");
    add("</devices></domain>");
    let _ = writeln!(xml);
    Ok(xml)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Hardware, Purpose};
    use uuid::Uuid;

    #[test]
    fn names_and_paths_stay_text() {
        let machine = Machine {
            id: Uuid::from_u128(1),
            name: "web".into(),
            hardware: Hardware { buses: vec![Bus::Sata, Bus::Scsi, Bus::Virtio], ..Hardware::default() },
            disks: vec![
                Place::Raw { path: "/a'/><evil/>".into() },
                Place::Nbd { socket: "/run/x".into(), export: "a&b".into() },
                Place::Device { path: "/dev/sda".into() },
            ],
            purpose: Purpose::Drill,
            ports: Vec::new(),
        };
        let xml = domain(&machine, "qemu", Path::new("/c.log")).unwrap();
        assert!(!xml.contains("<evil/>") && xml.contains("name='a&amp;b'"), "{xml}");
        for target in ["dev='sda' bus='sata'", "dev='sdb' bus='scsi'", "dev='vda' bus='virtio'"] {
            assert!(xml.contains(target), "{target} in {xml}");
        }
        let from = xml.find("'>{").unwrap() + 2;
        let json = unescape(&xml[from..from + xml[from..].find("</tm:machine>").unwrap()]);
        assert_eq!(serde_json::from_str::<Machine>(&json).unwrap(), machine);
        let many =
            Machine { hardware: Hardware::default(), disks: vec![Place::Raw { path: "/d".into() }; 30], ..machine };
        assert_eq!((target(&many, 25).unwrap(), target(&many, 26).unwrap()), ("vdz".into(), "vdaa".into()));
    }
}
