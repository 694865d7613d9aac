//! A process of its own that makes an application quiet and lets it go on again, whatever becomes of the agent.
//!
//! ```text
//! agent ── fork ──→ guard: runs `freeze` (killed at its limit) → says how it went → waits until it is told, the agent is gone, or the
//!                          time is over → runs `thaw` (killed at its limit) → ends
//! ```
//!
//! *Consistency.* `thaw` runs after every `freeze` that was begun, once, however that ended. *Cancellation.* Dropping a [`Guard`] thaws and waits
//! for it. *Crash.* The end of the agent closes the pipe, which is what the guard waits for; a `freeze` that runs then is let end
//! first, within its limit, so that it never comes after its `thaw`. *Retries.* None: who thaws must say how it went.
//!
//! The guard makes nothing but system calls: it is forked from a process of many threads, whose locks it must not need. It keeps none of the
//! agent's files open, so that the locks on disks end with the agent.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::FreezeError;

/// What makes an application quiet, and what lets it go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Commands {
    /// A program by its full path, and its arguments.
    pub freeze: Vec<OsString>,
    pub thaw: Vec<OsString>,
    /// Besides `PATH`.
    pub environment: Vec<(OsString, OsString)>,
}

/// How long each may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    pub freeze: Duration,
    /// From the end of `freeze` to the beginning of `thaw`.
    pub frozen: Duration,
    pub thaw: Duration,
}

/// An application that is quiet. Dropping it thaws.
#[derive(Debug)]
pub struct Guard {
    child: nix::unistd::Pid,
    /// Closing it is what thaws.
    command: Option<OwnedFd>,
    answer: OwnedFd,
    thaw: PathBuf,
    limit: Duration,
}

const PATH: &[u8] = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\0";
/// How a program ended, as it is told through the pipe: what, and a number.
const ENDED: u8 = 1;
const KILLED_LATE: u8 = 2;
const NOT_RUN: u8 = 3;
/// Nobody said in time that it goes on: `thaw` begins now.
const OUTLASTED: u8 = 4;
/// The descriptors of the guard.
const COMMAND: RawFd = 3;
const ANSWER: RawFd = 4;
/// What a shell ends with when a program cannot be run, and so does the guard's child.
const CANNOT_RUN: i32 = 127;
const LOOK_EVERY_NS: i64 = 5_000_000;

impl Guard {
    /// Runs `freeze`; when it failed, `thaw` has run as well when this returns.
    pub fn freeze(commands: &Commands, limits: Limits) -> Result<Self, FreezeError> {
        let named = |arguments: &[OsString]| PathBuf::from(arguments.first().cloned().unwrap_or_default());
        let path = named(&commands.freeze);
        let failed = |source: io::Error| FreezeError::Run { path: path.clone(), source };
        // Everything that allocates comes before the fork.
        let [freeze, thaw] = [Program::new(&commands.freeze), Program::new(&commands.thaw)];
        let (freeze, thaw) = (freeze.map_err(failed)?, thaw.map_err(failed)?);
        let environment = environment(&commands.environment).map_err(failed)?;
        let pointers = pointers(&environment);
        let (command_read, command) = super::pipe().map_err(failed)?;
        let (answer, answer_write) = super::pipe().map_err(failed)?;
        let own = [command_read.as_raw_fd(), answer_write.as_raw_fd()];
        // SAFETY: the child makes system calls only, with what was prepared here: it allocates nothing and takes no lock.
        let child = match unsafe { libc::fork() } {
            -1 => return Err(failed(io::Error::last_os_error())),
            0 => guard(own, &freeze.pointers, &thaw.pointers, &pointers, limits),
            child => nix::unistd::Pid::from_raw(child),
        };
        drop((command_read, answer_write));
        let guard = Self { child, command: Some(command), answer, thaw: named(&commands.thaw), limit: limits.thaw };
        match guard.told() {
            Ok((ENDED, 0)) => Ok(guard),
            // Dropped on the way out: it thaws.
            Ok(how) => Err(error_of(how, path, limits.freeze)),
            Err(error) => Err(failed(error)),
        }
    }

