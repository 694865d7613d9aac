//! Measures the write path of a protected disk without NBD: microseconds for each 4 KiB write, by batch size, against the
//! bare disk. `cargo run --release -p tidemark-host --example write_path -- FOLDER [THREADS]`; give a tmpfs for the cost of
//! the software alone.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tidemark_base::disk::{Access, Disk, Durability, FileDisk};
use tidemark_base::storage::RealStorage;
use tidemark_base::{DiskId, Generation, MachineId, ServerId, SystemClock};
use tidemark_host::attach::{AttachRequest, attach};
use tidemark_host::capture::splitter::Splitter;
use tidemark_host::events::Events;
use tidemark_host::log::LogLimits;
use tidemark_host::state::session::Boot;
use tidemark_nbd::{Export, WriteRequest};

const DISK_BYTES: u64 = 1 << 30;
const WRITES: usize = 200_000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().expect("a folder"));
    let threads: usize = arguments.next().map_or(1, |number| number.parse().expect("a number of threads"));
    let path = folder.join("write-path.img");
    File::create(&path).and_then(|file| file.set_len(DISK_BYTES)).expect("a disk");
    let data = vec![0x5a_u8; 4096];

    let bare = FileDisk::open(&path, Access::Exclusive).expect("the disk opens");
    let begin = Instant::now();
    for index in 0..WRITES {
        bare.write_at(place(index), &data, Durability::Cached).expect("a write");
    }
    println!("bare pwrite             {:7.2} us", micros(begin, WRITES));
    drop(bare);

    let attached = attach(AttachRequest {
        disk: DiskId::random(),
        machine: MachineId::random(),
        generation: Generation::FIRST,
        path: path.clone(),
        tracker: None,
        device_folder: folder.join("devices"),
        elsewhere: RealStorage::create(folder.join("write-path.elsewhere")).expect("a folder"),
        consumers: vec![ServerId::random()],
        limits: LogLimits { rotate_bytes: 256 << 20, limit_bytes: u64::MAX, reserve_bytes: 0 },
        log_bytes_max: u64::MAX,
        boot: Boot::current().expect("a boot id"),
        clock: Arc::new(SystemClock::new()),
        events: Events::new(Arc::new(SystemClock::new())),
    })
    .expect("the disk attaches");
    let splitter = Arc::new(Splitter::new(attached.disk.clone()).expect("a splitter"));
    for batch in [1, 4, 16, 32] {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (splitter, data) = (&splitter, &data);
                scope.spawn(move || {
                    let mut results: Vec<_> = (0..batch).map(|_| Ok(())).collect();
                    for round in 0..WRITES / batch / threads {
                        let writes: Vec<WriteRequest<'_>> = (0..batch)
                            .map(|index| WriteRequest {
                                offset: place((round * batch + index) * threads + thread),
                                data,
                                fua: false,
                            })
                            .collect();
                        splitter.write_batch(&writes, &mut results);
                        assert!(results.iter().all(Result::is_ok));
                    }
                });
            }
        });
        println!("protected, batch of {batch:2}  {:7.2} us", micros(begin, WRITES));
        attached.disk.tick();
    }
    attached.disk.detach().expect("a clean end");
    drop((splitter, attached));
    for entry in std::fs::read_dir(&folder).expect("the folder").flatten() {
        if entry.file_name().to_string_lossy().starts_with("write-path.") {
            let path = entry.path();
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        }
    }
}

/// Scattered over the disk, each block once before any comes again.
fn place(index: usize) -> u64 {
    let blocks = DISK_BYTES / 4096;
    (index as u64 * 100_003) % blocks * 4096
}

fn micros(begin: Instant, count: usize) -> f64 {
    begin.elapsed().as_secs_f64() * 1e6 / count as f64
}
