//! Opening a recovery point of a large disk: 1 TiB, sparse, with some written blocks.
//!
//! Timed from the start of `tidemark point serve` until the first byte of the disk came back over NBD.

use std::path::Path;
use std::time::Instant;

use tidemark_tests::image::Seeded;
use tidemark_tests::nbd::Client;

use crate::Failure;
use crate::image::{BLOCK, Write};
use crate::options::Options;
use crate::ours::{self, Compression, NAME, Ours};
use crate::report::Report;

const DISK_BYTES: u64 = 1 << 40;
const WRITES: u64 = 4096;

pub fn measure(options: &Options, folder: &Path, report: &mut Report) -> Result<(), Failure> {
    let disk = folder.join("large.img");
    std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let mut ours = Ours::start(folder, Compression::Default);
    let machine = ours.protect(&disk);
    ours.wait_protected();
    let mut seeded = Seeded(1);
    let writes: Vec<Write> = (0..WRITES)
        .map(|_| {
            let mut data = vec![0; BLOCK];
            seeded.fill(&mut data);
            Write { offset: seeded.below(DISK_BYTES / BLOCK as u64) * BLOCK as u64, data }
        })
        .collect();
    ours::write(machine.nbd(), &writes)?;
    let last = writes.last().ok_or("nothing was written")?;
    for round in 0..options.rounds {
        let start = Instant::now();
        ours.site.point(NAME);
        report.seconds("making a point of a 1 TiB disk", round, start.elapsed().as_secs_f64());
        let start = Instant::now();
        let served = ours.site.serve(NAME, "latest", &[]);
        let mut client = Client::connect(served.nbd())?;
        let mut block = vec![0; BLOCK];
        client.read(last.offset, &mut block)?;
        report.seconds("serving a point of a 1 TiB disk, to the first byte", round, start.elapsed().as_secs_f64());
        if block != last.data {
            return Err(format!("the block at {} is not what was written", last.offset).into());
        }
    }
    ours.site.down();
    std::fs::remove_file(disk)?;
    Ok(())
}
