//! inspect, verify and apply, on our logs and on files as Hyper-V makes them.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use support::*;
use tidemark_base::disk::{Access, Disk, FileDisk};
use tidemark_base::storage::{OpenMode, Storage};
use tidemark_hrl::format::{BlockHeader, Entry, Header};
use tidemark_hrl::tools::ToolError;
use tidemark_hrl::tools::apply::ApplyPlan;
use tidemark_hrl::tools::inspect::Inspection;
use tidemark_hrl::tools::verify::{Companion, verify};
use tidemark_hrl::{LogChain, PreparedLog};

fn put(storage: &Arc<dyn Storage>, file: &str, bytes: &[u8]) {
    let file = storage.open(file, OpenMode::OpenOrCreate).unwrap();
    file.set_bytes(0).unwrap();
    file.write_at(0, bytes).unwrap();
}

fn get(storage: &Arc<dyn Storage>, file: &str) -> Vec<u8> {
    tidemark_base::storage::read_file(&**storage, file, 1 << 30).unwrap()
}

fn flip(storage: &Arc<dyn Storage>, file: &str, at: usize) {
    let mut bytes = get(storage, file);
    bytes[at] ^= 1;
    put(storage, file, &bytes);
}

/// Three chained logs of ours, and what the disk must hold after them.
fn three_logs() -> (tempfile::TempDir, Arc<dyn Storage>, Vec<PathBuf>, Vec<u8>) {
    let (folder, storage) = folder();
    let batches = [
        vec![write(0, 16, 1), write(100, 8, 2)],
        vec![Step::Mark { body: b"mark".to_vec() }, Step::Zeroes { sector: 4, sectors: 8 }, write(102, 1, 3)],
        vec![write(6, 1, 4), write(1000, 40, 5)],
    ];
    let mut log = first_log(&storage);
    let mut expected = vec![0xee; DISK_BYTES as usize];
    for (number, batch) in batches.iter().enumerate() {
        append(&mut log, number as u64, batch).unwrap();
        for step in batch.iter().map(Seen::from) {
            match step {
                Seen::Write { offset, data } => expected[offset as usize..][..data.len()].copy_from_slice(&data),
                Seen::Zeroes { extent } => expected[extent.offset as usize..extent.end() as usize].fill(0),
                Seen::Mark { .. } => {}
            }
        }
        if number < 2 {
            let next = PreparedLog::create(storage.clone(), log.name().next(), disk(), DISK_BYTES, time(0)).unwrap();
            log.rotate(next, time(0)).unwrap().close(time(5)).unwrap();
        }
    }
    log.close(time(5)).unwrap();
    let paths = (1..=3).map(|number| folder.path().join(name(number).hrl())).collect();
    put(&storage, "target.img", &vec![0xee; DISK_BYTES as usize]);
    (folder, storage, paths, expected)
}

fn target(folder: &Path) -> FileDisk {
    FileDisk::open(&folder.join("target.img"), Access::Exclusive).unwrap()
}

#[test]
fn logs_are_applied_in_the_order_of_their_chain() {
    let (folder, storage, paths, expected) = three_logs();
    let before: Vec<Vec<u8>> = (1..=3).map(|number| get(&storage, &name(number).hrl())).collect();
    let shuffled = [paths[2].clone(), paths[0].clone(), paths[1].clone()];
    let report = ApplyPlan::check(&shuffled).unwrap().apply(&target(folder.path())).unwrap();
    assert_eq!(report.logs, paths);
    assert_eq!((report.entries, report.entries_without_data_checksum), (6, 0));
    assert!(get(&storage, "target.img") == expected, "the disk differs");
    let after: Vec<Vec<u8>> = (1..=3).map(|number| get(&storage, &name(number).hrl())).collect();
    assert!(before == after, "apply changed a log");
}

