//! The machine room: threads that take turns, clocks that jump to the next moment at which something happens, and two
//! machines with their media.
//!
//! Every thread of the system is a coroutine of one real thread. It runs until it waits (for a lock, a condition, a time)
//! or comes to a step at which the seed lets another one go on. Nothing here is left to the real machine, so that a
//! seed is all that a run depends on.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use tidemark_base::disk::{Access, DiskError};
use tidemark_base::random::Random;
use tidemark_base::seam::{self, Event, SimulatedDisk};
use tidemark_base::storage::Storage;
use tidemark_base::{DiskId, MarkId, Position};

use crate::counts::{Counts, Kind};
use crate::media::{Media, MediaFolder};

thread_local! {
    /// Stacks that nobody uses, also those of runs before: the real machine clears every page of a new one.
    static SPARE_STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

fn give_back(stack: DefaultStack) {
    SPARE_STACKS.with_borrow_mut(|spare| spare.push(stack));
}

const STACK_BYTES: usize = 1 << 20;
/// Steps of one run; more than this is a loop that never waits.
const STEPS_MAX: u64 = 30_000_000;
/// Where virtual time begins: long enough after zero that times can be subtracted from.
const START: Duration = Duration::from_secs(100_000);
const WALL_START_SECONDS: u64 = 1_795_000_000;

/// Who runs a thread. What crashes, crashes as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Process {
    /// The simulation itself: director, wires.
    Outside,
    Host,
    Server,
    /// The other process server of a machine that feeds two.
    Second,
}

type Task = Coroutine<(), (), (), DefaultStack>;

struct Thread {
    process: Process,
    name: String,
    task: Option<Task>,
    yielder: *const Yielder<(), ()>,
    /// What it waits for.
    key: Option<usize>,
    deadline: Option<Duration>,
    was_woken: bool,
    token: Arc<Mutex<bool>>,
}

/// Spreads addresses, which differ in their middle bits.
#[derive(Default)]
struct Address(u64);

