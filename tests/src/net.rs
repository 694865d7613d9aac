//! Networks of a test's own: two namespaces joined by a cable, which can be cut, throttled, or led through a proxy that
//! misbehaves. Nothing has a name outside of the test: what it leaves goes with its last process.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tidemark_base::stop::Stop;

use crate::image::Seeded;
use crate::tools;

/// A network namespace, which lives as long as something is in it or this is held.
pub struct Namespace {
    file: File,
}

fn unshare_network() {
    // SAFETY: unshare takes no pointers; it changes the network of the calling thread alone.
    let outcome = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(outcome, 0, "unshare: {}", std::io::Error::last_os_error());
}

fn this_threads() -> File {
    File::open("/proc/thread-self/ns/net").expect("a thread has a network")
}

impl Namespace {
    /// Moves the calling thread, and whatever it starts from now on, to a network of its own.
    pub fn enter_new() -> Self {
        unshare_network();
        let namespace = Self { file: this_threads() };
        namespace.run("ip", &["link", "set", "lo", "up"]);
        namespace
    }

    /// A network that nobody is in yet.
    pub fn new() -> Self {
        std::thread::spawn(Self::enter_new).join().expect("a network can be made")
    }

    /// Moves the calling thread there.
    pub fn enter(&self) {
        // SAFETY: setns takes no pointers; it changes the network of the calling thread alone.
        let outcome = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(outcome, 0, "setns: {}", std::io::Error::last_os_error());
    }

    /// Lets a command run there.
    pub fn enclose(&self, command: &mut Command) {
        let descriptor = self.file.as_raw_fd();
        // SAFETY: setns is async-signal-safe and touches no memory; the descriptor is open in the child until it executes.
        unsafe {
            command.pre_exec(move || match libc::setns(descriptor, libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }

    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = tools::command(program);
        command.args(arguments);
        self.enclose(&mut command);
        let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(output.status.success(), "{}", tools::describe(program, arguments, &output));
    }

    /// Replaces what this network's packet filter does by a table of its own; `None`: by nothing.
    #[track_caller]
    pub fn filter(&self, chains: Option<&str>) {
        let script = match chains {
            Some(chains) => format!("table inet test\ndelete table inet test\ntable inet test {{\n{chains}\n}}\n"),
            None => "table inet test\ndelete table inet test\n".to_owned(),
        };
        let mut command = tools::command("nft");
        command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        self.enclose(&mut command);
        let mut child = command.spawn().expect("nft starts");
        child.stdin.take().expect("stdin is piped").write_all(script.as_bytes()).expect("nft reads");
        let output = child.wait_with_output().expect("nft ends");
        assert!(output.status.success(), "nft: {}\n{script}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

/// Joins two networks: `t0` with the first address in one, `t1` with the second in the other.
#[track_caller]
pub fn cable(one: &Namespace, other: &Namespace, addresses: [&str; 2]) {
    let place = format!("/proc/{}/fd/{}", std::process::id(), other.file.as_raw_fd());
    one.run("ip", &["link", "add", "t0", "type", "veth", "peer", "name", "t1", "netns", &place]);
    for (namespace, device, address) in [(one, "t0", addresses[0]), (other, "t1", addresses[1])] {
        namespace.run("ip", &["address", "add", &format!("{address}/24"), "dev", device]);
        namespace.run("ip", &["link", "set", device, "up"]);
    }
}

/// How a [`Proxy`] treats connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manners {
    /// Everything passes.
    Fine,
    /// Pauses, pieces of a few bytes, resets in the middle of anything, half-closed and silent connections.
    Bad,
}

/// Takes connections and makes one of its own for each.
pub struct Proxy {
    manners: Arc<AtomicU8>,
    resets: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// How often a waiting pump looks whether it shall end.
const GLANCE: Duration = Duration::from_millis(50);

impl Proxy {
    /// In a network, from one address to another.
    pub fn start(namespace: &Namespace, listen: SocketAddr, to: SocketAddr, seed: u64) -> Self {
        let file = namespace.file.try_clone().expect("a descriptor can be copied");
        let manners = Arc::new(AtomicU8::new(Manners::Fine as u8));
        let resets = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let shared = (manners.clone(), resets.clone(), stop.clone());
        let (ready, wait) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            Namespace { file }.enter();
            let listener = TcpListener::bind(listen).expect("the proxy's address is free");
            listener.set_nonblocking(true).expect("a socket option");
            ready.send(()).expect("somebody waits");
            let (manners, resets, stop) = shared;
            let mut seeded = Seeded(seed);
            let pause = Stop::new();
            while !stop.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let Ok(server) = TcpStream::connect(to) else { continue };
                        for (from, to) in [(&client, &server), (&server, &client)] {
                            let pump = Pump {
                                from: from.try_clone().expect("a socket can be shared"),
                                to: to.try_clone().expect("a socket can be shared"),
                                manners: manners.clone(),
                                resets: resets.clone(),
                                stop: stop.clone(),
                                seeded: Seeded(seeded.number()),
                            };
                            std::thread::spawn(move || pump.run());
                        }
                    }
                    Err(_) => {
                        pause.wait_for(GLANCE);
                    }
                }
            }
        });
        wait.recv().expect("the proxy listens");
        Self { manners, resets, stop, thread: Some(thread) }
    }

