//! Requests over HTTPS, one after another on connections that are kept for a moment.
//!
//! *Retries.* A request on a connection that was kept is sent again on a new one where nothing of an answer came, if it may be sent twice. Whatever else
//! is the caller's. *Cancellation.* None: every request has limits of time and size. *Crash.* Nothing is kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tidemark_base::sync::Mutex;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::error::VsphereError;
use crate::settings::Settings;
use crate::tls::{self, Refused};

const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Until the head of an answer: a vCenter thinks for a while about some questions.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);
/// Between two parts of an answer: slow datastores pause.
const PAUSE_LIMIT: Duration = Duration::from_secs(60);
/// Servers end connections that idle for longer.
const KEPT_FOR: Duration = Duration::from_secs(20);
const KEPT_MAX: usize = 8;

pub struct Http {
    runtime: Option<Runtime>,
    shared: Arc<Shared>,
}

struct Shared {
    settings: Settings,
    kept: Mutex<Vec<(Instant, SendRequest<Full<Bytes>>)>>,
    /// When the next byte may be read, in nanoseconds after `began`.
    began: Instant,
    paid_until: AtomicU64,
}

pub struct Question {
    pub method: Method,
    pub path: String,
    pub headers: Vec<(HeaderName, String)>,
    pub body: Bytes,
    /// For messages.
    pub what: String,
    pub may_be_sent_twice: bool,
    pub answer_bytes_max: usize,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Http {
    pub fn new(settings: Settings) -> Result<Self, VsphereError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("vsphere")
            .enable_all()
            .build()
            .map_err(|source| VsphereError::Io { what: "start threads for", path: settings.server().into(), source })?;
        let shared = Shared { settings, kept: Mutex::default(), began: Instant::now(), paid_until: AtomicU64::new(0) };
        Ok(Self { runtime: Some(runtime), shared: Arc::new(shared) })
    }

    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// From any thread, also one that runs tasks.
    pub fn ask(&self, question: Question) -> Result<Answer, VsphereError> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let shared = self.shared.clone();
        let Some(runtime) = &self.runtime else { return Err(VsphereError::Stopping) };
        runtime.spawn(async move {
            let _ = tell.send(shared.ask(question).await);
        });
        told.recv().map_err(|_| VsphereError::Stopping)?
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        // Also from a thread that runs tasks, where waiting is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

enum Sent {
    Answer(Answer),
    /// Nothing came back on a connection that was kept: it may have been closed before.
    Stale,
}

impl Shared {
    fn server(&self) -> String {
        self.settings.server()
    }

    async fn ask(&self, question: Question) -> Result<Answer, VsphereError> {
        if question.may_be_sent_twice
            && let Some(sender) = self.take_kept()
            && let Sent::Answer(answer) = self.send(sender, &question, true).await?
        {
            return Ok(answer);
        }
        let sender = self.connect(&question.what).await?;
        match self.send(sender, &question, false).await? {
            Sent::Answer(answer) => Ok(answer),
            Sent::Stale => Err(VsphereError::Cut { server: self.server(), what: question.what }),
        }
    }

    fn take_kept(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.retain(|(since, sender)| since.elapsed() < KEPT_FOR && !sender.is_closed());
        kept.pop().map(|(_, sender)| sender)
    }

    async fn connect(&self, what: &str) -> Result<SendRequest<Full<Bytes>>, VsphereError> {
        let refused = Refused::default();
        let config = tls::client(&self.settings.trust, refused.clone())?;
        let server = self.server();
        let unreachable = |reason: String| VsphereError::Unreachable { server: server.clone(), reason };
        let handshake = async {
            let address = (self.settings.host.as_str(), self.settings.port);
            let stream = TcpStream::connect(address).await.map_err(|error| unreachable(error.to_string()))?;
            stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
            let name = ServerName::try_from(self.settings.host.clone());
            let name = name.map_err(|error| unreachable(error.to_string()))?;
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
            let stream = stream.map_err(|error| match refused.get() {
                Some((thumbprint, reason)) => VsphereError::Certificate {
                    server: server.clone(),
                    thumbprint: thumbprint.clone(),
                    reason: reason.clone(),
                },
                None => unreachable(error.to_string()),
            })?;
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(error.to_string()))
        };
        let limit = CONNECT_LIMIT;
        let done = timeout(limit, handshake).await;
        let timed_out = |_| VsphereError::TimedOut { server: server.clone(), what: what.to_owned(), limit };
        let (sender, connection) = done.map_err(timed_out)??;
        tokio::spawn(async move {
            // Whoever waits for an answer is told.
            let _ = connection.await;
        });
        Ok(sender)
    }