impl Hasher for Address {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_usize(usize::from(*byte)));
    }

    fn write_usize(&mut self, number: usize) {
        self.0 = (self.0 ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[derive(Default)]
struct Threads {
    alive: BTreeMap<u64, Thread>,
    ready: Vec<u64>,
    timers: BTreeSet<(Duration, u64)>,
    /// Never gone through: only asked.
    waiting: HashMap<usize, VecDeque<u64>, BuildHasherDefault<Address>>,
    next: u64,
    /// Processes that are about to be killed: their threads run no further.
    doomed: BTreeSet<Process>,
}

/// What makes this process stop at a step of its own.
#[derive(Clone, Copy, Default)]
pub struct Trap {
    pub steps_left: Option<u64>,
}

pub struct Sim {
    threads: RefCell<Threads>,
    current: Cell<u64>,
    process: Cell<Process>,
    now: Cell<Duration>,
    steps: Cell<u64>,
    pub schedule: RefCell<Random>,
    pub faults: RefCell<Random>,
    entropy: RefCell<Random>,
    /// One step in so many lets another thread go on.
    pub switch_one_in: u64,
    /// How far the wall clock of host and server is off, in milliseconds.
    pub wall_offset_ms: RefCell<BTreeMap<Process, i64>>,
    pub traps: RefCell<BTreeMap<Process, Trap>>,
    pub host: Rc<Media>,
    pub server: Rc<Media>,
    pub second: Rc<Media>,
    pub counts: RefCell<Counts>,
    pub trace: bool,
    pub marks: RefCell<Vec<(MarkId, DiskId, Position)>>,
    on_mark: RefCell<Option<Box<dyn Fn(DiskId, MarkId)>>>,
    failure: RefCell<Option<String>>,
    /// A running fingerprint of everything that happened, to see that a seed replays.
    fingerprint: Cell<u64>,
}

impl Sim {
    pub fn new(seed: u64, switch_one_in: u64, trace: bool) -> Rc<Self> {
        let stream = |number: u64| RefCell::new(Random::new(seed.wrapping_mul(0x1_0001).wrapping_add(number << 56)));
        Rc::new_cyclic(|sim| Self {
            threads: RefCell::default(),
            current: Cell::new(0),
            process: Cell::new(Process::Outside),
            now: Cell::new(START),
            steps: Cell::new(0),
            schedule: stream(1),
            faults: stream(2),
            entropy: stream(3),
            switch_one_in,
            wall_offset_ms: RefCell::default(),
            traps: RefCell::default(),
            host: Media::new(Process::Host, sim.clone()),
            server: Media::new(Process::Server, sim.clone()),
            second: Media::new(Process::Second, sim.clone()),
            counts: RefCell::default(),
            trace,
            marks: RefCell::default(),
            on_mark: RefCell::default(),
            failure: RefCell::default(),
            fingerprint: Cell::new(0),
        })
    }

    pub fn media(&self, process: Process) -> &Rc<Media> {
        match process {
            Process::Server => &self.server,
            Process::Second => &self.second,
            Process::Host | Process::Outside => &self.host,
        }
    }

    pub fn set_on_mark(&self, act: impl Fn(DiskId, MarkId) + 'static) {
        *self.on_mark.borrow_mut() = Some(Box::new(act));
    }

    /// Runs `director` and everything that it starts, until it returns or something is wrong.
    pub fn run(self: &Rc<Self>, director: impl FnOnce() + 'static) -> Result<(), String> {
        seam::enter(Some(self.clone()));
        let director = self.start(Process::Outside, "director", Box::new(director));
        let result = self.drive(director);
        seam::enter(None);
        self.end();
        result
    }

    fn drive(self: &Rc<Self>, director: u64) -> Result<(), String> {
        while self.is_alive(director) {
            if let Some(failure) = self.failure.borrow().clone() {
                return Err(failure);
            }
            let Some(id) = self.choose() else {
                return Err(format!("nobody can go on: {}", self.describe()));
            };
            self.resume(id)?;
            if self.steps.get() > STEPS_MAX {
                return Err(format!("more than {STEPS_MAX} steps: {}", self.describe()));
            }
        }
        self.failure.borrow().clone().map_or(Ok(()), Err)
    }

    /// Who goes on: one of those that can; when nobody can, whoever's time comes first.
    fn choose(&self) -> Option<u64> {
        let mut threads = self.threads.borrow_mut();
        let threads = &mut *threads;
        loop {
            if !threads.ready.is_empty() {
                let index = self.schedule.borrow_mut().below(threads.ready.len() as u64) as usize;
                let id = threads.ready.swap_remove(index);
                let Some(thread) = threads.alive.get(&id) else { continue };
                if threads.doomed.contains(&thread.process) {
                    continue;
                }
                return Some(id);
            }
            let (time, id) = threads.timers.pop_first()?;
            self.now.set(self.now.get().max(time));
            if let Some(thread) = threads.alive.get_mut(&id) {
                if let Some(key) = thread.key.take()
                    && let Some(queue) = threads.waiting.get_mut(&key)
                {
                    queue.retain(|waiter| *waiter != id);
                }
                thread.deadline = None;
                thread.was_woken = false;
                threads.ready.push(id);
            }
        }
    }

    fn resume(&self, id: u64) -> Result<(), String> {
        let mut task = {
            let mut threads = self.threads.borrow_mut();
            let thread = threads.alive.get_mut(&id).expect("chosen among the living");
            self.process.set(thread.process);
            thread.task.take().expect("nobody else runs it")
        };
        self.current.set(id);
        self.steps.set(self.steps.get() + 1);
        self.mix(id);
        let result = task.resume(());
        self.process.set(Process::Outside);
        match result {
            CoroutineResult::Yield(()) => {
                if let Some(thread) = self.threads.borrow_mut().alive.get_mut(&id) {
                    thread.task = Some(task);
                }
                Ok(())
            }
            CoroutineResult::Return(()) => {
                let mut threads = self.threads.borrow_mut();
                give_back(task.into_stack());
                threads.alive.remove(&id);
                drop(threads);
                self.wake_key(join_key(id), true);
                Ok(())
            }
        }
    }

    pub fn mix(&self, value: u64) {
        let mixed = (self.fingerprint.get() ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.fingerprint.set(mixed ^ (mixed >> 29));
    }

    pub fn fingerprint(&self) -> u64 {
        self.fingerprint.get()
    }

    pub fn steps(&self) -> u64 {
        self.steps.get()
    }

    fn is_alive(&self, id: u64) -> bool {
        self.threads.borrow().alive.contains_key(&id)
    }

    fn describe(&self) -> String {
        let threads = self.threads.borrow();
        let all: Vec<String> = threads
            .alive
            .values()
            .map(|thread| format!("{:?}/{} (until {:?})", thread.process, thread.name, thread.deadline))
            .collect();
        all.join(", ")
    }

    pub fn start(self: &Rc<Self>, process: Process, name: &str, run: Box<dyn FnOnce()>) -> u64 {
        let id = {
            let mut threads = self.threads.borrow_mut();
            threads.next += 1;
            threads.next
        };
        let stack = SPARE_STACKS.with_borrow_mut(Vec::pop);
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("room for a stack"));
        let sim = Rc::downgrade(self);
        let task = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            let sim = sim.upgrade().expect("the simulation outlives its threads");
            if let Some(thread) = sim.threads.borrow_mut().alive.get_mut(&id) {
                thread.yielder = std::ptr::from_ref(yielder);
            }
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
            if let Err(panic) = result {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                    .unwrap_or_else(|| "something".to_owned());
                sim.fail(format!("a thread panicked: {text}"));
            }
        });
        let thread = Thread {
            process,
            name: name.to_owned(),
            task: Some(task),
            yielder: std::ptr::null(),
            key: None,
            deadline: None,
            was_woken: false,
            token: Arc::default(),
        };
        let mut threads = self.threads.borrow_mut();
        threads.alive.insert(id, thread);
        threads.ready.push(id);
        id
    }

    /// The run ends here, with the first thing that was wrong.
    pub fn fail(&self, failure: String) {
        self.note(|| format!("FAILURE: {failure}"));
        self.failure.borrow_mut().get_or_insert(failure);
    }

    pub fn has_failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    pub fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            let process = self.process.get();
            println!("{:>12.6} {:<7} {}", (self.now.get() - START).as_secs_f64(), format!("{process:?}"), text());
        }
    }

    pub fn count(&self, kind: Kind) {
        self.counts.borrow_mut().add(kind);
        self.mix(kind as u64 + 1000);
    }

    /// One in `of`, by the seed's faults.
    pub fn one_in(&self, of: u64) -> bool {
        of > 0 && self.faults.borrow_mut().below(of) == 0
    }

    pub fn below(&self, limit: u64) -> u64 {
        self.faults.borrow_mut().below(limit)
    }

    pub fn running(&self) -> Process {
        self.process.get()
    }

    /// A step of a process at which it may be killed and at which others may go on.
    pub fn step(&self) {
        let process = self.process.get();
        if process == Process::Outside {
            return;
        }
        let is_trapped = {
            let mut traps = self.traps.borrow_mut();
            match traps.get_mut(&process).and_then(|trap| trap.steps_left.as_mut()) {
                Some(0) => true,
                Some(left) => {
                    *left -= 1;
                    false
                }
                None => false,
            }
        };
        if is_trapped {
            self.note(|| "killed here".to_owned());
            self.threads.borrow_mut().doomed.insert(process);
            self.wake_key(crash_key(process), true);
            self.suspend();
            unreachable!("threads of a dead process go no further");
        }
        if self.schedule.borrow_mut().below(self.switch_one_in) == 0 {
            let id = self.current.get();
            self.threads.borrow_mut().ready.push(id);
            self.suspend();
        }
    }

    fn suspend(&self) {
        let id = self.current.get();
        let process = self.process.get();
        let yielder = self.threads.borrow().alive.get(&id).expect("it runs").yielder;
        // SAFETY: the yielder lives on the coroutine's own stack for as long as the coroutine does, and this is it.
        unsafe { (*yielder).suspend(()) };
        self.process.set(process);
        self.current.set(id);
    }

    fn wait_key(&self, key: usize, until: Option<Duration>) -> bool {
        let id = self.current.get();
        if until.is_some_and(|until| until <= self.now.get()) {
            // Time passes for others all the same.
            self.threads.borrow_mut().ready.push(id);
            self.suspend();
            return false;
        }
        {
            let mut threads = self.threads.borrow_mut();
            let thread = threads.alive.get_mut(&id).expect("it runs");
            thread.key = Some(key);
            thread.deadline = until;
            thread.was_woken = false;
            threads.waiting.entry(key).or_default().push_back(id);
            if let Some(until) = until {
                threads.timers.insert((until, id));
            }
        }
        self.suspend();
        self.threads.borrow().alive.get(&id).is_some_and(|thread| thread.was_woken)
    }

    pub fn wake_key(&self, key: usize, all: bool) {
        let mut threads = self.threads.borrow_mut();
        let threads = &mut *threads;
        let Some(queue) = threads.waiting.get_mut(&key) else { return };
        let count = if all { queue.len() } else { queue.len().min(1) };
        let mut woken = std::mem::take(queue);
        if count < woken.len() {
            *queue = woken.split_off(count);
        }
        if queue.is_empty() {
            threads.waiting.remove(&key);
        }
        for id in woken {
            if let Some(thread) = threads.alive.get_mut(&id) {
                thread.key = None;
                thread.was_woken = true;
                if let Some(deadline) = thread.deadline.take() {
                    threads.timers.remove(&(deadline, id));
                }
                threads.ready.push(id);
            }
        }
    }

    /// Waits for a time, whoever calls.
    pub fn sleep(&self, time: Duration) {
        let until = self.now.get() + time;
        while self.now.get() < until {
            self.wait_key(usize::MAX, Some(until));
        }
    }

    /// Waits for a key of the simulation's own.
    pub fn wait_own(&self, key: usize, limit: Duration) -> bool {
        self.wait_key(key, Some(self.now.get() + limit))
    }

    /// Waits until the process hit its trap; false when `limit` came first.
    pub fn wait_crash(&self, process: Process, limit: Duration) -> bool {
        let until = self.now.get() + limit;
        while !self.threads.borrow().doomed.contains(&process) {
            if self.now.get() >= until {
                return false;
            }
            self.wait_key(crash_key(process), Some(until));
        }
        true
    }

    /// Ends every thread of a process where it stands. Nothing of it is unwound: a killed process cleans nothing up.
    /// What its stacks own is leaked until the end of the real process.
    pub fn kill(&self, process: Process) {
        self.traps.borrow_mut().remove(&process);
        let dead: Vec<(u64, Thread)> = {
            let mut threads = self.threads.borrow_mut();
            let ids: Vec<u64> =
                threads.alive.iter().filter(|(_, thread)| thread.process == process).map(|(id, _)| *id).collect();
            threads.doomed.remove(&process);
            ids.into_iter().filter_map(|id| Some((id, threads.alive.remove(&id)?))).collect()
        };
        for (id, mut thread) in dead {
            assert_ne!(id, self.current.get(), "a thread cannot kill itself");
            let mut threads = self.threads.borrow_mut();
            if let Some(key) = thread.key
                && let Some(queue) = threads.waiting.get_mut(&key)
            {
                queue.retain(|waiter| *waiter != id);
            }
            if let Some(deadline) = thread.deadline {
                threads.timers.remove(&(deadline, id));
            }
            threads.ready.retain(|ready| *ready != id);
            if let Some(mut task) = thread.task.take() {
                if task.started() {
                    // SAFETY: nothing runs on this stack again, and nothing that others use lies on it: threads of the
                    // system share through the heap only.
                    unsafe { task.force_reset() };
                    give_back(task.into_stack());
                } else {
                    std::mem::forget(task);
                }
            }
        }
    }

    fn end(&self) {
        // Nobody runs any more, also when a failure ended the run in the middle.
        self.current.set(0);
        for process in [Process::Host, Process::Server, Process::Second, Process::Outside] {
            self.kill(process);
        }
        let threads = std::mem::take(&mut *self.threads.borrow_mut());
        drop(threads);
        self.host.forget();
        self.server.forget();
        self.second.forget();
    }
}

