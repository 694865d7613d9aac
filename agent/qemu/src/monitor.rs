//! Questions to a QEMU, one after another, by whoever may block: over its own QMP socket, which stays open, or through libvirt.
//!
//! *Retries.* A connection that ended is made again by the next question, at the place where the machine is then. *Cancellation.* Each question has a
//! limit. *Crash.* Nothing here is durable.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};
use tidemark_base::sync::Mutex;
use tokio::process::Command;
use tokio::runtime::Runtime;

use crate::error::{QemuError, QmpError};
use crate::find::Way;
use crate::qmp::Qmp;

const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// What libvirt's client may say.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// One thread for all connections of this process.
fn runtime() -> Result<&'static Runtime, QmpError> {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("qmp").enable_all().build().ok()
    });
    made.as_ref().ok_or_else(|| QmpError::Unreachable { reason: "no thread can be started".to_owned() })
}

/// Waits for it, whatever thread this is.
fn wait<T: Send + 'static>(future: impl Future<Output = Result<T, QmpError>> + Send + 'static) -> Result<T, QmpError> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    runtime()?.spawn(async move { tell.send(future.await) });
    told.recv().unwrap_or_else(|_| Err(QmpError::Unreachable { reason: "its thread ended".to_owned() }))
}

#[derive(Clone)]
enum Connection {
    Socket(Arc<Qmp>),
    Libvirt { domain: String, owner: (u32, u32) },
}

#[derive(Default)]
pub struct Monitor {
    /// Counted, so that it is known when another QEMU may be there.
    current: Mutex<(u64, Option<Connection>)>,
}

impl Monitor {
    /// Connects if that is not done; the number of the connection.
    pub fn connect(&self, way: impl FnOnce() -> Result<Way, QemuError>) -> Result<u64, QemuError> {
        let mut current = self.current.lock().expect("no panic while held");
        let is_open = match &current.1 {
            Some(Connection::Socket(qmp)) => qmp.is_open(),
            // Which process it is, only a new look tells.
            Some(Connection::Libvirt { .. }) | None => false,
        };
        if is_open {
            return Ok(current.0);
        }
        let made = match way()? {
            Way::Libvirt { domain, owner } => {
                let is_same =
                    matches!(&current.1, Some(Connection::Libvirt { domain: before, .. }) if *before == domain);
                if is_same {
                    return Ok(current.0);
                }
                Connection::Libvirt { domain, owner }
            }
            Way::Sockets(sockets) => {
                let mut last = QmpError::Unreachable { reason: "it has no socket".to_owned() };
                let mut connected = None;
                for socket in sockets {
                    match wait(async move { connect(&socket).await }) {
                        Ok(qmp) => connected = Some(qmp),
                        Err(error) => last = error,
                    }
                    if connected.is_some() {
                        break;
                    }
                }
                Connection::Socket(Arc::new(connected.ok_or(last)?))
            }
        };
        current.0 += 1;
        current.1 = Some(made);
        Ok(current.0)
    }

    /// Leaves its socket, which takes one client, to others.
    pub fn disconnect(&self) {
        self.current.lock().expect("no panic while held").1 = None;
    }

    fn current(&self) -> Result<Connection, QmpError> {
        let current = self.current.lock().expect("no panic while held");
        current.1.clone().ok_or_else(|| QmpError::Unreachable { reason: "nobody connected to it".to_owned() })
    }

    /// The user and group that QEMU runs as.
    pub fn owner(&self) -> Result<(u32, u32), QmpError> {
        Ok(match self.current()? {
            Connection::Socket(qmp) => qmp.owner(),
            Connection::Libvirt { owner, .. } => owner,
        })
    }

    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let connection = self.current()?;
        let command = command.to_owned();
        wait(async move {
            match connection {
                Connection::Socket(qmp) => qmp.execute(&command, arguments, ANSWER_LIMIT).await,
                Connection::Libvirt { domain, .. } => through_libvirt(&domain, &command, arguments).await,
            }
        })
    }
}

async fn connect(socket: &Path) -> Result<Qmp, QmpError> {
    let unreachable = || QmpError::Unreachable { reason: format!("{} is no path of a socket", socket.display()) };
    let name = socket.file_name().and_then(|name| name.to_str()).ok_or_else(unreachable)?;
    let folder = socket.parent().ok_or_else(unreachable)?;
    Qmp::connect(folder, name).await.map_err(|error| match error {
        QmpError::Unreachable { reason } => QmpError::Unreachable { reason: format!("{}: {reason}", socket.display()) },
        error => error,
    })
}

async fn through_libvirt(domain: &str, command: &str, arguments: Value) -> Result<Value, QmpError> {
    let question = json!({ "execute": command, "arguments": arguments }).to_string();
    let mut virsh = Command::new("virsh");
    virsh.env("LC_ALL", "C").args(["-q", "qemu-monitor-command", domain]).arg(&question).kill_on_drop(true);
    let unreachable = |reason: String| QmpError::Unreachable { reason: format!("libvirt: {reason}") };
    let output = match tokio::time::timeout(ANSWER_LIMIT, virsh.output()).await {
        Ok(output) => output.map_err(|error| unreachable(error.to_string()))?,
        Err(_) => return Err(QmpError::TimedOut { what: command.to_owned(), limit: ANSWER_LIMIT }),
    };
    if !output.status.success() || output.stdout.len() > ANSWER_BYTES_MAX {
        return Err(unreachable(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let mut answer: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| unreachable(format!("its answer is no JSON: {error}")))?;
    match answer.get("error") {
        Some(error) => {
            let reason = error["desc"].as_str().unwrap_or("it gave no reason").to_owned();
            Err(QmpError::Refused { what: command.to_owned(), reason })
        }
        None => Ok(answer["return"].take()),
    }
}
