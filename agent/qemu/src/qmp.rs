//! QEMU's machine protocol: lines of JSON on a Unix socket; answers carry the question's id, events come between.
//!
//! One task owns the connection. Dropping the last [`Qmp`] ends it; the machine goes on.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::error::QmpError;

/// Questions that wait for their turn.
const CALLS_MAX: usize = 16;
/// Events that a slow listener may be behind.
const EVENTS_MAX: usize = 256;
const LINE_BYTES_MAX: usize = 4 << 20;
const GREETING_LIMIT: Duration = Duration::from_secs(10);

pub struct Qmp {
    calls: mpsc::Sender<Call>,
    events: broadcast::WeakSender<Value>,
    /// The user and group that QEMU runs as.
    owner: (u32, u32),
}

struct Call {
    command: String,
    arguments: Value,
    answer: oneshot::Sender<Result<Value, String>>,
}

/// Connects to a socket in a folder, however long the folder's path is: addresses of sockets have 107 bytes.
pub async fn connect_in(folder: &Path, name: &str) -> std::io::Result<UnixStream> {
    let folder = std::fs::File::open(folder)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd())).await
}

impl Qmp {
    pub async fn connect(folder: &Path, name: &str) -> Result<Self, QmpError> {
        let unreachable = |reason: String| QmpError::Unreachable { reason };
        let stream = connect_in(folder, name).await.map_err(|error| unreachable(error.to_string()))?;
        Self::over(stream).await
    }

    /// To a socket that nobody else connects to: a QEMU that does not greet within `limit` is slow, or stuck.
    pub async fn connect_own(folder: &Path, name: &str, limit: Duration) -> Result<Self, QmpError> {
        let unreachable = |reason: String| QmpError::Unreachable { reason };
        let stream = connect_in(folder, name).await.map_err(|error| unreachable(error.to_string()))?;
        Self::over_within(stream, limit, &format!("it does not greet within {} s", limit.as_secs())).await
    }

    pub async fn over(stream: UnixStream) -> Result<Self, QmpError> {
        Self::over_within(stream, GREETING_LIMIT, "it does not greet; somebody else may be connected").await
    }

    async fn over_within(stream: UnixStream, limit: Duration, silent: &str) -> Result<Self, QmpError> {
        let unreachable = |reason: String| QmpError::Unreachable { reason };
        let peer = stream.peer_cred().map_err(|error| unreachable(error.to_string()))?;
        let owner = (peer.uid(), peer.gid());
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let mut line = Vec::new();
        let greeting = tokio::time::timeout(limit, next(&mut read, &mut line)).await;
        match greeting {
            Ok(Ok(Some(greeting))) if greeting.get("QMP").is_some() => {}
            Ok(Ok(other)) => return Err(unreachable(format!("it does not greet: {other:?}"))),
            Ok(Err(error)) => return Err(unreachable(error.to_string())),
            Err(_) => return Err(unreachable(silent.to_owned())),
        }
        let (calls, receiver) = mpsc::channel(CALLS_MAX);
        let events = broadcast::channel(EVENTS_MAX).0;
        let qmp = Self { calls, events: events.downgrade(), owner };
        tokio::spawn(talk(read, write, receiver, events));
        qmp.execute("qmp_capabilities", json!({}), limit).await?;
        Ok(qmp)
    }

    /// What happens from now on; ends with the connection.
    pub fn events(&self) -> broadcast::Receiver<Value> {
        match self.events.upgrade() {
            Some(events) => events.subscribe(),
            // It has ended: so does the receiver.
            None => broadcast::channel(1).1,
        }
    }

    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }

    pub fn is_open(&self) -> bool {
        !self.calls.is_closed()
    }

    pub async fn execute(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        let (answer, answered) = oneshot::channel();
        let call = Call { command: command.to_owned(), arguments, answer };
        let ended = || QmpError::Unreachable { reason: format!("it ended before it answered {command}") };
        let asking = async {
            self.calls.send(call).await.map_err(|_| ended())?;
            match answered.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(reason)) => Err(QmpError::Refused { what: command.to_owned(), reason }),
                Err(_) => Err(ended()),
            }
        };
        match tokio::time::timeout(limit, asking).await {
            Ok(outcome) => outcome,
            Err(_) => Err(QmpError::TimedOut { what: command.to_owned(), limit }),
        }
    }
}

/// Cancel safe: what was read of a line stays in `line`.
async fn next(read: &mut BufReader<OwnedReadHalf>, line: &mut Vec<u8>) -> std::io::Result<Option<Value>> {
    loop {
        let available = read.fill_buf().await?;
        if available.is_empty() {
            return Ok(None);
        }
        let (taken, complete) = match available.iter().position(|byte| *byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (available.len(), false),
        };
        if line.len() + taken > LINE_BYTES_MAX {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "a line is too long"));
        }
        line.extend_from_slice(&available[..taken]);
        read.consume(taken);
        if complete {
            let value = serde_json::from_slice(line);
            line.clear();
            return Ok(Some(value?));
        }
    }
}

async fn talk(
    mut read: BufReader<OwnedReadHalf>,
    mut write: OwnedWriteHalf,
    mut calls: mpsc::Receiver<Call>,
    events: broadcast::Sender<Value>,
) {
    let mut waiting: HashMap<u64, oneshot::Sender<Result<Value, String>>> = HashMap::new();
    let mut last = 0;
    let mut line = Vec::new();
    loop {
        tokio::select! {
            call = calls.recv() => {
                let Some(call) = call else { return };
                last += 1;
                // Those whose asker gave up are not kept.
                waiting.retain(|_, answer| !answer.is_closed());
                waiting.insert(last, call.answer);
                let text = format!("{}\n", json!({ "execute": call.command, "arguments": call.arguments, "id": last }));
                if write.write_all(text.as_bytes()).await.is_err() {
                    return;
                }
            }
            message = next(&mut read, &mut line) => {
                let mut message = match message {
                    Ok(Some(message)) => message,
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(%error, "a machine's QEMU cannot be heard any more");
                        return;
                    }
                };
                if message.get("event").is_some() {
                    // Nobody listening is fine.
                    let _ = events.send(message);
                } else if let Some(answer) = message["id"].as_u64().and_then(|id| waiting.remove(&id)) {
                    let _ = answer.send(match message.get("error") {
                        Some(error) => Err(error["desc"].as_str().unwrap_or("it gave no reason").to_owned()),
                        None => Ok(message["return"].take()),
                    });
                }
            }
        }
    }
}