fn join_key(id: u64) -> usize {
    // Odd numbers are no addresses of locks.
    (id as usize) * 2 + 1
}

fn crash_key(process: Process) -> usize {
    usize::MAX - 2 - 2 * process as usize
}

impl seam::World for Sim {
    fn now(&self) -> Duration {
        self.now.get()
    }

    fn wall_now(&self) -> SystemTime {
        let offset = self.wall_offset_ms.borrow().get(&self.process.get()).copied().unwrap_or(0);
        let now = UNIX_EPOCH + Duration::from_secs(WALL_START_SECONDS) + (self.now.get() - START);
        let by = Duration::from_millis(offset.unsigned_abs());
        if offset < 0 { now - by } else { now + by }
    }

    fn random(&self) -> [u8; 16] {
        self.entropy.borrow_mut().bytes16()
    }

    fn spawn(&self, name: &str, run: Box<dyn FnOnce()>) -> u64 {
        self.this().start(self.process.get(), name, run)
    }

    fn current_thread(&self) -> u64 {
        self.current.get()
    }

    fn join(&self, thread: u64) {
        while self.is_alive(thread) {
            self.wait_key(join_key(thread), None);
        }
    }

    fn park_token(&self, thread: u64) -> Arc<Mutex<bool>> {
        self.threads.borrow().alive.get(&thread).map(|thread| thread.token.clone()).unwrap_or_default()
    }

