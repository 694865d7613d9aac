//! One tracked disk, as user space reads it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use tidemark_base::{DiskId, Extent, ExtentSet};

use crate::device::{Device, DeviceError};
use crate::kernel::{self, Figures, KernelError};
use crate::maps::Words;

pub const PIN_FOLDER: &str = "/sys/fs/bpf";
pub const GRANULE_BYTES: u64 = 64 << 10;
const WORD_BYTES: u64 = GRANULE_BYTES * 64;

const BLIND: usize = 0;
const ARMED: usize = 1;
const SESSION: usize = 2;
const SEQUENCE: usize = 4;
const FIRST_SECTOR: usize = 5;
const SECTORS: usize = 6;
const NUMBERS: usize = 7;
const STATE_WORDS: usize = 8;
/// Disks of more than 2 EiB have more words than an array of the kernel.
const WORDS_MAX: u64 = u32::MAX as u64;

#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("{path} is too large to be tracked")]
    TooLarge { path: PathBuf },
}

impl TrackerError {
    pub fn help(&self) -> &'static str {
        match self {
            TrackerError::Device(error) => error.help(),
            TrackerError::Kernel(error) => error.help(),
            TrackerError::TooLarge { .. } => "protect it in another way: `--via nbd`",
        }
    }
}

/// Whether an earlier session of this boot left the tracker at work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// It saw everything since the session of this id armed it.
    Witness([u8; 16]),
    /// It sees everything from now on.
    New,
}

/// Whether the tracker saw everything since it was opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Witness {
    Whole,
    /// It did not, for this reason; what it saw still counts.
    Broken(String),
}

pub struct BlockTracker {
    device: Device,
    folder: PathBuf,
    live: Words,
    claimed: Words,
    state: Words,
    /// What was missed before, which was compared.
    missed: std::sync::atomic::AtomicU64,
    blind: std::sync::atomic::AtomicU64,
}

impl BlockTracker {
    /// Whether the device at `path` could be tracked. Nothing is changed.
    pub fn probe(path: &Path) -> Result<Device, TrackerError> {
        let device = Device::examine(path)?;
        kernel::check()?;
        Ok(device)
    }

    /// Takes over what is pinned for the disk where it saw everything; begins anew otherwise.
    pub fn open(path: &Path, disk: DiskId) -> Result<(Self, Found), TrackerError> {
        let device = Self::probe(path)?;
        kernel::ensure_file_system(PIN_FOLDER.as_ref())?;
        let folder = pin_folder(disk);
        let words = device.bytes().div_ceil(WORD_BYTES);
        if words > WORDS_MAX {
            return Err(TrackerError::TooLarge { path: path.to_owned() });
        }
        if let Some(tracker) = Self::take_over(&device, &folder, words as usize) {
            let session = tracker.session();
            return Ok((tracker, Found::Witness(session)));
        }
        let unusable = |source| KernelError::Pin { path: folder.clone(), source };
        kernel::remove(&folder).map_err(unusable)?;
        let pinned = kernel::load(&folder, &device, words as u32).inspect_err(|_| drop(kernel::remove(&folder)))?;
        let tracker = Self::map(device, folder.clone(), &pinned, words as usize).map_err(unusable)?;
        tracker.state.set(SEQUENCE, tracker.device.sequence);
        tracker.state.set(FIRST_SECTOR, tracker.device.first_sector);
        tracker.state.set(SECTORS, tracker.device.sectors);
        tracker.state.set(NUMBERS, tracker.numbers());
        Ok((tracker, Found::New))
    }

    /// `None` where it did not see everything, or belongs to another disk.
    fn take_over(device: &Device, folder: &Path, words: usize) -> Option<Self> {
        let pinned = kernel::open(folder)?;
        let tracker = Self::map(device.clone(), folder.to_owned(), &pinned, words).ok()?;
        let state = &tracker.state;
        let is_same = state.get(SEQUENCE) == device.sequence
            && state.get(FIRST_SECTOR) == device.first_sector
            && state.get(SECTORS) == device.sectors
            && state.get(NUMBERS) == tracker.numbers();
        (is_same && state.get(ARMED) == 1 && tracker.witness() == Witness::Whole).then_some(tracker)
    }

    fn map(device: Device, folder: PathBuf, pinned: &kernel::Pinned, words: usize) -> io::Result<Self> {
        Ok(Self {
            live: Words::map(&pinned.live, words)?,
            claimed: Words::map(&pinned.claimed, words)?,
            state: Words::map(&pinned.state, STATE_WORDS)?,
            device,
            folder,
            missed: Default::default(),
            blind: Default::default(),
        })
    }

