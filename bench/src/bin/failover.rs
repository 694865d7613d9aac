//! What a failover and the way home cost: `cargo build --release && cargo run --release -p tidemark-bench --bin failover --
//! [rto|sign|failback|barrier…] [--rounds 5] [--size 4G] [--barriers 100] [--dir FOLDER] [--json FILE]`
//!
//! The product is driven through its command, as a user drives it. *rto* and *sign* boot real guests: they need
//! `qemu-system-x86_64`, busybox, mke2fs, and `TIDEMARK_GUEST_KERNEL` (`tests/run` gets one). Exits 3 when a goal is missed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidemark_tests::guest::{self, Guest};
use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::workload::{nbd, protected};
use tidemark_tests::{Machine, Site};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const KINDS: [&str; 4] = ["rto", "sign", "failback", "barrier"];
const GIB: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// Each changed block is one of so many.
const CHANGED_ONE_IN: u64 = 100;
const FILE_SYSTEM_BYTES: u64 = 48 * MIB;
const ALIVE: &str = "ALIVE";

/// The goals of the issue that asked for this.
const RTO_SECONDS_MAX: f64 = 2.0;
const SIGN_LATER_SECONDS_MAX: f64 = 2.0;
const LAST_DELTA_SECONDS_MAX: f64 = 2.0;
const DELTA_BYTES_RATIO_MAX: f64 = 1.05;
const HELD_P99_MS_MAX: f64 = 50.0;

struct Options {
    what: BTreeSet<String>,
    rounds: usize,
    bytes: u64,
    barriers: usize,
    dir: PathBuf,
    json: Option<PathBuf>,
}

impl Options {
    fn parse() -> Result<Self, Failure> {
        let mut options = Self {
            what: BTreeSet::new(),
            rounds: 5,
            bytes: 4 * GIB,
            barriers: 100,
            dir: std::env::temp_dir(),
            json: None,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            if KINDS.contains(&word.as_str()) {
                options.what.insert(word);
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{word} needs a value, or is nothing to measure"))?;
            match word.as_str() {
                "--rounds" => options.rounds = value.parse::<usize>()?.max(1),
                "--size" => options.bytes = size(&value)?,
                "--barriers" => options.barriers = value.parse::<usize>()?.max(1),
                "--dir" => options.dir = value.into(),
                "--json" => options.json = Some(value.into()),
                _ => return Err(format!("unknown option {word}").into()),
            }
        }
        if options.what.is_empty() {
            options.what = KINDS.map(str::to_owned).into();
        }
        Ok(options)
    }
}

/// Whole MiB.
fn size(text: &str) -> Result<u64, Failure> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'G') => (&text[..text.len() - 1], GIB),
        Some(b'M') => (&text[..text.len() - 1], MIB),
        _ => return Err(format!("{text}: a size is a number with M or G").into()),
    };
    Ok(digits.parse::<u64>()?.max(1) * unit)
}

/// One line of the table.
struct Figure {
    what: String,
    measured: f64,
    unit: &'static str,
    most: Option<f64>,
}

#[derive(Default)]
struct Report(Vec<Figure>);

impl Report {
    fn add(&mut self, what: impl Into<String>, measured: f64, unit: &'static str, most: Option<f64>) {
        let figure = Figure { what: what.into(), measured, unit, most };
        eprintln!("{}: {:.3} {unit}", figure.what, figure.measured);
        self.0.push(figure);
    }

    /// Whether every goal was met.
    fn tell(&self, json: Option<&Path>) -> Result<bool, Failure> {
        println!("| figure | measured | goal |\n|---|---|---|");
        for Figure { what, measured, unit, most } in &self.0 {
            let goal = most.map_or_else(|| "–".to_owned(), |most| format!("≤ {most}"));
            println!("| {what}, {unit} | {measured:.3} | {goal} |");
        }
        if let Some(file) = json {
            let one =
                |of: &Figure| json!({ "figure": of.what, "unit": of.unit, "measured": of.measured, "most": of.most });
            let all: Vec<Value> = self.0.iter().map(one).collect();
            let mut file = std::fs::File::create(file)?;
            serde_json::to_writer_pretty(&mut file, &all)?;
        }
        Ok(self.0.iter().all(|of| of.most.is_none_or(|most| of.measured <= most)))
    }
}

