//! Disks with content, and the comparison of two of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::tools;

pub const MIB: u64 = 1 << 20;

/// Repeatable numbers (SplitMix64). A test names its seed.
#[derive(Clone)]
pub struct Seeded(pub u64);

impl Seeded {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for part in buffer.chunks_mut(8) {
            let word = self.number().to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }
}

/// A disk of holes, random extents, and compressible ones.
pub fn make_mixed(path: &Path, bytes: u64, seed: u64) {
    let file = File::create(path).expect("the disk can be made");
    file.set_len(bytes).expect("the disk can grow");
    let mut seeded = Seeded(seed);
    let mut buffer = vec![0; 64 << 10];
    for offset in (0..bytes).step_by(buffer.len()) {
        let length = buffer.len().min((bytes - offset) as usize);
        match seeded.below(4) {
            0 => continue,
            1 => seeded.fill(&mut buffer),
            _ => {
                let (word, length) = (seeded.number().to_le_bytes(), buffer.len());
                for (index, byte) in buffer.iter_mut().enumerate() {
                    *byte = word[index % 7] ^ (index / 512 * length) as u8;
                }
            }
        }
        file.write_all_at(&buffer[..length], offset).expect("the disk can be written");
    }
}

/// An ext4 disk that holds a copy of `folder`.
pub fn make_ext4(path: &Path, bytes: u64, folder: &Path) {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("the disk can be made");
    let (path, folder) =
        (path.to_str().expect("paths of tests are text"), folder.to_str().expect("and so are folders"));
    tools::run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-d", folder, path]);
}

/// Where two disks differ first; a shorter one differs at its end.
pub fn first_difference(one: &Path, other: &Path) -> io::Result<Option<u64>> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let (one_bytes, other_bytes) = (one.metadata()?.len(), other.metadata()?.len());
    let common = one_bytes.min(other_bytes);
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for offset in (0..common).step_by(left.len()) {
        let length = left.len().min((common - offset) as usize);
        one.read_exact_at(&mut left[..length], offset)?;
        other.read_exact_at(&mut right[..length], offset)?;
        if left[..length] != right[..length] {
            let index = (0..length).find(|index| left[*index] != right[*index]).expect("they differ");
            return Ok(Some(offset + index as u64));
        }
    }
    Ok((one_bytes != other_bytes).then_some(common))
}

/// Panics with the first different offset.
#[track_caller]
pub fn assert_same(one: &Path, other: &Path) {
    if let Some(offset) = first_difference(one, other).expect("both disks can be read") {
        panic!("{} and {} differ at byte {offset}", one.display(), other.display());
    }
}

/// A copy that keeps holes.
pub fn copy(from: &Path, to: &Path) {
    let (from, to) = (from.to_str().expect("paths of tests are text"), to.to_str().expect("paths of tests are text"));
    tools::run("cp", &["--sparse=always", from, to]);
}
