//! Writers under load, each of which knows what it wrote.
//!
//! A writer owns every n-th block of the databases on both disks, so that no other writes there, and writes one block at a
//! time: the next only after the one before was acknowledged. What a recovered machine holds of it must therefore be a
//! beginning of its log, on both disks together.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemark_base::random::Random;
use tidemark_base::stop::Stop;

use super::disks::NbdDisk;
use crate::cli::CliError;

pub const BLOCK_BYTES: usize = 4096;
pub const WRITERS: usize = 3;
const MAGIC: &[u8; 8] = b"TIDEDEMO";
/// Blocks between two rests.
const BURST: u64 = 32;
const REST: Duration = Duration::from_millis(8);

/// One write: which disk, which block of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    pub disk: u8,
    pub block: u32,
}

/// What one writer did, in its order; write number n is at index n − 1.
pub struct Log {
    places: Mutex<Vec<Place>>,
    pub issued: AtomicU64,
    pub acknowledged: AtomicU64,
    owned: Vec<Place>,
}

impl Log {
    #[cfg(test)]
    pub fn of(places: &[Place]) -> Self {
        let count = places.len() as u64;
        Self {
            places: Mutex::new(places.to_vec()),
            issued: AtomicU64::new(count),
            acknowledged: AtomicU64::new(count),
            owned: Vec::new(),
        }
    }

    pub fn places(&self, upto: u64) -> Vec<Place> {
        self.places.lock().expect("no panic while held")[..upto as usize].to_vec()
    }
}

pub struct Writers {
    pub logs: Vec<Arc<Log>>,
    threads: Vec<JoinHandle<Result<(), CliError>>>,
    stop: Stop,
    /// Held for reading by a writer during each write: held for writing, no write is in flight.
    hold: Arc<RwLock<()>>,
    failed: Arc<AtomicBool>,
}

impl Writers {
    /// Writers that have ended.
    #[cfg(test)]
    pub fn of(logs: Vec<Arc<Log>>) -> Self {
        Self { logs, threads: Vec::new(), stop: Stop::new(), hold: Arc::default(), failed: Arc::default() }
    }

    /// `databases`: the blocks of each disk's database.
    pub fn start(addresses: &[String], databases: &[Vec<u32>]) -> Result<Self, CliError> {
        let all: Vec<Place> = databases
            .iter()
            .enumerate()
            .flat_map(|(disk, blocks)| blocks.iter().map(move |&block| Place { disk: disk as u8, block }))
            .collect();
        let mut writers = Self {
            logs: Vec::new(),
            threads: Vec::new(),
            stop: Stop::new(),
            hold: Arc::default(),
            failed: Arc::default(),
        };
        for number in 0..WRITERS {
            let owned = all.iter().copied().skip(number).step_by(WRITERS).collect();
            let log = Arc::new(Log {
                places: Mutex::default(),
                issued: AtomicU64::new(0),
                acknowledged: AtomicU64::new(0),
                owned,
            });
            let disks = addresses.iter().map(|address| NbdDisk::connect(address)).collect::<Result<Vec<_>, _>>()?;
            let writer =
                Writer { number, log: log.clone(), disks, stop: writers.stop.clone(), hold: writers.hold.clone() };
            let failed = writers.failed.clone();
            let thread = std::thread::Builder::new()
                .name(format!("writer-{number}"))
                .spawn(move || writer.run().inspect_err(|_| failed.store(true, Ordering::Release)))
                .map_err(CliError::runtime)?;
            writers.threads.push(thread);
            writers.logs.push(log);
        }
        Ok(writers)
    }

    /// How far each writer is: (acknowledged, issued).
    pub fn progress(&self) -> Vec<(u64, u64)> {
        self.logs
            .iter()
            .map(|log| (log.acknowledged.load(Ordering::SeqCst), log.issued.load(Ordering::SeqCst)))
            .collect()
    }

    pub fn have_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Runs `work` while every write is acknowledged and no new one begins.
    pub fn held<T>(&self, work: impl FnOnce() -> T) -> T {
        let _held = self.hold.write().expect("no panic while held");
        work()
    }

    /// Ends the writers; the first error of any.
    pub fn end(&mut self) -> Result<(), CliError> {
        self.stop.stop();
        let mut outcome = Ok(());
        for thread in self.threads.drain(..) {
            let ended = thread
                .join()
                .unwrap_or_else(|_| Err(CliError::new("a writer of the demonstration panicked", "please report it")));
            outcome = outcome.and(ended);
        }
        outcome
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

struct Writer {
    number: usize,
    log: Arc<Log>,
    disks: Vec<NbdDisk>,
    stop: Stop,
    hold: Arc<RwLock<()>>,
}

impl Writer {
    fn run(mut self) -> Result<(), CliError> {
        let mut random = Random::new(self.number as u64 + 1);
        for number in 1.. {
            if number % BURST == 0 && self.stop.wait_for(REST) || self.stop.is_stopped() {
                break;
            }
            let place = self.log.owned[(random.draw() % self.log.owned.len() as u64) as usize];
            let page = page(self.number, number);
            let hold = self.hold.clone();
            let _writing = hold.read().expect("no panic while held");
            self.log.places.lock().expect("no panic while held").push(place);
            self.log.issued.store(number, Ordering::SeqCst);
            self.disks[place.disk as usize].write(u64::from(place.block) * BLOCK_BYTES as u64, &page)?;
            self.log.acknowledged.store(number, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// What write `number` of a writer writes: who and which, then half random, half text.
pub fn page(writer: usize, number: u64) -> Vec<u8> {
    let mut page = Vec::with_capacity(BLOCK_BYTES);
    page.extend_from_slice(MAGIC);
    page.extend_from_slice(&(writer as u64).to_le_bytes());
    page.extend_from_slice(&number.to_le_bytes());
    let mut random = Random::new(number << 8 | writer as u64 | 1 << 63);
    while page.len() < BLOCK_BYTES / 2 {
        page.extend_from_slice(&random.draw().to_le_bytes());
    }
    while page.len() < BLOCK_BYTES {
        page.extend_from_slice(b"and the rest of a row of text; ");
    }
    page.truncate(BLOCK_BYTES);
    page
}

/// Who wrote a page, and as which of its writes.
pub fn author(page: &[u8]) -> Option<(usize, u64)> {
    let number = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
    (page.starts_with(MAGIC) && number(8) < WRITERS as u64).then(|| (number(8) as usize, number(16)))
}

/// The last write to each place in a beginning of the logs.
pub fn last_writes(logs: &[Arc<Log>], upto: &[u64]) -> HashMap<Place, (usize, u64)> {
    let mut last = HashMap::new();
    for (writer, (log, &upto)) in logs.iter().zip(upto).enumerate() {
        for (index, place) in log.places(upto).into_iter().enumerate() {
            last.insert(place, (writer, index as u64 + 1));
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_names_its_author() {
        assert_eq!(author(&page(2, 77)), Some((2, 77)));
        assert_ne!(page(0, 1), page(0, 2));
        assert_eq!(author(&[0; BLOCK_BYTES]), None);
    }
}
