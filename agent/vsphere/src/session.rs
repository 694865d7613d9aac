//! One session at a vCenter, for all of its machines that are protected here.
//!
//! *Consistency.* A method that was refused because the session had ended was not carried out: it is asked again in a new one. *Retries.* Questions are asked again
//! after a cut; what changes something never is, because nobody knows whether it was done. *Cancellation.* Waiting for a task ends with [`Session::stop`]; the
//! task goes on. *Crash.* The session ends by itself after half an hour.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Method;
use hyper::header::{CONTENT_TYPE, COOKIE, HeaderName, SET_COOKIE};
use roxmltree::Node;
use tidemark_base::stop::Stop;
use tidemark_base::sync::Mutex;

use crate::error::VsphereError;
use crate::http::{Answer, Http, Question};
use crate::permits::Permits;
use crate::settings::{self, Settings};
use crate::soap::{self, Fault, Reference, argument, child, child_text, envelope};

const ANSWER_BYTES_MAX: usize = 32 << 20;
/// After a wrong password: accounts are locked after a few.
const LOGIN_PAUSE: Duration = Duration::from_secs(300);
/// A session that nobody uses ends after half an hour.
pub const KEEP_ALIVE: Duration = Duration::from_secs(300);
const ATTEMPTS: u32 = 3;
const POLL_FIRST: Duration = Duration::from_millis(5);
const POLL_LAST: Duration = Duration::from_secs(1);

pub struct Session {
    file: PathBuf,
    state: Mutex<State>,
    stop: Stop,
    /// Of snapshots, by ESXi host.
    hosts: Mutex<BTreeMap<String, Arc<Permits>>>,
}

#[derive(Default)]
struct State {
    /// Counted up with each login.
    number: u64,
    open: Option<Arc<Open>>,
    refused: Option<(Instant, Settings)>,
    used: Option<Instant>,
    /// Server and interval of the last login.
    known: Option<(String, Duration)>,
}

pub(crate) struct Open {
    http: Http,
    reads: Permits,
    number: u64,
    cookie: Mutex<Option<String>>,
    content: Content,
}

/// What a `ServiceContent` tells.
#[derive(Clone, Debug)]
pub struct Content {
    pub collector: Reference,
    pub sessions: Reference,
    pub search: Option<Reference>,
    pub root: Reference,
}

impl Session {
    pub fn new(file: &Path) -> Self {
        Self { file: file.to_owned(), state: Mutex::default(), stop: Stop::new(), hosts: Mutex::default() }
    }

    /// Ends what waits for tasks, and the session.
    pub fn stop(&self) {
        self.stop.stop();
        let open = self.state.lock().expect("no panic while held").open.take();
        if let Some(open) = open {
            let question = envelope("Logout", &open.content.sessions, "");
            let _ = open.post("Logout", &question, true);
        }
    }

    pub(crate) fn stopping(&self) -> &Stop {
        &self.stop
    }

    pub fn settings(&self) -> Result<Settings, VsphereError> {
        Ok(self.open()?.http.settings().clone())
    }

    /// For messages: as it was called at the last login.
    pub fn server(&self) -> String {
        let state = self.state.lock().expect("no panic while held");
        let known = state.known.as_ref().map(|(server, _)| server.clone());
        known.unwrap_or_else(|| self.file.file_stem().unwrap_or_default().to_string_lossy().into_owned())
    }

    /// Between snapshots that nobody asks for: what the last login found. Asks nobody.
    pub fn interval(&self) -> Duration {
        let state = self.state.lock().expect("no panic while held");
        state.known.as_ref().map_or(settings::INTERVAL, |(_, interval)| *interval)
    }

    pub fn content(&self) -> Result<Content, VsphereError> {
        Ok(self.open()?.content.clone())
    }

    /// Snapshots that are made and removed at once on one host.
    pub fn permits_of(&self, host: &str) -> Result<Arc<Permits>, VsphereError> {
        let count = self.open()?.http.settings().snapshots_max;
        let mut hosts = self.hosts.lock().expect("no panic while held");
        Ok(hosts.entry(host.to_owned()).or_insert_with(|| Arc::new(Permits::new(count))).clone())
    }

