//! What happened, by kind: a kind of fault that never happens tests nothing.

use std::fmt;

macro_rules! kinds {
    ($($name:ident $text:literal),* $(,)?) => {
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Kind {
            $($name),*
        }

        impl Kind {
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            pub fn text(self) -> &'static str {
                match self {
                    $(Kind::$name => $text),*
                }
            }

            pub fn named(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|kind| kind.text() == text)
            }
        }
    };
}

kinds! {
    GuestWrite "guest-write",
    GuestZero "guest-zero",
    GuestFlush "guest-flush",
    GuestFua "guest-fua",
    GuestError "guest-error",
    Mark "mark",
    KeptMark "kept-mark",
    HostKill "host-kill",
    HostPowerLoss "host-power-loss",
    HostStop "host-clean-stop",
    ServerKill "server-kill",
    ServerPowerLoss "server-power-loss",
    ServerStop "server-clean-stop",
    CrashAtStep "crash-at-a-step",
    LostWrite "unsynced-write-lost",
    TornWrite "unsynced-write-torn",
    ReorderedWrite "unsynced-write-reordered",
    LostName "unsynced-name-lost",
    ReadError "read-eio",
    WriteError "write-eio",
    SyncError "failed-fsync",
    NoRoom "enospc",
    DiskError "disk-eio",
    DiskFlushError "disk-flush-eio",
    SlowMedium "slow-medium",
    BitRot "bit-rot",
    BitRotFound "bit-rot-found",
    BitRotNamed "bit-rot-named-by-the-scrub",
    BitRotHealed "healed-after-bit-rot",
    LogRot "bit-rot-in-a-log-of-the-host",
    LinkCut "link-cut",
    LinkDown "link-down",
    LinkDelay "link-delay",
    LateStream "late-frames-of-an-old-stream",
    DuplicateStream "two-streams-of-one-disk",
    ClockJump "clock-jump",
    ServerAbsent "server-absent-for-long",
    BitmapMode "bitmap-mode",
    NewEpoch "scan-started",
    Fold "fold",
    Resync "resync",
    Question "compare-question",
    Answer "compare-answer",
    Needed "blocks-needed-again",
    SecondServer "second-process-server",
    ServerRemoved "process-server-removed",
    ServerAdded "process-server-added-again",
    ServerReplaced "process-server-replaced",
    ServersReordered "process-servers-in-another-order",
    LiveStayed "live-one-stayed-in-data-mode",
    LetGo "one-let-go-alone",
    PointChecked "point-checked",
    FloorChecked "flush-contract-checked",
    Converged "converged",
}

/// By the place of each kind in [`Kind::ALL`].
#[derive(Clone, Debug)]
pub struct Counts([u64; Kind::ALL.len()]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; Kind::ALL.len()])
    }
}

impl Counts {
    pub fn add(&mut self, kind: Kind) {
        self.0[kind as usize] += 1;
    }

    pub fn merge(&mut self, other: &Counts) {
        for (sum, count) in self.0.iter_mut().zip(&other.0) {
            *sum += count;
        }
    }

    pub fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    /// Reads back what `Display` wrote.
    pub fn parse(text: &str) -> Self {
        let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
        let mut counts = Self::default();
        for (kind, count) in pairs.filter_map(|(name, count)| Some((Kind::named(name)?, count.parse::<u64>().ok()?))) {
            counts.0[kind as usize] = count;
        }
        counts
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = Kind::ALL.iter().map(|kind| format!("{}={}", kind.text(), self.of(*kind))).collect();
        f.write_str(&all.join(" "))
    }
}
