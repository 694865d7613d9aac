//! What a vCenter knows of a machine: its disks, its snapshots, where its files are.

use roxmltree::Node;

use crate::address::{DiskName, MachineName};
use crate::error::VsphereError;
use crate::session::Session;
use crate::soap::{Reference, argument, child, child_text, children, type_of};

/// Of the names that snapshots of ours have.
pub const PREFIX: &str = "tidemark-";
/// How deep folders are looked through.
const DEPTH_MAX: usize = 64;

#[derive(Clone, Debug)]
pub struct Disk {
    pub key: i64,
    pub slot: Option<DiskName>,
    pub label: String,
    pub bytes: u64,
    /// The kind of its backing, as the API calls it.
    pub backing: String,
    /// `[datastore] folder/name.vmdk`
    pub file: String,
    pub datastore: Option<Reference>,
    pub mode: String,
    pub sharing: String,
    pub uuid: String,
    pub change_id: Option<String>,
    pub is_encrypted: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    pub reference: Reference,
    pub name: String,
    pub description: String,
}

#[derive(Clone, Debug)]
pub struct Found {
    pub name: String,
    pub uuid: String,
    pub tracks: bool,
    pub can_track: bool,
    pub is_off: bool,
    /// Where it runs.
    pub host: String,
    pub snapshots: Vec<Snapshot>,
    pub disks: Vec<Disk>,
    /// Of everything that could have been done to it while it is off.
    pub trace: String,
}

#[derive(Clone, Debug)]
pub struct Datastore {
    pub name: String,
    pub free_bytes: u64,
    /// The inventory path of its data centre.
    pub datacenter: String,
}

/// Finds a machine by the name that it was given.
pub fn find(session: &Session, machine: &MachineName) -> Result<Reference, VsphereError> {
    let ask = |method: &str, arguments: &str| {
        let search = session.content()?.search.ok_or_else(|| VsphereError::Answer {
            what: "RetrieveServiceContent".to_owned(),
            reason: "it names no searchIndex".to_owned(),
        })?;
        session.query(method, &search, arguments, |answer| Ok(child(answer, "returnval").map(Reference::of)))
    };
    let found = match machine {
        MachineName::Moref(moref) => Some(Reference::new("VirtualMachine", moref)),
        MachineName::Path(path) => ask("FindByInventoryPath", &argument("inventoryPath", path))?,
        MachineName::Uuid(uuid) => {
            let by = |instance: &str| {
                let arguments =
                    argument("uuid", uuid) + &argument("vmSearch", "true") + &argument("instanceUuid", instance);
                ask("FindByUuid", &arguments)
            };
            match by("true")? {
                Some(found) => Some(found),
                None => by("false")?,
            }
        }
    };
    let found = found.filter(|found| found.kind == "VirtualMachine");
    found.ok_or_else(|| absent(session, machine))
}

pub fn absent(session: &Session, machine: &MachineName) -> VsphereError {
    VsphereError::NoMachine { server: session.server(), machine: machine.to_string() }
}

/// Looks at a machine.
pub fn look(session: &Session, machine: &Reference) -> Result<Found, VsphereError> {
    let paths = [
        "name",
        "config.instanceUuid",
        "config.uuid",
        "config.changeVersion",
        "config.changeTrackingEnabled",
        "capability.changeTrackingSupported",
        "runtime.powerState",
        "runtime.bootTime",
        "runtime.host",
        "snapshot",
        "config.hardware.device",
    ];
    session.properties(machine, &paths, |find| {
        let text_of = |path: &str| find.text(path).to_owned();
        let uuid = Some(text_of("config.instanceUuid")).filter(|uuid| !uuid.is_empty());
        let mut snapshots = Vec::new();
        if let Some(info) = find.get("snapshot") {
            children(info, "rootSnapshotList").for_each(|tree| add_snapshots(tree, &mut snapshots, 0));
        }
        let disks = find.get("config.hardware.device").map(disks_of).unwrap_or_default();
        let change_ids: Vec<&str> = disks.iter().map(|disk| disk.change_id.as_deref().unwrap_or_default()).collect();
        Ok(Found {
            name: text_of("name"),
            uuid: uuid.unwrap_or_else(|| text_of("config.uuid")),
            tracks: text_of("config.changeTrackingEnabled") == "true",
            can_track: text_of("capability.changeTrackingSupported") != "false",
            is_off: text_of("runtime.powerState") == "poweredOff",
            host: text_of("runtime.host"),
            trace: format!(
                "{} {} {}",
                text_of("config.changeVersion"),
                text_of("runtime.bootTime"),
                change_ids.join(" ")
            ),
            snapshots,
            disks,
        })
    })
}

/// The disks of a machine as they were at a snapshot.
pub fn look_at_snapshot(session: &Session, snapshot: &Reference) -> Result<Vec<Disk>, VsphereError> {
    session.properties(snapshot, &["config.hardware.device"], |find| {
        Ok(find.get("config.hardware.device").map(disks_of).unwrap_or_default())
    })
}

