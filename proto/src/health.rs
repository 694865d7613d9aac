//! The standard gRPC health protocol, served by whoever listens for gRPC.

use std::collections::BTreeMap;
use std::pin::Pin;

use futures_util::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

pub mod wire {
    tonic::include_proto!("grpc.health.v1");
}

use wire::health_check_response::ServingStatus;
use wire::health_server::{Health, HealthServer};
use wire::{HealthCheckRequest, HealthCheckResponse};

/// Whether each service works; the empty name is the whole process.
pub type Serving = BTreeMap<String, bool>;

/// Clones tell the same.
#[derive(Clone)]
pub struct HealthService(watch::Receiver<Serving>);

pub fn health_server(serving: watch::Receiver<Serving>) -> HealthServer<HealthService> {
    HealthServer::new(HealthService(serving))
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

fn status(serving: &Serving, service: &str) -> Option<ServingStatus> {
    let works = serving.get(service)?;
    Some(if *works { ServingStatus::Serving } else { ServingStatus::NotServing })
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let status = status(&self.0.borrow(), &service);
        let shown: String = service.chars().take(80).collect();
        status
            .map(|status| Response::new(response(status)))
            .ok_or_else(|| Status::not_found(format!("there is no service {shown:?} here")))
    }

    /// Answers now and at each change, to the end of the process.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let service = request.into_inner().service;
        let state = (self.0.clone(), service, None);
        let told = stream::unfold(state, |(mut serving, service, before)| async move {
            loop {
                let now = status(&serving.borrow_and_update(), &service).unwrap_or(ServingStatus::ServiceUnknown);
                if before != Some(now) {
                    return Some((Ok(response(now)), (serving, service, Some(now))));
                }
                serving.changed().await.ok()?;
            }
        });
        Ok(Response::new(told.boxed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    #[tokio::test]
    async fn health_is_told_now_and_at_each_change() {
        let (sender, receiver) = watch::channel(Serving::from([(String::new(), true)]));
        let service = HealthService(receiver);
        let status = |response: Response<HealthCheckResponse>| response.into_inner().status();
        assert_eq!(status(service.check(ask("")).await.unwrap()), ServingStatus::Serving);
        assert_eq!(service.check(ask("other")).await.unwrap_err().code(), tonic::Code::NotFound);
        let mut watched = service.watch(ask("")).await.unwrap().into_inner();
        assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
        sender.send_modify(|serving| {
            serving.insert("other".to_owned(), true);
        });
        sender.send_modify(|serving| {
            serving.insert(String::new(), false);
        });
        assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::NotServing, "only changes are told");
        assert_eq!(status(service.check(ask("")).await.unwrap()), ServingStatus::NotServing);
        drop(sender);
        assert!(watched.next().await.is_none());
    }
}