fn main() -> ExitCode {
    let outcome = Options::parse().and_then(|options| measure(&options));
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<bool, Failure> {
    let mut report = Report::default();
    if options.what.contains("rto") {
        rto(options, &mut report)?;
    }
    if options.what.contains("sign") {
        sign(options, &mut report)?;
    }
    if options.what.contains("failback") {
        failback(options, &mut report)?;
    }
    if options.what.contains("barrier") {
        barrier(options, &mut report)?;
    }
    report.tell(options.json.as_deref())
}

/// A guest that mounts its disk, says so and stays.
struct Parts {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Parts {
    fn make(site: &Site) -> Result<Self, Failure> {
        let kernel = guest::kernel()?;
        let script =
            format!("mount -t ext4 $disk /mnt || fail mount\necho {ALIVE} 1\nwhile true; do sleep 1000; done\n");
        let initrd = guest::initrd(site, &script);
        // Machines are started with files of this folder and no others.
        let folder = site.state().join("process-server/kernels");
        std::fs::create_dir_all(&folder)?;
        let parts = Self { kernel: folder.join("vmlinuz"), initrd: folder.join("initrd") };
        std::fs::copy(kernel, &parts.kernel)?;
        std::fs::copy(initrd, &parts.initrd)?;
        Ok(parts)
    }

    fn describe(&self, site: &Site, name: &str, sign: &[&str]) {
        let (kernel, initrd) = (self.kernel.to_string_lossy(), self.initrd.to_string_lossy());
        let mut arguments = vec!["machine", "set", name, "--memory", "256M", "--bus", "nvme", "--kernel", &kernel];
        arguments.extend(["--initrd", &initrd, "--kernel-command-line", guest::COMMAND_LINE]);
        arguments.extend(sign);
        site.json(&arguments);
    }
}

/// A file system at the beginning, and nothing behind it.
fn make_sparse(site: &Site, name: &str, bytes: u64) -> Result<PathBuf, Failure> {
    let (disk, empty) = (site.path(&format!("{name}.img")), site.path("empty"));
    std::fs::create_dir_all(&empty)?;
    image::make_ext4(&disk, FILE_SYSTEM_BYTES, &empty);
    std::fs::File::options().write(true).open(&disk)?.set_len(bytes)?;
    Ok(disk)
}

fn seconds(result: &Value, field: &str) -> Result<f64, Failure> {
    result[field].as_f64().ok_or_else(|| format!("no {field} in {result}").into())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn share(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// From the command to the guest's first instruction.
fn rto(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let site = Site::start_in(&options.dir);
    let parts = Parts::make(&site)?;
    for (name, bytes) in [("64 GiB", 64 * GIB), ("1 TiB", 1024 * GIB)] {
        let machine = name.replace(' ', "-");
        let disk = make_sparse(&site, &machine, bytes)?;
        site.protect(&machine, &[&disk], &[]);
        site.wait_protected(&machine);
        parts.describe(&site, &machine, &["--no-sign"]);
        site.point(&machine);
        let (mut drills, mut failovers, mut typed) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let drill = site.json(&["failover", "test", &machine, "--cleanup"]);
            drills.push(seconds(&drill, "rto_seconds")?);
            let began = Instant::now();
            let failover = site.json(&["failover", "unplanned", &machine]);
            typed.push(began.elapsed().as_secs_f64());
            failovers.push(seconds(&failover, "rto_seconds")?);
            site.json(&["failover", "cancel", &machine]);
            site.wait_protected(&machine);
        }
        let most = failovers.iter().copied().fold(0.0, f64::max);
        report.add(
            format!("{name}: failover to first instruction, median"),
            median(&mut failovers),
            "s",
            Some(RTO_SECONDS_MAX),
        );
        report.add(format!("{name}: the longest of {}", options.rounds), most, "s", None);
        report.add(format!("{name}: the command, from its start to its end, median"), median(&mut typed), "s", None);
        report.add(
            format!("{name}: drill to first instruction, median"),
            median(&mut drills),
            "s",
            Some(RTO_SECONDS_MAX),
        );
    }
    Ok(())
}

/// From the command to the guest's sign of life, beside the same guest's boot from a plain file.
fn sign(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let site = Site::start_in(&options.dir);
    let parts = Parts::make(&site)?;
    let disk = make_sparse(&site, "web", 64 * GIB)?;
    let plain = site.path("plain.img");
    image::copy(&disk, &plain);
    site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    parts.describe(&site, "web", &["--sign-console", ALIVE]);
    site.point("web");
    let (mut drills, mut boots) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let began = Instant::now();
        let guest = Guest::boot_file(&site, &parts.kernel, &parts.initrd, &plain);
        guest.says_number(ALIVE, 1);
        boots.push(began.elapsed().as_secs_f64());
        drop(guest);
        let drill = site.json(&["failover", "test", "web", "--cleanup"]);
        drills.push(seconds(&drill, "sign_seconds")?);
    }
    let (boot, drill) = (median(&mut boots), median(&mut drills));
    report.add("plain boot to sign of life, median", boot, "s", None);
    report.add("drill to sign of life, median", drill, "s", None);
    report.add("later than the plain boot", drill - boot, "s", Some(SIGN_LATER_SECONDS_MAX));
    Ok(())
}

/// Writes to one block of a hundred, each another one than before; returns the bytes.
fn change(uri: &str, bytes: u64, pass: u64) -> Result<u64, Failure> {
    let mut client = Client::connect(uri)?;
    let mut seeded = Seeded(pass);
    let mut block = [0; BLOCK as usize];
    let mut changed = 0;
    for window in 0..bytes / BLOCK / CHANGED_ONE_IN {
        seeded.fill(&mut block);
        let place = window * CHANGED_ONE_IN + seeded.below(CHANGED_ONE_IN);
        client.write(place * BLOCK, &block)?;
        changed += BLOCK;
    }
    client.flush()?;
    client.disconnect()?;
    Ok(changed)
}

/// The way home of a machine of which 1 % changed: what crosses, and how long it is down.
fn failback(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let site = Site::start_in(&options.dir);
    let machine = protected(&site, "web", "web.img", options.bytes, 1);
    site.wait_sent("web");
    let failed = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let there = nbd(&failed);
    let changed = change(&there, options.bytes, 1)?;
    let began = Instant::now();
    let delta = site.json(&["reprotect", "web", "--method", "delta"]);
    report.add("delta reprotect of 1 %", began.elapsed().as_secs_f64(), "s", None);
    let of_changed = |field: &str| Ok::<_, Failure>(seconds(&delta, field)? / changed as f64);
    report.add(
        "delta reprotect: sent ÷ changed, before compression",
        of_changed("received_bytes")?,
        "×",
        Some(DELTA_BYTES_RATIO_MAX),
    );
    report.add("delta reprotect: on the wire ÷ changed", of_changed("wire_bytes")?, "×", None);

    change(&there, options.bytes, 2)?;
    let began = Instant::now();
    site.json(&["failback", "web", "--minimise-downtime"]);
    report.add("sync of 1 % while it runs", began.elapsed().as_secs_f64(), "s", None);
    // As much again in the last moment: what a round did not bring by then is the last delta.
    change(&there, options.bytes, 3)?;
    let last = content_of(&there)?;
    let back = site.json(&["failback", "complete", "web"]);
    report.add(
        "failback, 1 % changed in the last moment: last delta",
        seconds(&back, "delta_seconds")?,
        "s",
        Some(LAST_DELTA_SECONDS_MAX),
    );
    report.add("failback: time to stop", seconds(&back, "stop_seconds")?, "s", None);
    report.add("failback: downtime", seconds(&back, "downtime_seconds")?, "s", None);
    if digest_of(&machine.disks[0].path)? != last {
        return Err("what is at home is not what was there".into());
    }
    site.json(&["commit", "web"]);
    Ok(())
}

fn content_of(uri: &str) -> Result<blake3::Hash, Failure> {
    let mut client = Client::connect(uri)?;
    let mut hasher = blake3::Hasher::new();
    let mut part = vec![0; MIB as usize];
    for at in (0..client.bytes).step_by(part.len()) {
        client.read(at, &mut part)?;
        hasher.update(&part);
    }
    Ok(hasher.finalize())
}

fn digest_of(path: &Path) -> Result<blake3::Hash, Failure> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(path)?)?;
    Ok(hasher.finalize())
}

