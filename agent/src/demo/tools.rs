//! Programs of e2fsprogs: file systems that are not ours, made and judged by those who made them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::cli::CliError;

const NEEDED: [&str; 3] = ["mkfs.ext4", "e2fsck", "debugfs"];

/// They are often not in the PATH of ordinary users.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

pub fn check() -> Result<(), CliError> {
    let missing: Vec<&str> = NEEDED.into_iter().filter(|program| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(CliError::new(format!("{} is not installed", missing.join(", ")), "install it: apt-get install e2fsprogs"))
}

fn run(program: &str, arguments: &[&str], file: &Path) -> Result<Output, CliError> {
    let path = find(program).unwrap_or_else(|| PathBuf::from(program));
    Command::new(path).args(arguments).arg(file).env("LC_ALL", "C").output().map_err(|error| {
        CliError::new(format!("cannot run {program}: {error}"), "install it: apt-get install e2fsprogs")
    })
}

fn must(program: &str, output: &Output) -> Result<(), CliError> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(CliError::new(format!("{program} failed: {}", said.trim()), "check the room in the demonstration's folder"))
}

/// A file system in `image`, with the content of `tree`.
pub fn make_file_system(image: &Path, tree: &Path) -> Result<(), CliError> {
    let tree = tree.to_string_lossy();
    let output = run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-m", "0", "-d", &tree], image)?;
    must("mkfs.ext4", &output)
}

/// Whether the file system is sound; changes nothing.
pub fn is_clean(image: &Path) -> Result<bool, CliError> {
    Ok(run("e2fsck", &["-f", "-n"], image)?.status.success())
}

/// Changes the file system as the commands say.
pub fn edit(image: &Path, commands: &Path) -> Result<(), CliError> {
    let commands = commands.to_string_lossy();
    let output = run("debugfs", &["-w", "-f", &commands], image)?;
    must("debugfs", &output)
}

/// The blocks of 4 KiB that a file occupies.
pub fn blocks_of(image: &Path, file: &str) -> Result<Vec<u32>, CliError> {
    let output = run("debugfs", &["-R", &format!("blocks {file}")], image)?;
    must("debugfs", &output)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let blocks: Vec<u32> =
        text.split_whitespace().filter_map(|word| word.parse().ok()).filter(|&block| block > 0).collect();
    if blocks.is_empty() {
        return Err(CliError::new(format!("debugfs finds no blocks of {file}"), "install a current e2fsprogs"));
    }
    Ok(blocks)
}
