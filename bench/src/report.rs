//! Tables in Markdown, everything as JSON, and the goals as ratios of medians of the same run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::Failure;
use crate::files::{BINDFS, BINDFS_THREADS, FILE};
use crate::frontend::{LOADS, Load, NBDKIT, PAUSED, QEMU_NBD};
use crate::image::Content;
use crate::intent::IntentCost;
use crate::meter::Cost;
use crate::options::Options;
use crate::ours::Compression;
use crate::peers::Peer;
use crate::rpo::Behind;

pub struct Report {
    command: String,
    machine: String,
    isolated: bool,
    image: Option<Content>,
    changed: BTreeMap<&'static str, u64>,
    /// What, tool, and a cost per round; in the order of their first appearance.
    costs: Vec<(&'static str, &'static str, Vec<Cost>)>,
    loads: Vec<(&'static str, &'static str, Vec<Load>)>,
    seconds: Vec<(&'static str, Vec<f64>)>,
    behind: Option<Behind>,
    intent: Vec<IntentCost>,
}

struct Goal {
    what: String,
    limit: f64,
    value: f64,
    /// Whether the value must stay below the limit or above it.
    at_most: bool,
    unit: &'static str,
}

impl Report {
    pub fn new(options: &Options, isolated: bool) -> Self {
        Self {
            command: format!("cargo run --release -p tidemark-bench -- {}", options.command),
            machine: machine(),
            isolated,
            image: None,
            changed: BTreeMap::new(),
            costs: Vec::new(),
            loads: Vec::new(),
            seconds: Vec::new(),
            behind: None,
            intent: Vec::new(),
        }
    }

    pub fn image(&mut self, content: Content) {
        self.image = Some(content);
    }

    pub fn changed(&mut self, what: &'static str, bytes: u64) {
        self.changed.insert(what, bytes);
    }

    pub fn cost(&mut self, what: &'static str, tool: &'static str, round: usize, cost: Cost) {
        eprintln!(
            "{what} {round}: {tool}: {:.3} s, {:.2} processor s, {:.1} MB on the wire, {:.0} MiB, noise {:.2}",
            cost.wall_seconds,
            cost.processor_seconds,
            cost.wire_bytes as f64 / 1e6,
            mib(cost.anonymous_bytes_peak),
            cost.noise_cores
        );
        match self.costs.iter_mut().find(|(kind, name, _)| *kind == what && *name == tool) {
            Some((_, _, costs)) => costs.push(cost),
            None => self.costs.push((what, tool, vec![cost])),
        }
    }

    pub fn load(&mut self, what: &'static str, server: &'static str, round: usize, load: Load) {
        eprintln!("front end {round}: {server}: {what}: {:.0} IOPS", load.operations_per_second);
        match self.loads.iter_mut().find(|(kind, name, _)| *kind == what && *name == server) {
            Some((_, _, loads)) => loads.push(load),
            None => self.loads.push((what, server, vec![load])),
        }
    }

    pub fn seconds(&mut self, what: &'static str, round: usize, seconds: f64) {
        eprintln!("{round}: {what}: {seconds:.3} s");
        match self.seconds.iter_mut().find(|(kind, _)| *kind == what) {
            Some((_, all)) => all.push(seconds),
            None => self.seconds.push((what, vec![seconds])),
        }
    }

    pub fn behind(&mut self, behind: Behind) {
        self.behind = Some(behind);
    }

    pub fn intent(&mut self, cost: IntentCost) {
        eprintln!(
            "intent bitmap: {:.1} ns a write, {:.0} ns where it is the first of its region",
            cost.steady_nanoseconds, cost.first_touch_nanoseconds
        );
        self.intent.push(cost);
    }

    pub fn print(&self) {
        print!("{}", self.markdown());
    }

    pub fn save(&self, file: &Path) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(&self.json())?;
        Ok(std::io::Write::write_all(&mut std::fs::File::create(file)?, text.as_bytes())?)
    }

