//! The programs that users have: QEMU's, libnbd's and fio against our server, and our client against their servers.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use tidemark_base::Extent;
use tidemark_base::disk::{Access, Allocation, FileDisk};
use tidemark_nbd::{Client, DiskExport, Exports, Limits, Server};

use crate::raw::PATIENCE;

const BYTES: u64 = 64 << 20;

/// Whether all these programs are here; says which one is not.
fn present(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        if !found {
            eprintln!("skipped: {program} is not installed");
        }
        found
    })
}

struct Served {
    folder: tempfile::TempDir,
    server: Server,
}

impl Served {
    /// A file served twice: with everything inline, and with everything on the worker threads.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let exports = Arc::new(Exports::new());
        for name in ["inline", "pooled"] {
            let path = folder.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(BYTES).unwrap();
            let disk = Arc::new(FileDisk::open(&path, Access::Exclusive).unwrap());
            let export = if name == "inline" { DiskExport::of_file(disk).unwrap() } else { DiskExport::new(disk) };
            exports.insert(name, Arc::new(export));
        }
        let server = Server::new(exports, Limits::default());
        server.listen_unix(&folder.path().join("run/nbd.sock"), &[]).unwrap();
        Self { folder, server }
    }

    fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.folder.path().join("run/nbd.sock").display())
    }

    fn client(&self, name: &str) -> Client {
        Client::connect_unix(&self.folder.path().join("run/nbd.sock"), name).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Runs a program; what it printed. Panics with all of it when the program fails or takes too long.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}", output.status);
    text
}

/// Some MiB of data, some of zeroes, some holes, in a file.
fn image(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(BYTES).unwrap();
    let mut state = 1u32;
    for mib in [0u64, 1, 2, 7, 20, 21, 63] {
        let data: Vec<u8> = (0..1 << 20)
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 24) as u8
            })
            .collect();
        file.write_all_at(&data, mib << 20).unwrap();
    }
    file.write_all_at(&vec![0; 1 << 20], 30 << 20).unwrap();
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    if !present(&["qemu-io"]) {
        return;
    }
    let served = Served::new();
    for name in ["inline", "pooled"] {
        let commands = "write -P 5 0 64k; write -f -P 6 64k 4k; aio_write -P 7 1M 3M; aio_write -P 8 8M 8M; aio_flush; \
                        read -P 5 0 64k; read -P 6 64k 4k; read -P 7 1M 3M; read -P 8 8M 8M; write -z 0 32k; read -P 0 0 32k; \
                        read -P 5 32k 32k; flush; discard 64k 4k; read -P 0 64k 4k; write -z -u 1M 1M; read -P 0 1M 1M; read -P 7 2M 2M";
        let mut arguments = vec!["-f", "raw"];
        for command in commands.split(';') {
            arguments.extend(["-c", command.trim()]);
        }
        let uri = served.uri(name);
        arguments.push(&uri);
        let text = run("qemu-io", &arguments);
        assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    }
    served.server.stop().unwrap();
}

#[test]
fn qemu_img_copies_in_and_out() {
    if !present(&["qemu-img"]) {
        return;
    }
    let served = Served::new();
    let (source, back) = (served.path("source"), served.path("back.qcow2"));
    image(&source);
    let (source, back) = (source.to_str().unwrap(), back.to_str().unwrap());
    for name in ["inline", "pooled"] {
        let uri = served.uri(name);
        run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, &uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, back]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", source, back]);
        // Holes stay holes: block status and WRITE_ZEROES with permission to discard work.
        let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(served.path(name)).unwrap()) * 512;
        assert!(allocated < 12 << 20, "{allocated}");
    }
}

