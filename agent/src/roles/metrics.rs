//! Figures and health of an agent or a process server, for whoever watches its machine: plain HTTP on an address that its
//! configuration names, most often of the loopback. `/metrics` is for Prometheus, `/health` says that the process runs,
//! `/ready` whether it does its work.
//!
//! *Consistency.* Figures are of the moment of the request. *Retries.* None. *Cancellation.* At the role's stop. *Crash.*
//! Counters begin at zero.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use serde_json::json;
use tidemark_proto::control::Failure;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::RoleError;

type Labels = Vec<(&'static str, String)>;

/// What a role tells.
#[tonic::async_trait]
pub trait Figures: Send + Sync + 'static {
    async fn fill(&self, sheet: &mut Sheet) -> Result<(), Failure>;
    /// `Err` says what it waits for.
    async fn is_ready(&self) -> Result<(), String>;
}

/// Figures as they are written down.
pub struct Sheet {
    registry: Registry,
    gauges: Vec<(&'static str, Family<Labels, Gauge<f64, AtomicU64>>)>,
    counters: Vec<(&'static str, Family<Labels, Counter>)>,
}

impl Default for Sheet {
    fn default() -> Self {
        Self { registry: Registry::with_prefix("tidemark"), gauges: Vec::new(), counters: Vec::new() }
    }
}

impl Sheet {
    pub fn gauge(&mut self, name: &'static str, help: &str, unit: Option<Unit>, labels: &Labels, value: f64) {
        if !self.gauges.iter().any(|(known, _)| *known == name) {
            let family = Family::default();
            match unit {
                Some(unit) => self.registry.register_with_unit(name, help, unit, Family::clone(&family)),
                None => self.registry.register(name, help, Family::clone(&family)),
            }
            self.gauges.push((name, family));
        }
        if let Some((_, family)) = self.gauges.iter().find(|(known, _)| *known == name) {
            family.get_or_create(labels).set(value);
        }
    }

    /// Bytes.
    pub fn counter(&mut self, name: &'static str, help: &str, labels: &Labels, value: u64) {
        self.counted(name, help, Some(Unit::Bytes), labels, value);
    }

    /// How often something happened.
    pub fn count(&mut self, name: &'static str, help: &str, labels: &Labels, value: u64) {
        self.counted(name, help, None, labels, value);
    }

    fn counted(&mut self, name: &'static str, help: &str, unit: Option<Unit>, labels: &Labels, value: u64) {
        if !self.counters.iter().any(|(known, _)| *known == name) {
            let family = Family::default();
            match unit {
                Some(unit) => self.registry.register_with_unit(name, help, unit, Family::clone(&family)),
                None => self.registry.register(name, help, Family::clone(&family)),
            }
            self.counters.push((name, family));
        }
        if let Some((_, family)) = self.counters.iter().find(|(known, _)| *known == name) {
            family.get_or_create(labels).inc_by(value);
        }
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Answers from when this returns until `stop`; says where.
pub async fn serve(
    listen: SocketAddr,
    figures: Arc<dyn Figures>,
    stop: CancellationToken,
) -> Result<SocketAddr, RoleError> {
    let failed = |error: std::io::Error| RoleError {
        message: format!("cannot listen on {listen} for metrics: {error}"),
        help: "choose another `metrics-listen`, or leave it out".to_owned(),
    };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let alive = get(|| async { Json(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") })) });
    let router = Router::new().route("/metrics", get(metrics)).route("/ready", get(ready)).route("/health", alive);
    let serving = axum::serve(listener, router.with_state(figures)).with_graceful_shutdown(stop.cancelled_owned());
    tokio::spawn(async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "metrics are not served any more");
        }
    });
    tracing::info!(%address, "metrics are served");
    Ok(address)
}

async fn metrics(State(figures): State<Arc<dyn Figures>>) -> Response {
    let mut sheet = Sheet::default();
    let text = match figures.fill(&mut sheet).await {
        Ok(()) => sheet.text().map_err(|error| error.to_string()),
        Err(failure) => Err(failure.message),
    };
    match text {
        Ok(text) => {
            let of = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, of)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "error": error }))).into_response(),
    }
}

async fn ready(State(figures): State<Arc<dyn Figures>>) -> Response {
    match figures.is_ready().await {
        Ok(()) => Json(json!({ "status": "ready" })).into_response(),
        Err(reason) => {
            let body = Json(json!({ "status": "not_ready", "error": reason }));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    struct Fixed(Mutex<Result<(), String>>);

    #[tonic::async_trait]
    impl Figures for Fixed {
        async fn fill(&self, sheet: &mut Sheet) -> Result<(), Failure> {
            for (machine, seconds) in [("web", 1.5), ("db", 0.0)] {
                let labels = vec![("machine", machine.to_owned())];
                sheet.gauge("rpo", "Age", Some(Unit::Seconds), &labels, seconds);
                sheet.counter("sent", "Sent", &labels, 7);
                sheet.count("errors", "Went wrong", &labels, 3);
            }
            Ok(())
        }

        async fn is_ready(&self) -> Result<(), String> {
            self.0.lock().unwrap().clone()
        }
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn figures_and_health_are_told_over_http() {
        let fixed = Arc::new(Fixed(Mutex::new(Ok(()))));
        let stop = CancellationToken::new();
        let address = serve("127.0.0.1:0".parse().unwrap(), fixed.clone(), stop.clone()).await.unwrap();
        let text = get(address, "/metrics").await;
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("openmetrics"), "{text}");
        for line in [
            "tidemark_rpo_seconds{machine=\"web\"} 1.5",
            "tidemark_sent_bytes_total{machine=\"db\"} 7",
            "tidemark_errors_total{machine=\"web\"} 3",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(get(address, "/health").await.contains("\"ok\""));
        assert!(get(address, "/ready").await.starts_with("HTTP/1.1 200"));
        *fixed.0.lock().unwrap() = Err("a disk cannot be attached".to_owned());
        let not_ready = get(address, "/ready").await;
        assert!(
            not_ready.starts_with("HTTP/1.1 503") && not_ready.contains("a disk cannot be attached"),
            "{not_ready}"
        );
        let taken = serve(address, fixed, stop.clone()).await.unwrap_err();
        assert!(taken.message.contains(&address.to_string()) && !taken.help.is_empty());
        stop.cancel();
    }
}
