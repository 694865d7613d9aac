//! What a home disk held before it was overwritten.

use std::io;
use std::sync::Arc;

use tidemark_base::bits::PART_BYTES;
use tidemark_base::chunk::{ChunkKey, Compression, HEADER_BYTES, Opener, SEALED_BYTES_MAX, Sealer, UnverifiedChunk};
use tidemark_base::compare::pieces;
use tidemark_base::disk::{Disk, is_zero};
use tidemark_base::storage::{OpenMode, Storage, StorageFile, write_again};
use tidemark_base::{Bits, CHUNK_BYTES_MAX, DiskId, Extent, Generation};

/// Of no stream: nothing that a process server sent is taken for what home had.
const GENERATION: Generation = Generation(0);

pub struct Undo {
    file: Arc<dyn StorageFile>,
    disk: DiskId,
    disk_bytes: u64,
    saved: Bits,
    bytes: u64,
    sealer: Sealer,
    /// Chunks that are not in the file yet.
    pending: Vec<u8>,
    pending_parts: Vec<Extent>,
    /// A sync failed: nothing of the file counts until it is opened again.
    failed: bool,
}

fn key(disk: DiskId) -> ChunkKey {
    ChunkKey::new(disk, GENERATION)
}

pub fn name(disk: DiskId) -> String {
    format!("{disk}.undo")
}