#[test]
fn nbdinfo_and_nbdcopy_work() {
    if !present(&["nbdinfo", "nbdcopy", "cmp"]) {
        return;
    }
    let served = Served::new();
    let source = served.path("source");
    image(&source);
    let source = source.to_str().unwrap();
    for name in ["inline", "pooled"] {
        let uri = served.uri(name);
        let info = run("nbdinfo", &[&uri]);
        for line in
            ["export-size: 67108864", "base:allocation", "can_fua: true", "can_multi_conn: true", "can_df: true"]
        {
            assert!(info.contains(line), "{line}\n{info}");
        }
        // Four connections, many requests each.
        run("nbdcopy", &["--connections=4", "--flush", source, &uri]);
        assert!(run("nbdinfo", &["--map", "--totals", &uri]).contains("hole,zero"));
        let back = served.path("back");
        run("nbdcopy", &["--connections=4", &uri, back.to_str().unwrap()]);
        run("cmp", &[source, back.to_str().unwrap()]);
        // Connections that the copy no longer uses go away on both sides.
        served.server.close_export(name).unwrap();
    }
    let list = run("nbdinfo", &["--list", &served.uri("")]);
    assert!(list.contains("export=\"inline\"") && list.contains("export=\"pooled\""), "{list}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !present(&["fio"]) {
        return;
    }
    let served = Served::new();
    for (name, depth, block) in [("inline", "32", "4k"), ("pooled", "8", "4k"), ("inline", "8", "128k")] {
        let (uri, depth, block) =
            (format!("--uri={}", served.uri(name)), format!("--iodepth={depth}"), format!("--bs={block}"));
        let text = run(
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                "--rw=randwrite",
                &block,
                &depth,
                "--size=32M",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--fsync=512",
                "--verify_state_save=0",
            ],
        );
        assert!(text.contains("err= 0"), "{text}");
    }
}

/// A server of somebody else's, ended when dropped.
struct Foreign(Child);

impl Foreign {
    fn start(program: &str, arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn().unwrap();
        let foreign = Self(child);
        let deadline = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < deadline, "{program} does not listen");
            std::thread::yield_now();
        }
        foreign
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The same through any server: writes, zeroes, flush, reads back, asks for holes.
fn exercise(mut client: Client, tells_holes: bool) {
    assert_eq!(client.bytes(), BYTES);
    let data: Vec<u8> = (0..3u32 << 20).map(|index| (index % 239) as u8 + 1).collect();
    client.write(8 << 20, &data).unwrap();
    client.write_many((0..200).map(|number| (number * 8192, &data[number as usize..][..4096]))).unwrap();
    client.write_durable(40 << 20, &data[..65536]).unwrap();
    client.zero(Extent::new(9 << 20, 1 << 20), true).unwrap();
    client.flush().unwrap();
    let mut read = vec![0; data.len()];
    client.read(8 << 20, &mut read).unwrap();
    assert!(read[..1 << 20] == data[..1 << 20] && read[2 << 20..] == data[2 << 20..]);
    assert!(read[1 << 20..2 << 20].iter().all(|&byte| byte == 0));
    client.read(199 * 8192, &mut read[..4096]).unwrap();
    assert!(read[..4096] == data[199..][..4096]);
    let status = client.block_status(Extent::new(0, BYTES)).unwrap();
    assert_eq!(status.iter().map(|(extent, _)| extent.length).sum::<u64>(), BYTES);
    if tells_holes {
        assert!(status.contains(&(Extent::new(10 << 20, 1 << 20), Allocation::Data)), "{status:?}");
        assert_eq!(status.last().unwrap().1, Allocation::Hole);
    }
    client.close().unwrap();
}

#[test]
fn our_client_talks_to_our_server() {
    let served = Served::new();
    exercise(served.client("inline"), true);
    exercise(served.client("pooled"), true);
}

#[test]
fn our_client_talks_to_qemu_nbd() {
    if !present(&["qemu-nbd", "qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2", "vhdx"] {
        let (disk, socket) = (folder.path().join(format), folder.path().join(format!("{format}.sock")));
        let disk = disk.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", format, disk, "64M"]);
        let arguments = ["-t", "-f", format, "-x", "x", "--discard=unmap", "-k", socket.to_str().unwrap(), disk];
        let _server = Foreign::start("qemu-nbd", &arguments, &socket);
        // QEMU says of a VHDX image that all of it is data.
        exercise(Client::connect_unix(&socket, "x").unwrap(), format != "vhdx");
        assert!(Client::connect_unix(&socket, "y").is_err());
    }
}

#[test]
fn our_client_talks_to_nbdkit() {
    if !present(&["nbdkit"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("sock"));
    std::fs::File::create(&disk).unwrap().set_len(BYTES).unwrap();
    let arguments = ["-f", "-U", socket.to_str().unwrap(), "file", disk.to_str().unwrap()];
    let _server = Foreign::start("nbdkit", &arguments, &socket);
    exercise(Client::connect_unix(&socket, "").unwrap(), true);
}
