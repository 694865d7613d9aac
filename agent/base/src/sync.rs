//! Locks. The standard library's own; under the feature `simulation` a thread of a simulated machine that has to wait
//! lets the simulation decide who goes on ([`crate::seam`]).

#[cfg(not(feature = "simulation"))]
pub use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult};

#[cfg(feature = "simulation")]
pub use simulated::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult};

#[cfg(feature = "simulation")]
mod simulated {
    use std::ops::{Deref, DerefMut};
    use std::sync::{LockResult, PoisonError, TryLockError};
    use std::time::Duration;

    use crate::seam;

    /// What names a lock while somebody waits for it.
    fn key<T: ?Sized>(of: &T) -> usize {
        std::ptr::from_ref(of).cast::<()>() as usize
    }

    /// Tries until the lock is had; in between, others run.
    fn acquire<G>(key: usize, mut attempt: impl FnMut() -> Result<G, TryLockError<G>>) -> Option<LockResult<G>> {
        let world = seam::current()?;
        loop {
            match attempt() {
                Ok(guard) => return Some(Ok(guard)),
                Err(TryLockError::Poisoned(error)) => return Some(Err(error)),
                Err(TryLockError::WouldBlock) => drop(world.wait(key, None)),
            }
        }
    }

    fn released(key: usize) {
        if let Some(world) = seam::current() {
            world.wake(key, true);
        }
    }

    fn map<A, B>(result: LockResult<A>, wrap: impl FnOnce(A) -> B) -> LockResult<B> {
        match result {
            Ok(guard) => Ok(wrap(guard)),
            Err(error) => Err(PoisonError::new(wrap(error.into_inner()))),
        }
    }

    #[derive(Default, Debug)]
    pub struct Mutex<T: ?Sized>(std::sync::Mutex<T>);

