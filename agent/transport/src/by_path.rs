//! Several gRPC services on one listener.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{Service, http};

/// Requests whose path begins with `prefix` (`/package.Service/`) go to `here`, all others to `elsewhere`.
#[derive(Clone)]
pub struct ByPath<A, B> {
    prefix: &'static str,
    here: A,
    elsewhere: B,
}

impl<A, B> ByPath<A, B> {
    pub fn new(prefix: &'static str, here: A, elsewhere: B) -> Self {
        Self { prefix, here, elsewhere }
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

impl<A, B> Service<http::Request<Body>> for ByPath<A, B>
where
    A: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    B: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    A::Future: Send + 'static,
    B::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Services of gRPC are always ready: what they cannot take they refuse by a status.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        match request.uri().path().starts_with(self.prefix) {
            true => Box::pin(self.here.call(request)),
            false => Box::pin(self.elsewhere.call(request)),
        }
    }
}