    pub fn behave(&self, manners: Manners) {
        self.manners.store(manners as u8, Ordering::SeqCst);
    }

    /// Connections that it reset.
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Pump {
    from: TcpStream,
    to: TcpStream,
    manners: Arc<AtomicU8>,
    resets: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    seeded: Seeded,
}

impl Pump {
    fn run(mut self) {
        let mut buffer = vec![0; 64 << 10];
        let never = Stop::new();
        self.from.set_read_timeout(Some(GLANCE)).expect("a socket option");
        while !self.stop.load(Ordering::SeqCst) {
            let length = match self.from.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    continue;
                }
                Err(_) => break,
            };
            let bad = self.manners.load(Ordering::SeqCst) == Manners::Bad as u8;
            let mut rest = &buffer[..length];
            if bad {
                match self.seeded.below(100) {
                    0 => return self.reset(rest),
                    1 => {
                        // Says no more in this direction, as a half-closed connection.
                        let _ = self.to.shutdown(Shutdown::Write);
                        return;
                    }
                    // Silence, then the rest.
                    2 => drop(never.wait_for(Duration::from_millis(800))),
                    3..20 => drop(never.wait_for(Duration::from_millis(self.seeded.below(30)))),
                    20..60 => {
                        while rest.len() > 4096 {
                            let (piece, tail) = rest.split_at(1 + self.seeded.below(4095) as usize);
                            if self.to.write_all(piece).is_err() {
                                return;
                            }
                            rest = tail;
                        }
                    }
                    60..70 => {
                        for byte in 0..rest.len().min(40) {
                            if self.to.write_all(&rest[byte..=byte]).is_err() {
                                return;
                            }
                        }
                        rest = &rest[rest.len().min(40)..];
                    }
                    _ => {}
                }
            }
            if self.to.write_all(rest).is_err() {
                break;
            }
        }
        let _ = self.to.shutdown(Shutdown::Write);
    }

    /// Half of it, then a reset of both sides.
    fn reset(mut self, rest: &[u8]) {
        let _ = self.to.write_all(&rest[..rest.len() / 2]);
        for stream in [&self.from, &self.to] {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            // SAFETY: the descriptor is open, and the option's value is as large as is said.
            unsafe {
                libc::setsockopt(
                    stream.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    (&raw const linger).cast(),
                    size_of::<libc::linger>() as libc::socklen_t,
                );
            }
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// Latencies of a guest's writes.
#[derive(Default, Clone)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    pub fn note(&mut self, since: Instant) {
        self.0.push(since.elapsed());
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The latency that this share of the writes did not exceed.
    pub fn quantile(&self, share: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let index = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
        sorted.get(index).copied().unwrap_or_default()
    }

    pub fn max(&self) -> Duration {
        self.0.iter().copied().max().unwrap_or_default()
    }
}