impl Undo {
    /// Opens or makes the file. `durable` bytes of it were synced: they must verify. What is behind them and does not is cut off.
    pub fn open(storage: &dyn Storage, disk: DiskId, disk_bytes: u64, durable: u64) -> io::Result<Self> {
        let file = storage.open(&name(disk), OpenMode::OpenOrCreate)?;
        storage.sync_folder("")?;
        let mut saved = Bits::new(disk_bytes);
        let mut opener = Opener::new();
        let bytes =
            read_chunks(&*file, 0, file.bytes()?, |chunk| match chunk.verify(&key(disk), disk_bytes, &mut opener) {
                Ok(chunk) => {
                    chunk.extents.iter().for_each(|extent| _ = saved.insert(*extent));
                    true
                }
                Err(_) => false,
            })?;
        if bytes < durable {
            return Err(damaged(&name(disk), bytes));
        }
        file.set_bytes(bytes)?;
        // What is behind may be in the page cache alone, and a sync of an earlier process may have failed.
        write_again(&*file, durable, bytes)?;
        file.sync()?;
        let sealer = Sealer::new(key(disk), Compression::Level(1));
        Ok(Self {
            file,
            disk,
            disk_bytes,
            saved,
            bytes,
            sealer,
            pending: Vec::new(),
            pending_parts: Vec::new(),
            failed: false,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Of the disk.
    pub fn kept_bytes(&self) -> u64 {
        self.saved.bytes()
    }

    /// Keeps what the disk holds at `extent`, where it is not kept yet. Durable after [`Undo::sync`]; extents between two of those
    /// do not overlap.
    pub fn keep(&mut self, from: &dyn Disk, extent: Extent) -> io::Result<()> {
        let start = extent.offset / PART_BYTES * PART_BYTES;
        let end = extent.end().next_multiple_of(PART_BYTES).min(self.disk_bytes);
        let parts = pieces(Extent::new(start, end - start), PART_BYTES);
        let missing = parts.filter(|part| !self.saved.contains(part.offset));
        let mut runs: Vec<Extent> = Vec::new();
        for part in missing {
            match runs.last_mut() {
                Some(last) if last.end() == part.offset && (last.length + part.length) as usize <= CHUNK_BYTES_MAX => {
                    last.length += part.length;
                }
                _ => runs.push(part),
            }
        }
        for run in runs {
            let mut content = vec![0; run.length as usize];
            from.read_at(run.offset, &mut content)?;
            if is_zero(&content) {
                self.sealer.seal_zeroes(&[run], &mut self.pending);
            } else {
                self.sealer.seal(&[run], &content, &mut self.pending);
            }
            self.pending_parts.push(run);
        }
        Ok(())
    }

    /// After this the blocks may be overwritten.
    pub fn sync(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if self.failed {
            return Err(io::Error::other(format!("an earlier sync of {} failed", name(self.disk))));
        }
        self.failed = true;
        self.file.write_at(self.bytes, &self.pending)?;
        self.file.sync()?;
        self.failed = false;
        self.bytes += self.pending.len() as u64;
        for part in self.pending_parts.drain(..) {
            self.saved.insert(part);
        }
        self.pending.clear();
        Ok(())
    }

    /// Each extent with what it held; `None`: zeroes. Stops at the first failure.
    pub fn replay(&self, mut each: impl FnMut(Extent, Option<&[u8]>) -> io::Result<()>) -> io::Result<()> {
        let mut opener = Opener::new();
        let mut failed = None;
        let read = read_chunks(&*self.file, 0, self.bytes, |chunk| {
            let Ok(chunk) = chunk.verify(&key(self.disk), self.disk_bytes, &mut opener) else { return false };
            failed = chunk.parts().try_for_each(|(extent, data)| each(extent, data)).err();
            failed.is_none()
        })?;
        match failed {
            Some(error) => Err(error),
            None if read < self.bytes => Err(damaged(&name(self.disk), read)),
            None => Ok(()),
        }
    }
}

pub fn damaged(name: &str, at: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{name} is damaged at {at}"))
}

/// Chunks that lie back to back in `from..to` of a file, for as long as `each` wants them. Where it stopped.
fn read_chunks(
    file: &dyn StorageFile,
    from: u64,
    to: u64,
    mut each: impl FnMut(UnverifiedChunk<'_>) -> bool,
) -> io::Result<u64> {
    let mut at = from;
    let mut buffer = vec![0; 4 * SEALED_BYTES_MAX];
    while at + HEADER_BYTES as u64 <= to {
        let length = ((to - at) as usize).min(buffer.len());
        file.read_at(at, &mut buffer[..length])?;
        let mut rest = &buffer[..length];
        let before = at;
        while let Ok((chunk, behind)) = UnverifiedChunk::split(rest) {
            if !each(chunk) {
                return Ok(at);
            }
            at += (rest.len() - behind.len()) as u64;
            rest = behind;
        }
        if at == before {
            break;
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    struct Memory(std::sync::Mutex<Vec<u8>>);

    impl Disk for Memory {
        fn bytes(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            buffer.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buffer.len()]);
            Ok(())
        }
        fn write_at(&self, offset: u64, data: &[u8], _: tidemark_base::disk::Durability) -> io::Result<()> {
            self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
        fn zero(&self, extent: Extent, _: bool, _: tidemark_base::disk::Durability) -> io::Result<()> {
            self.0.lock().unwrap()[extent.offset as usize..][..extent.length as usize].fill(0);
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn allocation(&self, offset: u64) -> io::Result<(u64, tidemark_base::disk::Allocation)> {
            Ok((self.bytes() - offset, tidemark_base::disk::Allocation::Data))
        }
    }

    fn replayed(undo: &Undo, image: &mut [u8]) -> io::Result<()> {
        undo.replay(|extent, data| {
            let target = &mut image[extent.offset as usize..extent.end() as usize];
            match data {
                Some(data) => target.copy_from_slice(data),
                None => target.fill(0),
            }
            Ok(())
        })
    }

    #[test]
    fn what_was_kept_first_comes_back_and_a_torn_end_is_cut_off() {
        const BYTES: u64 = 2 << 20;
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let disk = DiskId::random();
        let original: Vec<u8> = (0..BYTES).map(|at| if at < 1 << 20 { 0 } else { (at / 7) as u8 }).collect();
        let home = Memory(std::sync::Mutex::new(original.clone()));
        let mut undo = Undo::open(&*storage, disk, BYTES, 0).unwrap();
        for extent in [Extent::new(0, 8192), Extent::new((1 << 20) - 512, 600 << 10), Extent::new(4096, 512)] {
            undo.keep(&home, extent).unwrap();
            undo.sync().unwrap();
            home.write_at(extent.offset, &vec![0xee; extent.length as usize], tidemark_base::disk::Durability::Cached)
                .unwrap();
        }
        let durable = undo.bytes();
        let kept = undo.kept_bytes();
        undo.keep(&home, Extent::new(0, 4096)).unwrap();
        assert!(undo.pending.is_empty(), "a block is kept once: what came later is not what home had");
        drop(undo);
        // A chunk whose end never reached the media.
        let path = folder.path().join(name(disk));
        let put = |content: &[u8]| {
            let file = storage.open(&name(disk), OpenMode::OpenOrCreate).unwrap();
            file.set_bytes(content.len() as u64).unwrap();
            file.write_at(0, content).unwrap();
        };
        let mut content = std::fs::read(&path).unwrap();
        // The first chunk is of zeroes, and has no more than its header.
        let (first, _) = UnverifiedChunk::split(&content).unwrap();
        let torn = content[first.sealed_bytes()..][..200].to_vec();
        content.extend_from_slice(&torn);
        put(&content);
        let undo = Undo::open(&*storage, disk, BYTES, durable).unwrap();
        assert_eq!((undo.bytes(), undo.kept_bytes()), (durable, kept));
        let mut image = home.0.lock().unwrap().clone();
        replayed(&undo, &mut image).unwrap();
        assert!(image == original);
        // A byte that turned in what was durable is no torn end.
        content.truncate(durable as usize);
        content[durable as usize - 3] ^= 1;
        put(&content);
        assert!(replayed(&undo, &mut image).unwrap_err().to_string().contains("damaged"));
        assert!(Undo::open(&*storage, disk, BYTES, durable).is_err());
    }
}
