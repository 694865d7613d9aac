//! A bad network between host and process server: cut on both ways and on one, slow, and full of resets, pauses and
//! splinters. The guest feels nothing; once the network is fine again, replication catches up by itself, and the points
//! that are made then are right.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::net::{self, Latencies, Manners, Namespace, Proxy};
use tidemark_tests::process::Owned;
use tidemark_tests::site::{Machine, ROLES};
use tidemark_tests::{Site, binary, need, need_root, tools, wait};

const DISK_BYTES: u64 = 32 * MIB;
const BLOCK: u64 = 4096;
/// A guest that does some work between its writes: more than a slow link takes, less than a fast one.
const WRITES_PER_SECOND: u32 = 400;
/// No write of the guest may take longer, whatever the network does. The machine is busy with other things, too.
const LATENCY_MAX: Duration = Duration::from_secs(2);
/// How soon everything is durable again after the network is fine.
const CONVERGED_IN: Duration = Duration::from_secs(60);
const HOST: &str = "10.77.0.1";
const SERVER: &str = "10.77.0.2";
const REPLICATION_PORT: u16 = 17320;
const PROXY_PORT: u16 = 17330;

/// Host and configuration server in one network, the process server in another.
struct Apart {
    site: Site,
    machine: Machine,
    host: Namespace,
    server: Namespace,
}

impl Apart {
    fn start() -> Self {
        let host = Namespace::enter_new();
        let server = Namespace::new();
        net::cable(&host, &server, [HOST, SERVER]);
        // A start on loopback makes everybody's identity; then each has its own configuration.
        let mut site = Site::start_roles();
        site.down();
        let state = site.state();
        let configuration = format!(
            "[config-server]\ndir = {state:?}\nlisten = \"{HOST}:17321\"\ncontrol-listen = \"{HOST}:17322\"\n\
             [agent]\ndir = {:?}\nconfig-server = \"{HOST}:17322\"\n\
             [process-server]\ndir = {:?}\nlisten = \"{SERVER}:{REPLICATION_PORT}\"\nconfig-server = \"{HOST}:17322\"\n",
            state.join("agent"),
            state.join("process-server"),
        );
        let file = site.path("tidemark.toml");
        std::fs::File::create(&file).and_then(|file| file.write_all_at(configuration.as_bytes(), 0)).unwrap();
        for role in ROLES {
            let mut command = Command::new(binary::tidemark());
            command.args([role, "run", "--config"]).arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
            if role == "process-server" {
                server.enclose(&mut command);
            }
            site.adopt(Owned::start(role, command, Some(&site.path("site.log"))));
        }
        site.wait_connected();
        let disk = site.path("disk.img");
        image::make_mixed(&disk, DISK_BYTES, 1);
        let machine = site.protect("web", &[&disk], &[]);
        site.wait_protected("web");
        Self { site, machine, host, server }
    }

    /// Waits for a point that has everything until now; how long that took.
    fn converge(&self) -> Duration {
        let begin = Instant::now();
        wait::until("a point is made again", CONVERGED_IN, || {
            (self.site.run(&["point", "create", "web"]).code == 0).then_some(())
        });
        begin.elapsed()
    }
}

/// Runs `faults` beside a guest that writes; its latencies, one list for each phase that `faults` begins.
fn under_load(machine: &Machine, faults: impl FnOnce(&dyn Fn())) -> Vec<Latencies> {
    let (stop, phase) = (AtomicBool::new(false), AtomicUsize::new(0));
    let latencies = Mutex::new(vec![Latencies::default()]);
    std::thread::scope(|scope| {
        let mut client = Client::connect(machine.nbd()).unwrap();
        let (stop, phase, latencies) = (&stop, &phase, &latencies);
        let guest = scope.spawn(move || {
            let mut seeded = Seeded(3);
            let mut data = vec![0; BLOCK as usize];
            let mut next = Instant::now();
            while !stop.load(Ordering::SeqCst) {
                wait::until_passed(next);
                next = (next + Duration::from_secs(1) / WRITES_PER_SECOND).max(Instant::now() - Duration::from_secs(1));
                seeded.fill(&mut data);
                let begin = Instant::now();
                client.write(seeded.below(DISK_BYTES / BLOCK) * BLOCK, &data).expect("the guest can write");
                let phase = phase.load(Ordering::SeqCst);
                latencies.lock().unwrap()[phase].note(begin);
            }
            client.disconnect().unwrap();
        });
        // A failed step still ends the guest, which would write for ever otherwise.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            faults(&|| {
                latencies.lock().unwrap().push(Latencies::default());
                phase.fetch_add(1, Ordering::SeqCst);
            })
        }));
        stop.store(true, Ordering::SeqCst);
        guest.join().unwrap();
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    latencies.into_inner().unwrap()
}

