//! What was proven and measured.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::proof::Proof;
use crate::cli::{CliError, Output, size_text};

#[derive(Default)]
pub struct Report {
    pub proofs: Vec<Proof>,
    /// Both source disks fail e2fsck after the damage: there was something to recover from.
    pub source_damaged: bool,
    pub replication_went_on: bool,
    pub initial_replication_seconds: f64,
    pub initial_replication_bytes_sent: u64,
    pub rpo_samples: Vec<f64>,
    pub rto_seconds: f64,
    pub recovery_seconds: Vec<f64>,
    pub written_bytes: u64,
    pub sent_bytes: u64,
    pub points: usize,
    seconds: f64,
    kept: Option<PathBuf>,
}

impl Report {
    pub fn finish(&mut self, took: Duration, kept: Option<PathBuf>) {
        self.seconds = took.as_secs_f64();
        self.kept = kept;
        self.rpo_samples.sort_by(f64::total_cmp);
    }

    pub fn holds(&self) -> bool {
        !self.proofs.is_empty() && self.broken() == 0 && self.source_damaged && self.replication_went_on
    }

    pub fn broken(&self) -> usize {
        self.proofs.iter().filter(|proof| !proof.holds).count()
    }

    fn rpo(&self, share: f64) -> Option<f64> {
        let last = self.rpo_samples.len().checked_sub(1)?;
        Some(self.rpo_samples[(last as f64 * share) as usize])
    }

    fn slowest_recovery(&self) -> f64 {
        self.recovery_seconds.iter().copied().fold(0.0, f64::max)
    }

    pub fn print(&self, output: &Output) -> Result<(), CliError> {
        if output.is_json() {
            let document = json!({
                "proven": self.holds(),
                "proofs": self.proofs,
                "source_damaged": self.source_damaged,
                "replication_went_on": self.replication_went_on,
                "rpo_seconds_median": self.rpo(0.5),
                "rpo_seconds_p99": self.rpo(0.99),
                "rpo_seconds_max": self.rpo(1.0),
                "rpo_samples": self.rpo_samples.len(),
                "rto_seconds": self.rto_seconds,
                "recovery_seconds_max": self.slowest_recovery(),
                "initial_replication_seconds": self.initial_replication_seconds,
                "initial_replication_bytes_sent": self.initial_replication_bytes_sent,
                "written_bytes": self.written_bytes,
                "sent_bytes": self.sent_bytes,
                "points": self.points,
                "seconds": self.seconds,
                "kept": self.kept,
            });
            return Ok(output.json(&document)?);
        }
        let rows: Vec<Vec<String>> = self
            .proofs
            .iter()
            .map(|proof| {
                let yes = |holds: bool| if holds { "yes" } else { "NO" }.to_owned();
                vec![
                    proof.name.clone(),
                    proof.disk.clone(),
                    proof.time.clone(),
                    proof.recovered_blake3[..16].to_owned(),
                    yes(proof.identical),
                    yes(proof.e2fsck_clean),
                    if proof.holds { "holds" } else { "BROKEN" }.to_owned(),
                ]
            })
            .collect();
        output.table(&["RECOVERED", "DISK", "MARK", "BLAKE3", "IDENTICAL", "E2FSCK", "PROOF"], &rows)?;
        output.line("")?;
        let seconds = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3} s"));
        let figures = [
            ("RPO under load: median, p99, largest", [0.5, 0.99, 1.0].map(|share| seconds(self.rpo(share))).join(", ")),
            ("RTO: failover command to first byte", seconds(Some(self.rto_seconds))),
            ("slowest export of both disks to plain images", seconds(Some(self.slowest_recovery()))),
            (
                "initial replication",
                format!(
                    "{}, {} sent",
                    seconds(Some(self.initial_replication_seconds)),
                    size_text(self.initial_replication_bytes_sent)
                ),
            ),
            ("written through the agent", size_text(self.written_bytes)),
            ("sent, initial replication included", size_text(self.sent_bytes)),
            ("recovery points", self.points.to_string()),
            ("source damaged beyond e2fsck -n", self.source_damaged.to_string()),
            ("replication went on during the test failover", self.replication_went_on.to_string()),
            ("whole demonstration", seconds(Some(self.seconds))),
        ];
        let rows: Vec<Vec<String>> = figures.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
        output.table(&["MEASURED", ""], &rows)?;
        if let Some(kept) = &self.kept {
            output.line(&format!("kept in {}", kept.display()))?;
        }
        Ok(())
    }
}
