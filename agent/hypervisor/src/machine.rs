//! What a machine is, whatever runs it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub const PROCESSORS_MAX: u16 = 255;
pub const MEMORY_MIB_MIN: u64 = 32;
pub const MEMORY_MIB_MAX: u64 = 16 << 20;
pub const DISKS_MAX: usize = 64;
pub const CARDS_MAX: usize = 8;
pub const NAME_BYTES_MAX: usize = 128;
/// Two channels of two.
pub const IDE_DISKS_MAX: usize = 4;
pub const SATA_DISKS_MAX: usize = 6;

/// The description of a machine: the same wherever its disks are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hardware {
    pub firmware: Firmware,
    pub processors: u16,
    pub memory_mib: u64,
    /// Of the disks in their order, which is the boot order. Disks past its end take the last one's, or [`Bus::Virtio`].
    pub buses: Vec<Bus>,
    pub cards: Vec<Card>,
    /// Started directly instead of what a disk's boot loader names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Kernel>,
}

impl Default for Hardware {
    fn default() -> Self {
        Self {
            firmware: Firmware::Bios,
            processors: 1,
            memory_mib: 1024,
            buses: Vec::new(),
            cards: Vec::new(),
            kernel: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    Bios,
    Uefi,
}

/// How a disk is connected: what the guest's drivers see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bus {
    Ide,
    Sata,
    Scsi,
    Virtio,
    Nvme,
}

impl std::str::FromStr for Bus {
    type Err = InvalidMachine;

    fn from_str(text: &str) -> Result<Self, InvalidMachine> {
        match text {
            "ide" => Ok(Bus::Ide),
            "sata" => Ok(Bus::Sata),
            "scsi" => Ok(Bus::Scsi),
            "virtio" => Ok(Bus::Virtio),
            "nvme" => Ok(Bus::Nvme),
            _ => Err(InvalidMachine::Word { what: "disk bus", words: "ide, sata, scsi, virtio, nvme" }),
        }
    }
}

impl std::str::FromStr for Firmware {
    type Err = InvalidMachine;