fn assert_calm(latencies: &[Latencies], names: &[&str]) {
    for (latencies, name) in latencies.iter().zip(names) {
        let (median, most, max) = (latencies.quantile(0.5), latencies.quantile(0.99), latencies.max());
        println!("{name}: {} writes, median {median:?}, 99 % {most:?}, longest {max:?}", latencies.count());
        assert!(latencies.count() > 20, "{name}: the guest hardly wrote");
        assert!(max < LATENCY_MAX, "{name}: a write of the guest took {max:?}");
    }
}

fn assert_equal(apart: &Apart) {
    apart.converge();
    let recovered = apart.site.export("web", "latest", "recovered.raw", "raw");
    image::assert_same(&apart.machine.disks[0].path, &recovered);
    std::fs::remove_file(recovered).unwrap();
}

fn seconds(quick: u64, long: u64) -> Duration {
    Duration::from_secs(if tools::is_long() { long } else { quick })
}

/// Time is what a fault of a network is made of.
fn last(time: Duration) {
    wait::until_passed(Instant::now() + time);
}

const BOTH_WAYS: &str = "chain in { type filter hook input priority 0; iifname \"t1\" drop
}
chain out { type filter hook output priority 0; oifname \"t1\" drop
}";
const DEAF: &str = "chain in { type filter hook input priority 0; iifname \"t1\" drop
}";
const MUTE: &str = "chain out { type filter hook output priority 0; oifname \"t1\" drop
}";
const REFUSING: &str =
    "chain in { type filter hook input priority 0; iifname \"t1\" tcp dport 17320 reject with tcp reset
}";

#[test]
fn a_cut_or_slow_network_holds_up_no_guest_and_is_caught_up() {
    need!("ip", "tc", "nft");
    need_root!("network namespaces");
    let apart = Apart::start();
    let names = ["before", "cut both ways", "the server is deaf", "the server is mute", "resets", "8 Mbit/s", "after"];
    let mut cycles = 0;
    let latencies = under_load(&apart.machine, |phase| {
        last(seconds(1, 5));
        for (name, chains) in names[1..].iter().zip([BOTH_WAYS, DEAF, MUTE, REFUSING]) {
            phase();
            apart.server.filter(Some(chains));
            last(seconds(3, 40));
            apart.server.filter(None);
            println!("{name}: caught up in {:?}", apart.converge());
            cycles += 1;
        }
        phase();
        apart.host.run(
            "tc",
            &["qdisc", "add", "dev", "t0", "root", "tbf", "rate", "8mbit", "burst", "32kbit", "latency", "400ms"],
        );
        last(seconds(4, 60));
        apart.host.run("tc", &["qdisc", "del", "dev", "t0", "root"]);
        println!("slow: caught up in {:?}", apart.converge());
        cycles += 1;
        phase();
        last(seconds(1, 5));
    });
    assert_equal(&apart);
    assert_calm(&latencies, &names);
    tools::counted("network faults ending in equal disks", cycles);
}

#[test]
fn a_network_that_resets_delays_and_splits_is_survived() {
    need!("ip", "nft");
    need_root!("network namespaces");
    let apart = Apart::start();
    let address = |port: u16| SocketAddr::new(SERVER.parse().unwrap(), port);
    let listen = SocketAddr::new("0.0.0.0".parse().unwrap(), PROXY_PORT);
    let proxy = Proxy::start(&apart.server, listen, address(REPLICATION_PORT), 9);
    // New connections go through the proxy; what is there is reset.
    let detour = format!(
        "chain detour {{ type nat hook prerouting priority -100; iifname \"t1\" tcp dport {REPLICATION_PORT} redirect to :{PROXY_PORT}\n}}\n"
    );
    apart.server.filter(Some(REFUSING));
    last(Duration::from_secs(1));
    apart.server.filter(Some(&detour));
    apart.converge();
    proxy.behave(Manners::Bad);
    let latencies = under_load(&apart.machine, |phase| {
        let end = Instant::now() + seconds(12, 300);
        let mut points = 0;
        while Instant::now() < end {
            // Points may succeed or fail meanwhile; each that succeeds is right, and the last is compared.
            points += u64::from(apart.site.run(&["point", "create", "web"]).code == 0);
            last(Duration::from_millis(200));
        }
        println!("{points} points, {} resets", proxy.resets());
        phase();
        proxy.behave(Manners::Fine);
        println!("caught up in {:?}", apart.converge());
        last(seconds(1, 5));
    });
    assert!(proxy.resets() > 0, "no connection was reset");
    assert_equal(&apart);
    assert_calm(&latencies, &["a bad network", "after"]);
    tools::counted("network faults ending in equal disks", 1);
    tools::counted("connections reset in the middle of frames", proxy.resets());
}
