//! What disks a host has: found by its agent, kept by the configuration server. Texts and lists are bounded, and whoever sends what is
//! beyond that is refused: an agent makes it fit first ([`Inventory::fit`]).

use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, Timestamp};

use super::convert::WireError;
use super::{
    INVENTORY_DISKS_MAX, INVENTORY_TEXT_BYTES_MAX, INVENTORY_USES_MAX, INVENTORY_WAYS_MAX, INVENTORY_WORD_BYTES_MAX,
    wire,
};

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Inventory {
    /// When it was found to be so, by the host's clock.
    pub time: Timestamp,
    pub disks: Vec<HostDisk>,
    /// Disks that are more than the list holds, or whose names are too long.
    pub left_out: u32,
}

/// A disk of a host, protected or not. Kinds are words, not an enumeration: a newer agent may know more of them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostDisk {
    /// As it is named to protect it.
    pub path: String,
    pub bytes: u64,
    pub kind: String,
    /// Its model, or what is behind it.
    pub description: String,
    /// What tells it from others of its kind.
    pub serial: String,
    /// What it holds, as far as that is known without reading it.
    pub content: String,
    pub read_only: bool,
    pub removable: bool,
    pub uses: Vec<DiskUse>,
    /// By one of `uses`, or of those of its partitions.
    pub in_use: bool,
    /// The protected disk that it is.
    pub disk: Option<DiskId>,
    /// None where it is protected.
    pub ways: Vec<DiskWay>,
}

/// Who uses a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskUse {
    /// `file_system`, `swap`, `partition` or `holder`.
    pub kind: String,
    /// A mount point, or the path of a device.
    pub at: String,
}

/// A way of capture.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskWay {
    pub via: String,
    /// Why the disk cannot be protected in this way now; empty: it can.
    pub obstacle: String,
}

impl Inventory {
    /// Makes it such that it is taken: what is too long is cut, a disk whose path is too long is left out and counted.
    pub fn fit(&mut self) {
        let known = self.disks.len();
        self.disks.retain(|disk| !disk.path.is_empty() && is_plain(&disk.path, INVENTORY_TEXT_BYTES_MAX));
        self.disks.truncate(INVENTORY_DISKS_MAX);
        let left_out = u32::try_from(known - self.disks.len()).unwrap_or(u32::MAX);
        self.left_out = self.left_out.saturating_add(left_out);
        for disk in &mut self.disks {
            disk.uses.truncate(INVENTORY_USES_MAX);
            disk.ways.truncate(INVENTORY_WAYS_MAX);
            let texts = [&mut disk.description, &mut disk.serial, &mut disk.content];
            let uses = disk.uses.iter_mut().map(|of| &mut of.at);
            let ways = disk.ways.iter_mut().map(|way| &mut way.obstacle);
            texts.into_iter().chain(uses).chain(ways).for_each(cut);
        }
    }
}

/// No control characters, and no longer than may be told.
fn cut(text: &mut String) {
    if text.chars().any(char::is_control) {
        *text = text.replace(char::is_control, "?");
    }
    if text.len() > INVENTORY_TEXT_BYTES_MAX {
        let mut end = INVENTORY_TEXT_BYTES_MAX - "…".len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
}

fn is_plain(text: &str, most: usize) -> bool {
    text.len() <= most && !text.chars().any(char::is_control)
}

type Checked<T> = Result<T, WireError>;

/// What is shown to people on a terminal: a control character has no place in it.
fn plain(text: String, field: &'static str) -> Checked<String> {
    match text.len() {
        have if have > INVENTORY_TEXT_BYTES_MAX => {
            Err(WireError::TooLong { field, have, most: INVENTORY_TEXT_BYTES_MAX })
        }
        _ if !is_plain(&text, INVENTORY_TEXT_BYTES_MAX) => Err(WireError::Invalid(field)),
        _ => Ok(text),
    }
}

fn word(text: String, field: &'static str) -> Checked<String> {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if text.is_empty() || text.len() > INVENTORY_WORD_BYTES_MAX || !text.bytes().all(is_word) {
        return Err(WireError::Invalid(field));
    }
    Ok(text)
}

fn list<T, U>(values: Vec<T>, field: &'static str, most: usize, convert: impl Fn(T) -> Checked<U>) -> Checked<Vec<U>> {
    if values.len() > most {
        return Err(WireError::TooLong { field, have: values.len(), most });
    }
    values.into_iter().map(convert).collect()
}

impl From<&Inventory> for wire::Inventory {
    fn from(from: &Inventory) -> Self {
        let disk = |disk: &HostDisk| wire::HostDisk {
            path: disk.path.clone(),
            bytes: disk.bytes,
            kind: disk.kind.clone(),
            description: disk.description.clone(),
            serial: disk.serial.clone(),
            content: disk.content.clone(),
            read_only: disk.read_only,
            removable: disk.removable,
            uses: disk.uses.iter().map(|of| wire::DiskUse { kind: of.kind.clone(), at: of.at.clone() }).collect(),
            in_use: disk.in_use,
            disk: disk.disk.map_or_else(Vec::new, DiskId::to_vec),
            ways: disk
                .ways
                .iter()
                .map(|way| wire::DiskWay { via: way.via.clone(), obstacle: way.obstacle.clone() })
                .collect(),
        };
        wire::Inventory { time_ns: from.time.0, disks: from.disks.iter().map(disk).collect(), left_out: from.left_out }
    }
}

