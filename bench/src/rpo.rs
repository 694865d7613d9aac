//! How far the replica is behind under load: from the guest's acknowledgement to the durable one.
//!
//! A writer sends 100 MB/s of random writes of 4 to 64 KiB, half of their bytes compressible. Beside it a sampler asks
//! for the positions some fifty times a second. Every write that was acknowledged before a sample was taken is logged
//! in it; the first sample whose durable position has reached that place bounds their RPO from above. Both ends and the
//! writer share the processors of this machine.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tidemark_tests::image::Seeded;
use tidemark_tests::nbd::Client;
use tidemark_tests::wait;

use crate::Failure;
use crate::image::BLOCK;
use crate::meter;
use crate::options::Options;
use crate::ours::{Compression, Ours};
use crate::report::Report;

const BYTES_PER_SECOND: u64 = 100_000_000;
const DISK_BYTES: u64 = 2 << 30;
const IN_FLIGHT: usize = 16;
const SAMPLE: Duration = Duration::from_millis(20);

pub struct Behind {
    pub seconds: f64,
    pub written_bytes_per_second: f64,
    pub p50_seconds: f64,
    pub p99_seconds: f64,
    pub worst_seconds: f64,
    /// What the status itself says.
    pub stated_p99_seconds: f64,
    pub anonymous_bytes_peak: u64,
    pub processor_cores: f64,
    pub sent_per_written: f64,
}

/// When it was taken, and the sequences of the first disk.
struct Sample {
    at: Duration,
    logged: u64,
    durable: u64,
    stated: f64,
}

pub fn measure(options: &Options, folder: &Path, report: &mut Report) -> Result<(), Failure> {
    let disk = folder.join("rpo.img");
    std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let mut ours = Ours::start(folder, Compression::Default);
    let machine = ours.protect(&disk);
    ours.wait_protected();
    let seconds = options.seconds * 10;
    let before = ours.status();
    let stop = AtomicBool::new(false);
    let (mut samples, mut written, mut elapsed) = (Vec::new(), 0, 0.0);
    let cost = meter::measure(&[ours.site.pid()], || {
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let outcome = write(machine.nbd(), Duration::from_secs(seconds));
                stop.store(true, Ordering::Relaxed);
                outcome
            });
            let start = Instant::now();
            let mut next = start;
            while !stop.load(Ordering::Relaxed) {
                samples.push(sample(start.elapsed(), &ours.status()));
                next += SAMPLE;
                wait::until_passed(next);
            }
            elapsed = start.elapsed().as_secs_f64();
            written = writer.join().map_err(|_| "the writer panicked")??;
            Ok::<(), Failure>(())
        })?;
        // The tail: until the last sample's writes are durable too.
        let start = Instant::now();
        let last = samples.last().map_or(0, |sample: &Sample| sample.logged);
        while samples.last().is_none_or(|sample| sample.durable < last) && start.elapsed() < Duration::from_secs(60) {
            let at = Duration::from_secs_f64(elapsed) + start.elapsed();
            samples.push(sample(at, &ours.status()));
            wait::until_passed(Instant::now() + SAMPLE);
        }
        Ok(())
    })?;
    let exported = ours.export()?;
    let figure = |status: &Value, key: &str| status[key].as_u64().unwrap_or(0) as f64;
    let after = ours.status();
    let growth = |key: &str| figure(&after, key) - figure(&before, key);
    ours.site.down();
    crate::peers::check(&disk, &exported)?;
    std::fs::remove_file(disk)?;

    let mut behind = lags(&samples, elapsed);
    let mut stated: Vec<f64> = samples.iter().map(|sample| sample.stated).collect();
    report.behind(Behind {
        seconds: elapsed,
        written_bytes_per_second: written as f64 / elapsed,
        p50_seconds: quantile(&mut behind, 0.50),
        p99_seconds: quantile(&mut behind, 0.99),
        worst_seconds: quantile(&mut behind, 1.0),
        stated_p99_seconds: quantile(&mut stated, 0.99),
        anonymous_bytes_peak: cost.anonymous_bytes_peak,
        processor_cores: cost.processor_seconds / cost.wall_seconds,
        sent_per_written: growth("sent_bytes") / growth("written_bytes"),
    });
    Ok(())
}

