//! Real guests: a Linux kernel in QEMU, whose programs are busybox and a script in an initramfs that is made here.
//!
//! The kernel comes from Debian's package for clouds, which has NVMe and ext4 built in; `tests/run` unpacks it and says where
//! it is.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::process::Owned;
use crate::{Site, tools};

/// Without a virtual processor of the machine a guest takes seconds to boot, and on a loaded machine many.
pub const GUEST_LIMIT: Duration = Duration::from_secs(120);

/// For a kernel that says nothing of its own and ends when it panics.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet nokaslr panic=-1 mitigations=off";

/// The kernel, or why the test cannot run.
pub fn kernel() -> Result<PathBuf, String> {
    match std::env::var_os("TIDEMARK_GUEST_KERNEL").map(PathBuf::from) {
        Some(kernel) if kernel.is_file() => Ok(kernel),
        Some(kernel) => Err(format!("there is no kernel {}", kernel.display())),
        None => Err("TIDEMARK_GUEST_KERNEL names no kernel for the guest; tests/run gets one".to_owned()),
    }
}

/// How every first program begins: what busybox needs is mounted, `fail WHAT` says so and ends the guest, `$disk` is there.
const BEGIN: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
exec 2>&1
fail() { echo "FAILED: $1"; poweroff -f; }
disk=/dev/nvme0n1
until [ -b $disk ]; do :; done
"#;

/// Makes an initramfs of busybox and a first program that goes on with `script`.
pub fn initrd(site: &Site, script: &str) -> PathBuf {
    let init = format!("{BEGIN}{script}");
    let busybox = std::fs::read(tools::find("busybox").expect("it was asked for")).expect("busybox can be read");
    let archive =
        initramfs(&[("bin", 0o40755, &[]), ("bin/busybox", 0o100755, &busybox), ("init", 0o100755, init.as_bytes())]);
    let path = site.path("initrd");
    std::fs::File::create(&path).and_then(|mut file| file.write_all(&archive)).expect("the initramfs is written");
    path
}

