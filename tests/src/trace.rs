//! System calls that fail, or that a process does not survive, by strace's injection.
//!
//! strace counts each system call in each thread by itself: the n-th is the n-th of the first thread that makes so many.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{binary, tools};

/// What happens to a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The process is killed as it enters the call.
    Kill,
    /// The call does nothing and returns this error.
    Error(&'static str),
}

/// A fault at one call.
#[derive(Clone, Debug)]
pub struct Injection {
    pub call: &'static str,
    pub fault: Fault,
    /// The n-th call, from one.
    pub at: u64,
    /// And every later one: a disk that is full, or broken, stays so.
    pub from_then_on: bool,
}

impl fmt::Display for Injection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { call, fault, at, .. } = self;
        let more = if self.from_then_on { " and later ones" } else { "" };
        match fault {
            Fault::Kill => write!(formatter, "killed at {call} number {at}"),
            Fault::Error(error) => write!(formatter, "{error} at {call} number {at}{more}"),
        }
    }
}

impl Injection {
    /// A command that runs `tidemark` with this fault. The process is `tidemark` itself: strace watches from beside, and
    /// ends with it.
    pub fn command(&self, log: &Path) -> Command {
        let fault = match self.fault {
            Fault::Kill => "signal=KILL".to_owned(),
            Fault::Error(error) => format!("error={error}"),
        };
        let more = if self.from_then_on { "+" } else { "" };
        let mut command = tools::command("strace");
        command.args(["--daemonize", "--follow-forks", "--quiet=all", "--output"]).arg(log);
        if self.fault != Fault::Kill {
            // Only the calls in question stop. A signal that is injected at such a stop gets lost.
            command.arg("--seccomp-bpf");
        }
        command.args(["-e", &format!("trace={}", self.call)]);
        command.args(["-e", &format!("inject={}:{fault}:when={}{more}", self.call, self.at)]);
        command.arg(binary::tidemark());
        command
    }
}

/// What strace saw.
pub struct Trace {
    path: PathBuf,
}

impl Trace {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a call was made to fail.
    pub fn injected(&self) -> bool {
        std::fs::read_to_string(&self.path).is_ok_and(|text| text.contains("(INJECTED)"))
    }
}
