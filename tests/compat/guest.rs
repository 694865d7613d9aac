//! A real guest on the front end: a Linux kernel in QEMU, whose disk is our NBD export.
//!
//! The guest's programs are busybox and a script, in an initramfs that is made here. It talks over its serial line: it
//! says what it has synced, and goes on when it is told to. The kernel comes from Debian's package for clouds, which has
//! NVMe and ext4 built in; `tests/run` unpacks it and says where it is.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tidemark_tests::guest::{self, GUEST_LIMIT, Guest, kernel};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::{Site, need, tools, wait};

const PATTERN_BLOCK: usize = 64 << 10;
/// Where on the disk the guest writes its pattern, past every file.
const PATTERN_AT: u64 = 64 * MIB;
const PATTERN_BLOCKS: u64 = 128;
const DISK_BYTES: u64 = 96 * MIB;

/// What the guest writes into one block: text that says which block of which turn it is.
fn pattern(turn: u32, block: u64) -> Vec<u8> {
    let line = format!("tidemark guest, turn {turn}, block {block}\n");
    line.bytes().cycle().take(PATTERN_BLOCK).collect()
}

/// The guest's first program. In each turn it writes blocks and files, syncs, says so, and waits for a word.
///
/// The part of the disk behind the file system is written as a database would: unbuffered, with a flush at the end.
fn init() -> String {
    let first = PATTERN_AT / PATTERN_BLOCK as u64;
    format!(
        r#"block() {{ yes "tidemark guest, turn $1, block $2" | head -c {PATTERN_BLOCK}; }}
blocks() {{
    for n in $(seq $2 $3); do
        block $1 $n | dd of=$disk bs={PATTERN_BLOCK} seek=$(({first} + n)) conv=notrunc 2>/dev/null || fail "write of block $n"
    done
    dd if=/dev/null of=$disk bs=512 count=0 conv=notrunc,fsync 2>/dev/null || fail "flush of the blocks"
}}
files() {{
    for n in $(seq $2 $3); do block $1 $n > /mnt/turn-$1-$n || fail "write of file $n"; done
    sync
}}
mount -t ext4 -o discard $disk /mnt || fail "mount"
blocks 1 0 127; files 1 0 31
echo "DONE 1"; read word
blocks 2 32 95; files 2 0 31; rm /mnt/turn-1-*; sync
fstrim -v /mnt || fail "fstrim"
echo "DONE 2"; read word
umount /mnt || fail "umount"
blkdiscard -o {PATTERN_AT} -l $((64 * {PATTERN_BLOCK})) $disk || fail "blkdiscard"
echo "DONE 3"
poweroff -f
"#
    )
}

/// The blocks behind the file system are as the guest left them after this turn.
#[track_caller]
fn assert_pattern(disk: &Path, turn: u32) {
    let file = File::open(disk).expect("the disk can be read");
    let mut found = vec![0; PATTERN_BLOCK];
    for block in 0..PATTERN_BLOCKS {
        let expected = match (turn, block) {
            (3, 0..64) => vec![0; PATTERN_BLOCK],
            (2 | 3, 32..=95) => pattern(2, block),
            _ => pattern(1, block),
        };
        file.read_exact_at(&mut found, PATTERN_AT + block * PATTERN_BLOCK as u64).expect("the disk is long enough");
        assert!(found == expected, "block {block} of {} after turn {turn}", disk.display());
    }
}

/// The files of a turn, after the file system's own repair of what a crash leaves.
#[track_caller]
fn assert_files(disk: &Path, present: u32, absent: u32) {
    let path = disk.to_str().expect("paths of tests are text");
    let repair = tools::outcome("e2fsck", &["-fy", path]);
    assert!(matches!(repair.status.code(), Some(0 | 1)), "{}", tools::describe("e2fsck", &["-fy", path], &repair));
    tools::run("e2fsck", &["-fn", path]);
    for number in 0..32 {
        let name = format!("cat /turn-{present}-{number}");
        let content = tools::outcome("debugfs", &["-R", &name, path]).stdout;
        assert!(content == pattern(present, number), "{name} in {path}: {} bytes", content.len());
    }
    let listed = tools::run("debugfs", &["-R", "ls -p /", path]);
    assert!(!listed.contains(&format!("turn-{absent}-")), "{listed}");
}

fn allocated_bytes(disk: &Path) -> u64 {
    std::fs::metadata(disk).expect("the disk is there").blocks() * 512
}

#[test]
fn a_guest_writes_discards_and_is_recovered() {
    need!("qemu-system-x86_64", "busybox", "mke2fs", "e2fsck", "debugfs");
    let kernel = match kernel() {
        Ok(kernel) => kernel,
        Err(why) => return tools::skipped("guest::a_guest_writes_discards_and_is_recovered", &why),
    };
    let site = Site::start();
    let (disk, empty) = (site.path("disk.img"), site.path("empty"));
    std::fs::create_dir(&empty).unwrap();
    // A file system in the first part of the disk; the rest is for blocks that no file system rearranges.
    image::make_ext4(&disk, PATTERN_AT, &empty);
    File::options().write(true).open(&disk).and_then(|file| file.set_len(DISK_BYTES)).unwrap();
    let machine = site.protect("guest", &[&disk], &[]);
    site.wait_protected("guest");

    let mut guest = Guest::boot(&site, &kernel, &guest::initrd(&site, &init()), machine.nbd());
    guest.says("DONE 1");
    // The guest idles, but it runs: its file system is mounted.
    let first = site.point("guest");
    guest.tell();
    guest.says("DONE 2");
    let second = site.point("guest");
    let before = allocated_bytes(&disk);
    guest.tell();
    guest.says("DONE 3");
    wait::until("the guest is off", GUEST_LIMIT, || (!guest.process.is_running()).then_some(()));
    let after = allocated_bytes(&disk);
    assert!(after + 3 * MIB < before, "the guest discarded 4 MiB: {before} bytes were allocated, then {after}");
    site.point("guest");

    image::assert_same(&disk, &site.export("guest", "latest", "latest.raw", "raw"));
    assert_pattern(&disk, 3);
    for (point, turn) in [(first, 1), (second, 2)] {
        let id = tidemark_tests::site::text(&point["id"]);
        let recovered = site.export("guest", &id, &format!("turn-{turn}.raw"), "raw");
        assert_pattern(&recovered, turn);
        assert_files(&recovered, turn, 3 - turn);
    }
}
