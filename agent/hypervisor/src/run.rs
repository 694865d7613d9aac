//! Programs that are run to their end, with a limit and bounded output.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::error::{HypervisorError, store};

/// What is kept of what a program says; more is read and dropped.
pub const OUTPUT_BYTES_MAX: usize = 1 << 20;

pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The end of what it said about its failure, in one line.
    pub fn reason(&self) -> String {
        let text = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines[lines.len().saturating_sub(4)..].join("; ");
        if last.is_empty() { format!("it ended with {}", self.code) } else { last.chars().take(1000).collect() }
    }
}

/// Runs a command to its end. It is killed when the limit is over or the future is dropped.
pub async fn run(mut command: Command, input: &[u8], limit: Duration) -> Result<Output, HypervisorError> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            HypervisorError::Missing { package: package_of(&program), what: program.clone() }
        }
        _ => store(format!("{program} does not start"))(error),
    })?;
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = input.to_vec();
    let whole = async move {
        let telling = async move {
            if let Some(stdin) = &mut stdin {
                // A program that does not want to know ends its input.
                let _ = stdin.write_all(&input).await;
            }
            drop(stdin);
        };
        let (_, stdout, stderr, status) = tokio::join!(telling, read(stdout), read(stderr), child.wait());
        Ok(Output { code: status?.code().unwrap_or(-1), stdout: stdout?, stderr: stderr? })
    };
    match tokio::time::timeout(limit, whole).await {
        Ok(outcome) => outcome.map_err(store(program)),
        Err(_) => Err(HypervisorError::TimedOut { what: program, limit }),
    }
}

fn package_of(program: &str) -> &'static str {
    match program.rsplit('/').next().unwrap_or_default() {
        "virsh" => "libvirt-clients",
        name if name.starts_with("qemu-system") => "qemu-system-x86",
        _ => "the package that has it",
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>) -> std::io::Result<String> {
    let mut kept = Vec::new();
    if let Some(mut pipe) = pipe {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let read = pipe.read(&mut buffer).await?;
            if read == 0 {
                break;
            }
            let room = OUTPUT_BYTES_MAX - kept.len();
            kept.extend_from_slice(&buffer[..read.min(room)]);
        }
    }
    Ok(String::from_utf8_lossy(&kept).into_owned())
}
