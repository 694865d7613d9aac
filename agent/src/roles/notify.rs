//! What the service manager is told: that a role is ready, that it lives, and that it ends. Without `NOTIFY_SOCKET` nothing is.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// One role's line to the service manager.
pub struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

/// Tells the watchdog that the runtime still turns, until it is dropped.
pub struct Alive(Option<tokio::task::JoinHandle<()>>);

impl Drop for Alive {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
    }
}

impl Manager {
    /// As the environment says.
    pub fn of_environment() -> Self {
        let variable = |name: &str| std::env::var_os(name);
        let socket = variable("NOTIFY_SOCKET").and_then(|path| {
            open(&path).inspect_err(|error| tracing::warn!(%error, "the service manager cannot be told anything")).ok()
        });
        let number = |name: &str| variable(name).and_then(|text| text.to_str()?.parse::<u64>().ok());
        // The variable may be another process's, handed down.
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| is_ours && *micros > 0).map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// It answers from now on. The watchdog is told twice in its interval, by the runtime that does the work.
    pub fn ready(self: &std::sync::Arc<Self>) -> Alive {
        self.tell("READY=1");
        let Some(watchdog) = self.watchdog.filter(|_| self.socket.is_some()) else { return Alive(None) };
        let manager = self.clone();
        Alive(Some(tokio::spawn(async move {
            let mut ticks = tokio::time::interval((watchdog / 2).max(Duration::from_millis(1)));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                manager.tell("WATCHDOG=1");
            }
        })))
    }

    /// It ends, which may take a while.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, state: &str) {
        if let Some((socket, address)) = &self.socket {
            // Nobody there to hear it changes nothing for us.
            if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
                tracing::debug!(%error, state, "the service manager did not take it");
            }
        }
    }
}

/// A path, or with `@` a name without a file.
fn open(path: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_watchdog_and_stopping_arrive_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let heard = tokio::net::UnixDatagram::bind(&path).unwrap();
        let socket = Some(open(path.as_os_str()).unwrap());
        let manager = std::sync::Arc::new(Manager { socket, watchdog: Some(Duration::from_millis(20)) });
        let next = async || {
            let mut buffer = [0; 64];
            let bytes = tokio::time::timeout(Duration::from_secs(5), heard.recv(&mut buffer)).await.unwrap().unwrap();
            String::from_utf8_lossy(&buffer[..bytes]).into_owned()
        };
        let alive = manager.ready();
        assert_eq!(next().await, "READY=1");
        for _ in 0..3 {
            assert_eq!(next().await, "WATCHDOG=1");
        }
        drop(alive);
        manager.stopping();
        let mut last = next().await;
        while last == "WATCHDOG=1" {
            last = next().await;
        }
        assert_eq!(last, "STOPPING=1");
        // Nobody listens any more: nothing happens.
        drop(heard);
        manager.stopping();
    }
}
