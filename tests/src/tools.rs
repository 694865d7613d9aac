//! Programs that tests need. Without one a test is skipped and says so, in a line that `tests/run` collects.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Where a program is; also in the folders that a user's `PATH` often lacks.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Says that a test did not run. `tests/run` gathers these lines from the file that `TIDEMARK_SKIPPED` names, because
/// runners hide what a passing test prints.
pub fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}");
    println!("{line}");
    if let Some(file) = std::env::var_os("TIDEMARK_SKIPPED") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
        // One write per line: tests of several processes append to the same file.
        if let Ok(mut file) = file {
            file.write_all(format!("{line}\n").as_bytes()).expect("the list of skipped tests can be written");
        }
    }
}

/// The first of the programs that is not installed.
pub fn missing<'a>(programs: &[&'a str]) -> Option<&'a str> {
    programs.iter().find(|program| find(program).is_none()).copied()
}

/// Returns from the test, which then counts as skipped, unless each of the programs is there.
#[macro_export]
macro_rules! need {
    ($($program:expr),+) => {
        if let Some(program) = $crate::tools::missing(&[$($program),+]) {
            let test = std::thread::current().name().unwrap_or("test").to_owned();
            $crate::tools::skipped(&test, &format!("{program} is not installed"));
            return;
        }
    };
}

/// Returns from the test unless it runs as root, which `$why` needs.
#[macro_export]
macro_rules! need_root {
    ($why:expr) => {
        if !nix::unistd::Uid::effective().is_root() {
            let test = std::thread::current().name().unwrap_or("test").to_owned();
            $crate::tools::skipped(&test, &format!("needs root: {}", $why));
            return;
        }
    };
}

/// A program that [`need!`](crate::need) found, to be given arguments.
pub fn command(program: &str) -> Command {
    Command::new(find(program).unwrap_or_else(|| panic!("{program} is not installed")))
}

/// Runs a program to its end; its output when it succeeded.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = outcome(program, arguments);
    assert!(output.status.success(), "{}", describe(program, arguments, &output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program to its end, whatever it says.
#[track_caller]
pub fn outcome(program: &str, arguments: &[&str]) -> Output {
    command(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

pub fn describe(program: &str, arguments: &[&str], output: &Output) -> String {
    format!(
        "{program} {} ended with {}\n--- stdout\n{}\n--- stderr\n{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// One `qemu-io` session on a raw disk or NBD address; panics when a command fails or a pattern does not match.
#[track_caller]
pub fn qemu_io(target: &str, commands: &[&str]) -> String {
    let mut arguments = vec!["-f", "raw"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(target);
    let text = run("qemu-io", &arguments);
    assert!(!text.contains("Pattern verification failed"), "qemu-io {target}: {text}");
    assert!(!text.contains("failed:"), "qemu-io {target}: {text}");
    text
}

/// Whether this is a long run: sweeps take every step then, not some of them.
pub fn is_long() -> bool {
    std::env::var_os("TIDEMARK_LONG").is_some()
}

/// Notes how many of something a test did, such as kills. `tests/run` gathers these lines from the file that
/// `TIDEMARK_COUNTS` names and adds them up.
pub fn counted(what: &str, count: u64) {
    let line = format!("{count} {what}");
    println!("COUNTED {line}");
    if let Some(file) = std::env::var_os("TIDEMARK_COUNTS")
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(file)
    {
        file.write_all(format!("{line}\n").as_bytes()).expect("the list of counts can be written");
    }
}