    /// So that it does not end while nothing is asked.
    pub fn keep_alive(&self) {
        let is_due = {
            let state = self.state.lock().expect("no panic while held");
            state.open.is_some() && state.used.is_none_or(|used| used.elapsed() > KEEP_ALIVE)
        };
        if is_due {
            let this = Reference::new("ServiceInstance", "ServiceInstance");
            if let Err(error) = self.query("CurrentTime", &this, "", |_| Ok(())) {
                tracing::debug!(%error, "the session was not kept");
            }
        }
    }

    /// A question that changes nothing.
    pub fn query<T>(
        &self,
        method: &str,
        this: &Reference,
        arguments: &str,
        use_it: impl Fn(Node<'_, '_>) -> Result<T, VsphereError>,
    ) -> Result<T, VsphereError> {
        self.call(method, this, arguments, true, use_it)
    }

    /// A method that changes something, and ends at once with the task that does it.
    pub fn begin(&self, method: &str, this: &Reference, arguments: &str) -> Result<Reference, VsphereError> {
        self.call(method, this, arguments, false, |answer| {
            let task = child(answer, "returnval").map(Reference::of);
            task.ok_or_else(|| VsphereError::Answer { what: method.to_owned(), reason: "it names no task".to_owned() })
        })
    }

    /// Waits until a task has ended. `Some`: what it made.
    pub fn wait_for(&self, what: &str, task: &Reference, limit: Duration) -> Result<Option<Reference>, VsphereError> {
        let deadline = Instant::now() + limit;
        let mut pause = POLL_FIRST;
        loop {
            let ended = self.properties(task, &["info"], |find| {
                let info = find.get("info").ok_or_else(|| VsphereError::Answer {
                    what: what.to_owned(),
                    reason: "the task has no info".to_owned(),
                })?;
                match child_text(info, "state") {
                    Some("success") => Ok(Some(child(info, "result").map(Reference::of))),
                    Some("error") => {
                        let fault = child(info, "error").map(soap::task_fault);
                        let none = || Fault { kind: "Fault".to_owned(), message: "no reason was told".to_owned() };
                        Err(fault.unwrap_or_else(none).refused(what))
                    }
                    _ => Ok(None),
                }
            })?;
            if let Some(made) = ended {
                return Ok(made);
            }
            if Instant::now() > deadline {
                return Err(VsphereError::TaskTimedOut { what: what.to_owned(), limit });
            }
            if self.stop.wait_for(pause) {
                return Err(VsphereError::Stopping);
            }
            pause = (pause * 2).min(POLL_LAST);
        }
    }

    /// Properties of one object, by their paths; those that it does not have are absent.
    pub fn properties<T>(
        &self,
        object: &Reference,
        paths: &[&str],
        use_them: impl Fn(&Properties<'_, '_>) -> Result<T, VsphereError>,
    ) -> Result<T, VsphereError> {
        let method = "RetrievePropertiesEx";
        let wanted: String = paths.iter().map(|path| argument("pathSet", path)).collect();
        let kind = argument("type", &object.kind);
        let arguments = format!(
            "<specSet><propSet>{kind}{wanted}</propSet><objectSet>{}</objectSet></specSet><options/>",
            object.argument("obj")
        );
        let collector = self.content()?.collector;
        self.query(method, &collector, &arguments, |answer| {
            let found = child(answer, "returnval").and_then(|value| child(value, "objects"));
            let found = found.ok_or_else(|| VsphereError::Fault {
                what: format!("a look at {} {}", object.kind, object.value),
                fault: "ManagedObjectNotFound".to_owned(),
                message: "it is not there any more".to_owned(),
            })?;
            for missing in soap::children(found, "missingSet") {
                let fault = child(missing, "fault").map(soap::task_fault);
                if let Some(fault) = fault.filter(|fault| fault.kind != "Fault" && fault.kind != "InvalidProperty") {
                    let path = child_text(missing, "path").unwrap_or_default();
                    return Err(fault.refused(&format!("a look at {path} of {} {}", object.kind, object.value)));
                }
            }
            use_them(&Properties(found))
        })
    }

