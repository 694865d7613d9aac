//! Where the agent's log goes: to the console, or for a service to a file that does not grow for ever.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tidemark_base::storage::create_private_folder;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

const FILE: &str = "agent.log";
/// The one before is kept.
const BEFORE: &str = "agent.1.log";
const FILE_BYTES_MAX: u64 = 16 << 20;

/// `TIDEMARK_LOG` says what of it, by level and module.
fn filter() -> Targets {
    let asked = std::env::var("TIDEMARK_LOG").ok().and_then(|asked| asked.parse().ok());
    asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO))
}

pub fn to_console() {
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter())).try_init();
}

/// Where no file can be written, nothing is: a service has no console to say so.
pub fn to_file(folder: &Path) {
    let Ok(lines) = Lines::open(folder, FILE_BYTES_MAX) else { return };
    let lines = tracing_subscriber::fmt::layer().with_writer(Mutex::new(lines)).with_ansi(false);
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter())).try_init();
}

struct Lines {
    folder: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
}

impl Lines {
    fn open(folder: &Path, bytes_max: u64) -> io::Result<Self> {
        create_private_folder(folder)?;
        let file = OpenOptions::new().append(true).create(true).open(folder.join(FILE))?;
        let bytes = file.metadata()?.len();
        Ok(Self { folder: folder.to_owned(), file, bytes, bytes_max })
    }

    fn turn_over(&mut self) -> io::Result<()> {
        std::fs::rename(self.folder.join(FILE), self.folder.join(BEFORE))?;
        *self = Self::open(&self.folder, self.bytes_max)?;
        Ok(())
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Where it cannot be done the file grows on, until the next line.
        if self.bytes + line.len() as u64 > self.bytes_max && self.bytes > 0 {
            let _ = self.turn_over();
        }
        let count = self.file.write(line)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_does_not_grow_for_ever_and_goes_on_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let text = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            Lines::open(folder.path(), 9).unwrap().write_all(line.as_bytes()).unwrap();
        }
        // "three" and "four" do not fit together.
        assert_eq!((text(BEFORE), text(FILE)), ("three\n".into(), "four\n".into()));
    }
}