    async fn send(
        &self,
        mut sender: SendRequest<Full<Bytes>>,
        question: &Question,
        is_kept: bool,
    ) -> Result<Sent, VsphereError> {
        let cut = || VsphereError::Cut { server: self.server(), what: question.what.clone() };
        let slow = |limit| VsphereError::TimedOut { server: self.server(), what: question.what.clone(), limit };
        let request = self.request(question)?;
        let answered = async {
            sender.ready().await?;
            sender.send_request(request).await
        };
        let answer = match timeout(ANSWER_LIMIT, answered).await {
            Err(_) => return Err(slow(ANSWER_LIMIT)),
            Ok(Err(_)) if is_kept => return Ok(Sent::Stale),
            Ok(Err(_)) => return Err(cut()),
            Ok(Ok(answer)) => answer,
        };
        let (head, mut stream) = answer.into_parts();
        let mut body = BytesMut::new();
        loop {
            let frame = match timeout(PAUSE_LIMIT, stream.frame()).await {
                Err(_) => return Err(slow(PAUSE_LIMIT)),
                Ok(None) => break,
                Ok(Some(Err(_))) => return Err(cut()),
                Ok(Some(Ok(frame))) => frame,
            };
            let Some(data) = frame.data_ref() else { continue };
            if body.len() + data.len() > question.answer_bytes_max {
                let reason = format!("it has more than {} bytes", question.answer_bytes_max);
                return Err(VsphereError::Answer { what: question.what.clone(), reason });
            }
            body.extend_from_slice(data);
            self.pay(data.len()).await;
        }
        let mut kept = self.kept.lock().expect("no panic while held");
        if kept.len() < KEPT_MAX && !sender.is_closed() {
            kept.push((Instant::now(), sender));
        }
        drop(kept);
        Ok(Sent::Answer(Answer { status: head.status.as_u16(), headers: head.headers, body: body.freeze() }))
    }

    fn request(&self, question: &Question) -> Result<Request<Full<Bytes>>, VsphereError> {
        let wrong = |reason: String| VsphereError::Answer { what: question.what.clone(), reason };
        let mut request = Request::builder().method(question.method.clone()).uri(&question.path);
        let headers = request.headers_mut().ok_or_else(|| wrong(format!("{:?} is no path", question.path)))?;
        headers.insert(USER_AGENT, HeaderValue::from_static("tidemark"));
        let host = HeaderValue::from_str(&self.server()).map_err(|error| wrong(error.to_string()))?;
        headers.insert(HOST, host);
        for (name, value) in &question.headers {
            let mut value = HeaderValue::from_str(value).map_err(|error| wrong(error.to_string()))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        request.body(Full::new(question.body.clone())).map_err(|error| wrong(error.to_string()))
    }

    /// Waits as long as what was read takes at the limit.
    async fn pay(&self, bytes: usize) {
        let rate = self.settings.read_bytes_per_second;
        if rate == 0 {
            return;
        }
        let price = (bytes as u128 * 1_000_000_000 / u128::from(rate)) as u64;
        let now = self.began.elapsed().as_nanos() as u64;
        let paid = |until: u64| Some(until.max(now).saturating_add(price));
        let before = self.paid_until.fetch_update(Ordering::AcqRel, Ordering::Acquire, paid).unwrap_or_default();
        let until = before.max(now).saturating_add(price);
        let _ = timeout(Duration::from_nanos(until - now), std::future::pending::<()>()).await;
    }
}
