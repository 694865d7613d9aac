//! QEMU's own change tracking: a dirty bitmap on the disk that a guest writes to, and an incremental backup of what it
//! names to an NBD server. This is what libvirt's checkpoints drive. `qemu-storage-daemon` stands for QEMU: the block
//! layer is the same, and no guest is needed.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::{tools, wait};

use crate::image::Write;
use crate::meter::{self, Cost};
use crate::{Failure, isolate, peers};

/// QEMU's default; its backup reads and sends whole clusters of this size whatever the bitmap's granularity.
const GRANULARITY: u32 = 64 << 10;
const START_LIMIT: Duration = Duration::from_secs(20);

/// `source` holds `writes` already; they are written again through QEMU, so that its bitmap knows of them.
pub fn delta(source: &Path, target: &Path, writes: &[Write]) -> Result<Cost, Failure> {
    let folder = target.parent().unwrap_or(Path::new("."));
    let (control, nbd) = (folder.join("qmp"), folder.join("nbd"));
    for socket in [&control, &nbd] {
        let _ = std::fs::remove_file(socket);
    }
    let port = isolate::free_port()?;
    let mut command = peers::nbdkit(port, target);
    command.stdin(Stdio::null());
    let nbdkit = Owned::start("nbdkit", command, None);
    let mut command = tools::command("qemu-storage-daemon");
    command.args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", control.display())]);
    command.args(["--monitor", "chardev=qmp"]).stdin(Stdio::null());
    let qemu = Owned::start("qemu-storage-daemon", command, None);
    wait::until("QEMU and nbdkit listen", START_LIMIT, || (control.exists() && isolate::listens(port)).then_some(()));

    let mut monitor = Monitor::connect(&control)?;
    monitor.execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": source, "aio": "threads"}}),
    )?;
    monitor
        .execute("block-dirty-bitmap-add", json!({"node": "disk", "name": "changed", "granularity": GRANULARITY}))?;
    monitor.execute("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": nbd}}}))?;
    let export = json!({"type": "nbd", "id": "guest", "node-name": "disk", "writable": true, "name": "disk"});
    monitor.execute("block-export-add", export)?;
    let mut guest = Client::connect(&format!("nbd+unix:///disk?socket={}", nbd.display()))?;
    for write in writes {
        guest.write(write.offset, &write.data)?;
    }
    guest.flush()?;
    guest.disconnect()?;

    meter::measure(&[nbdkit.pid(), qemu.pid()], || {
        let server = json!({"type": "inet", "host": "127.0.0.1", "port": port.to_string()});
        monitor.execute("blockdev-add", json!({"driver": "nbd", "node-name": "replica", "server": server}))?;
        monitor.execute(
            "blockdev-backup",
            json!({
                "job-id": "delta", "device": "disk", "target": "replica", "sync": "bitmap", "bitmap": "changed",
                "bitmap-mode": "on-success", "x-perf": {"max-workers": 64, "use-copy-range": false},
            }),
        )?;
        monitor.wait_completed("delta")?;
        monitor.execute("blockdev-del", json!({"node-name": "replica"}))?;
        Ok(())
    })
}

/// QEMU's control socket.
struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut monitor = Self { lines: BufReader::new(stream) };
        monitor.receive()?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.lines.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                return Err(format!("QEMU: {command}: {error}").into());
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Waits for the event that a job is over, which must not say that it failed.
    fn wait_completed(&mut self, job: &str) -> Result<(), Failure> {
        loop {
            let message = self.receive()?;
            if message["event"] == "BLOCK_JOB_COMPLETED" && message["data"]["device"] == job {
                return match message["data"].get("error") {
                    Some(error) => Err(format!("QEMU: {job}: {error}").into()),
                    None => Ok(()),
                };
            }
        }
    }

    fn receive(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err("QEMU closed its control socket".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