fn sample(asked: Duration, status: &Value) -> Sample {
    let positions = &status["disks"][0]["positions"];
    // A position is shown as epoch:sequence.
    let sequence = |key: &str| {
        let text = positions[key].as_str().unwrap_or_default();
        text.rsplit_once(':').and_then(|(_, sequence)| sequence.parse().ok()).unwrap_or(0)
    };
    let stated = status["rpo_seconds"].as_f64().unwrap_or(f64::NAN);
    Sample { at: asked, logged: sequence("logged"), durable: sequence("durable"), stated }
}

/// For each sample of the load: how long until a sample had all of it durable.
fn lags(samples: &[Sample], elapsed: f64) -> Vec<f64> {
    let mut lags = Vec::new();
    let mut later = 0;
    for (index, sample) in samples.iter().enumerate().take_while(|(_, sample)| sample.at.as_secs_f64() <= elapsed) {
        later = later.max(index);
        while later < samples.len() && samples[later].durable < sample.logged {
            later += 1;
        }
        // Never durable: that bound is none.
        let until =
            samples.get(later).map_or(f64::INFINITY, |later| (later.at.saturating_sub(sample.at)).as_secs_f64());
        lags.push(until);
    }
    lags
}

fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count => values[((count - 1) as f64 * part).ceil() as usize],
    }
}

/// Writes at the rate until `time` is over; gives the bytes that were acknowledged.
fn write(uri: &str, time: Duration) -> Result<u64, Failure> {
    let mut client = Client::connect(uri)?;
    let mut receiver = client.try_clone()?;
    let (slots, free) = std::sync::mpsc::sync_channel::<()>(IN_FLIGHT);
    std::thread::scope(|scope| {
        let replies = scope.spawn(move || -> Result<(), Failure> {
            // One reply for each request that took a slot, until the sender hangs up and none is left.
            while free.recv().is_ok() {
                match receiver.receive()? {
                    (_, 0) => {}
                    (_, error) => return Err(std::io::Error::from_raw_os_error(error as i32).into()),
                }
            }
            Ok(())
        });
        let mut seeded = Seeded(1);
        let mut noise = vec![0; 1 << 20];
        seeded.fill(&mut noise);
        let row = b"00000000|row|".repeat(64 << 10);
        let mut data = Vec::with_capacity(64 << 10);
        let start = Instant::now();
        let mut sent: u64 = 0;
        while start.elapsed() < time {
            let due = Duration::from_secs_f64(sent as f64 / BYTES_PER_SECOND as f64);
            wait::until_passed(start + due);
            let length = (1 + seeded.below(16) as usize) * BLOCK;
            let offset = seeded.below((DISK_BYTES - length as u64) / BLOCK as u64) * BLOCK as u64;
            let from = seeded.below((noise.len() - length) as u64) as usize;
            data.clear();
            data.extend(&noise[from..from + length / 2]);
            data.extend(&row[..length / 2]);
            // Blocks that were written before would compress to nothing.
            data[..8].copy_from_slice(&sent.to_le_bytes());
            if slots.send(()).is_err() {
                break;
            }
            client.send_write(sent, offset, &data, 0)?;
            sent += length as u64;
        }
        drop(slots);
        replies.join().map_err(|_| "the receiving thread panicked")??;
        Ok(sent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample_at(milliseconds: u64, logged: u64, durable: u64) -> Sample {
        Sample { at: Duration::from_millis(milliseconds), logged, durable, stated: 0.0 }
    }

    #[test]
    fn a_lag_lasts_until_a_sample_has_it_durable() {
        let samples = [sample_at(0, 10, 0), sample_at(100, 20, 5), sample_at(200, 20, 10), sample_at(300, 20, 20)];
        assert_eq!(lags(&samples, 0.1), [0.2, 0.2]);
        assert_eq!(lags(&samples[..3], 0.1)[1], f64::INFINITY);
    }

    #[test]
    fn quantiles_are_of_the_sorted_values() {
        let mut values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(quantile(&mut values, 0.5), 3.0);
        assert_eq!(quantile(&mut values, 1.0), 4.0);
        assert!(quantile(&mut [], 0.5).is_nan());
    }
}
