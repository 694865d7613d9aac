//! A long way between two programs: what one says is heard by the other so much later.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tidemark_base::stop::Stop;

use crate::wait;

/// How often who waits looks whether it shall end.
const GLANCE: Duration = Duration::from_millis(50);

/// Takes connections on loopback and makes one of its own for each.
pub struct Distance {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Distance {
    #[track_caller]
    pub fn start(to: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        listener.set_nonblocking(true).expect("a socket option");
        let address = listener.local_addr().expect("it listens");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let pause = Stop::new();
            while !stopped.load(Ordering::SeqCst) {
                let Ok((client, _)) = listener.accept() else {
                    pause.wait_for(GLANCE);
                    continue;
                };
                client.set_nonblocking(false).expect("a socket option");
                let Ok(server) = TcpStream::connect(to) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let from = from.try_clone().expect("a socket can be shared");
                    let to = to.try_clone().expect("a socket can be shared");
                    let stopped = stopped.clone();
                    std::thread::spawn(move || carry(from, to, delay, &stopped));
                }
            }
        });
        Self { address, stop, thread: Some(thread) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration, stopped: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    from.set_read_timeout(Some(GLANCE)).expect("a socket option");
    while !stopped.load(Ordering::SeqCst) {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                wait::until_passed(Instant::now() + delay);
                if to.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