    fn from_str(text: &str) -> Result<Self, InvalidMachine> {
        match text {
            "bios" => Ok(Firmware::Bios),
            "uefi" => Ok(Firmware::Uefi),
            _ => Err(InvalidMachine::Word { what: "firmware", words: "bios, uefi" }),
        }
    }
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    pub network: Network,
    /// `52:54:00:12:34:56`; absent: one that follows from the machine's id.
    #[serde(default)]
    pub mac: Option<String>,
    #[serde(default)]
    pub model: CardModel,
    /// `10.0.4.7/24`: what the isolated network's DHCP gives to the guest. One address is given, the others are noted.
    #[serde(default)]
    pub addresses: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CardModel {
    #[default]
    Virtio,
    E1000e,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Reaches nothing and nobody: not the host, not other machines. What drills use.
    Isolated,
    /// A bridge of the host.
    Bridge(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    pub image: PathBuf,
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    #[serde(default)]
    pub command_line: String,
}

/// Where a disk's content is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Place {
    /// A plain image.
    Raw { path: PathBuf },
    /// A block device of the host.
    Device { path: PathBuf },
    /// An NBD export on a Unix socket.
    Nbd { socket: PathBuf, export: String },
}

impl Place {
    /// From `nbd+unix:///EXPORT?socket=PATH`, as served points and protected disks print it.
    pub fn from_nbd_uri(uri: &str) -> Result<Self, InvalidMachine> {
        let parts = uri.strip_prefix("nbd+unix:///").and_then(|rest| rest.split_once("?socket="));
        let parsed = parts.and_then(|(export, socket)| Some((unescape(export)?, unescape(socket)?)));
        let Some((export, socket)) = parsed else {
            return Err(InvalidMachine::Uri { uri: uri.to_owned() });
        };
        Ok(Place::Nbd { socket: socket.into(), export })
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

/// A machine that a hypervisor can run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub id: Uuid,
    pub name: String,
    pub hardware: Hardware,
    /// Of the disks in their order.
    pub disks: Vec<Place>,
    pub purpose: Purpose,
    /// TCP ports of the guest, on its first card, that can be reached from the host for a sign of life.
    #[serde(default)]
    pub ports: Vec<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Isolated, and gone with its scratch layer.
    Drill,
    /// Production.
    Failover,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMachine {
    #[error("{what} is {value}, but must be between {least} and {most}")]
    OutOfRange { what: &'static str, value: u64, least: u64, most: u64 },
    #[error("{count} disks on the {bus} bus are more than the {most} that fit")]
    BusFull { bus: &'static str, count: usize, most: usize },
    #[error("UEFI machines have no IDE bus")]
    IdeOnUefi,
    #[error("{text:?} is no name of a machine")]
    Name { text: String },
    #[error("{text:?} is no hardware address")]
    Mac { text: String },
    #[error("{text:?} is no address with the length of its prefix")]
    Address { text: String },
    #[error("{text:?} is no name of a bridge")]
    Bridge { text: String },
    #[error("{path} is no full path")]
    Path { path: PathBuf },
    #[error("{uri:?} is no NBD address of a Unix socket")]
    Uri { uri: String },
    #[error("that is no {what}")]
    Word { what: &'static str, words: &'static str },
    #[error("the machine of a drill has a card on a network that is not isolated")]
    NotIsolated,
}

impl InvalidMachine {
    pub fn help(&self) -> &'static str {
        match self {
            InvalidMachine::OutOfRange { .. } => "choose a value in this range",
            InvalidMachine::BusFull { .. } => "put some of the disks on another bus, such as scsi",
            InvalidMachine::IdeOnUefi => "use scsi, sata, virtio or nvme, or firmware bios",
            InvalidMachine::Name { .. } => "use letters, digits, dots, dashes and underscores",
            InvalidMachine::Mac { .. } => "write it as 52:54:00:12:34:56; the first number must be even",
            InvalidMachine::Address { .. } => "write it as 10.0.4.7/24",
            InvalidMachine::Bridge { .. } => "see `ip link show type bridge`",
            InvalidMachine::Path { .. } => "paths begin with a slash",
            InvalidMachine::Uri { .. } => "it begins with nbd+unix:///",
            InvalidMachine::Word { words, .. } => words,
            InvalidMachine::NotIsolated => "drills run in isolated networks only",
        }
    }
}

impl Hardware {
    /// Of the disk at this place of the order.
    pub fn bus(&self, index: usize) -> Bus {
        self.buses.get(index).or(self.buses.last()).copied().unwrap_or(Bus::Virtio)
    }

    /// The same machine in networks that reach nothing.
    pub fn isolated(mut self) -> Self {
        self.cards.iter_mut().for_each(|card| card.network = Network::Isolated);
        self
    }

    /// Whether a machine with so many disks can be made.
    pub fn check(&self, disks: usize) -> Result<(), InvalidMachine> {
        in_range("the number of processors", self.processors.into(), 1, PROCESSORS_MAX.into())?;
        in_range("memory in MiB", self.memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX)?;
        in_range("the number of disks", disks as u64, 0, DISKS_MAX as u64)?;
        in_range("the number of network cards", self.cards.len() as u64, 0, CARDS_MAX as u64)?;
        let on = |bus| (0..disks).filter(|index| self.bus(*index) == bus).count();
        if self.firmware == Firmware::Uefi && on(Bus::Ide) > 0 {
            return Err(InvalidMachine::IdeOnUefi);
        }
        for (bus, name, most) in [(Bus::Ide, "ide", IDE_DISKS_MAX), (Bus::Sata, "sata", SATA_DISKS_MAX)] {
            if on(bus) > most {
                return Err(InvalidMachine::BusFull { bus: name, count: on(bus), most });
            }
        }
        self.cards.iter().try_for_each(Card::check)?;
        if let Some(kernel) = &self.kernel {
            let paths = std::iter::once(&kernel.image).chain(&kernel.initrd);
            paths.into_iter().try_for_each(|path| full_path(path))?;
        }
        Ok(())
    }
}

impl Card {
    fn check(&self) -> Result<(), InvalidMachine> {
        if let Some(mac) = &self.mac {
            let bytes: Option<Vec<u8>> = mac
                .split(':')
                .map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
                .collect();
            if !bytes.is_some_and(|bytes| bytes.len() == 6 && bytes[0] & 1 == 0) {
                return Err(InvalidMachine::Mac { text: mac.clone() });
            }
        }
        for address in &self.addresses {
            prefix_of(address).ok_or_else(|| InvalidMachine::Address { text: address.clone() })?;
        }
        if let Network::Bridge(name) = &self.network {
            // As the kernel takes interface names.
            let fine = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-' | '_');
            if name.is_empty() || name.len() > 15 || !name.chars().all(fine) {
                return Err(InvalidMachine::Bridge { text: name.clone() });
            }
        }
        Ok(())
    }
}

/// An address and the length of its network's prefix.
pub fn prefix_of(text: &str) -> Option<(std::net::IpAddr, u8)> {
    let (address, length) = text.split_once('/')?;
    let address: std::net::IpAddr = address.parse().ok()?;
    let length: u8 = length.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    (1..=most).contains(&length).then_some((address, length))
}

impl Machine {
    pub fn check(&self) -> Result<(), InvalidMachine> {
        let fine = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-' | '_');
        if self.name.is_empty() || self.name.len() > NAME_BYTES_MAX || !self.name.chars().all(fine) {
            return Err(InvalidMachine::Name { text: self.name.clone() });
        }
        self.hardware.check(self.disks.len())?;
        for disk in &self.disks {
            match disk {
                Place::Raw { path } | Place::Device { path } | Place::Nbd { socket: path, .. } => full_path(path)?,
            }
        }
        let isolated = |card: &Card| card.network == Network::Isolated;
        if self.purpose == Purpose::Drill && !self.hardware.cards.iter().all(isolated) {
            return Err(InvalidMachine::NotIsolated);
        }
        Ok(())
    }

    /// Of a card: its own, or one that follows from the machine's id, in the range of local ones.
    pub fn mac(&self, index: usize) -> String {
        if let Some(mac) = self.hardware.cards.get(index).and_then(|card| card.mac.clone()) {
            return mac;
        }
        let id = self.id.as_bytes();
        format!("52:54:00:{:02x}:{:02x}:{:02x}", id[0], id[1], id[2] ^ index as u8)
    }
}

fn in_range(what: &'static str, value: u64, least: u64, most: u64) -> Result<(), InvalidMachine> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(InvalidMachine::OutOfRange { what, value, least, most })
}

fn full_path(path: &std::path::Path) -> Result<(), InvalidMachine> {
    if path.is_absolute() { Ok(()) } else { Err(InvalidMachine::Path { path: path.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            id: Uuid::from_u128(7),
            name: "web".to_owned(),
            hardware: Hardware::default(),
            disks: vec![Place::Raw { path: "/disk".into() }],
            purpose: Purpose::Failover,
            ports: Vec::new(),
        }
    }

    #[test]
    fn what_cannot_be_made_is_named() {
        assert_eq!(machine().check(), Ok(()));
        let changed = |change: &dyn Fn(&mut Machine)| {
            let mut machine = machine();
            change(&mut machine);
            machine.check().unwrap_err()
        };
        assert!(matches!(changed(&|m| m.hardware.processors = 0), InvalidMachine::OutOfRange { .. }));
        assert!(matches!(changed(&|m| m.hardware.memory_mib = 1), InvalidMachine::OutOfRange { .. }));
        assert!(matches!(changed(&|m| m.name = "a,b".into()), InvalidMachine::Name { .. }));
        assert!(matches!(changed(&|m| m.name = "../a".into()), InvalidMachine::Name { .. }));
        assert!(matches!(changed(&|m| m.disks = vec![Place::Raw { path: "x".into() }]), InvalidMachine::Path { .. }));
        let ide = |m: &mut Machine| {
            m.hardware.buses = vec![Bus::Ide];
            m.disks = vec![Place::Raw { path: "/d".into() }; 5];
        };
        assert_eq!(changed(&ide), InvalidMachine::BusFull { bus: "ide", count: 5, most: 4 });
        let uefi = |m: &mut Machine| {
            m.hardware.firmware = Firmware::Uefi;
            m.hardware.buses = vec![Bus::Ide];
        };
        assert_eq!(changed(&uefi), InvalidMachine::IdeOnUefi);
        let card = |network, mac: Option<&str>, address: &str| Card {
            network,
            mac: mac.map(str::to_owned),
            model: CardModel::Virtio,
            addresses: vec![address.to_owned()],
        };
        let bridge = Network::Bridge("br0".to_owned());
        let odd = card(bridge.clone(), Some("53:54:00:00:00:01"), "10.0.0.1/8");
        assert!(matches!(changed(&|m| m.hardware.cards = vec![odd.clone()]), InvalidMachine::Mac { .. }));
        let no_prefix = card(bridge.clone(), None, "10.0.0.1");
        assert!(matches!(changed(&|m| m.hardware.cards = vec![no_prefix.clone()]), InvalidMachine::Address { .. }));
        let option = card(Network::Bridge("br0,helper=/x".to_owned()), None, "10.0.0.1/8");
        assert!(matches!(changed(&|m| m.hardware.cards = vec![option.clone()]), InvalidMachine::Bridge { .. }));
        let open = card(bridge, None, "10.0.0.1/8");
        let drill = |m: &mut Machine| {
            m.purpose = Purpose::Drill;
            m.hardware.cards = vec![open.clone()];
        };
        assert_eq!(changed(&drill), InvalidMachine::NotIsolated);
        let mut isolated = machine();
        drill(&mut isolated);
        isolated.hardware = isolated.hardware.isolated();
        assert_eq!(isolated.check(), Ok(()));
    }

    #[test]
    fn addresses_of_served_points_are_places() {
        let place = Place::from_nbd_uri("nbd+unix:///abc-0?socket=/run/a%20b/points.sock").unwrap();
        assert_eq!(place, Place::Nbd { socket: "/run/a b/points.sock".into(), export: "abc-0".into() });
        for bad in ["nbd://host/x", "nbd+unix:///x", "nbd+unix:///x?socket=%zz", "nbd+unix:///x?socket=%e"] {
            assert!(Place::from_nbd_uri(bad).is_err(), "{bad}");
        }
    }
}
