//! So many at once and no more.

use tidemark_base::sync::{Condvar, Mutex};

pub struct Permits {
    free: Mutex<usize>,
    given_back: Condvar,
}

pub struct Permit<'a>(&'a Permits);

impl Permits {
    pub fn new(count: usize) -> Self {
        Self { free: Mutex::new(count.max(1)), given_back: Condvar::default() }
    }

    pub fn take(&self) -> Permit<'_> {
        let free = self.free.lock().expect("no panic while held");
        let mut free = self.given_back.wait_while(free, |free| *free == 0).expect("no panic while held");
        *free -= 1;
        Permit(self)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().expect("no panic while held") += 1;
        self.0.given_back.notify_one();
    }
}
