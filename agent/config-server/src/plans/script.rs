//! Scripts of plans: pre-installed on the configuration server's host, looked up by name, never sent.
//!
//! *Cancellation.* A script that is not done within its limit is killed, with everything that it started. *Retries.* None here. *Crash.* A
//! script may outlive the server that started it; going on with the plan runs it again, so scripts must bear that.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tidemark_base::trust::distrust;
use tidemark_proto::control::{Failure, FailureKind};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::names::check_name;

/// What of a script's words is kept.
const OUTPUT_BYTES_MAX: usize = 4096;

/// The script of this name, which nobody but its owner can have written.
pub fn find(folder: &Path, name: &str) -> Result<PathBuf, Failure> {
    check_name("script", name)?;
    let path = folder.join(name);
    if !path.is_file() {
        return Err(Failure::new(
            FailureKind::NotFound,
            format!("there is no script {name:?} for plans"),
            format!("install it as {}, executable and writable to its owner alone", path.display()),
        ));
    }
    for path in [folder, &path] {
        if let Some(reason) = distrust(path).map_err(|error| refused(path, &error.to_string()))? {
            return Err(refused(path, reason));
        }
    }
    match path.metadata() {
        Ok(metadata) if metadata.mode() & 0o111 != 0 => Ok(path),
        _ => Err(refused(&path, "it is not executable")),
    }
}

fn refused(path: &Path, reason: &str) -> Failure {
    Failure::new(
        FailureKind::Conflict,
        format!("{} is not safe to run: {reason}", path.display()),
        "let it belong to root or to the configuration server's user, executable and writable to its owner alone",
    )
}

/// Kills the group of a script that nobody waits for any more.
struct KillOnDrop(Option<Pid>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(group) = self.0.take() {
            // Its leader was not waited for yet, so the id is not another's.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs a script to its end; the end of what it said.
pub async fn run(path: &Path, environment: &[(&str, String)], limit: Duration) -> Result<String, Failure> {
    let failed = |reason: String, output: &str| {
        let said = if output.is_empty() { String::new() } else { format!("; it said: {output}") };
        Failure::new(
            FailureKind::Failed,
            format!("script {} {reason}{said}", path.display()),
            "run it by hand to see why",
        )
    };
    let mut child = Command::new(path)
        .envs(environment.iter().map(|(name, value)| (*name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}"), ""))?;
    let mut group = KillOnDrop(child.id().map(|id| Pid::from_raw(id as i32)));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let reading = async { tokio::join!(tail(stdout), tail(stderr)) };
    let finishing = async { tokio::join!(child.wait(), reading) };
    let finished = tokio::time::timeout(limit, finishing).await;
    let Ok((status, (mut said, complained))) = finished else {
        drop(group);
        let late = format!("did not finish within {} s and was killed", limit.as_secs_f32());
        return Err(Failure { kind: FailureKind::TimedOut, ..failed(late, "") });
    };
    group.0 = None;
    said.push_str(&complained);
    match status {
        Ok(status) if status.success() => Ok(said),
        Ok(status) => Err(failed(format!("ended with {status}"), said.trim())),
        Err(error) => Err(failed(format!("cannot be waited for: {error}"), said.trim())),
    }
}

/// The end of what comes; all of it is read, so that nobody waits to write.
async fn tail(from: Option<impl tokio::io::AsyncRead + Unpin>) -> String {
    let (Some(mut from), mut kept, mut buffer) = (from, Vec::new(), [0; OUTPUT_BYTES_MAX]) else {
        return String::new();
    };
    while let Ok(count) = from.read(&mut buffer).await
        && count > 0
    {
        kept.extend_from_slice(&buffer[..count]);
        let excess = kept.len().saturating_sub(OUTPUT_BYTES_MAX);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const LONG: Duration = Duration::from_secs(60);

    fn install(folder: &Path, name: &str, body: &str) -> PathBuf {
        let path = folder.join(name);
        std::io::Write::write_all(
            &mut std::fs::File::create(&path).unwrap(),
            format!("#!/bin/sh\n{body}\n").as_bytes(),
        )
        .unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_script_is_run_with_what_it_needs_to_know_and_says_how_it_went() {
        let folder = tempfile::tempdir().unwrap();
        let path = install(folder.path(), "switch", "echo \"$TIDEMARK_PLAN\"; echo no >&2");
        assert_eq!(find(folder.path(), "switch").unwrap(), path);
        let environment = [("TIDEMARK_PLAN", "shop".to_owned())];
        assert_eq!(run(&path, &environment, LONG).await.unwrap(), "shop\nno\n");
        let failure = run(&install(folder.path(), "bad", "echo reason; exit 3"), &[], LONG).await.unwrap_err();
        assert!(failure.message.contains("exit status: 3") && failure.message.contains("reason"), "{failure:?}");
    }

    #[tokio::test]
    async fn a_script_that_hangs_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let id = folder.path().join("id");
        let path = install(folder.path(), "hang", &format!("sleep 1000 & echo $! > {}; wait", id.display()));
        let failure = run(&path, &[], Duration::from_secs(2)).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::TimedOut);
        let id: i32 = std::fs::read_to_string(id).unwrap().trim().parse().unwrap();
        let is_gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let gone = async {
            while !is_gone() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LONG, gone).await.expect("what it started is killed");
    }

    #[test]
    fn what_others_could_have_written_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = install(folder.path(), "switch", "true");
        for name in ["", "absent", "../switch", "a/b", ".switch"] {
            assert!(find(folder.path(), name).is_err(), "{name}");
        }
        for mode in [0o722, 0o770, 0o600] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(find(folder.path(), "switch").unwrap_err().message.contains("not safe"), "{mode:o}");
        }
    }
}