    fn markdown(&self) -> String {
        let mut text = format!("`{}`\n\n{}.", self.command, self.machine);
        if !self.isolated {
            text += " The loopback was not our own: bytes on the wire include those of others.";
        }
        text.push('\n');
        if let Some(image) = &self.image {
            let _ = writeln!(
                text,
                "\nThe disk: {:.0} MiB, {:.0} MiB written ({:.0} % holes), {:.0} MiB of it incompressible; zstd 1 makes {:.0} MB of it.",
                mib(image.bytes),
                mib(image.allocated),
                100.0 * (1.0 - image.allocated as f64 / image.bytes as f64),
                mib(image.incompressible),
                image.compressed as f64 / 1e6
            );
        }
        for (what, title) in [
            ("initial", "Initial replication"),
            ("delta", "1 % of all 4 KiB blocks"),
            ("append", "Appended in one piece"),
            ("resync", "Compared with a replica that differs"),
        ] {
            self.cost_table(&mut text, what, title);
        }
        self.load_table(&mut text);
        if !self.intent.is_empty() {
            let of = |figure: fn(&IntentCost) -> f64| self.intent.iter().map(figure).collect::<Vec<f64>>();
            let _ = writeln!(
                text,
                "\n### Write-intent bitmap\n\n| a write in steady state, ns (min..max) | the first write of a region, ns | share of a write at QD32 |\n\
                 |---|---|---|\n| {} | {:.0} | {} |",
                spread(&of(|cost| cost.steady_nanoseconds), 1),
                median(&of(|cost| cost.first_touch_nanoseconds)),
                self.intent_share().map_or("–".into(), |share| format!("{:.3} %", 100.0 * share)),
            );
        }
        if let Some(behind) = &self.behind {
            let _ = write!(
                text,
                "\n### RPO under random writes\n\n| written MB/s | p50 s | p99 s | worst s | stated p99 s | cores | anonymous MiB | sent / written |\n\
                 |---|---|---|---|---|---|---|---|\n| {:.1} | {:.3} | {:.3} | {:.3} | {:.3} | {:.2} | {:.0} | {:.2} |\n\nFor {:.0} s.\n",
                behind.written_bytes_per_second / 1e6,
                behind.p50_seconds,
                behind.p99_seconds,
                behind.worst_seconds,
                behind.stated_p99_seconds,
                behind.processor_cores,
                mib(behind.anonymous_bytes_peak),
                behind.sent_per_written,
                behind.seconds
            );
        }
        if !self.seconds.is_empty() {
            text += "\n### Points\n\n| what | s (min..max) |\n|---|---|\n";
            for (what, seconds) in &self.seconds {
                let _ = writeln!(text, "| {what} | {} |", spread(seconds, 3));
            }
        }
        let goals = self.goals();
        if !goals.is_empty() {
            text += "\n### Goals\n\n| goal | limit | measured | |\n|---|---|---|---|\n";
            for goal in goals {
                let sign = if goal.at_most { "≤" } else { "≥" };
                let verdict = if goal.passes() { "pass" } else { "**miss**" };
                let Goal { what, limit, value, unit, .. } = goal;
                let _ = writeln!(text, "| {what} | {sign} {limit:.3}{unit} | {value:.3}{unit} | {verdict} |");
            }
        }
        text
    }

    fn cost_table(&self, text: &mut String, what: &str, title: &str) {
        let rows: Vec<_> = self.costs.iter().filter(|(kind, _, _)| *kind == what).collect();
        if rows.is_empty() {
            return;
        }
        let changed = self.changed.get(what).map(|bytes| format!(" ({:.1} MB changed)", *bytes as f64 / 1e6));
        let _ = writeln!(text, "\n### {title}{}\n", changed.unwrap_or_default());
        *text += "| tool | wall s (min..max) | processor s | wire MB | anonymous MiB | noise cores |\n|---|---|---|---|---|---|\n";
        for (_, tool, costs) in rows {
            let of = |figure: fn(&Cost) -> f64| costs.iter().map(figure).collect::<Vec<f64>>();
            let _ = writeln!(
                text,
                "| {tool} | {} | {:.2} | {:.1} | {:.0} | {:.2} |",
                spread(&of(|cost| cost.wall_seconds), 3),
                median(&of(|cost| cost.processor_seconds)),
                median(&of(|cost| cost.wire_bytes as f64 / 1e6)),
                median(&of(|cost| mib(cost.anonymous_bytes_peak))),
                median(&of(|cost| cost.noise_cores)),
            );
        }
    }

