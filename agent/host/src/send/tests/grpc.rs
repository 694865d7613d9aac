//! The same over gRPC and mutual TLS on loopback.

use std::sync::{Arc, Mutex};

use tidemark_base::storage::RealStorage;
use tidemark_base::{HostId, ServerId};
use tidemark_proto::replication::wire::replication_server::{Replication, ReplicationServer};
use tidemark_proto::replication::{HostFrame, ServerFrame, wire};
use tidemark_transport::{Authority, MESSAGE_BYTES_MAX, PeerIdentity, TlsListener, serve, tls};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::server::MemoryServer;
use super::{Bench, LIMIT, Random};
use crate::send::Phase;
use crate::send::grpc::GrpcLink;
use crate::send::link::{Link, LinkError, LinkEvents, Traffic};

/// Hands the frames of a gRPC stream to the server in memory.
struct Bridge(MemoryServer);

struct Answers(Mutex<Option<mpsc::UnboundedSender<Result<wire::ServerFrame, Status>>>>);

impl LinkEvents for Answers {
    fn frame(&self, frame: ServerFrame) -> bool {
        let sender = self.0.lock().unwrap();
        sender.as_ref().is_some_and(|sender| sender.send(Ok(frame.into())).is_ok())
    }

    fn closed(&self, _: LinkError) {
        *self.0.lock().unwrap() = None;
    }
}

#[tonic::async_trait]
impl Replication for Bridge {
    type ReplicateStream = UnboundedReceiverStream<Result<wire::ServerFrame, Status>>;

    async fn replicate(
        &self,
        request: Request<Streaming<wire::HostFrame>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let (sender, answers) = mpsc::unbounded_channel();
        let events = Arc::new(Answers(Mutex::new(Some(sender))));
        let mut stream = self.0.open(Traffic::Live, events.clone());
        let mut frames = request.into_inner();
        tokio::spawn(async move {
            let mut whole = false;
            while let Some(Ok(frame)) = frames.next().await {
                let frame = HostFrame::try_from(frame).unwrap();
                whole = matches!(frame, HostFrame::Close(_));
                if stream.send(frame, None).is_err() {
                    break;
                }
            }
            if whole {
                stream.finish();
            }
            events.closed(LinkError::Cut { reason: "over".into() });
        });
        Ok(Response::new(UnboundedReceiverStream::new(answers)))
    }
}

#[test]
fn a_disk_travels_over_mutual_tls() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&*RealStorage::open_folder(folder.path())).unwrap();
    let mut bench = Bench::new(8 << 20, 31);
    bench.fill(&mut Random(31));
    let server = PeerIdentity::ProcessServer(bench.consumer);
    let served = authority.issue(server, &["127.0.0.1".into()]).unwrap();
    let host = authority.issue(PeerIdentity::Agent(HostId::random()), &[]).unwrap();
    let service = ReplicationServer::new(Bridge(bench.server.clone())).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (address, serving) = runtime.block_on(async {
        let listener = TlsListener::bind("127.0.0.1:0", tls::mutual_server(&served).unwrap()).await.unwrap();
        let address = listener.local_address().to_string();
        let serving = tokio::spawn(serve(listener, service, async { drop(stopped.await) }));
        (address, serving)
    });

    // Another server than the one that was asked for is not talked to.
    let other = PeerIdentity::ProcessServer(ServerId::random());
    bench.config.link = Arc::new(GrpcLink::new(runtime.handle().clone(), address.clone(), other, host.clone()));
    let sender = bench.start();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Retrying));
    assert!(bench.server.with(|state| state.streams.is_empty()));
    sender.stop();

    bench.config.link = Arc::new(GrpcLink::new(runtime.handle().clone(), address, server, host));
    let sender = bench.start();
    bench.settle(&sender);
    let mut random = Random(32);
    for _ in 0..500 {
        bench.source.write(random.below(2048) * 4096, &random.bytes(4096));
    }
    bench.settle(&sender);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));

    // Streams that are reset are opened again.
    bench.server.with(|state| state.behaviour.cut_after_frames = Some(12));
    sender.pause();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
    sender.resume();
    for _ in 0..300 {
        bench.source.write(random.below(2048) * 4096, &random.bytes(4096));
    }
    let streams = bench.server.with(|state| state.streams.len());
    assert!(bench.server.wait_until(LIMIT, |state| state.streams.len() > streams + 3));
    bench.server.with(|state| state.behaviour.cut_after_frames = None);
    bench.settle(&sender);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    sender.stop();
    drop(stop);
    runtime.block_on(serving).unwrap().unwrap();
}
