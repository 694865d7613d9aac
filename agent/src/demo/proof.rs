//! Proofs: a recovered disk against what it must be.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use super::api::Api;
use super::disks::{self, failed};
use super::tools;
use super::writers::{BLOCK_BYTES, Place, WRITERS, Writers, author, last_writes, page};
use crate::cli::CliError;

/// What was compared, and what came out.
#[derive(Debug, Serialize)]
pub struct Proof {
    pub name: String,
    pub kind: &'static str,
    pub disk: String,
    pub point: String,
    pub time: String,
    pub expected_blake3: String,
    pub recovered_blake3: String,
    pub identical: bool,
    pub e2fsck_clean: bool,
    pub holds: bool,
    pub detail: String,
}

/// The machine at one instant, found without the product.
pub struct Reference {
    pub hashes: Vec<blake3::Hash>,
    /// Copies of the disks.
    pub images: Vec<PathBuf>,
}

/// A point, and what is known of its instant.
pub struct Marked {
    pub name: String,
    pub point: Value,
    pub known: Known,
}

pub enum Known {
    /// App-consistent: the source itself was read at the mark.
    Source(Vec<blake3::Hash>),
    /// Crash-consistent under load: how far each writer was at least, and at most; the last reference before.
    Between { base: usize, acknowledged: Vec<u64>, issued: Vec<u64> },
}

/// Exports a point; gives the images in the order of the machine's disks.
pub fn recover(
    api: &Api,
    machine: &str,
    marked: &Marked,
    to: &Path,
    disks: &[Value],
) -> Result<Vec<PathBuf>, CliError> {
    std::fs::create_dir(to).map_err(|error| failed(to, error))?;
    let point = marked.point["id"].as_str().unwrap_or_default();
    let request = json!({ "to": to, "format": "raw" });
    let exported = api.job(&format!("/machines/{machine}/points/{point}/export"), &request)?;
    let files = exported["files"].as_array().map(Vec::as_slice).unwrap_or_default();
    disks
        .iter()
        .map(|disk| {
            let file = files.iter().find(|file| file["id"] == disk["id"]).and_then(|file| file["path"].as_str());
            file.map(PathBuf::from).ok_or_else(|| {
                CliError::new(format!("disk {} is not among the exported files", disk["id"]), "please report it")
            })
        })
        .collect()
}

/// Compares recovered images with what they must be: one proof a disk.
pub fn check(
    marked: &Marked,
    recovered: &[PathBuf],
    references: &[Reference],
    databases: &[Vec<u32>],
    writers: &Writers,
    scratch: &Path,
) -> Result<Vec<Proof>, CliError> {
    let found = recovered.iter().map(|image| disks::hash(image)).collect::<Result<Vec<_>, _>>()?;
    let (expected, kind, in_order, detail) = match &marked.known {
        Known::Source(hashes) => {
            (hashes.clone(), "app", true, "the source was hashed while its writers were held".to_owned())
        }
        Known::Between { base, acknowledged, issued } => {
            let prefix = prefix_of(recovered, databases)?;
            let in_order = (0..WRITERS).all(|writer| (acknowledged[writer]..=issued[writer]).contains(&prefix[writer]));
            let base = &references[*base];
            let detail = format!(
                "each writer's log up to writes {prefix:?}; acknowledged before the mark {acknowledged:?}, issued after it {issued:?}"
            );
            let upto: Vec<u64> = if in_order { prefix } else { acknowledged.clone() };
            (replay(base, &upto, writers, scratch)?, "crash", in_order, detail)
        }
    };
    let mut proofs = Vec::new();
    for (index, image) in recovered.iter().enumerate() {
        let identical = found[index] == expected[index];
        let e2fsck_clean = tools::is_clean(image)?;
        proofs.push(Proof {
            name: marked.name.clone(),
            kind,
            disk: format!("disk {index}"),
            point: marked.point["id"].as_str().unwrap_or_default().to_owned(),
            time: marked.point["time"].as_str().unwrap_or_default().to_owned(),
            expected_blake3: expected[index].to_hex().to_string(),
            recovered_blake3: found[index].to_hex().to_string(),
            identical,
            e2fsck_clean,
            holds: identical && e2fsck_clean && in_order,
            detail: detail.clone(),
        });
    }
    Ok(proofs)
}

