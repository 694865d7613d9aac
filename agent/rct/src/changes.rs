//! What changed of a disk since a change id. The answer comes in parts: each tells of as much of the disk as fits.

use tidemark_base::{Extent, ExtentSet};

use crate::hypervisor::Image;

/// Answers to one question: each covers some of the disk, at least a sector.
const ANSWERS_MAX: usize = 1 << 20;

/// `Err`: nobody knows. Whatever is not an answer to exactly what was asked would leave out changes.
pub fn changed_since(image: &dyn Image, since: &str, disk_bytes: u64) -> Result<ExtentSet, String> {
    let mut changed = ExtentSet::new();
    let mut from = 0;
    for _ in 0..ANSWERS_MAX {
        let asked = Extent::new(from, disk_bytes - from);
        let part = image
            .query(since, asked.offset, asked.length)
            .map_err(|reason| format!("Hyper-V cannot tell what changed since {since} ({reason})"))?;
        if part.processed == 0 || part.processed > asked.length {
            return Err(format!("Hyper-V told of {} bytes where {} were asked for", part.processed, asked.length));
        }
        for area in part.areas {
            if area.offset < from || area.offset >= disk_bytes || area.offset.checked_add(area.length).is_none() {
                return Err(format!("Hyper-V told of {} bytes at {}, asked from {from} on", area.length, area.offset));
            }
            // The last granule may reach past the end.
            changed.insert(Extent::new(area.offset, area.length.min(disk_bytes - area.offset)));
        }
        from += part.processed;
        if from == disk_bytes {
            return Ok(changed);
        }
    }
    Err("Hyper-V does not come to an end".to_owned())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;
    use crate::error::RctError;
    use crate::hypervisor::{Facts, Part};

    struct Answers(Mutex<Vec<Part>>);

    impl Image for Answers {
        fn facts(&self) -> Result<Facts, RctError> {
            unreachable!("nobody asks")
        }
        fn query(&self, _since: &str, _from: u64, _length: u64) -> Result<Part, String> {
            let mut left = self.0.lock().unwrap();
            if left.is_empty() { Err("error 87".into()) } else { Ok(left.remove(0)) }
        }
        fn read_at(&self, _offset: u64, _buffer: &mut [u8]) -> io::Result<()> {
            unreachable!("nobody reads")
        }
    }

    fn asked(parts: &[(&[(u64, u64)], u64)]) -> Result<Vec<(u64, u64)>, String> {
        let part = |(areas, processed): &(&[(u64, u64)], u64)| Part {
            areas: areas.iter().map(|&(offset, length)| Extent { offset, length }).collect(),
            processed: *processed,
        };
        let changed = changed_since(&Answers(Mutex::new(parts.iter().map(part).collect())), "rctX:1", 10_000)?;
        Ok(changed.iter().map(|area| (area.offset, area.length)).collect())
    }

    #[test]
    fn answers_are_put_together_until_all_of_the_disk_is_told_of() {
        assert_eq!(asked(&[(&[], 10_000)]), Ok(vec![]));
        let parts: &[(&[(u64, u64)], u64)] = &[(&[(0, 512), (1024, 512)], 2048), (&[(4096, 100)], 7952)];
        assert_eq!(asked(parts), Ok(vec![(0, 512), (1024, 512), (4096, 100)]));
        assert_eq!(asked(&[(&[(9_000, 4096)], 10_000)]), Ok(vec![(9_000, 1_000)]), "the last granule");
    }

    #[test]
    fn an_answer_to_something_else_is_no_answer() {
        for parts in [
            [(&[][..], 0)].as_slice(),
            &[(&[], 10_001)],
            &[(&[], 4096)],
            &[(&[(10_000, 512)], 10_000)],
            &[(&[(u64::MAX - 5, 512)], 10_000)],
            &[(&[(8192, u64::MAX)], 10_000)],
            &[(&[], 4096), (&[(512, 512)], 5904)],
        ] {
            assert!(asked(parts).is_err(), "{parts:?}");
        }
    }
}
