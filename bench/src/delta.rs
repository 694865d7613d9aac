//! A small change: how long it takes until the replica has it.
//!
//! Both sides are equal at first; then the change is made to the source, and only then does the clock run. For us the
//! change is written through the protected disk while sending is paused; timed is from `resume` until the last write is
//! durable at the process server. Not paused, most of it would be there before the last write is made. QEMU's bitmap
//! and the minimal sender know what changed, as we do; everybody else has to find out.

use std::fs::File;
use std::path::Path;

use crate::image::{self, Change};
use crate::meter;
use crate::options::Options;
use crate::ours::{self, Compression, NAME, Ours};
use crate::report::Report;
use crate::{Failure, peers};

pub fn measure(
    options: &Options,
    folder: &Path,
    source: &Path,
    kind: Change,
    report: &mut Report,
) -> Result<(), Failure> {
    let what = if kind == Change::Random { "delta" } else { "append" };
    let tools: Vec<_> = peers::DELTA
        .into_iter()
        .filter(|peer| options.takes(peer.name()) && peers::installed(peer.name(), peer.programs()))
        .collect();
    let changes: Vec<_> = (0..options.rounds).map(|round| kind.writes(options.bytes, round)).collect();
    report.changed(what, changes[0].iter().map(|write| write.data.len() as u64).sum());

    let mut ours = match options.takes(Compression::Default.name()) {
        true => {
            let disk = folder.join("ours");
            std::fs::create_dir(&disk)?;
            let disk = disk.join("disk.img");
            tidemark_tests::image::copy(source, &disk);
            let mut ours = Ours::start(folder, Compression::Default);
            let machine = ours.protect(&disk);
            ours.wait_protected();
            Some((ours, machine, disk))
        }
        false => None,
    };
    let target = peers::target(folder)?;
    tidemark_tests::image::copy(source, &target);
    let (source_file, target_file) = (open(source)?, open(&target)?);
    let mut undo = Vec::new();
    for (round, writes) in changes.iter().enumerate() {
        let old = image::apply(&source_file, writes)?;
        for peer in &tools {
            let cost = peer.delta(source, &target, writes)?;
            peers::check(source, &target)?;
            image::apply(&target_file, &old)?;
            report.cost(what, peer.name(), round, cost);
        }
        image::apply(&target_file, writes)?;
        undo.push(old);
        if let Some((ours, machine, _)) = &mut ours {
            ours.pause();
            ours::write(machine.nbd(), writes)?;
            let cost = meter::measure(&[ours.site.pid()], || {
                ours.api.post(&format!("machines/{NAME}/resume"));
                ours.wait_durable();
                Ok(())
            })?;
            report.cost(what, Compression::Default.name(), round, cost);
        }
    }
    std::fs::remove_file(&target)?;
    if let Some((mut ours, _, disk)) = ours {
        let exported = ours.export()?;
        ours.site.down();
        peers::check(&disk, &exported)?;
        peers::check(source, &exported)?;
        std::fs::remove_dir_all(folder.join("ours"))?;
    }
    for old in undo.iter().rev() {
        image::apply(&source_file, old)?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<File, Failure> {
    Ok(File::options().read(true).write(true).open(path)?)
}