#[test]
fn logs_that_are_no_chain_are_not_applied() {
    let (folder, storage, paths, _) = three_logs();
    for wrong in [vec![paths[0].clone(), paths[2].clone()], vec![paths[0].clone(), paths[0].clone()]] {
        let error = ApplyPlan::check(&wrong).err().unwrap();
        assert!(matches!(error, ToolError::NotAChain { .. }), "{error}");
        assert!(!verify(&wrong).unwrap().sound);
    }
    let _ = target(folder.path());
    assert!(get(&storage, "target.img").iter().all(|&byte| byte == 0xee));
}

#[test]
fn a_write_beyond_the_disk_is_refused_before_anything_is_written() {
    let (folder, storage, paths, _) = three_logs();
    storage.open("target.img", OpenMode::ReadWrite).unwrap().set_bytes(1000 * 512).unwrap();
    let error = ApplyPlan::check(&paths).unwrap().apply(&target(folder.path())).err().unwrap();
    assert!(
        matches!(&error, ToolError::BeyondDisk { path, extent, .. } if *path == paths[2] && extent.offset == 512_000),
        "{error}"
    );
    assert!(get(&storage, "target.img").iter().all(|&byte| byte == 0xee));
}

#[test]
fn verify_names_each_defect_with_its_offset() {
    let (_folder, storage, paths, _) = three_logs();
    let report = verify(&paths).unwrap();
    assert!(report.sound && report.files.iter().all(|file| file.companion == Companion::Verified), "{report:?}");
    flip(&storage, &name(1).hrl(), 4096 + 10);
    flip(&storage, &name(2).hrl(), 200);
    flip(&storage, &name(3).companion(), 4096 + 20);
    let report = verify(&paths).unwrap();
    assert!(!report.sound);
    let first: Vec<(u64, bool)> =
        report.files.iter().map(|file| (file.defects[0].offset, file.defects[0].in_companion)).collect();
    assert_eq!(first, [(4096, false), (40, false), (4096, true)]);
    assert!(report.files[0].defects[0].what.contains("data's checksum"));
    assert!(matches!(ApplyPlan::check(&paths).err(), Some(ToolError::Unsound { .. })));
}

/// Two bytes that changed places pass the format's checksum, but not the companion.
#[test]
fn the_companion_finds_what_the_format_cannot() {
    let (_folder, storage, paths, _) = three_logs();
    let mut bytes = get(&storage, &name(1).hrl());
    let at = (4096..).find(|&at| bytes[at] != bytes[at + 1]).unwrap();
    bytes.swap(at, at + 1);
    put(&storage, &name(1).hrl(), &bytes);
    let report = verify(&paths[..1]).unwrap();
    assert_eq!((report.sound, report.files[0].companion), (false, Companion::Defective));
    storage.remove(&name(1).companion()).unwrap();
    assert!(verify(&paths[..1]).unwrap().sound);
}

/// As Hyper-V writes it: blank padding, no data checksums, an empty first block, a header checksum of its own.
fn hyper_v_log() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes.extend(BlockHeader { previous: 0, entries: 0 }.encode());
    bytes.resize(8192, 0);
    bytes.extend(data_of(1, 8));
    bytes.extend(data_of(2, 61));
    let block_at = bytes.len();
    bytes.extend(BlockHeader { previous: block_at as u64 - 4096, entries: 2 }.encode());
    for (byte_offset, data_bytes) in [(8192, 4096), (16_384, 31_232)] {
        let entry = Entry { byte_offset, data_bytes, time_seconds: 539_842_382, operation: 1, data_checksum: 0 };
        bytes.extend(entry.encode());
    }
    bytes.resize(block_at + 4096, 0);
    let mut header = Header::new(uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2), time(0));
    header.eol_location = bytes.len() as u64;
    header.total_entries = 2;
    bytes[..4096].copy_from_slice(&header.encode());
    bytes[7] = b' ';
    bytes
}

