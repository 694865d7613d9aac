//! The chain of bitmaps of one disk, and what it proves: see the crate's own page for the names.

use std::fmt;

use tidemark_base::DiskId;

use crate::nodes::Bitmap;

/// Of all names that we give in a QEMU: nodes, jobs, exports, bitmaps.
pub const PREFIX: &str = "tidemark-";
const UNARMED: &str = "unarmed";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapName {
    pub disk: DiskId,
    /// The session that saw everything since, if one did.
    pub session: Option<[u8; 16]>,
    pub number: u64,
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}.", self.disk)?;
        match self.session {
            Some(session) => write!(f, "{:032x}", u128::from_be_bytes(session))?,
            None => f.write_str(UNARMED)?,
        }
        write!(f, ".{}", self.number)
    }
}

impl BitmapName {
    pub fn parse(name: &str, disk: DiskId) -> Option<Self> {
        let rest = name.strip_prefix(PREFIX)?.strip_prefix(&disk.to_string())?.strip_prefix('.')?;
        let (session, number) = rest.split_once('.')?;
        let session = match session {
            UNARMED => None,
            session if session.len() == 32 => Some(u128::from_str_radix(session, 16).ok()?.to_be_bytes()),
            _ => return None,
        };
        Some(Self { disk, session, number: number.parse().ok()? })
    }

    pub fn next(self) -> Self {
        Self { number: self.number + 1, ..self }
    }
}

/// Whose union is everything that changed since the oldest one began.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    pub live: BitmapName,
    pub granularity: u64,
    /// Of all of them together, in bytes; the same granule may count twice.
    pub bytes: u64,
    /// What was claimed, and not released.
    pub frozen: Vec<BitmapName>,
}

/// What the bitmaps of a node that are named after a disk prove, or why they prove nothing.
pub fn judge(disk: DiskId, bitmaps: &[Bitmap]) -> Result<Chain, String> {
    let ours: Vec<(BitmapName, &Bitmap)> =
        bitmaps.iter().filter_map(|bitmap| Some((BitmapName::parse(&bitmap.name, disk)?, bitmap))).collect();
    if ours.is_empty() {
        return Err("there is no bitmap of it: the machine was started anew and kept none, or the disk is another one"
            .to_owned());
    }
    if let Some((name, _)) = ours.iter().find(|(_, bitmap)| bitmap.is_inconsistent) {
        return Err(format!("QEMU calls bitmap {name} inconsistent: it was killed, or the host went down"));
    }
    let recording: Vec<&(BitmapName, &Bitmap)> = ours.iter().filter(|(_, bitmap)| bitmap.is_recording).collect();
    // Each begins while the one before it still records: the newest of one session has everything since.
    let Some((live, newest)) = recording.iter().max_by_key(|(name, _)| name.number) else {
        return Err("none of its bitmaps records: somebody switched it off".to_owned());
    };
    if recording.iter().any(|(name, _)| name.session != live.session) {
        return Err("bitmaps of two sessions record".to_owned());
    }
    let frozen = ours.iter().map(|(name, _)| *name).filter(|name| name != live).collect();
    let bytes = ours.iter().map(|(_, bitmap)| bitmap.bytes).sum();
    Ok(Chain { live: *live, granularity: newest.granularity, bytes, frozen })
}

/// At most 4 MiB of memory for a disk of 2 TiB and less, at least what a file system writes at once.
pub fn granularity(disk_bytes: u64) -> u64 {
    const BITS: u64 = 32 << 20;
    (disk_bytes / BITS).next_power_of_two().clamp(4 << 10, 64 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: BitmapName, is_recording: bool) -> Bitmap {
        Bitmap { name: name.to_string(), bytes: 4096, granularity: 4096, is_recording, ..Bitmap::default() }
    }

    #[test]
    fn names_are_read_back() {
        let disk = DiskId::random();
        for session in [None, Some([7; 16]), Some([0; 16])] {
            let name = BitmapName { disk, session, number: 41 };
            assert_eq!(BitmapName::parse(&name.to_string(), disk), Some(name));
            assert_eq!(BitmapName::parse(&name.to_string(), DiskId::random()), None);
            assert_eq!(name.next().number, 42);
        }
        for name in [
            "",
            "bitmap0",
            &format!("tidemark-{disk}"),
            &format!("tidemark-{disk}.x.1"),
            &format!("tidemark-{disk}.unarmed."),
        ] {
            assert_eq!(BitmapName::parse(name, disk), None, "{name}");
        }
    }

    #[test]
    fn only_a_chain_without_a_gap_proves_anything() {
        let disk = DiskId::random();
        let of = |session: u8, number| BitmapName { disk, session: Some([session; 16]), number };
        let chain = judge(disk, &[bitmap(of(1, 4), true), bitmap(of(1, 3), false), bitmap(of(2, 9), false)]).unwrap();
        assert_eq!((chain.live, chain.frozen.len(), chain.bytes), (of(1, 4), 2, 3 * 4096));
        // A kill between the begin of one and the end of the one before.
        let chain = judge(disk, &[bitmap(of(1, 4), true), bitmap(of(1, 5), true)]).unwrap();
        assert_eq!((chain.live, chain.frozen), (of(1, 5), vec![of(1, 4)]));
        let stranger = BitmapName { disk: DiskId::random(), session: None, number: 0 };
        let broken = bitmap(of(1, 3), false);
        for (bitmaps, reason) in [
            (vec![], "no bitmap"),
            (vec![bitmap(stranger, true)], "no bitmap"),
            (vec![bitmap(of(1, 4), true), Bitmap { is_inconsistent: true, ..broken.clone() }], "inconsistent"),
            (vec![broken], "none of its bitmaps records"),
            (vec![bitmap(of(1, 4), true), bitmap(of(2, 5), true)], "two sessions"),
        ] {
            let told = judge(disk, &bitmaps).unwrap_err();
            assert!(told.contains(reason), "{told}");
        }
    }

    #[test]
    fn bitmaps_stay_small() {
        for (bytes, expected) in
            [(1 << 20, 4096), (64 << 30, 4096), (1 << 40, 32768), (1 << 41, 65536), (1 << 44, 65536)]
        {
            assert_eq!(granularity(bytes), expected, "{bytes}");
        }
    }
}
