//! HTTP/1.1 over TLS.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tidemark_transport::{Connection, TlsListener};
use tokio_util::sync::CancellationToken;

/// How long requests under way may take once the server stops. Long polls end at once.
const STOP_GRACE: Duration = Duration::from_secs(5);

struct Tls(TlsListener);

impl axum::serve::Listener for Tls {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let connection = self.0.accept().await;
        let address = connection.peer().address;
        (connection, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.local_address())
    }
}

/// Where a request came from.
#[derive(Clone, Copy)]
pub struct From(pub SocketAddr);

impl Connected<IncomingStream<'_, Tls>> for From {
    fn connect_info(stream: IncomingStream<'_, Tls>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// Serves until `stop`.
pub async fn serve(listener: TlsListener, router: Router, stop: CancellationToken) {
    let serving = axum::serve(Tls(listener), router.into_make_service_with_connect_info::<From>())
        .with_graceful_shutdown(stop.clone().cancelled_owned());
    let late = async {
        stop.cancelled().await;
        let _ = tokio::time::timeout(STOP_GRACE, std::future::pending::<()>()).await;
    };
    tokio::select! {
        result = serving.into_future() => if let Err(error) = result {
            tracing::error!(%error, "the API ended");
        },
        () = late => tracing::info!("requests were still under way when the API stopped"),
    }
}