    /// Lets it go on. An error means that this could not be confirmed, or that the time was over before.
    pub fn thaw(mut self) -> Result<(), FreezeError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), FreezeError> {
        let Some(command) = self.command.take() else { return Ok(()) };
        drop(command);
        let mut told = self.told();
        let is_late = matches!(told, Ok((OUTLASTED, _)));
        if is_late {
            told = self.told();
        }
        let waited = nix::sys::wait::waitpid(self.child, None);
        let failed = |source| FreezeError::Run { path: self.thaw.clone(), source };
        match told.map_err(failed)? {
            (ENDED, 0) => {}
            how => return Err(error_of(how, self.thaw.clone(), self.limit)),
        }
        match waited {
            // It did not wait for us any longer.
            Ok(_) if is_late => Err(FreezeError::Outlasted { path: self.thaw.clone() }),
            Ok(_) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Whether `thaw` has not begun. While the disks are held, what follows cannot change what a mark shows.
    pub fn is_quiet(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.answer.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor of ours, which is open.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
    }

    /// How the program that ran last ended.
    fn told(&self) -> io::Result<(u8, i32)> {
        let mut answer = [0; 5];
        let mut have = 0;
        while have < answer.len() {
            match nix::unistd::read(&self.answer, &mut answer[have..]) {
                Ok(0) => return Err(io::Error::other("the guarding process ended")),
                Ok(count) => have += count,
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok((answer[0], i32::from_le_bytes([answer[1], answer[2], answer[3], answer[4]])))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(error = %error, help = error.help(), "thawing failed");
        }
    }
}

fn error_of((kind, number): (u8, i32), path: PathBuf, limit: Duration) -> FreezeError {
    match kind {
        KILLED_LATE => FreezeError::TimedOut { path, limit },
        NOT_RUN => FreezeError::Run { path, source: io::Error::from_raw_os_error(number) },
        _ if libc::WIFEXITED(number) && libc::WEXITSTATUS(number) == CANNOT_RUN => {
            FreezeError::Run { path, source: io::ErrorKind::NotFound.into() }
        }
        _ => {
            let status = std::os::unix::process::ExitStatusExt::from_raw(number);
            let status: std::process::ExitStatus = status;
            FreezeError::Failed { path, status: status.to_string() }
        }
    }
}

/// A program as `execve` takes it. The pointers are into the texts, whose buffers never move.
struct Program {
    _texts: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl Program {
    fn new(arguments: &[OsString]) -> io::Result<Self> {
        if arguments.is_empty() {
            return Err(io::Error::other("no program is named"));
        }
        let texts = arguments.iter().map(|text| CString::new(text.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        let pointers = pointers(&texts);
        Ok(Self { _texts: texts, pointers })
    }
}

fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
}

fn environment(pairs: &[(OsString, OsString)]) -> io::Result<Vec<CString>> {
    let text = |(name, value): &(OsString, OsString)| {
        CString::new([name.as_bytes(), OsStr::new("=").as_bytes(), value.as_bytes()].concat())
    };
    let mut texts = pairs.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    texts.push(CString::from_vec_with_nul(PATH.to_vec()).map_err(io::Error::other)?);
    Ok(texts)
}

/// The other process. Never returns, and must not allocate: another thread of the parent may have held the allocator's lock.
fn guard(
    [command, answer]: [RawFd; 2],
    freeze: &[*const libc::c_char],
    thaw: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    limits: Limits,
) -> ! {
    // SAFETY: system calls on descriptors of this process, with buffers on this stack and pointers that were made before the fork.
    unsafe {
        // What is told to the agent's group is not for us.
        libc::setsid();
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
            libc::signal(signal, libc::SIG_IGN);
        }
        // Out of the way of the numbers that they get.
        let (command, answer) = (libc::fcntl(command, libc::F_DUPFD, 16), libc::fcntl(answer, libc::F_DUPFD, 16));
        libc::dup2(command, COMMAND);
        libc::dup2(answer, ANSWER);
        libc::syscall(libc::SYS_close_range, ANSWER as libc::c_uint + 1, libc::c_uint::MAX, 0);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for standard in 0..3 {
            libc::dup2(null, standard);
        }
        libc::close(null);
        let mut own = Own { kind: 0, number: 0 };
        run(freeze, environment, limits.freeze, &mut own);
        own.tell();
        let mut poll = libc::pollfd { fd: COMMAND, events: libc::POLLIN, revents: 0 };
        let limit = limits.frozen.as_millis().min(i32::MAX as u128) as i32;
        // After a failed `freeze` nothing is waited for.
        if own.kind == ENDED && own.number == 0 && libc::poll(&raw mut poll, 1, limit) == 0 {
            Own { kind: OUTLASTED, number: 0 }.tell();
        }
        run(thaw, environment, limits.thaw, &mut own);
        own.tell();
        libc::_exit(0)
    }
}

/// How a program ended.
struct Own {
    kind: u8,
    number: i32,
}

impl Own {
    /// Nobody may be there to hear it.
    unsafe fn tell(&self) {
        let number = self.number.to_le_bytes();
        let answer = [self.kind, number[0], number[1], number[2], number[3]];
        // SAFETY: a write of five bytes of this stack.
        unsafe { libc::write(ANSWER, answer.as_ptr().cast(), answer.len()) };
    }
}

/// Runs a program, and kills it with everything that it started when its time is over.
///
/// # Safety
///
/// Only in the guard: the pointers are to texts that end with a zero, in a list that ends with a null.
unsafe fn run(program: &[*const libc::c_char], environment: &[*const libc::c_char], limit: Duration, own: &mut Own) {
    // SAFETY: system calls only, on both sides of the fork.
    unsafe {
        let child = libc::fork();
        if child < 0 {
            (own.kind, own.number) = (NOT_RUN, *libc::__errno_location());
            return;
        }
        if child == 0 {
            libc::setpgid(0, 0);
            libc::close(COMMAND);
            libc::close(ANSWER);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::execve(program[0], program.as_ptr(), environment.as_ptr());
            libc::_exit(CANNOT_RUN);
        }
        libc::setpgid(child, child);
        let mut left = limit.as_nanos().min(i64::MAX as u128) as i64;
        let mut status = 0;
        loop {
            let ended = libc::waitpid(child, &raw mut status, libc::WNOHANG);
            if ended == child {
                (own.kind, own.number) = (ENDED, status);
                return;
            }
            if left <= 0 {
                // Not waited for yet, so its number is not another's.
                libc::kill(-child, libc::SIGKILL);
                libc::waitpid(child, &raw mut status, 0);
                (own.kind, own.number) = (KILLED_LATE, 0);
                return;
            }
            let pause = libc::timespec { tv_sec: 0, tv_nsec: LOOK_EVERY_NS };
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
            left -= LOOK_EVERY_NS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(60);
    const LIMITS: Limits = Limits { freeze: LONG, frozen: LONG, thaw: LONG };

    fn shell(folder: &Path, freeze: &str, thaw: &str) -> Commands {
        let line = |text: &str| ["/bin/sh", "-c", text].iter().map(OsString::from).collect();
        let environment = vec![(OsString::from("AT"), folder.as_os_str().to_owned())];
        Commands { freeze: line(freeze), thaw: line(thaw), environment }
    }

    fn said(folder: &Path) -> String {
        std::fs::read_to_string(folder.join("said")).unwrap_or_default()
    }

    fn wait_for(folder: &Path, text: &str) {
        let began = Instant::now();
        while said(folder) != text {
            assert!(began.elapsed() < LONG, "{:?} instead of {text:?}", said(folder));
            std::thread::yield_now();
        }
    }

    #[test]
    fn it_thaws_when_it_is_told_to_and_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let commands = shell(folder.path(), "echo frozen >> $AT/said", "echo thawed >> $AT/said");
        let guard = Guard::freeze(&commands, LIMITS).unwrap();
        assert_eq!(said(folder.path()), "frozen\n");
        guard.thaw().unwrap();
        assert_eq!(said(folder.path()), "frozen\nthawed\n");
        drop(Guard::freeze(&commands, LIMITS).unwrap());
        assert_eq!(said(folder.path()), "frozen\nthawed\n".repeat(2));
    }

    #[test]
    fn a_freeze_that_fails_or_hangs_is_thawed_and_says_how() {
        let folder = tempfile::tempdir().unwrap();
        let thaw = "echo thawed >> $AT/said";
        let failed = Guard::freeze(&shell(folder.path(), "exit 3", thaw), LIMITS).unwrap_err();
        assert!(matches!(&failed, FreezeError::Failed { status, .. } if status.contains('3')), "{failed:?}");
        assert_eq!(said(folder.path()), "thawed\n", "before it is told");
        let short = Limits { freeze: Duration::from_millis(100), ..LIMITS };
        let late = Guard::freeze(&shell(folder.path(), "sleep 1000 & wait", thaw), short).unwrap_err();
        assert!(matches!(late, FreezeError::TimedOut { .. }), "{late:?}");
        let absent = Commands { freeze: vec!["/nowhere/at/all".into()], ..shell(folder.path(), "", thaw) };
        assert!(matches!(Guard::freeze(&absent, LIMITS).unwrap_err(), FreezeError::Run { .. }));
        assert_eq!(said(folder.path()), "thawed\n".repeat(3));
        // A thaw that fails is told.
        let guard = Guard::freeze(&shell(folder.path(), "true", "exit 4"), LIMITS).unwrap();
        assert!(matches!(guard.thaw(), Err(FreezeError::Failed { .. })));
    }

    #[test]
    fn a_freeze_never_outlasts_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let commands = shell(folder.path(), "true", "echo thawed >> $AT/said");
        let guard = Guard::freeze(&commands, Limits { frozen: Duration::from_millis(100), ..LIMITS }).unwrap();
        assert!(guard.is_quiet() || !said(folder.path()).is_empty());
        // Nobody tells it to.
        wait_for(folder.path(), "thawed\n");
        assert!(!guard.is_quiet());
        assert!(matches!(guard.thaw(), Err(FreezeError::Outlasted { .. })), "whoever comes late is told");
        assert_eq!(said(folder.path()), "thawed\n", "once");
    }

    /// What the agent of the test below does; nothing when it is run with the others.
    #[test]
    fn an_agent_that_freezes_and_waits() {
        let Some(folder) = std::env::var_os("TIDEMARK_TEST_FREEZES") else { return };
        let freeze = std::env::var("TIDEMARK_TEST_FREEZE").unwrap();
        let commands = shell(Path::new(&folder), &freeze, "echo thawed >> $AT/said");
        let _guard = Guard::freeze(&commands, LIMITS).unwrap();
        loop {
            std::thread::park();
        }
    }

    #[test]
    fn an_agent_that_is_killed_leaves_nothing_frozen() {
        // Killed while it is frozen, and while it is being frozen: the thaw comes last.
        for (freeze, until) in [
            ("echo frozen >> $AT/said", "frozen\n"),
            ("echo freezing >> $AT/said; sleep 0.5; echo frozen >> $AT/said", "freezing\n"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let mut agent = Command::new(std::env::current_exe().unwrap())
                .args(["freeze::guard::tests::an_agent_that_freezes_and_waits", "--exact"])
                .env("TIDEMARK_TEST_FREEZES", folder.path())
                .env("TIDEMARK_TEST_FREEZE", freeze)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            wait_for(folder.path(), until);
            agent.kill().unwrap();
            agent.wait().unwrap();
            let all = if until == "frozen\n" { "frozen\nthawed\n" } else { "freezing\nfrozen\nthawed\n" };
            wait_for(folder.path(), all);
        }
    }
}
