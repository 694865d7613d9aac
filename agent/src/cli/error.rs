//! What goes wrong, as people see it: `error: what happened`, `help: what to do`.

use std::io;

use tidemark_proto::control::{Failure, FailureKind};

use super::hrl::HrlError;
use crate::client::ClientError;
use crate::roles::RoleError;

#[derive(Debug)]
pub struct CliError {
    message: String,
    help: String,
    is_broken_pipe: bool,
}

impl CliError {
    pub fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into(), is_broken_pipe: false }
    }

    pub fn runtime(error: io::Error) -> Self {
        Self::new(format!("cannot start: {error}"), "raise the limits on threads and open files")
    }

    /// `hrl verify` told the defects already.
    pub fn logs_not_sound() -> Self {
        Self::new(
            "not every file is a sound log of one chain",
            "see the defects above; `tidemark hrl inspect` shows a log's entries",
        )
    }

    /// Says what to do with the name that was typed, so that it can be copied.
    pub fn about(mut self, name: &str) -> Self {
        // Only within commands: they stand between backquotes.
        let is_plain = !name.contains('`');
        let parts = self.help.split('`').enumerate().map(|(number, part)| match number % 2 == 1 && is_plain {
            true => named(part, name),
            false => part.to_owned(),
        });
        self.help = parts.collect::<Vec<_>>().join("`");
        self
    }

    pub fn is_broken_pipe(&self) -> bool {
        self.is_broken_pipe
    }

    /// Tries to say it; when stderr is closed the exit code must do.
    pub fn print(&self) {
        use std::io::Write;
        let mut stderr = io::stderr().lock();
        if !self.message.is_empty() {
            let _ = writeln!(stderr, "error: {}", self.message);
        }
        if !self.help.is_empty() {
            let _ = writeln!(stderr, "help: {}", self.help);
        }
    }
}

fn named(command: &str, name: &str) -> String {
    let words = command.split(' ').map(|word| if word == "NAME" { name } else { word });
    words.collect::<Vec<_>>().join(" ")
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        Self::new(error.to_string(), error.help())
    }
}

impl From<HrlError> for CliError {
    fn from(error: HrlError) -> Self {
        match error {
            HrlError::Print(error) => error.into(),
            error => {
                let failure = Failure::from_error(FailureKind::Failed, &error, error.help());
                Self::new(failure.message, failure.help)
            }
        }
    }
}

impl From<RoleError> for CliError {
    fn from(error: RoleError) -> Self {
        Self::new(error.message, error.help)
    }
}

impl From<io::Error> for CliError {
    /// Of printing.
    fn from(error: io::Error) -> Self {
        Self {
            is_broken_pipe: error.kind() == io::ErrorKind::BrokenPipe,
            ..Self::new(format!("cannot print: {error}"), "check where the output goes")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_is_said_with_the_name_that_was_typed() {
        let said = |help: &str| CliError::new("", help).about("web").help;
        assert_eq!(
            said("commit it: `tidemark commit NAME`, or `x NAME --y`"),
            "commit it: `tidemark commit web`, or `x web --y`"
        );
        assert_eq!(said("give it a NAME, as `tidemark x NAMES`"), "give it a NAME, as `tidemark x NAMES`");
    }
}
