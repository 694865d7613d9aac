//! A thread that works for as long as its process does. One that a defect ended is told of: what it did is not done any more.

use std::io;

use tidemark_base::sync::Mutex;
use tidemark_base::thread::{Builder, JoinHandle};
use tidemark_proto::control::Problem;

pub struct Background {
    /// As people are told: "the scrub".
    what: &'static str,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Background {
    pub fn start(name: &str, what: &'static str, run: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let thread = Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(Self { what, thread: Mutex::new(Some(thread)) })
    }

    /// `None`: it is at work, or was told to end.
    pub fn problem(&self) -> Option<Problem> {
        let thread = self.thread.lock().expect("no panic while held");
        thread.as_ref().is_some_and(JoinHandle::is_finished).then(|| Problem {
            critical: true,
            message: format!("{} ended by a defect of the program, and is not done any more", self.what),
            help: "restart the process server, and report it with what its log says; what was replicated is not touched by it".to_owned(),
        })
    }

    /// Waits until it ended, as it was told to.
    pub fn join(&self) {
        let thread = self.thread.lock().expect("no panic while held").take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("{} ended by a defect", self.what);
        }
    }
}

#[cfg(test)]
mod tests {
    use tidemark_base::stop::Stop;

    use super::*;

    #[test]
    fn a_thread_that_a_defect_ended_is_a_problem() {
        let stop = Stop::new();
        let works = Background::start("works", "the work", {
            let stop = stop.clone();
            move || while !stop.wait_for(std::time::Duration::from_secs(60)) {}
        });
        let works = works.unwrap();
        assert_eq!(works.problem(), None);
        stop.stop();
        works.join();
        assert_eq!(works.problem(), None, "it was told to");

        let ends = Background::start("ends", "the scrub", || panic!("as a defect does")).unwrap();
        let told = (0..).find_map(|_| {
            std::thread::yield_now();
            ends.problem()
        });
        assert!(told.is_some_and(|told| told.critical && told.message.starts_with("the scrub ended by a defect")));
    }
}
