//! The sender against a server in memory: what is recovered equals the source, whatever happens between them.

mod compare;
mod faults;
mod grpc;
mod pack;
mod path;
mod scans;
pub mod server;
pub mod source;

use std::sync::Arc;
use std::time::Duration;

use tidemark_base::{Position, ServerId, SystemClock};
use tidemark_proto::replication::SessionId;

use super::{SendLimits, SendPolicy, Sender, SenderConfig};
use crate::pack::Workers;
use server::MemoryServer;
use source::MemorySource;

const LIMIT: Duration = Duration::from_secs(60);

/// A generator whose seed is all that a failing test needs to name.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| self.below(u64::MAX).to_le_bytes()).collect();
        bytes.truncate(length);
        bytes
    }
}

struct Bench {
    source: Arc<MemorySource>,
    server: MemoryServer,
    consumer: ServerId,
    config: SenderConfig,
}

impl Bench {
    fn new(disk_bytes: u64, seed: u64) -> Self {
        let source = MemorySource::new(disk_bytes);
        let server = MemoryServer::new(crate::source::Source::identity(&*source), seed);
        let consumer = ServerId::random();
        let config = SenderConfig {
            consumer,
            session: SessionId::random(),
            link: Arc::new(server.clone()),
            workers: Workers::with_threads(2).unwrap(),
            clock: Arc::new(SystemClock::new()),
            policy: SendPolicy::default(),
            limits: SendLimits {
                cut_gap: Duration::from_millis(1),
                heartbeat: Duration::from_millis(10),
                backoff_min: Duration::from_millis(1),
                backoff_max: Duration::from_millis(4),
                ..SendLimits::default()
            },
            moved: false,
        };
        Self { source, server, consumer, config }
    }

    fn start(&self) -> Sender {
        Sender::start(self.source.clone(), self.config.clone()).unwrap()
    }

    fn fill(&self, random: &mut Random) {
        let bytes = self.source.disk.content().len();
        for offset in (0..bytes).step_by(64 << 10) {
            self.source.write(offset as u64, &random.bytes((64 << 10).min(bytes - offset)));
        }
    }

    /// Waits until a mark made now is on the server, and compares there.
    fn settle(&self, sender: &Sender) -> Position {
        let mark = self.source.mark();
        self.settle_at(sender, mark);
        mark
    }

    fn settle_at(&self, sender: &Sender, mark: Position) {
        assert!(sender.wait_durable(mark, LIMIT), "{:?}\n{:?}", sender.status(), self.violations());
        self.compare();
    }

    fn violations(&self) -> Vec<String> {
        self.server.with(|state| state.violations.clone())
    }

    /// Every point of the server equals the source at its mark.
    fn compare(&self) {
        assert_eq!(self.violations(), Vec::<String>::new());
        let marks = self.source.points.lock().unwrap();
        self.server.with(|state| {
            for (id, image) in &state.points {
                if let Some(offset) = (0..image.len()).find(|&offset| image[offset] != marks[id][offset]) {
                    panic!("the point {id} differs from the source at {offset}");
                }
            }
        });
    }

    fn points(&self) -> usize {
        self.server.with(|state| state.points.len())
    }
}
