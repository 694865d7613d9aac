//! What a run costs: wall time of the client's side, processor seconds of client and servers together, bytes on the
//! wire, the peak of anonymous memory of all of them, and how busy the machine was with anything else meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use tidemark_base::stop::Stop;
use tidemark_tests::wait;

use crate::{Failure, isolate};

#[derive(Clone, Copy, Default, Debug)]
pub struct Cost {
    pub wall_seconds: f64,
    pub processor_seconds: f64,
    pub wire_bytes: u64,
    pub anonymous_bytes_peak: u64,
    /// Processor cores that everybody else kept busy: what makes a number doubtful.
    pub noise_cores: f64,
}

/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_millis(25);

/// Measures `client`. Processor time of `servers` counts, and that of every child which ends meanwhile.
pub fn measure(servers: &[i32], client: impl FnOnce() -> Result<(), Failure>) -> Result<Cost, Failure> {
    let stop = Stop::new();
    let peak = Mutex::new(0);
    // Of what runs already, only these servers are measured.
    let mut others = children(std::process::id() as i32);
    others.retain(|other| !servers.contains(other));
    std::thread::scope(|scope| {
        scope.spawn(|| sample_memory(&others, &stop, &peak));
        let sampling = StopOnDrop(&stop);
        let before = Counters::read(servers);
        let start = Instant::now();
        let outcome = client();
        let wall_seconds = start.elapsed().as_secs_f64();
        let end = Counters::read(servers);
        // A daemon's child for this connection is about to end: its time counts when it has.
        let deadline = Instant::now() + Duration::from_secs(2);
        while servers.iter().any(|server| has_children(*server)) && Instant::now() < deadline {
            wait::until_passed(Instant::now() + Duration::from_millis(1));
        }
        let after = Counters::read(servers);
        drop(sampling);
        outcome?;
        // A daemon's child counts as ours only when it has ended.
        let busy = end.machine - before.machine - (after.ours() - before.ours());
        Ok(Cost {
            wall_seconds,
            processor_seconds: after.servers + after.children - before.servers - before.children,
            wire_bytes: end.wire - before.wire,
            anonymous_bytes_peak: *peak.lock().expect("no panic while held"),
            noise_cores: (busy / wall_seconds).max(0.0),
        })
    })
}

/// Ends the sampler also when the client panics: its scope would wait for it for ever.
struct StopOnDrop<'a>(&'a Stop);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Counters {
    servers: f64,
    children: f64,
    own: f64,
    machine: f64,
    wire: u64,
}

impl Counters {
    fn read(servers: &[i32]) -> Self {
        Self {
            servers: servers.iter().map(|server| processor_seconds(*server)).sum(),
            children: usage(libc::RUSAGE_CHILDREN),
            own: usage(libc::RUSAGE_SELF),
            machine: machine_busy_seconds(),
            wire: isolate::loopback_bytes(),
        }
    }

    fn ours(&self) -> f64 {
        self.servers + self.children + self.own
    }
}

fn usage(who: libc::c_int) -> f64 {
    // SAFETY: an all-zero rusage is valid, and the call fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a rusage that outlives the call.
    unsafe { libc::getrusage(who, &mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Of all threads of a process, also those that ended, and of its children that ended.
fn processor_seconds(pid: i32) -> f64 {
    let own = clock_getcpuclockid(Pid::from_raw(pid)).and_then(clock_gettime);
    let own = own.map(|time| time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9).unwrap_or(0.0);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold anything; fields are counted from behind it: cutime and cstime are 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let children: f64 = [13, 14].iter().filter_map(|at| fields.get(*at)?.parse::<f64>().ok()).sum();
    own + children / ticks_per_second()
}

fn ticks_per_second() -> f64 {
    // SAFETY: takes a number and gives a number.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) as f64 }
}

fn machine_busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers = text.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
    let numbers: Vec<f64> = numbers.filter_map(|number| number.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let idle: f64 = numbers.iter().skip(3).take(2).sum();
    (numbers.iter().sum::<f64>() - idle) / ticks_per_second()
}

fn sample_memory(others: &[i32], stop: &Stop, peak: &Mutex<u64>) {
    loop {
        let now = descendants(std::process::id() as i32, others).into_iter().map(anonymous_bytes).sum::<u64>();
        let mut peak = peak.lock().expect("no panic while held");
        *peak = now.max(*peak);
        drop(peak);
        if stop.wait_for(SAMPLE) {
            return;
        }
    }
}

/// Memory that is not a file's: a page cache of mapped files can be dropped, this cannot.
pub fn anonymous_bytes(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}

fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = threads.flatten().filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

fn has_children(pid: i32) -> bool {
    !children(pid).is_empty()
}

/// Children, their children, and so on, without the process itself and without those of `others`.
fn descendants(pid: i32, others: &[i32]) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    let mut next = children(pid);
    while let Some(pid) = next.pop() {
        if !others.contains(&pid) && found.insert(pid) {
            next.extend(children(pid));
        }
    }
    found
}
