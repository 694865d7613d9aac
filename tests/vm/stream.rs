//! The guest that writes a chain of records, and its disk.

use std::path::{Path, PathBuf};

use tidemark_tests::image::{self, MIB};
use tidemark_tests::{Machine, Site, guest, tools};

/// What a guest says when it found its chain whole, before the number of its last record.
pub const ALIVE: &str = "ALIVE ";
/// Before the number of a record that is on the disk.
pub const SYNCED: &str = "SYNCED ";
/// Before the number of its last record, when it was asked to shut down.
pub const SHUT_DOWN: &str = "SHUT DOWN ";
/// What it says of the firmware that started it.
pub const UEFI: &str = "STARTED BY UEFI";
pub const BIOS: &str = "STARTED BY BIOS";
const FILE_SYSTEM_BYTES: u64 = 48 * MIB;

/// The guest's first program.
fn init() -> String {
    format!(
        r#"# As much of a guest agent as shutting down takes, on the second serial line where there is one.
listen() {{
    stty -F /dev/ttyS1 raw -echo
    while read -r line; do
        case "$line" in
            *guest-sync-delimited*) printf '\377{{"return": %s}}\n' "$(echo "$line" | tr -dc 0-9)" > /dev/ttyS1 ;;
            *guest-shutdown*) touch /stop ;;
        esac
    done < /dev/ttyS1
}}
if [ -c /dev/ttyS1 ]; then listen & fi 2>/dev/null
digest() {{ echo "$1" | md5sum | cut -c1-32; }}
# Firmware leaves a line that it did not end.
echo; [ -d /sys/firmware/efi ] && echo "{UEFI}" || echo "{BIOS}"
mount -t ext4 $disk /mnt || fail "mount"
touch /mnt/chain
last="begin"; number=0
while read line; do
    number=$((number + 1))
    [ "$line" = "$number $(digest "$last")" ] || fail "record $number is $line"
    last="$line"
done < /mnt/chain
echo "{ALIVE}$number"
while true; do
    number=$((number + 1))
    last="$number $(digest "$last")"
    echo "$last" >> /mnt/chain || fail "write of record $number"
    sync
    echo "{SYNCED}$number"
    if [ -e /stop ]; then
        umount /mnt || fail "umount"
        echo "{SHUT_DOWN}$number"
        poweroff -f
    fi
done
"#
    )
}

/// Everything that a guest needs but its disk.
pub struct Parts {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl Parts {
    /// `None`: the test was noted as skipped.
    pub fn make(site: &Site, test: &str) -> Option<Self> {
        match guest::kernel() {
            Ok(kernel) => {
                // Machines are started with files of this folder and no others.
                let folder = site.state().join("process-server/kernels");
                std::fs::create_dir_all(&folder).expect("a folder can be made");
                let put = |from: &Path, name: &str| {
                    let to = folder.join(name);
                    std::fs::copy(from, &to).expect("a file can be copied");
                    to
                };
                Some(Self { kernel: put(&kernel, "vmlinuz"), initrd: put(&guest::initrd(site, &init()), "initrd") })
            }
            Err(why) => {
                tools::skipped(test, &why);
                None
            }
        }
    }

    /// Says how the machine is run, with `extra` arguments.
    pub fn describe(&self, site: &Site, name: &str, extra: &[&str]) -> serde_json::Value {
        let (kernel, initrd) = (text(&self.kernel), text(&self.initrd));
        let mut arguments = vec!["machine", "set", name, "--memory", "256M", "--bus", "nvme", "--kernel", &kernel];
        arguments.extend(["--initrd", &initrd, "--kernel-command-line", guest::COMMAND_LINE]);
        arguments.extend(extra);
        site.json(&arguments)
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("paths of tests are text").to_owned()
}

/// Protects a disk with an empty file system at its beginning and nothing behind it.
pub fn protect(site: &Site, name: &str, bytes: u64) -> Machine {
    protect_with(site, name, bytes, &[])
}

/// The same on one of several hosts.
pub fn protect_on(site: &Site, name: &str, bytes: u64, host: &str) -> Machine {
    protect_with(site, name, bytes, &["--host", host])
}

/// Where its disk is.
pub fn disk(site: &Site, name: &str) -> PathBuf {
    site.path(&format!("{name}.img"))
}

fn protect_with(site: &Site, name: &str, bytes: u64, extra: &[&str]) -> Machine {
    let (disk, empty) = (disk(site, name), site.path("empty"));
    std::fs::create_dir_all(&empty).expect("a folder can be made");
    image::make_ext4(&disk, FILE_SYSTEM_BYTES, &empty);
    let file = std::fs::File::options().write(true).open(&disk).expect("the disk is there");
    file.set_len(bytes).expect("a sparse disk costs nothing");
    drop(file);
    let machine = site.protect(name, &[&disk], extra);
    site.wait_protected(name);
    machine
}

/// The number of the last line that begins so.
pub fn last_number(console: &str, beginning: &str) -> Option<u64> {
    console.lines().rev().find_map(|line| line.trim().strip_prefix(beginning)?.trim().parse().ok())
}
