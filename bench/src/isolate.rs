//! A network namespace of our own. Everything that the bench starts is in it, so the bytes that its loopback carries
//! are the bytes on the wire, with TCP and IP headers, in both directions, and of nobody else.

use std::fs;
use std::io;

/// Enters a new namespace and brings its loopback up. False where that is not allowed: then the machine's own loopback
/// is counted, with whatever else runs on it. Must be called before the first thread starts.
pub fn enter() -> bool {
    match new_namespace().and_then(|()| loopback_up()) {
        Ok(()) => true,
        Err(error) => {
            eprintln!("no network namespace of our own ({error}): bytes on the wire include those of others");
            false
        }
    }
}

fn new_namespace() -> io::Result<()> {
    let (user, group) = (nix::unistd::getuid(), nix::unistd::getgid());
    // SAFETY: takes flags only; this process has one thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
        return Ok(());
    }
    // Without root: in a user namespace of our own, in which we are still ourselves.
    // SAFETY: as above.
    if unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("{user} {user} 1"))?;
    write("/proc/self/gid_map", &format!("{group} {group} 1"))
}

fn write(path: &str, text: &str) -> io::Result<()> {
    io::Write::write_all(&mut fs::File::options().write(true).open(path)?, text.as_bytes())
}

fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the descriptor is open and the request is a valid ifreq that outlives the call.
    if unsafe { libc::ioctl(descriptor, libc::SIOCSIFFLAGS, &request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Bytes that went over the loopback so far.
pub fn loopback_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    line.and_then(|line| line.split_whitespace().next()).and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// More than one turn of any tool takes.
const TOUCHED_BYTES_MAX: u64 = 6 << 30;

/// Whether something listens on a TCP port. Looks it up and does not connect: some servers take one client only.
pub fn listens(port: u16) -> bool {
    let ending = format!(":{port:04X}");
    ["/proc/self/net/tcp", "/proc/self/net/tcp6"].iter().any(|table| {
        let text = fs::read_to_string(table).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut cells = line.split_whitespace().skip(1);
            cells.next().is_some_and(|local| local.ends_with(&ending)) && cells.nth(1) == Some("0A")
        })
    })
}

/// A TCP port that is free now.
pub fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Lets the machine hand out its memory before something is measured, for all alike: in a virtual machine the first touch
/// of a page costs a fault in the host, many times what writing it costs, and who needs new pages would be measured by
/// that. Again before each turn, because free pages go back to the host after seconds where the balloon reports them.
pub fn touch_memory(folder: &std::path::Path) -> io::Result<()> {
    const PIECE_BYTES: usize = 4 << 20;
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    let available = line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
    let bytes = (available / 4 * 3).min(TOUCHED_BYTES_MAX);
    let path = folder.join("touched");
    let mut file = fs::File::create(&path)?;
    let piece = vec![0x55; PIECE_BYTES];
    for _ in 0..bytes / PIECE_BYTES as u64 {
        // A smaller tmpfs is touched as far as it goes.
        if io::Write::write_all(&mut file, &piece).is_err() {
            break;
        }
    }
    drop(file);
    fs::remove_file(path)
}