    #[derive(Debug)]
    pub struct MutexGuard<'a, T: ?Sized> {
        lock: &'a Mutex<T>,
        guard: Option<std::sync::MutexGuard<'a, T>>,
    }

    impl<T> Mutex<T> {
        pub const fn new(value: T) -> Self {
            Self(std::sync::Mutex::new(value))
        }

        pub fn into_inner(self) -> LockResult<T> {
            self.0.into_inner()
        }
    }

    impl<T: ?Sized> Mutex<T> {
        pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            let result = acquire(key(self), || self.0.try_lock()).unwrap_or_else(|| self.0.lock());
            map(result, |guard| MutexGuard { lock: self, guard: Some(guard) })
        }

        pub fn try_lock(&self) -> Result<MutexGuard<'_, T>, TryLockError<MutexGuard<'_, T>>> {
            let wrap = |guard| MutexGuard { lock: self, guard: Some(guard) };
            match self.0.try_lock() {
                Ok(guard) => Ok(wrap(guard)),
                Err(TryLockError::WouldBlock) => Err(TryLockError::WouldBlock),
                Err(TryLockError::Poisoned(error)) => {
                    Err(TryLockError::Poisoned(PoisonError::new(wrap(error.into_inner()))))
                }
            }
        }

        pub fn get_mut(&mut self) -> LockResult<&mut T> {
            self.0.get_mut()
        }
    }

    impl<T: ?Sized> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.guard.as_ref().expect("taken only by a wait")
        }
    }

    impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.guard.as_mut().expect("taken only by a wait")
        }
    }

    impl<T: ?Sized> Drop for MutexGuard<'_, T> {
        fn drop(&mut self) {
            if self.guard.take().is_some() {
                released(key(self.lock));
            }
        }
    }

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct WaitTimeoutResult(bool);

    impl WaitTimeoutResult {
        pub fn timed_out(&self) -> bool {
            self.0
        }
    }

    #[derive(Default, Debug)]
    pub struct Condvar {
        real: std::sync::Condvar,
        /// Gives it an address of its own, whatever the size of the real one.
        _place: u8,
    }

    impl Condvar {
        pub const fn new() -> Self {
            Self { real: std::sync::Condvar::new(), _place: 0 }
        }

        pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
            match self.wait_until(guard, None) {
                Ok((guard, _)) => Ok(guard),
                Err(error) => Err(PoisonError::new(error.into_inner().0)),
            }
        }

        pub fn wait_while<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            mut condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<MutexGuard<'a, T>> {
            while condition(&mut guard) {
                guard = self.wait(guard)?;
            }
            Ok(guard)
        }

        pub fn wait_timeout<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            limit: Duration,
        ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
            self.wait_until(guard, Some(limit))
        }

        pub fn wait_timeout_while<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            limit: Duration,
            mut condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
            let deadline = crate::time::Instant::now() + limit;
            loop {
                if !condition(&mut guard) {
                    return Ok((guard, WaitTimeoutResult(false)));
                }
                let left = deadline.saturating_duration_since(crate::time::Instant::now());
                if left.is_zero() {
                    return Ok((guard, WaitTimeoutResult(true)));
                }
                guard = self.wait_timeout(guard, left)?.0;
            }
        }

        fn wait_until<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            limit: Option<Duration>,
        ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
            let lock = guard.lock;
            let inner = guard.guard.take().expect("taken only by a wait");
            let wrap = |guard| MutexGuard { lock, guard: Some(guard) };
            let Some(world) = seam::current() else {
                return match limit {
                    None => map(self.real.wait(inner), |guard| (wrap(guard), WaitTimeoutResult(false))),
                    Some(limit) => map(self.real.wait_timeout(inner, limit), |(guard, result)| {
                        (wrap(guard), WaitTimeoutResult(result.timed_out()))
                    }),
                };
            };
            drop(inner);
            released(key(lock));
            let woken = world.wait(key(self), limit.map(|limit| world.now() + limit));
            map(lock.lock(), |guard| (guard, WaitTimeoutResult(!woken)))
        }

        pub fn notify_one(&self) {
            match seam::current() {
                Some(world) => world.wake(key(self), false),
                None => self.real.notify_one(),
            }
        }

        pub fn notify_all(&self) {
            match seam::current() {
                Some(world) => world.wake(key(self), true),
                None => self.real.notify_all(),
            }
        }
    }

    #[derive(Default, Debug)]
    pub struct RwLock<T: ?Sized>(std::sync::RwLock<T>);

    pub struct RwLockReadGuard<'a, T: ?Sized> {
        lock: usize,
        guard: Option<std::sync::RwLockReadGuard<'a, T>>,
    }

    pub struct RwLockWriteGuard<'a, T: ?Sized> {
        lock: usize,
        guard: Option<std::sync::RwLockWriteGuard<'a, T>>,
    }

    impl<T> RwLock<T> {
        pub const fn new(value: T) -> Self {
            Self(std::sync::RwLock::new(value))
        }
    }

    impl<T: ?Sized> RwLock<T> {
        pub fn read(&self) -> LockResult<RwLockReadGuard<'_, T>> {
            let result = acquire(key(self), || self.0.try_read()).unwrap_or_else(|| self.0.read());
            map(result, |guard| RwLockReadGuard { lock: key(self), guard: Some(guard) })
        }

        pub fn write(&self) -> LockResult<RwLockWriteGuard<'_, T>> {
            let result = acquire(key(self), || self.0.try_write()).unwrap_or_else(|| self.0.write());
            map(result, |guard| RwLockWriteGuard { lock: key(self), guard: Some(guard) })
        }

        pub fn get_mut(&mut self) -> LockResult<&mut T> {
            self.0.get_mut()
        }
    }

    impl<T: ?Sized> Deref for RwLockReadGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.guard.as_ref().expect("taken only by drop")
        }
    }

    impl<T: ?Sized> Drop for RwLockReadGuard<'_, T> {
        fn drop(&mut self) {
            self.guard.take();
            released(self.lock);
        }
    }

    impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.guard.as_ref().expect("taken only by drop")
        }
    }

    impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.guard.as_mut().expect("taken only by drop")
        }
    }

    impl<T: ?Sized> Drop for RwLockWriteGuard<'_, T> {
        fn drop(&mut self) {
            self.guard.take();
            released(self.lock);
        }
    }
}