    fn load_table(&self, text: &mut String) {
        for (load, _) in LOADS {
            let rows: Vec<_> = self.loads.iter().filter(|(kind, _, _)| *kind == load).collect();
            if rows.is_empty() {
                continue;
            }
            let _ = writeln!(
                text,
                "\n### {load}\n\n| server | IOPS (min..max) | × nbdkit | mean µs | p99 µs |\n|---|---|---|---|---|"
            );
            let nbdkit = self.operations(load, NBDKIT);
            for (_, server, loads) in rows {
                let of = |figure: fn(&Load) -> f64| loads.iter().map(figure).collect::<Vec<f64>>();
                let operations = of(|load| load.operations_per_second);
                let _ = writeln!(
                    text,
                    "| {server} | {} | {} | {:.0} | {:.0} |",
                    spread(&operations, 0),
                    nbdkit.map_or("–".into(), |nbdkit| format!("{:.2}", median(&operations) / nbdkit)),
                    median(&of(|load| load.mean_microseconds)),
                    median(&of(|load| load.p99_microseconds)),
                );
            }
        }
    }

    fn goals(&self) -> Vec<Goal> {
        let mut goals = Vec::new();
        let ours = Compression::Default.name();
        let mut ratio = |what: &str, value: Option<f64>, other: Option<f64>, limit: f64, at_most: bool| {
            if let (Some(value), Some(other)) = (value, other) {
                goals.push(Goal { what: what.to_owned(), limit, value: value / other, at_most, unit: "" });
            }
        };
        let delta = self.wall("delta", ours);
        for (peer, limit) in [
            (Peer::QemuBitmap, 0.7),
            (Peer::Nbdcopy, 1.0 / 5.0),
            (Peer::RsyncBlocks4k, 1.0 / 20.0),
            (Peer::RsyncDefault, 1.0 / 50.0),
        ] {
            ratio(&format!("delta: time, × {}", peer.name()), delta, self.wall("delta", peer.name()), limit, true);
        }
        let minimal = Peer::ReferenceCompressed.name();
        ratio("delta: bytes, × minimal sender", self.wire("delta", ours), self.wire("delta", minimal), 1.10, true);
        let off = self.wall("initial", Compression::Off.name());
        ratio("initial, compression off: time, × nbdcopy", off, self.wall("initial", Peer::Nbdcopy.name()), 1.8, true);
        let compressed = Peer::RsyncWholeCompressed.name();
        ratio("initial: time, × rsync -W -z", self.wall("initial", ours), self.wall("initial", compressed), 0.9, true);
        ratio("initial: bytes, × rsync -W -z", self.wire("initial", ours), self.wire("initial", compressed), 1.0, true);
        let [_, deep, sequential] = LOADS.map(|(load, _)| load);
        let (deep_paused, sequential_paused) = (self.operations(deep, PAUSED), self.operations(sequential, PAUSED));
        ratio("front end, QD32: IOPS, × nbdkit", deep_paused, self.operations(deep, NBDKIT), 0.8, false);
        ratio("front end, QD32: IOPS, × qemu-nbd", deep_paused, self.operations(deep, QEMU_NBD), 2.0, false);
        let nbdkit = self.operations(sequential, NBDKIT);
        ratio("front end, 128 KiB: IOPS, × nbdkit", sequential_paused, nbdkit, 0.5, false);
        for (load, _) in LOADS {
            let bare = [BINDFS, BINDFS_THREADS].iter().filter_map(|bare| self.operations(load, bare));
            let bare = bare.reduce(f64::max);
            ratio(&format!("file, {load}: IOPS, × the faster bindfs"), self.operations(load, FILE), bare, 0.9, false);
        }
        if let Some(value) = self.intent_share() {
            let what = "write-intent bitmap: share of a 4 KiB write, steady state".into();
            goals.push(Goal { what, limit: 0.03, value, at_most: true, unit: "" });
        }
        let mut peak = self.costs.iter().filter(|(_, tool, _)| tool.starts_with(ours)).flat_map(|(_, _, costs)| costs);
        let mut anonymous = peak.by_ref().map(|cost| cost.anonymous_bytes_peak).max();
        if let Some(behind) = &self.behind {
            goals.push(Goal {
                what: "RPO p99".into(),
                limit: 1.0,
                value: behind.p99_seconds,
                at_most: true,
                unit: " s",
            });
            let rate = behind.written_bytes_per_second / 1e6;
            goals.push(Goal {
                what: "… at a rate of".into(), limit: 99.0, value: rate, at_most: false, unit: " MB/s"
            });
            anonymous = anonymous.max(Some(behind.anonymous_bytes_peak));
        }
        if let Some((_, seconds)) = self.seconds.iter().find(|(what, _)| what.starts_with("serving")) {
            goals.push(Goal {
                what: "serve 1 TiB, first byte".into(),
                limit: 1.0,
                value: median(seconds),
                at_most: true,
                unit: " s",
            });
        }
        if let Some(bytes) = anonymous {
            let what = "anonymous memory of all roles, peak".into();
            goals.push(Goal { what, limit: 512.0, value: mib(bytes), at_most: true, unit: " MiB" });
        }
        goals
    }

