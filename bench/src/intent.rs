//! What the write-intent bitmap costs a guest's write, once its working set was touched: the steady state.
//!
//! The code that the front end calls for each write, by itself: two looks and a note of the time. How long that takes on
//! a large working set is compared with how long a write takes at the front end in the same run. First touches, which
//! wait for the media, are counted apart.

use std::path::Path;
use std::time::Instant;

use tidemark_base::Extent;
use tidemark_base::storage::{OpenMode, RealStorage};
use tidemark_host::state::intent::{Intent, IntentFound};
use tidemark_tests::image::Seeded;

use crate::Failure;
use crate::image::BLOCK;
use crate::options::Options;
use crate::report::Report;

const WRITES: u64 = 4 << 20;

/// What one write costs.
#[derive(Clone, Copy, Debug)]
pub struct IntentCost {
    pub steady_nanoseconds: f64,
    pub first_touch_nanoseconds: f64,
}

pub fn measure(options: &Options, folder: &Path, report: &mut Report) -> Result<(), Failure> {
    let bytes = options.working_set;
    for _ in 0..options.rounds {
        let storage = RealStorage::open_folder(folder);
        let file = storage.open("intent", OpenMode::OpenOrCreate)?;
        file.set_bytes(Intent::file_bytes(bytes))?;
        let intent = Intent::start(file, bytes, &IntentFound::default())?;
        let start = Instant::now();
        let mut touched = 0;
        for offset in (0..bytes).step_by(4 << 20) {
            intent.declare(&[Extent::new(offset, BLOCK as u64)])?;
            touched += 1;
        }
        let first_touch_nanoseconds = start.elapsed().as_nanos() as f64 / f64::from(touched);
        let mut seeded = Seeded(1);
        let mut next = || Extent::new(seeded.below(bytes / BLOCK as u64) * BLOCK as u64, BLOCK as u64);
        let start = Instant::now();
        let mut sum = 0;
        for _ in 0..WRITES {
            sum ^= std::hint::black_box(next()).offset;
        }
        let without = start.elapsed();
        std::hint::black_box(sum);
        let start = Instant::now();
        for tick in 0..WRITES {
            let write = next();
            intent.declare(std::hint::black_box(&[write]))?;
            intent.ended(write, tick);
        }
        let steady = start.elapsed().saturating_sub(without).as_nanos() as f64 / WRITES as f64;
        report.intent(IntentCost { steady_nanoseconds: steady, first_touch_nanoseconds });
        storage.remove("intent")?;
    }
    Ok(())
}
