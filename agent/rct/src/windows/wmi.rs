//! Checkpoints and reference points, which only WMI makes: asked by the system's own PowerShell, in one process for each question. What it runs is
//! `hyperv.ps1`, which is built in and given to it as text; what is asked about is given as data.
//!
//! *Consistency.* What the methods promise. *Retries.* None. *Cancellation.* A question that takes longer than its limit ends its process; what Hyper-V began by then it ends by itself.
//! *Crash.* The same.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::windows::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::RctError;
use crate::hypervisor::{Checkpoint, Disk, Found, ReferencePoint};

const SCRIPT: &str = include_str!("hyperv.ps1");
/// Reads the whole of its input before anything of it is run.
const BOOTSTRAP: &str = "& ([scriptblock]::Create([Console]::In.ReadToEnd()))";
const LOOK_LIMIT: Duration = Duration::from_secs(120);
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(15 * 60);
/// What was written meanwhile is merged.
const CONVERT_LIMIT: Duration = Duration::from_secs(4 * 3600);
const ANSWER_BYTES_MAX: u64 = 64 << 20;
const CREATE_NO_WINDOW: u32 = 0x0800_0000;

#[derive(Deserialize)]
struct Machine {
    id: String,
    name: String,
    is_off: bool,
    disks: Vec<MachineDisk>,
    checkpoints: Vec<Made>,
    reference_points: Vec<Point>,
}

#[derive(Deserialize)]
struct MachineDisk {
    path: PathBuf,
    bytes: u64,
    parent: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Made {
    id: String,
    name: String,
    is_recovery: bool,
    disks: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Point {
    id: String,
    change_ids: Vec<String>,
}

#[derive(Deserialize)]
struct Told {
    #[serde(default)]
    answer: Value,
    error: Option<String>,
    #[serde(default)]
    is_absent: bool,
}

pub fn find(disk: &Path) -> Result<Found, RctError> {
    // As the machine's settings write it.
    let about = disk.to_string_lossy().replace('/', "\\");
    let machine: Option<Machine> = ask("find a machine", json!({ "question": "find", "about": about }), LOOK_LIMIT)?;
    machine.map(Found::from).ok_or_else(|| RctError::NoMachine { path: disk.to_owned() })
}

pub fn look(machine: &str) -> Result<Found, RctError> {
    let question = json!({ "question": "look", "about": machine });
    let found: Option<Machine> = ask("look at a machine", question, LOOK_LIMIT)?;
    found.map(Found::from).ok_or_else(|| RctError::Absent { machine: machine.to_owned() })
}

pub fn checkpoint(machine: &str, quiet: bool) -> Result<Checkpoint, RctError> {
    let question = json!({ "question": "checkpoint", "about": machine, "quiet": quiet });
    let made: Made = ask("make a checkpoint", question, CHECKPOINT_LIMIT)?;
    Ok(made.into())
}

pub fn convert(checkpoint: &str) -> Result<ReferencePoint, RctError> {
    let question = json!({ "question": "convert", "about": checkpoint });
    let made: Point = ask("convert a checkpoint", question, CONVERT_LIMIT)?;
    Ok(made.into())
}

pub fn remove(reference_point: &str) -> Result<(), RctError> {
    let question = json!({ "question": "remove", "about": reference_point });
    ask::<Value>("remove a reference point", question, LOOK_LIMIT).map(drop)
}

fn ask<T: DeserializeOwned>(what: &'static str, question: Value, limit: Duration) -> Result<T, RctError> {
    let answer = run(what, &script_of(&question), limit)?;
    let wrong = |reason: String| RctError::Answer { what, reason };
    let told: Told = serde_json::from_slice(&answer).map_err(|error| {
        let shown: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
        wrong(format!("{error}: {shown:?}"))
    })?;
    match told.error {
        Some(reason) if told.is_absent => Err(RctError::NoHyperV { reason }),
        Some(reason) => Err(RctError::Refused { what, reason }),
        None => serde_json::from_value(told.answer).map_err(|error| wrong(error.to_string())),
    }
}

/// The question as data, then what answers it. A text between these quotes ends with a line that begins with `'@`, and JSON in one line has none.
fn script_of(question: &Value) -> String {
    format!("$asked = @'\n{}\n'@ | ConvertFrom-Json\n{SCRIPT}", ascii(&question.to_string()))
}

/// Whatever the console's letters are, these are among them.
fn ascii(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for letter in json.chars() {
        match letter.is_ascii() {
            true => plain.push(letter),
            false => letter.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                let _ = write!(plain, "\\u{unit:04x}");
            }),
        }
    }
    plain
}