    /// Of the time that a write takes at the front end, all of them together keeping it busy.
    fn intent_share(&self) -> Option<f64> {
        let operations = self.operations(LOADS[1].0, PAUSED)?;
        let steady: Vec<f64> = self.intent.iter().map(|cost| cost.steady_nanoseconds).collect();
        (!steady.is_empty()).then(|| median(&steady) * operations / 1e9)
    }

    fn wall(&self, what: &str, tool: &str) -> Option<f64> {
        self.costs_of(what, tool).map(|costs| median(&costs.iter().map(|cost| cost.wall_seconds).collect::<Vec<_>>()))
    }

    fn wire(&self, what: &str, tool: &str) -> Option<f64> {
        self.costs_of(what, tool)
            .map(|costs| median(&costs.iter().map(|cost| cost.wire_bytes as f64).collect::<Vec<_>>()))
    }

    fn costs_of(&self, what: &str, tool: &str) -> Option<&Vec<Cost>> {
        self.costs.iter().find(|(kind, name, _)| *kind == what && *name == tool).map(|(_, _, costs)| costs)
    }

    fn operations(&self, load: &str, server: &str) -> Option<f64> {
        let (_, _, loads) = self.loads.iter().find(|(kind, name, _)| *kind == load && *name == server)?;
        Some(median(&loads.iter().map(|load| load.operations_per_second).collect::<Vec<_>>()))
    }

    fn json(&self) -> Value {
        let cost = |cost: &Cost| {
            json!({
                "wall_seconds": cost.wall_seconds, "processor_seconds": cost.processor_seconds,
                "wire_bytes": cost.wire_bytes, "anonymous_bytes_peak": cost.anonymous_bytes_peak,
                "noise_cores": cost.noise_cores,
            })
        };
        let load = |load: &Load| {
            json!({
                "operations_per_second": load.operations_per_second, "mean_microseconds": load.mean_microseconds,
                "p99_microseconds": load.p99_microseconds,
            })
        };
        let goal = |goal: &Goal| {
            json!({
                "goal": goal.what, "limit": goal.limit, "at_most": goal.at_most, "measured": goal.value,
                "passes": goal.passes(),
            })
        };
        let costs = self.costs.iter().map(|(what, tool, costs)| {
            json!({"what": what, "tool": tool, "rounds": costs.iter().map(cost).collect::<Vec<_>>()})
        });
        let loads = self.loads.iter().map(|(what, server, loads)| {
            json!({"what": what, "server": server, "rounds": loads.iter().map(load).collect::<Vec<_>>()})
        });
        let behind = self.behind.as_ref().map(|behind| {
            json!({
                "seconds": behind.seconds, "written_bytes_per_second": behind.written_bytes_per_second,
                "p50_seconds": behind.p50_seconds, "p99_seconds": behind.p99_seconds,
                "worst_seconds": behind.worst_seconds, "stated_p99_seconds": behind.stated_p99_seconds,
                "anonymous_bytes_peak": behind.anonymous_bytes_peak, "processor_cores": behind.processor_cores,
                "sent_per_written": behind.sent_per_written,
            })
        });
        json!({
            "command": self.command, "machine": self.machine, "wire_is_isolated": self.isolated,
            "intent": self.intent.iter().map(|cost| json!({
                "steady_nanoseconds": cost.steady_nanoseconds, "first_touch_nanoseconds": cost.first_touch_nanoseconds,
            })).collect::<Vec<_>>(),
            "costs": costs.collect::<Vec<_>>(), "loads": loads.collect::<Vec<_>>(), "rpo": behind,
            "seconds": self.seconds.iter().map(|(what, all)| json!({"what": what, "rounds": all})).collect::<Vec<_>>(),
            "goals": self.goals().iter().map(goal).collect::<Vec<_>>(),
        })
    }
}

impl Goal {
    fn passes(&self) -> bool {
        if self.at_most { self.value <= self.limit } else { self.value >= self.limit }
    }
}

fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("")
        .trim_start_matches([' ', '\t', ':']);
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = read("/proc/meminfo");
    let kib = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    format!("{count} × {model}, {} GiB of memory, Linux {}", kib >> 20, read("/proc/sys/kernel/osrelease").trim())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// The median, and from where to where the values go.
fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.digits$} ({least:.digits$}..{most:.digits$})", median(values))
}
