//! A replica that is not known to be equal: 1 % of its blocks differ, and nobody recorded which.
//!
//! The disk is changed while nothing of ours runs, so that the next start finds it changed and compares it with the
//! replica. Timed from that start until the replica is consistent again. Beside it, how long it takes to read the disk
//! and hash it, which no compare can do without; one thread, from the page cache.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::image::{self, Change};
use crate::meter;
use crate::options::Options;
use crate::ours::{Compression, Ours};
use crate::report::Report;
use crate::{Failure, peers};

pub const READING: &str = "reading and hashing, 1 thread";
const PIECE_BYTES: usize = 1 << 20;

pub fn measure(options: &Options, folder: &Path, source: &Path, report: &mut Report) -> Result<(), Failure> {
    let disk = folder.join("compared");
    std::fs::create_dir(&disk)?;
    let disk = disk.join("disk.img");
    tidemark_tests::image::copy(source, &disk);
    let file = File::options().read(true).write(true).open(&disk)?;
    let mut ours = Ours::start(folder, Compression::Default);
    ours.protect(&disk);
    ours.wait_protected();
    for round in 0..options.rounds {
        let epoch = ours.epoch();
        ours.site.down();
        let writes = Change::Random.writes(options.bytes, round);
        image::apply(&file, &writes)?;
        if round == 0 {
            report.changed("resync", writes.iter().map(|write| write.data.len() as u64).sum());
        }
        let reading = meter::measure(&[std::process::id() as i32], || read_and_hash(&file, options.bytes))?;
        report.cost("resync", READING, round, reading);
        ours.up();
        let cost = meter::measure(&[ours.site.pid()], || {
            ours.wait_compared(&epoch);
            Ok(())
        })?;
        report.cost("resync", Compression::Default.name(), round, cost);
    }
    let exported = ours.export()?;
    ours.site.down();
    peers::check(&disk, &exported)?;
    std::fs::remove_dir_all(folder.join("compared"))?;
    Ok(())
}

fn read_and_hash(file: &File, bytes: u64) -> Result<(), Failure> {
    let mut piece = vec![0; PIECE_BYTES];
    for offset in (0..bytes).step_by(PIECE_BYTES) {
        file.read_exact_at(&mut piece, offset)?;
        std::hint::black_box(blake3::hash(&piece));
    }
    Ok(())
}