/// An archive as the kernel takes it for its first file system (`cpio`, new ASCII format).
fn initramfs(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, (name, mode, content)) in files.iter().chain([&("TRAILER!!!", 0, &[][..])]).enumerate() {
        let fields = [number as u32 + 1, *mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        archive.extend(b"070701");
        fields.iter().for_each(|field| archive.extend(format!("{field:08X}").bytes()));
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// The firmware of machines that boot by UEFI, and the variables of one of them.
pub struct Uefi {
    code: PathBuf,
    variables: PathBuf,
}

impl Uefi {
    /// `None`: it is not installed.
    pub fn of_machine(site: &Site) -> Option<Self> {
        let folder = Path::new("/usr/share/OVMF");
        let variables = site.path("variables.fd");
        std::fs::copy(folder.join("OVMF_VARS_4M.fd"), &variables).ok()?;
        Some(Self { code: folder.join("OVMF_CODE_4M.fd"), variables })
    }
}

fn nbd_disk(nbd: &str) -> String {
    let address = nbd.strip_prefix("nbd+unix:///").and_then(|rest| rest.split_once("?socket="));
    let (export, socket) = address.expect("the address of a socket");
    format!("driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export},discard=unmap")
}

/// A running guest.
pub struct Guest {
    pub process: Owned,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Guest {
    /// Boots a kernel whose disk, an NVMe one, is an NBD export.
    pub fn boot(site: &Site, kernel: &Path, initrd: &Path, nbd: &str) -> Self {
        Self::boot_from(site, kernel, initrd, &nbd_disk(nbd), &[])
    }

    /// The same for whoever is to shut it down: QMP at `qmp.sock`, and the guest's second serial line, where its agent listens, at
    /// `agent.sock`, both in `folder`.
    pub fn boot_owned(site: &Site, kernel: &Path, initrd: &Path, nbd: &str, folder: &Path) -> Self {
        let socket = |name: &str| format!("unix:{},server=on,wait=off", folder.join(name).display());
        let (qmp, agent) = (socket("qmp.sock"), socket("agent.sock"));
        Self::boot_from(site, kernel, initrd, &nbd_disk(nbd), &["-qmp", &qmp, "-serial", &agent])
    }

    /// The same from a plain image.
    pub fn boot_file(site: &Site, kernel: &Path, initrd: &Path, disk: &Path) -> Self {
        let disk = format!("driver=file,node-name=disk,filename={}", disk.display());
        Self::boot_from(site, kernel, initrd, &disk, &[])
    }

    /// From a qcow2 image, with a QMP socket for whoever wants to ask it.
    pub fn boot_with_monitor(site: &Site, kernel: &Path, initrd: &Path, image: &Path, socket: &Path) -> Self {
        let disk =
            format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={},discard=unmap", image.display());
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        Self::boot_from(site, kernel, initrd, &disk, &["-qmp", &monitor])
    }

    /// From a qcow2 image, with QMP sockets for whoever protects it and for whoever runs it, who finds its agent as well: `tracked.qmp`,
    /// `qmp.sock` and `agent.sock` in `folder`.
    pub fn boot_tracked(site: &Site, kernel: &Path, initrd: &Path, image: &Path, folder: &Path) -> Self {
        let disk = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={}", image.display());
        let socket = |name: &str| format!("unix:{},server=on,wait=off", folder.join(name).display());
        let (tracked, qmp, agent) = (socket("tracked.qmp"), socket("qmp.sock"), socket("agent.sock"));
        Self::boot_from(site, kernel, initrd, &disk, &["-qmp", &tracked, "-qmp", &qmp, "-serial", &agent])
    }

    /// As [`Guest::boot`], by UEFI.
    pub fn boot_uefi(site: &Site, kernel: &Path, initrd: &Path, nbd: &str, firmware: &Uefi) -> Self {
        let flash = |node: &str, path: &Path, read_only: &str| {
            format!(
                "driver=raw,node-name={node},read-only={read_only},file.driver=file,file.filename={}",
                path.display()
            )
        };
        let code = flash("code", &firmware.code, "on");
        let variables = flash("variables", &firmware.variables, "off");
        let machine = "q35,pflash0=code,pflash1=variables";
        let extra = ["-M", machine, "-blockdev", &code, "-blockdev", &variables];
        Self::boot_from(site, kernel, initrd, &nbd_disk(nbd), &extra)
    }

    fn boot_from(site: &Site, kernel: &Path, initrd: &Path, disk: &str, extra: &[&str]) -> Self {
        let mut command = tools::command("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-M", "pc", "-nodefaults", "-serial", "stdio", "-display", "none", "-m", "256"]);
        command.args(["-no-reboot", "-append", COMMAND_LINE]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.arg("-blockdev").arg(disk);
        command.args(extra);
        command.args(["-device", "nvme,drive=disk,serial=tidemark"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Owned::start("guest", command, Some(&site.path("guest.log")));
        let stdin = process.child().stdin.take().expect("stdin is piped");
        let stdout = process.child().stdout.take().expect("stdout is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line.trim().to_owned()).is_err() {
                    return;
                }
            }
        });
        Self { process, stdin, lines }
    }

    /// Waits until the guest says this line.
    #[track_caller]
    pub fn says(&self, expected: &str) {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(GUEST_LIMIT) {
                Ok(line) if line == expected => return,
                Ok(line) if !line.starts_with("FAILED") => heard.push(line),
                other => {
                    let end = matches!(other, Err(RecvTimeoutError::Disconnected));
                    panic!(
                        "the guest {} instead of {expected:?}: {other:?}; it said\n{}\n{}",
                        if end { "ended" } else { "failed" },
                        heard.join("\n"),
                        self.process.log_tail()
                    );
                }
            }
        }
    }

    /// The number behind the next line that begins so and is said after this is called.
    #[track_caller]
    pub fn next_number(&self, beginning: &str) -> u64 {
        while self.lines.try_recv().is_ok() {}
        self.says_number(beginning, 0)
    }

    /// Waits until the guest says a line that begins so, with at least this number behind it.
    #[track_caller]
    pub fn says_number(&self, beginning: &str, at_least: u64) -> u64 {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(GUEST_LIMIT) {
                Ok(line) => {
                    let number = line.strip_prefix(beginning).and_then(|rest| rest.trim().parse().ok());
                    match number.filter(|number| *number >= at_least) {
                        Some(number) => return number,
                        None => heard.push(line),
                    }
                }
                Err(error) => panic!(
                    "the guest says nothing like {beginning:?} from {at_least} on: {error}; it said\n{}\n{}",
                    heard.join("\n"),
                    self.process.log_tail()
                ),
            }
        }
    }

    pub fn tell(&mut self) {
        self.stdin.write_all(b"go\n").expect("the guest listens");
    }
}
