//! What a user would pick instead, each as its manual says to use it for a disk image, over TCP on the loopback.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tidemark_tests::process::Owned;
use tidemark_tests::{tools, wait};

use crate::image::Write;
use crate::meter::{self, Cost};
use crate::{Failure, isolate, reference};

/// How a tool replicates. All but [`Peer::QemuBitmap`], which [`crate::bitmap`] drives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    Nbdcopy,
    QemuImg,
    RsyncWhole,
    RsyncWholeCompressed,
    RsyncDefault,
    RsyncBlocks4k,
    RsyncCompressed,
    QemuBitmap,
    ReferenceRaw,
    ReferenceCompressed,
}

/// For a disk that is not there yet.
pub const INITIAL: [Peer; 6] = [
    Peer::Nbdcopy,
    Peer::QemuImg,
    Peer::RsyncWhole,
    Peer::RsyncWholeCompressed,
    Peer::ReferenceRaw,
    Peer::ReferenceCompressed,
];

/// For a disk that differs a little.
pub const DELTA: [Peer; 8] = [
    Peer::Nbdcopy,
    Peer::QemuImg,
    Peer::QemuBitmap,
    Peer::RsyncDefault,
    Peer::RsyncBlocks4k,
    Peer::RsyncCompressed,
    Peer::ReferenceRaw,
    Peer::ReferenceCompressed,
];

impl Peer {
    pub fn name(self) -> &'static str {
        match self {
            Self::Nbdcopy => "nbdcopy → nbdkit file",
            Self::QemuImg => "qemu-img convert → qemu-nbd",
            Self::RsyncWhole => "rsync -W --inplace",
            Self::RsyncWholeCompressed => "rsync -W -z (zstd 1)",
            Self::RsyncDefault => "rsync --inplace",
            Self::RsyncBlocks4k => "rsync --inplace -B 4096",
            Self::RsyncCompressed => "rsync --inplace -z (zstd 1)",
            Self::QemuBitmap => "QEMU dirty bitmap → nbdkit file",
            Self::ReferenceRaw => "minimal sender, raw",
            Self::ReferenceCompressed => "minimal sender, zstd 1",
        }
    }

    /// Programs that must be installed.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Nbdcopy => &["nbdcopy", "nbdkit"],
            Self::QemuImg => &["qemu-img", "qemu-nbd"],
            Self::QemuBitmap => &["qemu-storage-daemon", "nbdkit"],
            Self::ReferenceRaw | Self::ReferenceCompressed => &[],
            _ => &["rsync"],
        }
    }

    /// Replicates `source` onto the new, empty `target`.
    pub fn initial(self, source: &Path, target: &Path) -> Result<Cost, Failure> {
        File::create(target)?.set_len(source.metadata()?.len())?;
        self.replicate(source, target, true, &[])
    }

    /// Brings `target` up to `source`, which differs from it in `writes`: trackers are told so, others find out.
    pub fn delta(self, source: &Path, target: &Path, writes: &[Write]) -> Result<Cost, Failure> {
        match self {
            Self::QemuBitmap => crate::bitmap::delta(source, target, writes),
            _ => self.replicate(source, target, false, writes),
        }
    }

    fn replicate(self, source: &Path, target: &Path, new: bool, writes: &[Write]) -> Result<Cost, Failure> {
        let port = isolate::free_port()?;
        let folder = target.parent().unwrap_or(Path::new("."));
        let address = format!("nbd://127.0.0.1:{port}");
        let (server, client) = match self {
            Self::Nbdcopy => {
                let mut client = tools::command("nbdcopy");
                client.args(new.then_some("--destination-is-zero")).arg("--flush").arg(source).arg(&address);
                (nbdkit(port, target), client)
            }
            Self::QemuImg => {
                let mut server = tools::command("qemu-nbd");
                server.args([
                    "-t",
                    "-e",
                    "8",
                    "-f",
                    "raw",
                    "--discard=unmap",
                    "--detect-zeroes=off",
                    "-p",
                    &port.to_string(),
                ]);
                let mut client = tools::command("qemu-img");
                client.args(["convert", "-n"]).args(new.then_some("--target-is-zero"));
                client.args(["-f", "raw", "-O", "raw", "-W", "-m", "8"]).arg(source).arg(&address);
                server.arg(target);
                (server, client)
            }
            Self::ReferenceRaw | Self::ReferenceCompressed => {
                let mode = if self == Self::ReferenceRaw { "raw" } else { "zstd" };
                let extents = folder.join("extents");
                if !new {
                    reference::write_extents(&extents, writes)?;
                }
                let extents = (!new).then_some(extents.as_path());
                (reference::receiver(port, target)?, reference::sender(port, source, mode, extents)?)
            }
            _ => (rsync_daemon(port, folder)?, self.rsync(port, source, target)),
        };
        run(port, server, client)
    }

    fn rsync(self, port: u16, source: &Path, target: &Path) -> Command {
        let compression = ["-z", "--compress-choice=zstd", "--compress-level=1"];
        let mut client = tools::command("rsync");
        // Times and sizes may agree by chance: the content decides.
        client.args(["--inplace", "--ignore-times"]);
        match self {
            Self::RsyncWhole => client.arg("--whole-file"),
            Self::RsyncWholeCompressed => client.arg("--whole-file").args(compression),
            Self::RsyncBlocks4k => client.args(["--no-whole-file", "--block-size=4096"]),
            Self::RsyncCompressed => client.arg("--no-whole-file").args(compression),
            _ => client.arg("--no-whole-file"),
        };
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        client.arg(source).arg(format!("rsync://127.0.0.1:{port}/disks/{name}"));
        client
    }
}