    fn wait(&self, key: usize, until: Option<Duration>) -> bool {
        self.wait_key(key, until)
    }

    fn wake(&self, key: usize, all: bool) {
        self.wake_key(key, all);
    }

    fn create_folder(&self, _path: &Path) -> io::Result<()> {
        self.step();
        Ok(())
    }

    fn folder(&self, path: &Path) -> Arc<dyn Storage> {
        let name = path.to_string_lossy().trim_start_matches('/').to_owned();
        let process = match &name {
            name if name.starts_with("server") => Process::Server,
            name if name.starts_with("second") => Process::Second,
            _ => Process::Host,
        };
        Arc::new(MediaFolder::new(self.media(process).clone(), name))
    }

    fn mount_of(&self, _path: &Path) -> (u64, u64) {
        (1, self.host.boot())
    }

    fn open_disk(&self, path: &Path, _access: Access) -> Result<Arc<dyn SimulatedDisk>, DiskError> {
        self.step();
        self.host.disk(&path.to_string_lossy()).ok_or_else(|| DiskError::Absent { path: path.to_owned() })
    }

    fn observe(&self, event: Event<'_>) {
        match event {
            Event::Marked { disk, mark, position } => {
                self.note(|| format!("mark {mark} of {disk} at {position}"));
                self.marks.borrow_mut().push((mark, disk, position));
                if let Some(act) = &*self.on_mark.borrow() {
                    act(disk, mark);
                }
            }
            Event::Reached(what) => self.note(|| format!("reached {what}")),
        }
    }
}

impl Sim {
    fn this(&self) -> Rc<Self> {
        self.host.sim()
    }
}
