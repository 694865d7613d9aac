//! How a disk of a machine is named: see the crate's own page.

use std::fmt;
use std::path::Path;

use crate::error::VsphereError;

pub const SCHEME: &str = "vsphere:";

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum MachineName {
    Path(String),
    Uuid(String),
    Moref(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskName {
    Key(i64),
    Slot { bus: &'static str, number: i64, unit: i64 },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskAddress {
    pub connection: String,
    pub machine: MachineName,
    pub disk: DiskName,
}

const BUSES: [&str; 4] = ["scsi", "nvme", "sata", "ide"];

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MachineName::Path(path) => f.write_str(path),
            MachineName::Uuid(uuid) => write!(f, "uuid={uuid}"),
            MachineName::Moref(moref) => write!(f, "moref={moref}"),
        }
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskName::Key(key) => write!(f, "{key}"),
            DiskName::Slot { bus, number, unit } => write!(f, "{bus}{number}:{unit}"),
        }
    }
}

impl DiskName {
    fn parse(text: &str) -> Option<Self> {
        if let Ok(key) = text.parse() {
            return Some(DiskName::Key(key));
        }
        BUSES.iter().find_map(|bus| {
            let (number, unit) = text.strip_prefix(bus)?.split_once(':')?;
            Some(DiskName::Slot { bus, number: number.parse().ok()?, unit: unit.parse().ok()? })
        })
    }
}

impl DiskAddress {
    pub fn of(path: &Path) -> Result<Self, VsphereError> {
        let wrong = || VsphereError::Address { address: path.display().to_string() };
        let text = path.to_str().and_then(|text| text.strip_prefix(SCHEME)).ok_or_else(wrong)?;
        let (connection, rest) = text.split_once('/').ok_or_else(wrong)?;
        let (machine, disk) = rest.rsplit_once('/').ok_or_else(wrong)?;
        // It becomes the name of a file.
        let is_plain = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
        if connection.is_empty() || connection.starts_with('.') || !connection.chars().all(is_plain) {
            return Err(wrong());
        }
        let machine = match machine.split_once('=') {
            Some(("uuid", uuid)) => MachineName::Uuid(uuid.to_lowercase()),
            Some(("moref", moref)) => MachineName::Moref(moref.to_owned()),
            _ => MachineName::Path(machine.to_owned()),
        };
        if matches!(&machine, MachineName::Path(name) | MachineName::Uuid(name) | MachineName::Moref(name) if name.is_empty())
        {
            return Err(wrong());
        }
        let disk = DiskName::parse(disk).ok_or_else(wrong)?;
        Ok(Self { connection: connection.to_owned(), machine, disk })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_by_machine_and_place() {
        let of = |text: &str| DiskAddress::of(Path::new(text));
        let address = of("vsphere:lab/DC0/vm/shop/web/scsi0:1").unwrap();
        assert_eq!(address.connection, "lab");
        assert_eq!(address.machine, MachineName::Path("DC0/vm/shop/web".into()));
        assert_eq!(address.disk, DiskName::Slot { bus: "scsi", number: 0, unit: 1 });
        assert_eq!(of("vsphere:lab/moref=vm-42/2000").unwrap().machine, MachineName::Moref("vm-42".into()));
        let uuid = of("vsphere:lab/uuid=42AB-00/2000").unwrap();
        assert_eq!((uuid.machine, uuid.disk), (MachineName::Uuid("42ab-00".into()), DiskName::Key(2000)));
        for wrong in [
            "",
            "/dev/sda",
            "vsphere:lab",
            "vsphere:lab/scsi0:0",
            "vsphere:../etc/web/2000",
            "vsphere:.lab/web/2000",
            "vsphere:/web/2000",
            "vsphere:lab/web/usb0:0",
            "vsphere:lab/web/scsi0",
            "vsphere:lab/moref=/2000",
        ] {
            assert!(of(wrong).is_err(), "{wrong:?}");
        }
    }
}