#[test]
fn a_log_of_hyper_v_is_inspected_and_applied_with_warnings() {
    let (folder, storage) = folder();
    put(&storage, "alien.hrl", &hyper_v_log());
    put(&storage, "target.img", &vec![0; 1 << 20]);
    let path = folder.path().join("alien.hrl");
    let inspection = Inspection::open(&path).unwrap();
    assert!(inspection.closed && !inspection.header.checksum_ok);
    let mut entries = Vec::new();
    let warnings = inspection
        .entries(|entry| {
            entries.push(serde_json::to_value(entry).unwrap());
            Ok(())
        })
        .unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0]["data_offset"], 8192);
    assert_eq!(entries[1]["data_offset"], 8192 + 4096);
    assert_eq!(entries[1]["time"], "2017-02-08T04:13:02.000000000Z");
    assert_eq!(entries[1]["data_checksum"], serde_json::Value::Null);
    assert!(warnings.len() == 1 && warnings[0].contains("header's checksum"), "{warnings:?}");

    let report = verify(std::slice::from_ref(&path)).unwrap();
    assert_eq!((report.sound, report.files[0].entries_without_data_checksum), (false, 2));
    assert_eq!(report.files[0].without_data_checksum[1].byte_offset, 16_384);
    let report = ApplyPlan::check(&[path]).unwrap().apply(&target(folder.path())).unwrap();
    assert_eq!((report.entries, report.entries_without_data_checksum, report.warnings.len()), (2, 2, 1));
    let written = get(&storage, "target.img");
    assert_eq!(written[8192..8192 + 4096], data_of(1, 8));
    assert_eq!(written[16_384..16_384 + 31_232], data_of(2, 61));
}

#[test]
fn every_truncation_of_a_log_is_an_error_that_names_it() {
    let (folder, storage) = folder();
    let whole = hyper_v_log();
    let path = folder.path().join("cut.hrl");
    for length in (0..whole.len()).step_by(97).chain([4095, 4096, 4097, whole.len() - 1]) {
        put(&storage, "cut.hrl", &whole[..length]);
        let error = Inspection::open(&path).err().unwrap();
        assert!(error.to_string().contains("cut.hrl") && !error.help().is_empty(), "{error}");
        assert!(!verify(std::slice::from_ref(&path)).unwrap().sound);
        assert!(ApplyPlan::check(std::slice::from_ref(&path)).is_err());
    }
}

#[test]
fn a_log_that_is_open_shows_its_header_only() {
    let (folder, storage) = folder();
    let mut log = first_log(&storage);
    append(&mut log, 1, &[write(0, 1, 1)]).unwrap();
    let path = folder.path().join(name(1).hrl());
    let inspection = Inspection::open(&path).unwrap();
    assert!(!inspection.closed);
    let warnings = inspection.entries(|_| panic!("an entry of an open log")).unwrap();
    assert!(warnings[0].contains("not closed"));
    let error = ApplyPlan::check(&[path]).err().unwrap();
    assert!(error.help().contains("agent"), "{}", error.help());
}

#[test]
fn what_is_no_log_is_refused_by_name() {
    let (folder, storage) = folder();
    put(&storage, "noise", &[7; 10_000]);
    for (path, expected) in [
        (folder.path().join("absent"), "absent"),
        (folder.path().to_owned(), "cannot open"),
        (folder.path().join("noise"), "cookie"),
    ] {
        let error = Inspection::open(&path).err().unwrap();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn the_target_stays_sparse_where_zeroes_are_applied() {
    let (folder, storage) = folder();
    let mut log = first_log(&storage);
    append(&mut log, 1, &[Step::Zeroes { sector: 0, sectors: DISK_BYTES / 512 }]).unwrap();
    log.close(time(1)).unwrap();
    put(&storage, "target.img", &vec![1; DISK_BYTES as usize]);
    let disk_file = target(folder.path());
    ApplyPlan::check(&[folder.path().join(name(1).hrl())]).unwrap().apply(&disk_file).unwrap();
    let mut page = vec![9; 4096];
    disk_file.read_at(DISK_BYTES - 4096, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
    // Wine, which runs this for Windows, knows no holes.
    if cfg!(unix) {
        assert!(storage.open("target.img", OpenMode::Read).unwrap().allocated_bytes().unwrap() < DISK_BYTES / 8);
    }
    assert!(!LogChain::open(storage, STEM, disk()).unwrap().is_empty());
}