/// The system's own, wherever `PATH` leads.
fn powershell() -> PathBuf {
    let system = std::env::var_os("SystemRoot").map_or_else(|| PathBuf::from(r"C:\Windows"), PathBuf::from);
    system.join(r"System32\WindowsPowerShell\v1.0\powershell.exe")
}

fn run(what: &'static str, script: &str, limit: Duration) -> Result<Vec<u8>, RctError> {
    let program = powershell();
    let absent = |error: std::io::Error| RctError::NoHyperV { reason: format!("{}: {error}", program.display()) };
    let mut child = Command::new(&program)
        .args(["-NoLogo", "-NoProfile", "-NonInteractive", "-InputFormat", "None", "-Command", BOOTSTRAP])
        .creation_flags(CREATE_NO_WINDOW)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(absent)?;
    let (mut input, output) = (child.stdin.take(), child.stdout.take());
    let (sender, answered) = mpsc::channel();
    // It reads all before it writes anything.
    let script = script.to_owned();
    let talk = std::thread::Builder::new().name("hyperv".to_owned()).spawn(move || {
        let given = input.take().map_or(Ok(()), |mut input| input.write_all(script.as_bytes()));
        let mut answer = Vec::new();
        let read = output.map_or(Ok(0), |output| output.take(ANSWER_BYTES_MAX).read_to_end(&mut answer));
        let _ = sender.send(given.and(read).map(|_| answer));
    });
    let answer = match talk {
        Ok(_) => answered.recv_timeout(limit).ok(),
        Err(error) => Some(Err(error)),
    };
    // Over, or to be ended.
    let _ = child.kill();
    let _ = child.wait();
    match answer {
        None => Err(RctError::TimedOut { what, limit }),
        Some(Ok(answer)) => Ok(answer),
        Some(Err(error)) => Err(RctError::Answer { what, reason: error.to_string() }),
    }
}

impl From<Machine> for Found {
    fn from(from: Machine) -> Self {
        let disk = |disk: MachineDisk| Disk { path: disk.path, bytes: disk.bytes, parent: disk.parent };
        Self {
            id: from.id,
            name: from.name,
            is_off: from.is_off,
            disks: from.disks.into_iter().map(disk).collect(),
            checkpoints: from.checkpoints.into_iter().map(Checkpoint::from).collect(),
            reference_points: from.reference_points.into_iter().map(ReferencePoint::from).collect(),
        }
    }
}

impl From<Made> for Checkpoint {
    fn from(from: Made) -> Self {
        Self { id: from.id, name: from.name, is_recovery: from.is_recovery, disks: from.disks }
    }
}

impl From<Point> for ReferencePoint {
    fn from(from: Point) -> Self {
        Self { id: from.id, change_ids: from.change_ids }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_data_whatever_is_asked_about() {
        let about = "D:\\Ä\u{1f4be}\n'@; Remove-Item C:\\ -Recurse; '";
        let script = script_of(&json!({ "question": "find", "about": about }));
        let (question, rest) =
            script.strip_prefix("$asked = @'\n").unwrap().split_once("\n'@ | ConvertFrom-Json\n").unwrap();
        assert!(question.is_ascii() && !question.contains('\n') && rest == SCRIPT);
        assert_eq!(serde_json::from_str::<Value>(question).unwrap()["about"], about);
        assert!(SCRIPT.is_ascii());
    }

    #[test]
    fn answers_are_understood_as_powershell_writes_them() {
        let told = r#"{"answer":{"id":"5B","name":"web","is_off":false,"disks":[{"path":"D:\\web_1.avhdx","bytes":1048576,"parent":"D:\\web.vhdx"}],
            "checkpoints":[{"id":"Microsoft:9","name":"x","is_recovery":true,"disks":["D:\\web.vhdx"]}],
            "reference_points":[{"id":"Microsoft:7","change_ids":["rctX:5b:00000001"]}]}}"#;
        let told: Told = serde_json::from_str(told).unwrap();
        let found = Found::from(serde_json::from_value::<Machine>(told.answer).unwrap());
        assert_eq!(found.disks[0].parent.as_deref(), Some(Path::new(r"D:\web.vhdx")));
        assert!(found.checkpoints[0].is_recovery && found.reference_points[0].change_ids == ["rctX:5b:00000001"]);
        let nothing: Told = serde_json::from_str(r#"{"answer":null}"#).unwrap();
        assert!(serde_json::from_value::<Option<Machine>>(nothing.answer).unwrap().is_none());
    }
}
