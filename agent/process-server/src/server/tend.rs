//! Indexes are merged soon after their segments were sealed, damaged ones made again, and what reads found is looked into.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::stop::Stop;

use super::background::Background;
use crate::replica::ReplicaSet;

/// Segments are sealed a few times a second at most, and a read asks each that is not merged.
const INTERVAL: Duration = Duration::from_secs(1);

pub struct Tender {
    stop: Stop,
    pub(super) thread: Background,
}

impl Tender {
    pub fn start(set: Arc<ReplicaSet>) -> io::Result<Self> {
        let stop = Stop::new();
        let thread = Background::start("tend", "healing of what is damaged", {
            let stop = stop.clone();
            move || {
                super::scrubber::give_way();
                // What a restart found to be needed may have come before it.
                set.replicas().iter().for_each(|replica| replica.check_need());
                loop {
                    set.tend(&stop);
                    if stop.wait_for(INTERVAL) {
                        break;
                    }
                }
            }
        })?;
        Ok(Self { stop, thread })
    }

    pub fn stop(&self) {
        self.stop.stop();
        self.thread.join();
    }
}