/// How far each writer had come, as the recovered databases say: the highest number of a write of its own. A writer's
/// last write cannot be covered by another, so its block shows it.
fn prefix_of(recovered: &[PathBuf], databases: &[Vec<u32>]) -> Result<Vec<u64>, CliError> {
    let mut prefix = vec![0; WRITERS];
    let mut block_data = vec![0; BLOCK_BYTES];
    for (image, blocks) in recovered.iter().zip(databases) {
        let file = File::open(image).map_err(|error| failed(image, error))?;
        for &block in blocks {
            file.read_exact_at(&mut block_data, u64::from(block) * BLOCK_BYTES as u64)
                .map_err(|error| failed(image, error))?;
            if let Some((writer, number)) = author(&block_data) {
                prefix[writer] = number.max(prefix[writer]);
            }
        }
    }
    Ok(prefix)
}

/// The reference's disks with each writer's log replayed so far; their hashes.
fn replay(base: &Reference, upto: &[u64], writers: &Writers, scratch: &Path) -> Result<Vec<blake3::Hash>, CliError> {
    let last: HashMap<Place, (usize, u64)> = last_writes(&writers.logs, upto);
    let mut hashes = Vec::new();
    for (disk, image) in base.images.iter().enumerate() {
        let expected = scratch.join("expected.img");
        disks::copy(image, &expected)?;
        let file = File::options().write(true).open(&expected).map_err(|error| failed(&expected, error))?;
        for (place, &(writer, number)) in last.iter().filter(|(place, _)| usize::from(place.disk) == disk) {
            file.write_all_at(&page(writer, number), u64::from(place.block) * BLOCK_BYTES as u64)
                .map_err(|error| failed(&expected, error))?;
        }
        drop(file);
        hashes.push(disks::hash(&expected)?);
        std::fs::remove_file(&expected).map_err(|error| failed(&expected, error))?;
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const BLOCKS: u32 = 24;

    fn image(folder: &Path, name: &str, writes: &[(u32, Vec<u8>)]) -> PathBuf {
        let path = folder.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(u64::from(BLOCKS) * BLOCK_BYTES as u64).unwrap();
        for (block, page) in writes {
            file.write_all_at(page, u64::from(*block) * BLOCK_BYTES as u64).unwrap();
        }
        path
    }

    /// Writer 0 wrote blocks 0, 3, 0, 6 and 9; four of these were acknowledged before the mark.
    #[test]
    fn only_a_beginning_of_the_writers_logs_is_a_crash_consistent_disk() {
        if tools::check().is_err() {
            return;
        }
        let top = tempfile::tempdir().unwrap();
        let folder = top.path();
        let base = image(folder, "base", &[]);
        let places = [0, 3, 0, 6, 9].map(|block| Place { disk: 0, block });
        let logs = (0..WRITERS)
            .map(|writer| Arc::new(super::super::writers::Log::of(if writer == 0 { &places } else { &[] })));
        let writers = Writers::of(logs.collect());
        let references = [Reference { hashes: Vec::new(), images: vec![base] }];
        let databases = [(0..BLOCKS).collect()];
        let marked = Marked {
            name: "crash".to_owned(),
            point: json!({ "id": "x", "time": "y" }),
            known: Known::Between { base: 0, acknowledged: vec![4, 0, 0], issued: vec![5, 0, 0] },
        };
        let four = vec![(3, page(0, 2)), (0, page(0, 3)), (6, page(0, 4))];
        let check = |name: &str, writes: &[(u32, Vec<u8>)]| {
            let recovered = image(folder, name, writes);
            let proofs = check(&marked, &[recovered], &references, &databases, &writers, folder).unwrap();
            proofs[0].identical
        };
        assert!(check("all acknowledged ones", &four));
        assert!(check("and one in flight", &[&four[..], &[(9, page(0, 5))]].concat()));
        assert!(!check("one is lost", &four[1..]));
        assert!(!check("the last acknowledged one is lost", &four[..2]));
        assert!(!check("an older one came later", &[(3, page(0, 2)), (0, page(0, 1)), (6, page(0, 4))]));
        assert!(!check("a stranger wrote", &[&four[..], &[(20, vec![1; BLOCK_BYTES])]].concat()));
    }
}