pub fn look_at_datastore(session: &Session, datastore: &Reference) -> Result<Datastore, VsphereError> {
    let (name, free_bytes, mut parent) =
        session.properties(datastore, &["name", "summary.freeSpace", "parent"], |find| {
            let free = find.text("summary.freeSpace").parse().unwrap_or(0);
            Ok((find.text("name").to_owned(), free, find.get("parent").map(Reference::of)))
        })?;
    // Data centres lie in folders, whose names belong to their path; the uppermost folder has none.
    let mut names: Vec<String> = Vec::new();
    let mut is_in_one = false;
    for _ in 0..DEPTH_MAX {
        let Some(above) = parent.take() else { break };
        let (name, next) = session.properties(&above, &["name", "parent"], |find| {
            Ok((find.text("name").to_owned(), find.get("parent").map(Reference::of)))
        })?;
        is_in_one |= above.kind == "Datacenter";
        if is_in_one && next.is_some() {
            names.push(name);
        }
        parent = next;
    }
    if names.is_empty() {
        let reason = format!("datastore {name} is in no data centre");
        return Err(VsphereError::Answer { what: "RetrievePropertiesEx".to_owned(), reason });
    }
    names.reverse();
    // Names have their slashes as %2f already.
    Ok(Datastore { name, free_bytes, datacenter: names.join("/") })
}

fn add_snapshots(tree: Node<'_, '_>, snapshots: &mut Vec<Snapshot>, depth: usize) {
    if depth > DEPTH_MAX {
        return;
    }
    if let Some(reference) = child(tree, "snapshot").map(Reference::of) {
        let text_of = |name| child_text(tree, name).unwrap_or_default().to_owned();
        snapshots.push(Snapshot { reference, name: text_of("name"), description: text_of("description") });
    }
    children(tree, "childSnapshotList").for_each(|below| add_snapshots(below, snapshots, depth + 1));
}

fn disks_of(devices: Node<'_, '_>) -> Vec<Disk> {
    let number = |node: Node<'_, '_>, name| child_text(node, name).and_then(|text| text.parse::<i64>().ok());
    let controllers: Vec<(i64, &'static str, i64)> = devices
        .children()
        .filter_map(|device| {
            let kind = type_of(device);
            let bus = match kind {
                "VirtualIDEController" => "ide",
                "VirtualNVMEController" => "nvme",
                _ if kind.contains("AHCI") || kind.contains("SATA") => "sata",
                _ if kind.contains("SCSI") || kind.contains("Lsi") || kind.contains("BusLogic") => "scsi",
                _ => return None,
            };
            Some((number(device, "key")?, bus, number(device, "busNumber")?))
        })
        .collect();
    let disks = devices.children().filter(|device| type_of(*device) == "VirtualDisk");
    disks
        .filter_map(|device| {
            let key = number(device, "key")?;
            let controller = number(device, "controllerKey");
            let controller = controllers.iter().find(|(key, _, _)| Some(*key) == controller);
            let slot = controller.zip(number(device, "unitNumber"));
            let backing = child(device, "backing");
            let of_backing =
                |name: &str| backing.and_then(|backing| child_text(backing, name)).unwrap_or_default().to_owned();
            let bytes = number(device, "capacityInBytes");
            let bytes = bytes.or_else(|| number(device, "capacityInKB")?.checked_mul(1024));
            Some(Disk {
                key,
                slot: slot.map(|((_, bus, number), unit)| DiskName::Slot { bus, number: *number, unit }),
                label: child(device, "deviceInfo")
                    .and_then(|info| child_text(info, "label"))
                    .unwrap_or_default()
                    .to_owned(),
                bytes: bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
                backing: backing.map(type_of).unwrap_or_default().to_owned(),
                file: of_backing("fileName"),
                datastore: backing.and_then(|backing| child(backing, "datastore")).map(Reference::of),
                mode: of_backing("diskMode"),
                sharing: of_backing("sharing"),
                uuid: of_backing("uuid").to_lowercase(),
                change_id: Some(of_backing("changeId")).filter(|id| !id.is_empty()),
                is_encrypted: backing.is_some_and(|backing| child(backing, "keyId").is_some()),
            })
        })
        .collect()
}

impl Disk {
    pub fn is(&self, name: &DiskName) -> bool {
        match name {
            DiskName::Key(key) => self.key == *key,
            slot => self.slot.as_ref() == Some(slot),
        }
    }

    /// Why it cannot be tracked and read, if it cannot.
    pub fn obstacle(&self) -> Option<String> {
        if self.backing != "VirtualDiskFlatVer2BackingInfo" {
            return Some(format!("it is kept as {}", self.backing));
        }
        if self.mode != "persistent" {
            return Some(format!("its mode is {}: snapshots leave it out", self.mode));
        }
        if !matches!(self.sharing.as_str(), "" | "sharingNone") {
            return Some("several machines write to it: none of them knows all changes".to_owned());
        }
        if self.is_encrypted {
            return Some("it is encrypted: what can be read of it is not what the machine reads".to_owned());
        }
        if self.bytes == 0 || !self.bytes.is_multiple_of(512) {
            return Some(format!("it has {} bytes, which is not a positive multiple of 512", self.bytes));
        }
        None
    }
}

impl Found {
    pub fn disk(&self, name: &DiskName) -> Result<&Disk, VsphereError> {
        self.disks.iter().find(|disk| disk.is(name)).ok_or_else(|| {
            let shown = |disk: &Disk| match &disk.slot {
                Some(slot) => format!("{slot} ({}, {})", disk.key, disk.label),
                None => format!("{} ({})", disk.key, disk.label),
            };
            let found: Vec<String> = self.disks.iter().map(shown).collect();
            let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
            VsphereError::NoDisk { machine: self.name.clone(), disk: name.to_string(), found }
        })
    }
}