/// Eight disks on four hosts, an agent each.
fn barrier(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let mut site = Site::start_roles();
    let mut hosts = vec![site.host_ids().remove(0)];
    hosts.extend(["host-2", "host-3", "host-4"].map(|name| site.start_host(name)));
    let names = ["one", "two", "three", "four"];
    let mut machines: Vec<Machine> = Vec::new();
    for (name, host) in names.iter().zip(&hosts) {
        let paths = [0, 1].map(|disk| site.path(&format!("{name}-{disk}.img")));
        paths.iter().for_each(|path| image::make_mixed(path, 64 * MIB, 1));
        machines.push(site.protect(name, &[&paths[0], &paths[1]], &["--host", host]));
        site.wait_protected(name);
    }
    site.json(&[&["group", "create", "shop"][..], &names, &["--interval", "0s", "--hold-limit", "250ms"]].concat());
    let (stop, round) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (mut held, mut whole) = (Vec::new(), 0usize);
    let mut waited = std::thread::scope(|scope| {
        let disks = machines.iter().flat_map(|machine| &machine.disks);
        let writers: Vec<_> = disks
            .map(|disk| {
                let (stop, round, rounds) = (&stop, &round, options.barriers);
                scope.spawn(move || paced_writes(&disk.nbd, stop, round, rounds))
            })
            .collect();
        for number in 1..=options.barriers {
            round.store(number, Ordering::SeqCst);
            let made = site.json(&["group", "point", "shop"]);
            whole += usize::from(made["group_consistent"] == true);
            held.push(made["held_seconds"].as_f64().unwrap_or_default() * 1e3);
        }
        stop.store(true, Ordering::SeqCst);
        let mut waited = Vec::new();
        for writer in writers {
            let longest = writer.join().map_err(|_| Failure::from("a writer stopped abruptly"))??;
            waited.extend(longest.into_iter().skip(1).map(|of| of.as_secs_f64() * 1e3));
        }
        Ok::<_, Failure>(waited)
    })?;
    report.add(format!("barrier: points of the group, of {}", options.barriers), whole as f64, "points", None);
    report.add("barrier: held by a host, p50", share(&mut held, 0.5), "ms", None);
    report.add("barrier: held by a host, p99", share(&mut held, 0.99), "ms", Some(HELD_P99_MS_MAX));
    report.add("barrier: longest write of a disk in a round, p50", share(&mut waited, 0.5), "ms", None);
    report.add("barrier: longest write of a disk in a round, p99", share(&mut waited, 0.99), "ms", None);
    Ok(())
}

/// 4 KiB each millisecond: a guest that does not take all of a processor. The write that waited longest in each round.
fn paced_writes(uri: &str, stop: &AtomicBool, round: &AtomicUsize, rounds: usize) -> Result<Vec<Duration>, Failure> {
    let mut client = Client::connect(uri)?;
    let mut longest = vec![Duration::ZERO; rounds + 1];
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) {
        let began = Instant::now();
        client.write(number % 64 * BLOCK, &[7; BLOCK as usize])?;
        number += 1;
        let of = &mut longest[round.load(Ordering::SeqCst)];
        *of = began.elapsed().max(*of);
        std::thread::park_timeout(Duration::from_millis(1));
    }
    Ok(longest)
}
