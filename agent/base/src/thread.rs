//! Threads. The standard library's own; under the feature `simulation`, those of a simulated machine take turns as its
//! seed says ([`crate::seam`]).

#[cfg(not(feature = "simulation"))]
pub use std::thread::{Builder, JoinHandle, Thread, ThreadId, available_parallelism, current, park_timeout};

#[cfg(feature = "simulation")]
pub use simulated::{Builder, JoinHandle, Thread, ThreadId, available_parallelism, current, park_timeout};

#[cfg(feature = "simulation")]
mod simulated {
    use std::io;
    use std::num::NonZero;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use crate::seam;

    #[derive(Default)]
    pub struct Builder {
        name: Option<String>,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub enum ThreadId {
        Real(std::thread::ThreadId),
        Simulated(u64),
    }

    #[derive(Clone, Debug)]
    pub enum Thread {
        Real(std::thread::Thread),
        Simulated { id: u64, token: Arc<Mutex<bool>> },
    }

    pub enum JoinHandle<T> {
        Real(std::thread::JoinHandle<T>),
        Simulated { thread: Thread, result: Arc<Mutex<Option<T>>>, id: u64 },
    }

    impl Builder {
        pub fn new() -> Self {
            Self::default()
        }

        pub fn name(mut self, name: String) -> Self {
            self.name = Some(name);
            self
        }

        pub fn spawn<T: Send + 'static>(self, run: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
            let Some(world) = seam::current() else {
                let builder = std::thread::Builder::new();
                let builder = if let Some(name) = self.name { builder.name(name) } else { builder };
                return builder.spawn(run).map(JoinHandle::Real);
            };
            let result = Arc::new(Mutex::new(None));
            let id = world.spawn(&self.name.unwrap_or_default(), {
                let result = result.clone();
                Box::new(move || *result.lock().expect("held for one store") = Some(run()))
            });
            Ok(JoinHandle::Simulated { thread: Thread::Simulated { id, token: world.park_token(id) }, result, id })
        }
    }

    impl<T> JoinHandle<T> {
        pub fn thread(&self) -> Thread {
            match self {
                JoinHandle::Real(handle) => Thread::Real(handle.thread().clone()),
                JoinHandle::Simulated { thread, .. } => thread.clone(),
            }
        }

        pub fn join(self) -> std::thread::Result<T> {
            match self {
                JoinHandle::Real(handle) => handle.join(),
                JoinHandle::Simulated { result, id, .. } => {
                    if let Some(world) = seam::current() {
                        world.join(id);
                    }
                    result.lock().expect("held for one store").take().ok_or_else(|| Box::new("it panicked") as _)
                }
            }
        }

        pub fn is_finished(&self) -> bool {
            match self {
                JoinHandle::Real(handle) => handle.is_finished(),
                JoinHandle::Simulated { result, .. } => result.lock().expect("held for one store").is_some(),
            }
        }
    }

    impl Thread {
        pub fn id(&self) -> ThreadId {
            match self {
                Thread::Real(thread) => ThreadId::Real(thread.id()),
                Thread::Simulated { id, .. } => ThreadId::Simulated(*id),
            }
        }

        pub fn unpark(&self) {
            match self {
                Thread::Real(thread) => thread.unpark(),
                Thread::Simulated { token, .. } => {
                    *token.lock().expect("held for one store") = true;
                    if let Some(world) = seam::current() {
                        world.wake(Arc::as_ptr(token) as usize, true);
                    }
                }
            }
        }
    }

    pub fn current() -> Thread {
        match seam::current() {
            None => Thread::Real(std::thread::current()),
            Some(world) => {
                let id = world.current_thread();
                Thread::Simulated { id, token: world.park_token(id) }
            }
        }
    }

    pub fn park_timeout(limit: Duration) {
        let Some(world) = seam::current() else { return std::thread::park_timeout(limit) };
        let token = world.park_token(world.current_thread());
        let deadline = world.now() + limit;
        while !std::mem::take(&mut *token.lock().expect("held for one store")) && world.now() < deadline {
            world.wait(Arc::as_ptr(&token) as usize, Some(deadline));
        }
    }

    pub fn available_parallelism() -> io::Result<NonZero<usize>> {
        match seam::current() {
            None => std::thread::available_parallelism(),
            Some(_) => Ok(NonZero::<usize>::MIN.saturating_add(1)),
        }
    }
}
