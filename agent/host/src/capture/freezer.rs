//! Freezes mounted file systems for a moment (`FIFREEZE`), from a process of its own.
//!
//! Whoever freezes must not wait for what it froze: the process is forked, locked in memory, makes nothing but system calls on descriptors
//! that were opened before, and thaws when it is told to, when its parent is gone, and when its time is over, whichever comes first.
//!
//! *Cancellation.* Dropping a [`FileSystemFreezer`] thaws. *Crash.* A killed agent closes the pipe, which thaws. *Retries.* A thaw is tried until
//! it succeeded or the kernel says that nothing is frozen.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use crate::freeze::{FreezeError, Frozen, pipe};

/// `FIFREEZE` and `FITHAW` of linux/fs.h: `_IOWR('X', 119, int)`, `_IOWR('X', 120, int)`.
const FREEZE: libc::c_ulong = 0xc004_5877;
const THAW: libc::c_ulong = 0xc004_5878;
const FILE_SYSTEMS_MAX: usize = 64;

/// Where file systems are mounted whose device is one that `is_wanted` says.
pub fn file_systems_on(is_wanted: impl Fn(u64) -> bool) -> io::Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ').skip(2);
        let (Some(numbers), Some(_), Some(place)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let Some((major, minor)) = numbers.split_once(':') else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        let device = nix::sys::stat::makedev(major, minor);
        // A file system that is mounted twice is frozen once.
        if major != 0 && !seen.contains(&device) && is_wanted(device) {
            seen.push(device);
            found.push(PathBuf::from(unescaped(place)));
        }
    }
    Ok(found)
}

/// Blanks and the like are octal there.
fn unescaped(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

pub struct FileSystemFreezer {
    child: nix::unistd::Pid,
    /// Closing it is what thaws.
    command: Option<OwnedFd>,
    first: PathBuf,
}

impl FileSystemFreezer {
    /// Freezes them all, or none. They thaw after `limit` by themselves.
    pub fn freeze(places: &[PathBuf], limit: Duration) -> Result<Box<dyn Frozen>, FreezeError> {
        let failed = |path: &PathBuf| {
            let path = path.clone();
            move |source| FreezeError::FileSystem { path, source }
        };
        let first = places.first().cloned().unwrap_or_default();
        if places.len() > FILE_SYSTEMS_MAX {
            return Err(failed(&first)(io::Error::other("too many file systems")));
        }
        let mut opened = Vec::new();
        for place in places {
            let folder = File::open(place).map_err(failed(place))?;
            // What can be written before is: writers stand still the shorter.
            nix::unistd::syncfs(&folder).map_err(|error| failed(place)(error.into()))?;
            opened.push(folder);
        }
        let descriptors: Vec<RawFd> = opened.iter().map(AsRawFd::as_raw_fd).collect();
        let (command_read, command) = pipe().map_err(failed(&first))?;
        let (answer_read, answer) = pipe().map_err(failed(&first))?;
        let own = [command_read.as_raw_fd(), answer.as_raw_fd(), command.as_raw_fd()];
        // SAFETY: the child makes system calls only: it allocates nothing and takes no lock.
        let child = match unsafe { libc::fork() } {
            -1 => return Err(failed(&first)(io::Error::last_os_error())),
            0 => child(&descriptors, own, limit.as_millis().min(i32::MAX as u128) as i32),
            child => nix::unistd::Pid::from_raw(child),
        };
        drop((command_read, answer, opened));
        let frozen = Box::new(Self { child, command: Some(command), first: first.clone() });
        match read_answer(&answer_read).map_err(failed(&first))? {
            [0, 0] => Ok(frozen),
            [index, code] => {
                let path = places.get(usize::from(index) - 1).unwrap_or(&first);
                Err(failed(path)(io::Error::from_raw_os_error(i32::from(code))))
            }
        }
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(command) = self.command.take() else { return Ok(()) };
        drop(command);
        match nix::sys::wait::waitpid(self.child, None)? {
            nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
            nix::sys::wait::WaitStatus::Exited(_, TOO_LATE) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            status => Err(io::Error::other(format!("its process ended with {status:?}"))),
        }
    }
}

impl Frozen for FileSystemFreezer {
    fn thaw(mut self: Box<Self>) -> Result<(), FreezeError> {
        let path = self.first.clone();
        self.end().map_err(|source| FreezeError::FileSystem { path, source })
    }
}

impl Drop for FileSystemFreezer {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(path = %self.first.display(), %error, "a file system thawed in another way than it was told to");
        }
    }
}

/// Which file system could not be frozen, counted from 1, and the error; zeroes where all are.
fn read_answer(from: &OwnedFd) -> io::Result<[u8; 2]> {
    let mut answer = [0; 2];
    match nix::unistd::read(from, &mut answer)? {
        2 => Ok(answer),
        _ => Err(io::Error::other("the freezing process ended")),
    }
}

/// The time was over before the parent said anything.
const TOO_LATE: i32 = 3;

/// The other process. Never returns, and must not allocate: another thread of the parent may have held the allocator's lock.
fn child(descriptors: &[RawFd], [command, answer, parents_end]: [RawFd; 3], limit_ms: i32) -> ! {
    // SAFETY: system calls on descriptors that are open here, with buffers on this stack.
    unsafe {
        // So that the parent's end is the only one.
        libc::close(parents_end);
        libc::mlockall(libc::MCL_CURRENT);
        // A signal to the group of the agent must not leave a file system frozen.
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
            libc::signal(signal, libc::SIG_IGN);
        }
        let mut frozen = 0u64;
        let mut result = [0u8; 2];
        for (index, &descriptor) in descriptors.iter().enumerate() {
            if libc::ioctl(descriptor, FREEZE as _, 0) == 0 {
                frozen |= 1 << index;
            // It lies on another disk of the machine as well, and is frozen for that one.
            } else if *libc::__errno_location() != libc::EBUSY {
                result = [index as u8 + 1, *libc::__errno_location() as u8];
                break;
            }
        }
        libc::write(answer, result.as_ptr().cast(), 2);
        let mut code = 0;
        if result[0] == 0 {
            let mut poll = libc::pollfd { fd: command, events: libc::POLLIN, revents: 0 };
            if libc::poll(&raw mut poll, 1, limit_ms) == 0 {
                code = TOO_LATE;
            }
        }
        for (_, &descriptor) in descriptors.iter().enumerate().filter(|(index, _)| frozen & (1 << index) != 0) {
            while libc::ioctl(descriptor, THAW as _, 0) != 0 && *libc::__errno_location() == libc::EINTR {}
        }
        libc::_exit(code)
    }
}
