//! Credit: how many bytes of chunks a host may have under way on one stream.
//!
//! Both ends keep one of these. It is moved by `Grant` and `Durable` alone, which travel in one ordered stream from
//! server to host, so the host's copy is the server's a moment ago: its limit never exceeds the server's, whatever
//! was under way, and nothing leaks when frames cross.
//!
//! A stream may have sent `max(granted_until, durable) + standing` bytes since it opened. What becomes durable uses up
//! the grant first, so the standing credit of an idle stream is whole again after each acknowledgement.

/// All numbers count bytes of `Data.chunks` since the stream opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Credit {
    standing: u64,
    granted_until: u64,
    durable: u64,
    sent: u64,
}

impl Credit {
    /// `standing` is what `Welcome` said.
    pub fn new(standing: u64) -> Self {
        Self { standing, granted_until: 0, durable: 0, sent: 0 }
    }

    /// A `Grant` was sent, or came.
    pub fn grant(&mut self, bytes: u64) {
        self.granted_until = self.granted_until.max(self.durable).saturating_add(bytes);
    }

    /// A `Durable` was sent, or came: `bytes` more of what was sent are on stable storage.
    pub fn acknowledge(&mut self, bytes: u64) {
        self.durable = self.durable.saturating_add(bytes).min(self.sent);
    }

    /// How many bytes may be sent now.
    pub fn room(&self) -> u64 {
        (self.granted_until.max(self.durable).saturating_add(self.standing)).saturating_sub(self.sent)
    }

    /// Counts a `Data` frame as sent, or as received. False when it exceeds the room: then nothing is counted.
    #[must_use]
    pub fn take(&mut self, bytes: u64) -> bool {
        let fits = bytes <= self.room();
        if fits {
            self.sent += bytes;
        }
        fits
    }

    /// Granted bytes that are not durable yet: what the stream holds of the server's pool.
    pub fn granted_live(&self) -> u64 {
        self.granted_until.saturating_sub(self.durable)
    }

    /// Sent and not yet durable.
    pub fn outstanding(&self) -> u64 {
        self.sent - self.durable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standing_credit_comes_back_with_each_acknowledgement() {
        let mut credit = Credit::new(100);
        for _ in 0..10 {
            assert!(credit.take(100) && !credit.take(1));
            credit.acknowledge(100);
        }
        assert_eq!((credit.room(), credit.granted_live()), (100, 0));
    }

    #[test]
    fn a_grant_adds_to_what_was_acknowledged_and_not_to_the_beginning() {
        let mut credit = Credit::new(100);
        assert!(credit.take(100));
        credit.acknowledge(100);
        credit.grant(1000);
        assert_eq!(credit.room(), 1100);
        assert!(credit.take(1100));
        credit.acknowledge(600);
        assert_eq!((credit.room(), credit.granted_live(), credit.outstanding()), (0, 400, 500));
        credit.acknowledge(500);
        assert_eq!((credit.room(), credit.granted_live()), (100, 0));
    }

    /// The host hears grants and acknowledgements late; the server must never find that it sent too much, and once
    /// everything arrived both agree.
    #[test]
    fn the_host_never_exceeds_what_the_server_counts() {
        let mut seed = 12345u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        enum Event {
            Grant(u64),
            Durable(u64),
        }
        let (mut host, mut server) = (Credit::new(64), Credit::new(64));
        let mut to_host = std::collections::VecDeque::new();
        for _ in 0..100_000 {
            match random(4) {
                0 => {
                    let bytes = random(host.room() + 1);
                    assert!(host.take(bytes));
                    assert!(server.take(bytes), "the server counts less room than the host");
                }
                1 => {
                    let bytes = random(200);
                    server.grant(bytes);
                    to_host.push_back(Event::Grant(bytes));
                }
                2 => {
                    let bytes = random(server.outstanding() + 1);
                    server.acknowledge(bytes);
                    to_host.push_back(Event::Durable(bytes));
                }
                _ => match to_host.pop_front() {
                    Some(Event::Grant(bytes)) => host.grant(bytes),
                    Some(Event::Durable(bytes)) => host.acknowledge(bytes),
                    None => assert_eq!(host, server),
                },
            }
        }
    }
}