/// `nbdkit` with its file plugin on a TCP port.
pub fn nbdkit(port: u16, disk: &Path) -> Command {
    let mut server = tools::command("nbdkit");
    server.args(["--foreground", "--port", &port.to_string(), "file"]).arg(disk);
    server
}

fn rsync_daemon(port: u16, folder: &Path) -> Result<Command, Failure> {
    let configuration = folder.join("rsyncd.conf");
    let user = nix::unistd::getuid();
    let group = nix::unistd::getgid();
    let text =
        format!("use chroot = no\nuid = {user}\ngid = {group}\n[disks]\npath = {}\nread only = no\n", folder.display());
    std::io::Write::write_all(&mut File::create(&configuration)?, text.as_bytes())?;
    let mut server = tools::command("rsync");
    server.args(["--daemon", "--no-detach", "--address=127.0.0.1", "--port", &port.to_string(), "--config"]);
    server.arg(configuration);
    Ok(server)
}

/// Starts the server, waits until it listens, and measures the client.
fn run(port: u16, mut server: Command, mut client: Command) -> Result<Cost, Failure> {
    server.stdin(Stdio::null()).stdout(Stdio::null());
    let server = Owned::start("server", server, None);
    wait::until("the server listens", Duration::from_secs(20), || isolate::listens(port).then_some(()));
    meter::measure(&[server.pid()], || succeed(&mut client))
}

/// Runs a command to its end, which must be a good one.
pub fn succeed(command: &mut Command) -> Result<(), Failure> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = format!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Err(text.into())
}

/// Says that a tool is left out; true when it is there.
pub fn installed(name: &str, programs: &[&str]) -> bool {
    match tools::missing(programs) {
        Some(program) => {
            eprintln!("{name} is left out: {program} is not installed");
            false
        }
        None => true,
    }
}

/// A replica must be what it replicates, or its number is worth nothing.
pub fn check(source: &Path, target: &Path) -> Result<(), Failure> {
    match tidemark_tests::image::first_difference(source, target)? {
        None => Ok(()),
        Some(offset) => Err(format!("{} differs from its source at byte {offset}", target.display()).into()),
    }
}

/// Where the peers' replica lies: in a folder of its own, which the rsync daemon may see.
pub fn target(folder: &Path) -> Result<PathBuf, Failure> {
    let target = folder.join("target");
    std::fs::create_dir_all(&target)?;
    Ok(target.join("disk.img"))
}
