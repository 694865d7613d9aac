//! The process server that the machine runs at, as the master target sees it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tidemark_proto::failback::wire::failback_client::FailbackClient;
use tidemark_proto::failback::wire::{
    BeginRound, BlocksReply, BlocksRequest, EndRound, Ended, Round, RunsReply, RunsRequest,
};
use tidemark_transport::{Identity, PeerIdentity};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tonic::Status;
use tonic::transport::Channel;

use tidemark_base::ServerId;

/// A call that was not answered by then is asked again with another round.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// An answer is a MiB of chunks with their headers, at most.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Every call blocks.
pub trait Source: Send + Sync {
    fn begin(&self, asked: BeginRound) -> Result<Round, String>;
    fn runs(&self, asked: RunsRequest) -> Result<RunsReply, String>;
    /// Answers in the order of the questions.
    fn blocks(&self, asked: Vec<BlocksRequest>) -> Result<Vec<BlocksReply>, String>;
    fn end(&self, asked: EndRound) -> Result<Ended, String>;
}

/// How to reach the process server of a machine.
pub type SourceFactory = Arc<dyn Fn(ServerId, &str) -> Arc<dyn Source> + Send + Sync>;

pub fn grpc(identity: Identity, runtime: Handle) -> SourceFactory {
    Arc::new(move |server, address| {
        Arc::new(GrpcSource {
            server,
            address: address.to_owned(),
            identity: identity.clone(),
            runtime: runtime.clone(),
            channel: Mutex::default(),
        })
    })
}

struct GrpcSource {
    server: ServerId,
    address: String,
    identity: Identity,
    runtime: Handle,
    /// Dialled again by the next call after one that failed.
    channel: Mutex<Option<Channel>>,
}

impl GrpcSource {
    async fn client(&self) -> Result<FailbackClient<Channel>, String> {
        let mut channel = self.channel.lock().await;
        if channel.is_none() {
            let expected = PeerIdentity::ProcessServer(self.server);
            let dialled = tidemark_transport::connect(&self.address, expected, &self.identity).await;
            *channel = Some(dialled.map_err(|error| format!("{error}: {}", error.help()))?);
        }
        let channel = channel.clone().expect("it was just made");
        Ok(FailbackClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    fn call<A>(&self, work: impl AsyncFnOnce(FailbackClient<Channel>) -> Result<A, Status>) -> Result<A, String> {
        self.runtime.block_on(async {
            let client = self.client().await?;
            let answered = tokio::time::timeout(CALL_LIMIT, work(client)).await;
            let failed = match answered {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => status.message().to_owned(),
                Err(_) => format!("the process server did not answer within {} s", CALL_LIMIT.as_secs()),
            };
            *self.channel.lock().await = None;
            Err(failed)
        })
    }
}

impl Source for GrpcSource {
    fn begin(&self, asked: BeginRound) -> Result<Round, String> {
        self.call(async |mut client| Ok(client.begin(asked).await?.into_inner()))
    }

    fn runs(&self, asked: RunsRequest) -> Result<RunsReply, String> {
        self.call(async |mut client| Ok(client.runs(asked).await?.into_inner()))
    }

    fn blocks(&self, asked: Vec<BlocksRequest>) -> Result<Vec<BlocksReply>, String> {
        self.call(async |client| {
            let calls = asked.into_iter().map(|asked| {
                let mut client = client.clone();
                async move { Ok(client.blocks(asked).await?.into_inner()) }
            });
            join_all(calls).await.into_iter().collect()
        })
    }

    fn end(&self, asked: EndRound) -> Result<Ended, String> {
        self.call(async |mut client| Ok(client.end(asked).await?.into_inner()))
    }
}
