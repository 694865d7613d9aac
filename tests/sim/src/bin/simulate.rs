//! `simulate --seed N [--trace]` replays one run; `--seeds A..B [--jobs N]` runs a range and sums up.
//!
//! A range is run by child processes, which fork one process for every few seeds: what a killed process of the simulation owned is
//! never given back (that is what being killed means), so a process that simulates is not kept for long. [`Heap`] is what they share.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use tidemark_sim::counts::Counts;
use tidemark_sim::heap::Heap;
use tidemark_sim::world::Process;
use tidemark_sim::{Options, StopAtSync, run};

const SEEDS_PER_PROCESS: u64 = 64;
const SEEDS_PER_FORK: usize = 6;

#[global_allocator]
static HEAP: Heap = Heap::new();

fn usage() -> ExitCode {
    eprintln!(
        "usage: simulate --seed N [--trace] [--twice] | --seeds A..B [--jobs N] [--until-failure] | --stops [--jobs N]; each with [--sabotage NAME]"
    );
    ExitCode::from(2)
}

#[derive(Default)]
struct Arguments {
    seed: Option<u64>,
    seeds: Option<(u64, u64)>,
    trace: bool,
    child: bool,
    twice: bool,
    jobs: Option<u64>,
    sabotage: Option<String>,
    until_failure: bool,
    stops: bool,
}

fn arguments() -> Option<Arguments> {
    let mut found = Arguments::default();
    let mut rest = std::env::args().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--seed" => found.seed = Some(rest.next()?.parse().ok()?),
            "--seeds" => {
                let range = rest.next()?;
                let (from, to) = range.split_once("..")?;
                found.seeds = Some((from.parse().ok()?, to.parse().ok()?));
            }
            "--jobs" => found.jobs = Some(rest.next()?.parse().ok()?),
            "--sabotage" => found.sabotage = Some(rest.next()?),
            "--trace" => found.trace = true,
            "--child" => found.child = true,
            "--twice" => found.twice = true,
            "--stops" => found.stops = true,
            "--until-failure" => found.until_failure = true,
            _ => return None,
        }
    }
    Some(found)
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else { return usage() };
    if let Some(name) = &arguments.sabotage {
        #[cfg(feature = "sabotage")]
        tidemark_base::sabotage::choose(Some(name));
        #[cfg(not(feature = "sabotage"))]
        {
            eprintln!("error: {name}: built without safeguards that can be taken out; help: add --features sabotage");
            return ExitCode::from(2);
        }
    }
    match (arguments.seed, arguments.seeds) {
        (Some(seed), None) => one(seed, &arguments),
        (None, Some((from, to))) if arguments.child && arguments.stops => child_stops(from, to),
        (None, Some((from, to))) if arguments.child => child(from, to),
        (None, None) if arguments.stops => range(0, STOPS, &arguments),
        (None, Some((from, to))) => range(from, to, &arguments),
        _ => usage(),
    }
}