    /// Reads a file of a datastore, or a part of it, in a session.
    pub fn read(&self, path: &str, range: Option<(u64, u64)>, bytes_max: usize) -> Result<Answer, VsphereError> {
        let mut expired = None;
        loop {
            let open = self.open_newer_than(expired)?;
            let _permit = open.reads.take();
            let mut headers = vec![(COOKIE, open.cookie())];
            if let Some((from, length)) = range {
                headers.push((HeaderName::from_static("range"), format!("bytes={from}-{}", from + length - 1)));
            }
            let answer = open.http.ask(Question {
                method: Method::GET,
                path: path.to_owned(),
                headers,
                body: Bytes::new(),
                what: "a read of a datastore".to_owned(),
                may_be_sent_twice: true,
                answer_bytes_max: bytes_max,
            })?;
            if answer.status != 401 || expired.is_some() {
                return Ok(answer);
            }
            expired = Some(open.number);
        }
    }

    fn call<T>(
        &self,
        method: &str,
        this: &Reference,
        arguments: &str,
        may_be_sent_twice: bool,
        use_it: impl Fn(Node<'_, '_>) -> Result<T, VsphereError>,
    ) -> Result<T, VsphereError> {
        let question = envelope(method, this, arguments);
        let (mut expired, mut attempt) = (None, 0);
        loop {
            let open = self.open_newer_than(expired)?;
            attempt += 1;
            let body = match open.post(method, &question, may_be_sent_twice) {
                Ok(body) => body,
                Err(VsphereError::Cut { .. } | VsphereError::Status { status: 502..=504, .. })
                    if may_be_sent_twice && attempt < ATTEMPTS =>
                {
                    if self.stop.wait_for(POLL_FIRST * 10u32.pow(attempt)) {
                        return Err(VsphereError::Stopping);
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            match soap::answer(method, &body, &use_it)? {
                Ok(done) => return Ok(done),
                Err(fault) if fault.kind == "NotAuthenticated" && expired.is_none() => expired = Some(open.number),
                Err(fault) => return Err(fault.refused(method)),
            }
        }
    }

    fn open(&self) -> Result<Arc<Open>, VsphereError> {
        self.open_newer_than(None)
    }

    fn open_newer_than(&self, expired: Option<u64>) -> Result<Arc<Open>, VsphereError> {
        let mut state = self.state.lock().expect("no panic while held");
        if self.stop.is_stopped() {
            return Err(VsphereError::Stopping);
        }
        state.used = Some(Instant::now());
        if let Some(open) = state.open.as_ref().filter(|open| Some(open.number) != expired) {
            return Ok(open.clone());
        }
        state.open = None;
        let settings = Settings::read(&self.file)?;
        state.known = Some((settings.server(), settings.interval));
        if let Some((at, refused)) = state.refused.as_ref().filter(|(_, refused)| *refused == settings) {
            let wait = LOGIN_PAUSE.saturating_sub(at.elapsed());
            if !wait.is_zero() {
                let (server, user) = (refused.server(), refused.user.clone());
                return Err(VsphereError::LoginPaused { server, user, wait: Duration::from_secs(wait.as_secs() + 1) });
            }
        }
        state.number += 1;
        let open = match Open::login(settings.clone(), state.number) {
            Err(error @ VsphereError::Login { .. }) => {
                state.refused = Some((Instant::now(), settings));
                return Err(error);
            }
            other => Arc::new(other?),
        };
        state.refused = None;
        state.open = Some(open.clone());
        Ok(open)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Of one object.
pub struct Properties<'a, 'b>(Node<'a, 'b>);

impl<'a, 'b> Properties<'a, 'b> {
    pub fn get(&self, path: &str) -> Option<Node<'a, 'b>> {
        let mut all = self.0.children().filter(|set| set.tag_name().name() == "propSet");
        all.find(|set| child_text(*set, "name") == Some(path)).and_then(|property| child(property, "val"))
    }

    /// Empty where it is absent.
    pub fn text(&self, path: &str) -> &'a str {
        self.get(path).map(soap::text).unwrap_or_default()
    }
}

impl Open {
    fn login(settings: Settings, number: u64) -> Result<Self, VsphereError> {
        let reads = Permits::new(settings.reads_max);
        let nothing = Reference::new("", "");
        let content = Content { collector: nothing.clone(), sessions: nothing.clone(), search: None, root: nothing };
        let mut open = Self { http: Http::new(settings)?, reads, number, cookie: Mutex::default(), content };
        let this = Reference::new("ServiceInstance", "ServiceInstance");
        let method = "RetrieveServiceContent";
        let body = open.post(method, &envelope(method, &this, ""), true)?;
        let content = soap::answer(method, &body, |answer| {
            let value = child(answer, "returnval");
            let part = |name: &str| value.and_then(|value| child(value, name)).map(Reference::of);
            let absent =
                |name: &str| VsphereError::Answer { what: method.to_owned(), reason: format!("it names no {name}") };
            Ok(Content {
                collector: part("propertyCollector").ok_or_else(|| absent("propertyCollector"))?,
                sessions: part("sessionManager").ok_or_else(|| absent("sessionManager"))?,
                search: part("searchIndex"),
                root: part("rootFolder").ok_or_else(|| absent("rootFolder"))?,
            })
        })?;
        open.content = content.map_err(|fault| fault.refused(method))?;
        let settings = open.http.settings().clone();
        let arguments = argument("userName", &settings.user) + &argument("password", settings.password.reveal());
        let question = envelope("Login", &open.content.sessions, &arguments);
        let body = open.post("Login", &question, false)?;
        match soap::answer("Login", &body, |_| Ok(()))? {
            Ok(()) => {}
            Err(fault) if fault.kind == "InvalidLogin" => {
                return Err(VsphereError::Login { server: settings.server(), user: settings.user });
            }
            Err(fault) => return Err(fault.refused("Login")),
        }
        if open.cookie().is_empty() {
            let reason = "it opened no session".to_owned();
            return Err(VsphereError::Answer { what: "Login".to_owned(), reason });
        }
        tracing::debug!(server = %settings.server(), user = %settings.user, "logged in");
        Ok(open)
    }

    fn cookie(&self) -> String {
        self.cookie.lock().expect("no panic while held").clone().unwrap_or_default()
    }

    fn post(&self, method: &str, question: &str, may_be_sent_twice: bool) -> Result<Bytes, VsphereError> {
        let mut headers = vec![
            (CONTENT_TYPE, "text/xml; charset=utf-8".to_owned()),
            // The oldest version that has all that is asked for: every server since knows it.
            (HeaderName::from_static("soapaction"), "urn:vim25/5.5".to_owned()),
        ];
        let cookie = self.cookie();
        if !cookie.is_empty() {
            headers.push((COOKIE, cookie));
        }
        let answer = self.http.ask(Question {
            method: Method::POST,
            path: "/sdk".to_owned(),
            headers,
            body: Bytes::copy_from_slice(question.as_bytes()),
            what: method.to_owned(),
            may_be_sent_twice,
            answer_bytes_max: ANSWER_BYTES_MAX,
        })?;
        for set in answer.headers.get_all(SET_COOKIE) {
            let pair = set.to_str().ok().and_then(|set| set.split(';').next());
            if let Some(pair) = pair.filter(|pair| pair.starts_with("vmware_soap_session=")) {
                *self.cookie.lock().expect("no panic while held") = Some(pair.to_owned());
            }
        }
        // A fault comes with 500.
        match answer.status {
            200 | 500 => Ok(answer.body),
            status => {
                Err(VsphereError::Status { server: self.http.settings().server(), what: method.to_owned(), status })
            }
        }
    }
}
