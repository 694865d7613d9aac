//! Streams over gRPC and mutual TLS 1.3.
//!
//! Two connections to a process server, one for live changes and one for scans, shared by all disks of the host. A
//! connection that was lost is dialled again by the next stream.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use futures_util::StreamExt;
use tidemark_proto::replication::{HostFrame, REPLICATE, ServerFrame};
use tidemark_transport::messages::call;
use tidemark_transport::{Expected, Identity, Message, Remote};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::link::{Link, LinkError, LinkEvents, LinkStream, Traffic};
use crate::pack::Permit;

/// Frames that a stream queues. Data is bounded by the emitter's budget long before, other frames by the cuts that may
/// be under way; a stream that fills this has a bug.
const QUEUE_FRAMES_MAX: usize = 1024;

/// Frames from the server are small.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// One process server. Clones share its connections.
#[derive(Clone)]
pub struct GrpcLink(Arc<Shared>);

struct Shared {
    runtime: Handle,
    address: String,
    expected: Expected,
    identity: Identity,
    /// With how often it had changed before each was dialled who is refused.
    channels: tokio::sync::Mutex<HashMap<Traffic, (u64, Channel)>>,
    remote: Remote,
}

impl GrpcLink {
    pub fn new(runtime: Handle, address: impl Into<String>, expected: impl Into<Expected>, identity: Identity) -> Self {
        Self(Arc::new(Shared {
            runtime,
            address: address.into(),
            expected: expected.into(),
            identity,
            channels: tokio::sync::Mutex::default(),
            remote: Remote::default(),
        }))
    }
}

impl Shared {
    async fn channel(&self, traffic: Traffic, refusals: u64) -> Result<Channel, LinkError> {
        // Held while dialling, so that disks that start together share one connection. Streams of the other kind wait
        // with them: it is the same server that they would dial.
        let mut channels = self.channels.lock().await;
        if let Some((of, channel)) = channels.get(&traffic)
            && *of >= refusals
        {
            return Ok(channel.clone());
        }
        let channel =
            tidemark_transport::connect_noting(&self.address, self.expected, &self.identity, self.remote.clone())
                .await
                .map_err(|error| LinkError::Unreachable { reason: error.to_string(), help: error.help().to_owned() })?;
        channels.insert(traffic, (refusals, channel.clone()));
        Ok(channel)
    }

    async fn run(
        self: Arc<Self>,
        traffic: Traffic,
        outgoing: mpsc::Receiver<(HostFrame, Option<Permit>)>,
        events: Arc<dyn LinkEvents>,
    ) {
        let error = match self.exchange(traffic, outgoing, &*events).await {
            Ok(()) => LinkError::Cut { reason: "the process server ended it".to_owned() },
            Err(error) => error,
        };
        events.closed(error);
    }

    async fn exchange(
        &self,
        traffic: Traffic,
        outgoing: mpsc::Receiver<(HostFrame, Option<Permit>)>,
        events: &dyn LinkEvents,
    ) -> Result<(), LinkError> {
        let mut refused = self.identity.refusals();
        let refusals = *refused.borrow_and_update();
        let channel = self.channel(traffic, refusals).await?;
        // The permit is dropped when the frame is taken to be sent: what HTTP/2 holds is bounded by its windows.
        let frames = ReceiverStream::new(outgoing).map(|(frame, _permit)| {
            let (head, payload) = frame.encode();
            Message { head, payload }
        });
        let mut answers = match call(channel, REPLICATE, frames, ANSWER_BYTES_MAX).await {
            Ok(answers) => answers,
            Err(status) => {
                // The connection itself may be what failed: the next stream dials anew.
                self.channels.lock().await.remove(&traffic);
                return Err(cut(&status));
            }
        };
        loop {
            let answer = tokio::select! {
                answer = answers.next() => answer,
                // Somebody was revoked, perhaps this process server: the handshake of the next stream tells.
                _ = refused.changed() => {
                    return Err(LinkError::Cut { reason: "who is refused has changed".to_owned() });
                }
            };
            match answer {
                Ok(Some(answer)) => {
                    let frame = ServerFrame::decode(answer)
                        .map_err(|error| LinkError::Protocol { reason: error.to_string() })?;
                    if !events.frame(frame) {
                        return Ok(());
                    }
                }
                Ok(None) => return Ok(()),
                Err(status) => return Err(cut(&status)),
            }
        }
    }
}

fn cut(status: &tonic::Status) -> LinkError {
    LinkError::Cut { reason: format!("{}: {}", status.code(), status.message()) }
}

impl Link for GrpcLink {
    fn open(&self, traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream> {
        let (sender, outgoing) = mpsc::channel(QUEUE_FRAMES_MAX);
        let task = self.0.runtime.spawn(self.0.clone().run(traffic, outgoing, events));
        Box::new(GrpcStream { sender: Some(sender), task })
    }

    fn remote(&self) -> Option<IpAddr> {
        self.0.remote.get()
    }
}

struct GrpcStream {
    sender: Option<mpsc::Sender<(HostFrame, Option<Permit>)>>,
    task: tokio::task::JoinHandle<()>,
}

impl LinkStream for GrpcStream {
    fn send(&mut self, frame: HostFrame, permit: Option<Permit>) -> Result<(), LinkError> {
        let sender = self.sender.as_ref().expect("no frame follows the last one");
        sender.try_send((frame, permit)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LinkError::Cut { reason: "its queue is full".to_owned() },
            mpsc::error::TrySendError::Closed(_) => LinkError::Cut { reason: "it is closed".to_owned() },
        })
    }

    fn finish(&mut self) {
        self.sender = None;
    }
}

impl Drop for GrpcStream {
    fn drop(&mut self) {
        // Resets the stream if it still runs.
        self.task.abort();
    }
}
