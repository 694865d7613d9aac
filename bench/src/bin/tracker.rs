//! What the eBPF tracker costs a writer: fio's 4 KiB random writes at QD32 on a loop device over tmpfs, with and without it.
//!
//! Rounds alternate off, on, off; the ratio of the two without it is what a difference means here. A run that is not counted comes before each that
//! is: the kernel takes a program off its events some time after it was asked to. The time of the programs is taken in runs of their own,
//! because counting it costs as well. Needs root, fio and losetup.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use tidemark_base::DiskId;
use tidemark_bpf::{BlockTracker, Witness};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const BYTES: u64 = 1 << 30;
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments.next().and_then(|rounds| rounds.parse().ok()).unwrap_or(9);
    match measure(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}\nhelp: run as root, with fio and losetup installed: `tracker [ROUNDS]`");
            ExitCode::FAILURE
        }
    }
}

/// A loop device over a file that is wholly allocated.
struct Loop {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Loop {
    fn new() -> Result<Self, Failure> {
        let folder = tempfile::tempdir_in("/dev/shm")?;
        let image = folder.path().join("disk.img");
        run("fallocate", &["-l", &BYTES.to_string(), text(&image)?])?;
        let path = run("losetup", &["--find", "--show", text(&image)?])?.trim().into();
        Ok(Self { path, _folder: folder })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| "a path that is no text".into())
}

fn run(program: &str, arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(format!("{program} failed: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

/// Write operations a second.
fn fio(device: &Path) -> Result<f64, Failure> {
    let file = format!("--filename={}", text(device)?);
    let said = run(
        "fio",
        &[
            "--name=w",
            &file,
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--ioengine=libaio",
            "--direct=1",
            "--runtime=2",
            "--time_based",
            "--norandommap",
            "--output-format=json",
        ],
    )?;
    let said: serde_json::Value = serde_json::from_str(&said[said.find('{').ok_or("fio said nothing")?..])?;
    said["jobs"][0]["write"]["iops"].as_f64().ok_or_else(|| "fio told no figures".into())
}

/// The second of two runs.
fn settled(device: &Path) -> Result<f64, Failure> {
    fio(device)?;
    fio(device)
}

fn measure(rounds: usize) -> Result<(), Failure> {
    let device = Loop::new()?;
    let disk = DiskId::random();
    let (mut with, mut control, mut programs) = (Vec::new(), Vec::new(), Vec::new());
    let mut absolute = Vec::new();
    for _ in 0..rounds {
        let before = settled(&device.path)?;
        let (tracker, _) = BlockTracker::open(&device.path, disk)?;
        let tracked = settled(&device.path)?;
        if tracker.witness() != Witness::Whole {
            return Err("the kernel missed events".into());
        }
        let counted = counted(&device.path, &tracker);
        BlockTracker::remove(disk)?;
        programs.push(counted?);
        let after = settled(&device.path)?;
        with.push(tracked / ((before + after) / 2.0));
        control.push(after / before);
        absolute.push(before);
    }
    println!("| | median (min..max) |\n|---|---|");
    println!("| without, IOPS | {} |", spread(&mut absolute, 0));
    println!("| with ÷ without | {} |", spread(&mut with, 3));
    println!("| without ÷ without | {} |", spread(&mut control, 3));
    println!("| programs, ns an event | {} |", spread(&mut programs, 0));
    Ok(())
}

/// Nanoseconds that one run of a program takes, counting included.
fn counted(device: &Path, tracker: &BlockTracker) -> Result<f64, Failure> {
    let set = |value: &[u8]| -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new().write(true).open(STATS)?;
        std::io::Write::write_all(&mut file, value)
    };
    set(b"1")?;
    let outcome = fio(device);
    set(b"0")?;
    outcome?;
    let figures = tracker.figures()?;
    Ok(figures.run_ns as f64 / figures.runs.max(1) as f64)
}

fn spread(values: &mut [f64], digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(min), Some(max)) = (values.first(), values.last()) else { return "–".to_owned() };
    format!("{:.digits$} ({min:.digits$}..{max:.digits$})", values[values.len() / 2])
}