impl TryFrom<wire::Inventory> for Inventory {
    type Error = WireError;

    fn try_from(from: wire::Inventory) -> Checked<Self> {
        let disks = list(from.disks, "disks of the inventory", INVENTORY_DISKS_MAX, HostDisk::try_from)?;
        Ok(Inventory { time: Timestamp(from.time_ns), disks, left_out: from.left_out })
    }
}

impl TryFrom<wire::HostDisk> for HostDisk {
    type Error = WireError;

    fn try_from(from: wire::HostDisk) -> Checked<Self> {
        let path = plain(from.path, "path")?;
        if path.is_empty() {
            return Err(WireError::Invalid("path"));
        }
        let disk = match from.disk.as_slice() {
            [] => None,
            id => Some(DiskId::from_slice(id).ok_or(WireError::Invalid("disk"))?),
        };
        Ok(HostDisk {
            path,
            bytes: from.bytes,
            kind: word(from.kind, "kind of a disk")?,
            description: plain(from.description, "description")?,
            serial: plain(from.serial, "serial")?,
            content: plain(from.content, "content")?,
            read_only: from.read_only,
            removable: from.removable,
            uses: list(from.uses, "uses", INVENTORY_USES_MAX, |of| {
                Ok(DiskUse { kind: word(of.kind, "kind of a use")?, at: plain(of.at, "place of a use")? })
            })?,
            in_use: from.in_use,
            disk,
            ways: list(from.ways, "ways", INVENTORY_WAYS_MAX, |way| {
                Ok(DiskWay { via: word(way.via, "via")?, obstacle: plain(way.obstacle, "obstacle")? })
            })?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str) -> HostDisk {
        HostDisk {
            path: path.into(),
            bytes: 4096,
            kind: "disk".into(),
            description: "QEMU HARDDISK".into(),
            serial: "s1".into(),
            content: "ext4".into(),
            read_only: true,
            removable: true,
            uses: vec![DiskUse { kind: "file_system".into(), at: "/srv".into() }],
            in_use: true,
            disk: Some(DiskId::random()),
            ways: vec![DiskWay { via: "bpf".into(), obstacle: "no".into() }],
        }
    }

    #[test]
    fn an_inventory_survives_the_wire() {
        let told = Inventory { time: Timestamp(7), disks: vec![disk("/dev/sda"), HostDisk::default()], left_out: 3 };
        let mut sent = wire::Inventory::from(&told);
        assert_eq!(Inventory::try_from(sent.clone()), Err(WireError::Invalid("path")), "a disk without a path");
        sent.disks.pop();
        assert_eq!(Inventory::try_from(sent).unwrap(), Inventory { disks: told.disks[..1].to_vec(), ..told });
    }

    #[test]
    fn what_is_hostile_is_refused_and_what_fits_is_taken() {
        let long = "x".repeat(INVENTORY_TEXT_BYTES_MAX + 1);
        let bad: [fn(&mut wire::HostDisk, &str); 9] = [
            |disk, long| disk.path = long.into(),
            |disk, _| disk.path = "/dev/\u{1b}[2Jsda".into(),
            |disk, long| disk.description = long.into(),
            |disk, _| disk.kind = "../etc".into(),
            |disk, _| disk.kind = "x".repeat(INVENTORY_WORD_BYTES_MAX + 1),
            |disk, _| disk.disk = vec![1; 3],
            |disk, _| disk.uses = vec![disk.uses[0].clone(); INVENTORY_USES_MAX + 1],
            |disk, _| disk.uses[0].at = "/a\nb".into(),
            |disk, _| disk.ways = vec![disk.ways[0].clone(); INVENTORY_WAYS_MAX + 1],
        ];
        let sound = wire::Inventory::from(&Inventory { disks: vec![disk("/dev/sda")], ..Default::default() });
        assert!(Inventory::try_from(sound.clone()).is_ok());
        for (number, spoil) in bad.into_iter().enumerate() {
            let mut sent = sound.clone();
            spoil(&mut sent.disks[0], &long);
            assert!(Inventory::try_from(sent).is_err(), "{number}");
        }
        let many = wire::Inventory { disks: vec![sound.disks[0].clone(); INVENTORY_DISKS_MAX + 1], ..sound };
        assert!(matches!(Inventory::try_from(many), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn an_agent_makes_whatever_it_found_fit() {
        let mut found = Inventory { disks: vec![disk("/dev/sda"); INVENTORY_DISKS_MAX + 5], ..Default::default() };
        found.disks[0].path = format!("/dev/{}", "x".repeat(INVENTORY_TEXT_BYTES_MAX));
        found.disks[1].path = "/dev/a\nb".into();
        found.disks[2].description = "ü".repeat(INVENTORY_TEXT_BYTES_MAX);
        found.disks[2].uses = vec![DiskUse { kind: "holder".into(), at: "/a\tb".into() }; INVENTORY_USES_MAX + 1];
        found.fit();
        assert_eq!((found.disks.len(), found.left_out), (INVENTORY_DISKS_MAX, 5));
        assert!(found.disks[0].description.ends_with('…') && found.disks[0].uses[0].at == "/a?b");
        assert_eq!(Inventory::try_from(wire::Inventory::from(&found)).unwrap(), found);
        assert!(prost::Message::encoded_len(&wire::Inventory::from(&found)) < 8 << 20, "a message may have 16 MiB");
    }
}
