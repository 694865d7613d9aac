//! Tidemark, driven as a user drives it: `tidemark up` on a folder, verbs of its command line, writes over NBD.
//! All three roles are in one process here; the data path between them is what it is between machines, gRPC over
//! mutual TLS.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tidemark_tests::api::Api;
use tidemark_tests::nbd::Client;
use tidemark_tests::site::text;
use tidemark_tests::{Machine, Site, wait};

use crate::Failure;
use crate::image::Write;

/// Name of the machine that is measured.
pub const NAME: &str = "measured";
const LIMIT: Duration = Duration::from_secs(600);
/// How often a state is asked for where its change is timed.
const POLL: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    Off,
    Default,
}

impl Compression {
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "tidemark, compression off",
            Self::Default => "tidemark",
        }
    }
}

pub struct Ours {
    pub site: Site,
    pub api: Api,
}

impl Ours {
    pub fn start(folder: &Path, compression: Compression) -> Self {
        let site = Site::start_in(folder);
        let api = Api::connect(&site.ready);
        // A log that holds all that is written while sending is paused: else the mode steps down, and what is measured
        // would no longer be the log's cost.
        let mut policy = vec!["policy", "create", "measured", "--log-limit", "1T"];
        if compression == Compression::Off {
            policy.extend(["--compression", "0"]);
        }
        site.json(&policy);
        Self { site, api }
    }

    /// After `down`.
    pub fn up(&mut self) {
        self.site.up();
        self.api = Api::connect(&self.site.ready);
    }

    pub fn protect(&self, disk: &Path) -> Machine {
        self.site.protect(NAME, &[disk], &["--policy", "measured"])
    }

    pub fn status(&mut self) -> Value {
        self.api.get(&format!("machines/{NAME}"))
    }

    /// Until the replica is consistent: the initial replication is durable at the process server.
    pub fn wait_protected(&mut self) {
        self.poll("the machine is protected", |status| {
            status["state"] == "protected" && status["disks"][0]["consistent"] == true
        });
    }

    /// The epoch that the process server holds durably.
    pub fn epoch(&mut self) -> String {
        epoch_of(&self.status())
    }

    /// Until the replica is consistent in another epoch than this one: what was changed while nobody looked is there.
    pub fn wait_compared(&mut self, before: &str) {
        self.poll("the replica was compared", |status| {
            let epoch = epoch_of(status);
            // What the process server reports may be of the epoch before; what the agent scans is not.
            let disk = &status["disks"][0];
            !epoch.is_empty() && epoch != before && disk["progress"].is_null() && disk["consistent"] == true
        });
    }

    /// Until all that was logged is durable at the process server.
    pub fn wait_durable(&mut self) {
        self.poll("everything is durable", |status| {
            let disks = status["disks"].as_array().map_or(&[][..], Vec::as_slice);
            let durable = |disk: &Value| disk["positions"]["logged"] == disk["positions"]["durable"];
            status["pending_bytes"] == 0 && !disks.is_empty() && disks.iter().all(durable)
        });
    }

    fn poll(&mut self, what: &str, mut condition: impl FnMut(&Value) -> bool) {
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if condition(&status) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "waited in vain: {what}: {status}");
            wait::until_passed(std::time::Instant::now() + POLL);
        }
    }

    pub fn pause(&self) {
        self.site.json(&["pause", NAME]);
    }

    /// The state as of now, as a raw image.
    pub fn export(&self) -> Result<PathBuf, Failure> {
        let point = self.site.point(NAME);
        let file = "exported.raw";
        let _ = std::fs::remove_file(self.site.path(file));
        Ok(self.site.export(NAME, &text(&point["id"]), file, "raw"))
    }
}

fn epoch_of(status: &Value) -> String {
    let durable = status["disks"][0]["positions"]["durable"].as_str().unwrap_or_default();
    durable.split(':').next().unwrap_or_default().to_owned()
}

/// As a guest writes: through the protected disk, with a flush at the end.
pub fn write(uri: &str, writes: &[Write]) -> Result<(), Failure> {
    let mut client = Client::connect(uri)?;
    for write in writes {
        client.write(write.offset, &write.data)?;
    }
    client.flush()?;
    Ok(client.disconnect()?)
}