    fn numbers(&self) -> u64 {
        u64::from(self.device.major) << 32 | u64::from(self.device.first_minor)
    }

    fn session(&self) -> [u8; 16] {
        let mut session = [0; 16];
        session[..8].copy_from_slice(&self.state.get(SESSION).to_le_bytes());
        session[8..].copy_from_slice(&self.state.get(SESSION + 1).to_le_bytes());
        session
    }

    /// What the tracker did not see is in a durable scan, and this session reads it from now on.
    pub fn arm(&self, session: [u8; 16]) {
        let (low, high) = session.split_at(8);
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight of sixteen"));
        self.state.set(ARMED, 0);
        self.state.set(SESSION, word(low));
        self.state.set(SESSION + 1, word(high));
        self.state.set(ARMED, 1);
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether anything changed that was not claimed.
    pub fn is_dirty(&self) -> bool {
        (0..self.live.count()).any(|index| self.live.get(index) != 0)
    }

    /// Takes what changed: from here on it is in `claimed`. Returns it.
    pub fn claim(&self) -> ExtentSet {
        let mut found = ExtentSet::new();
        for index in 0..self.live.count() {
            let bits = self.live.get(index);
            if bits == 0 {
                continue;
            }
            self.claimed.word(index).fetch_or(bits, Ordering::AcqRel);
            self.live.word(index).fetch_and(!bits, Ordering::AcqRel);
            self.insert(&mut found, index, bits);
        }
        found
    }

    /// Everything that was claimed and not released.
    pub fn claimed(&self) -> ExtentSet {
        let mut found = ExtentSet::new();
        (0..self.claimed.count()).for_each(|index| self.insert(&mut found, index, self.claimed.get(index)));
        found
    }

    /// These granules are in a log or in a durable bitmap.
    pub fn release(&self, extents: &ExtentSet) {
        for extent in extents.iter() {
            let mut at = extent.offset / GRANULE_BYTES;
            let end = extent.end().div_ceil(GRANULE_BYTES).min(self.claimed.count() as u64 * 64);
            while at < end {
                let next = ((at / 64 + 1) * 64).min(end);
                let bits = (u64::MAX >> (64 - (next - at))) << (at % 64);
                self.claimed.word((at / 64) as usize).fetch_and(!bits, Ordering::AcqRel);
                at = next;
            }
        }
    }

    fn insert(&self, found: &mut ExtentSet, index: usize, mut bits: u64) {
        while bits != 0 {
            let first = bits.trailing_zeros();
            let run = (bits >> first).trailing_ones();
            let offset = (index as u64 * 64 + u64::from(first)) * GRANULE_BYTES;
            let end = (offset + u64::from(run) * GRANULE_BYTES).min(self.device.bytes());
            if offset < end {
                found.insert(Extent::new(offset, end - offset));
            }
            bits = if first + run == 64 { 0 } else { bits & (u64::MAX << (first + run)) };
        }
    }

    /// Whether it saw everything since it was pinned, or since [`Self::forgive`].
    pub fn witness(&self) -> Witness {
        let figures = match kernel::figures(&self.folder) {
            Ok(figures) => figures,
            Err(error) => return Witness::Broken(format!("its programs are gone: {error}")),
        };
        if !self.device.is_same() {
            return Witness::Broken("another disk is behind the device now".to_owned());
        }
        let missed = figures.missed.saturating_sub(self.missed.load(Ordering::Acquire));
        let blind = self.state.get(BLIND).saturating_sub(self.blind.load(Ordering::Acquire));
        match (missed, blind) {
            (0, 0) => Witness::Whole,
            (0, blind) => Witness::Broken(format!("{blind} commands passed by the block layer")),
            (missed, _) => Witness::Broken(format!("the kernel did not run it for {missed} events")),
        }
    }

    /// What was missed so far is in a durable scan.
    pub fn forgive(&self) {
        if let Ok(figures) = kernel::figures(&self.folder) {
            self.missed.store(figures.missed, Ordering::Release);
        }
        self.blind.store(self.state.get(BLIND), Ordering::Release);
    }

    pub fn figures(&self) -> io::Result<Figures> {
        kernel::figures(&self.folder)
    }

    /// Ends the tracking of a disk. The maps live until the last one who has them mapped lets go.
    pub fn remove(disk: DiskId) -> io::Result<()> {
        kernel::remove(&pin_folder(disk))
    }
}

fn pin_folder(disk: DiskId) -> PathBuf {
    Path::new(PIN_FOLDER).join(format!("tidemark-{disk}"))
}
