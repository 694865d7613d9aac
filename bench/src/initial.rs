//! Initial replication: a disk that the other side has nothing of.
//!
//! For everybody from the start of the client (`protect` for us) until it says that the replica is complete; servers
//! run already. For us that includes TLS, a BLAKE3 of every chunk, the durable journal and the point from which the
//! replica is consistent. Every replica is compared with its source afterwards.

use std::path::Path;

use crate::meter;
use crate::options::Options;
use crate::ours::{Compression, Ours};
use crate::report::Report;
use crate::{Failure, peers};

pub fn measure(options: &Options, folder: &Path, source: &Path, report: &mut Report) -> Result<(), Failure> {
    let tools: Vec<_> = peers::INITIAL
        .into_iter()
        .filter(|peer| options.takes(peer.name()) && peers::installed(peer.name(), peer.programs()))
        .collect();
    for round in 0..options.rounds {
        for peer in &tools {
            let target = peers::target(folder)?;
            options.before_a_turn(folder)?;
            let cost = peer.initial(source, &target)?;
            peers::check(source, &target)?;
            std::fs::remove_file(target)?;
            report.cost("initial", peer.name(), round, cost);
        }
        for compression in [Compression::Off, Compression::Default] {
            if options.takes(compression.name()) {
                let mut ours = Ours::start(folder, compression);
                options.before_a_turn(folder)?;
                let cost = meter::measure(&[ours.site.pid()], || {
                    ours.protect(source);
                    ours.wait_protected();
                    Ok(())
                })?;
                let exported = ours.export()?;
                ours.site.down();
                peers::check(source, &exported)?;
                report.cost("initial", compression.name(), round, cost);
                remove_logs(folder)?;
            }
        }
    }
    Ok(())
}

/// Our logs lie beside the disk; the next site begins with none.
fn remove_logs(folder: &Path) -> Result<(), Failure> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.contains("source.img") && name != "source.img" || name.contains("tidemark") {
            if path.is_dir() {
                std::fs::remove_dir_all(path)?;
            } else {
                std::fs::remove_file(path)?;
            }
        }
    }
    Ok(())
}