fn one(seed: u64, arguments: &Arguments) -> ExitCode {
    let options = Options { trace: arguments.trace, ..Options::default() };
    if arguments.trace {
        tidemark_sim::print_events();
    }
    let started = Instant::now();
    let outcome = run(seed, &options);
    println!("{}", outcome.counts);
    println!(
        "seed {seed}: {} steps, {:.1} s simulated in {:.3} s, fingerprint {:016x}",
        outcome.steps,
        outcome.simulated.as_secs_f64(),
        started.elapsed().as_secs_f64(),
        outcome.fingerprint
    );
    if arguments.twice {
        let again = run(seed, &options);
        println!("again: {} steps, fingerprint {:016x}", again.steps, again.fingerprint);
        if again.fingerprint != outcome.fingerprint {
            println!("FAILED: the same seed ran differently");
            return ExitCode::FAILURE;
        }
    }
    match outcome.failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            println!("FAILED: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// The n-th of all stops: which process, at which of its syncs.
fn stop_at(number: u64) -> (StopAtSync, u64) {
    let mut rest = number;
    let mut take = |of: u64| {
        let digit = rest % of;
        rest /= of;
        digit
    };
    let (after, power_loss) = (take(2) == 1, take(2) == 1);
    let kind = KINDS_OF_SYNCS[take(KINDS_OF_SYNCS.len() as u64) as usize];
    let stop = StopAtSync { process: kind.0, kind: kind.1.to_owned(), number: 1 + rest, after, power_loss };
    // A few seeds in turn, so that what surrounds the stop differs.
    (stop, 7 + number % 5)
}

/// Whose files are synced: those of the host, and those of the process server.
const KINDS_OF_SYNCS: [(Process, &str); 10] = [
    (Process::Host, "log"),
    (Process::Host, "companion"),
    (Process::Host, "intent"),
    (Process::Host, "bitmap"),
    (Process::Host, "session"),
    (Process::Host, "cursor"),
    (Process::Server, "journal"),
    (Process::Server, "base"),
    (Process::Server, "manifest"),
    (Process::Server, "points"),
];

/// Before and after, killed and without power, of ten kinds, the first 24 syncs of each.
const STOPS: u64 = 2 * 2 * 10 * 24;

fn child_stops(from: u64, to: u64) -> ExitCode {
    each(from, to, |number| {
        let (stop, seed) = stop_at(number);
        let what = format!("{stop:?} of seed {seed}");
        let outcome = run(seed, &Options { stop_at_sync: Some(stop), trace: false });
        let failure =
            outcome.failure.map(|failure| format!("{what}: {}", failure.replace('\n', " "))).unwrap_or_default();
        println!("{number}\t{}\t{}\t{failure}", outcome.steps, outcome.counts);
    })
}

/// Does something for each number, in processes for a few of them, one after another. Where one of them crashes nothing is done for
/// the numbers after it: whoever reads the lines sees which one it was.
fn each(from: u64, to: u64, act: impl Fn(u64)) -> ExitCode {
    HEAP.reserve();
    for first in (from..to).step_by(SEEDS_PER_FORK) {
        // SAFETY: this process has one thread, so that the other one may do whatever this one might.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                HEAP.take_over();
                (first..to).take(SEEDS_PER_FORK).for_each(&act);
                std::process::exit(0);
            }
            Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, 0)) => {}
                ended => {
                    eprintln!("error: a process that simulates ended: {ended:?}");
                    return ExitCode::FAILURE;
                }
            },
            Err(error) => {
                eprintln!("error: no process can be made: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Some seeds, one line each, for the process that sums up.
fn child(from: u64, to: u64) -> ExitCode {
    each(from, to, |seed| {
        let outcome = run(seed, &Options::default());
        println!(
            "{seed}\t{}\t{}\t{}",
            outcome.steps,
            outcome.counts,
            outcome.failure.unwrap_or_default().replace('\n', " ")
        );
    })
}

fn range(from: u64, to: u64, arguments: &Arguments) -> ExitCode {
    let jobs =
        arguments.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, |found| found.get() as u64));
    let next = AtomicU64::new(from);
    let total = Mutex::new((Counts::default(), 0u64, 0u64, Vec::new()));
    let started = Instant::now();
    let program = std::env::current_exe().expect("this program is somewhere");
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(SEEDS_PER_PROCESS, Ordering::SeqCst);
                    if first >= to || (arguments.until_failure && !total.lock().expect("no panic").3.is_empty()) {
                        return;
                    }
                    let last = (first + SEEDS_PER_PROCESS).min(to);
                    let mut command = Command::new(&program);
                    command.args(["--child", "--seeds", &format!("{first}..{last}")]);
                    if arguments.stops {
                        command.arg("--stops");
                    }
                    if let Some(name) = &arguments.sabotage {
                        command.args(["--sabotage", name]);
                    }
                    let mut child = command.stdout(Stdio::piped()).spawn().expect("this program can be started");
                    let output = BufReader::new(child.stdout.take().expect("it is piped"));
                    let mut done = first;
                    for line in output.lines().map_while(Result::ok) {
                        let mut parts = line.split('\t');
                        let seed = parts.next().and_then(|seed| seed.parse::<u64>().ok());
                        let steps = parts.next().and_then(|steps| steps.parse::<u64>().ok());
                        let (Some(seed), Some(steps)) = (seed, steps) else { continue };
                        let counts = Counts::parse(parts.next().unwrap_or_default());
                        let failure = parts.next().unwrap_or_default();
                        done = seed + 1;
                        let mut total = total.lock().expect("no panic");
                        total.0.merge(&counts);
                        total.1 += 1;
                        total.2 += steps;
                        if !failure.is_empty() {
                            println!("seed {seed} FAILED: {failure}");
                            total.3.push(seed);
                        }
                    }
                    let status = child.wait().expect("it was started");
                    if done != last {
                        println!("seed {done} FAILED: the process that ran it ended ({status})");
                        total.lock().expect("no panic").3.push(done);
                    }
                }
            });
        }
    });
    let (counts, runs, steps, failures) = total.into_inner().expect("no panic");
    let seconds = started.elapsed().as_secs_f64();
    println!("{counts}");
    println!(
        "{runs} seeds from {from}: {} failed, {steps} steps, {seconds:.1} s, {:.1} seeds/s",
        failures.len(),
        runs as f64 / seconds
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
