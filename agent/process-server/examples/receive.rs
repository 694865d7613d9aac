//! How fast the receiving end is: one host in the same process sends sealed chunks over TLS on loopback into a journal.
//!
//! `cargo run --release --example receive -p tidemark-process-server -- FOLDER MIB [FRAME_KIB]`

use std::time::{Duration, Instant};

use bytes::Bytes;
use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::storage::RealStorage;
use tidemark_base::{DiskId, Epoch, Extent, FRAME_BYTES_MAX, Generation, HostId, MachineId, ServerId, Timestamp};
use tidemark_process_server::{ProcessServer, ProcessServerConfig};
use tidemark_proto::control::{DiskSpec, MachineGrant, Retention};
use tidemark_proto::replication::wire::replication_client::ReplicationClient;
use tidemark_proto::replication::{
    Credit, CutEnd, CutKind, Data, Hello, HostFrame, PROTOCOL_VERSION, ServerFrame, SessionId,
};
use tidemark_transport::{Authority, PeerIdentity, connect};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const CHUNK_BYTES: usize = 65536;
const CUT_BYTES: u64 = 16 << 20;
const WANT_BYTES: u64 = 4 << 20;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: receive FOLDER MIB [FRAME_KIB]")?;
    let total = arguments.next().ok_or("how many MiB?")?.parse::<u64>()? << 20;
    let frame_bytes = arguments.next().map_or(Ok(256), |text| text.parse::<usize>())? << 10;
    let storage = RealStorage::create(&folder)?;
    let authority = Authority::open_or_create(&*storage)?;
    let peer = PeerIdentity::ProcessServer(ServerId::random());
    let identity = authority.issue(peer, &[])?;
    let place = std::path::Path::new(&folder).join("process-server");
    let server = ProcessServer::start(ProcessServerConfig::new(place, ([127, 0, 0, 1], 0).into(), identity)).await?;
    let (agent, disk, machine) = (HostId::random(), DiskId::random(), MachineId::random());
    let spec = DiskSpec {
        disk,
        path: "/none".to_owned(),
        export: "none".to_owned(),
        generation: Generation::FIRST,
        bytes: total,
        added: false,
    };
    let retention = Retention { any_time: Duration::from_secs(7200), age: None, count: None, grid: Default::default() };
    server.authorise(MachineGrant { machine, name: "m".into(), host: agent, disks: vec![spec], retention }).await?;
    let agent = authority.issue(PeerIdentity::Agent(agent), &[])?;
    let address = server.address().to_string();
    // The same sealed chunks again and again: what sealing costs is not the question here.
    let mut raw = vec![0; CHUNK_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut raw);
    let mut sealer = Sealer::new(ChunkKey::new(disk, Generation::FIRST), Compression::Off);
    let per_frame = (frame_bytes / (CHUNK_BYTES + 128)).clamp(1, FRAME_BYTES_MAX / (CHUNK_BYTES + 128));
    let (mut frame, mut hashes) = (Vec::new(), Vec::new());
    for index in 0..per_frame {
        let extent = Extent::new((index * CHUNK_BYTES) as u64, CHUNK_BYTES as u64);
        hashes.extend_from_slice(&sealer.seal(&[extent], &raw, &mut frame));
    }
    let frame = Bytes::from(frame);

    let channel = connect(&address, peer, &agent).await?;
    let (sender, receiver) = mpsc::channel(32);
    let mut frames = ReplicationClient::new(channel).replicate(ReceiverStream::new(receiver)).await?.into_inner();
    let hello = Hello {
        version: PROTOCOL_VERSION,
        disk,
        generation: Generation::FIRST,
        disk_bytes: total,
        session: SessionId::random(),
        acknowledged: None,
    };
    sender.send(HostFrame::Hello(hello).into()).await?;
    let Some(Ok(ServerFrame::Welcome(welcome))) = frames.message().await?.map(ServerFrame::try_from) else {
        return Err("not welcome".into());
    };
    let position = Epoch::random().start();
    let mut cut = welcome.cut.next();
    let mut credit = Credit::new(welcome.credit_bytes);
    let (mut ended, mut acknowledged, mut sent, mut wanted) = (Vec::new(), 0, 0, 0);
    let end_of = |cut, kind, chunks: u64, chunk_bytes, hashes: &[u8]| CutEnd {
        cut,
        kind,
        from: position,
        to: position,
        time: Timestamp(cut.0),
        clock_stepped: false,
        chunks,
        chunk_bytes,
        chunks_hash: *blake3::hash(hashes).as_bytes(),
        written_bytes: 0,
        mark: None,
    };
    sender.send(HostFrame::CutEnd(end_of(cut, CutKind::ScanStart, 0, 0, &[])).into()).await?;
    ended.push((cut, 0));
    cut = cut.next();
    let (cpu, begin) = (cpu_seconds(), Instant::now());
    let (mut chunks, mut chunk_bytes, mut cut_hashes) = (0, 0, Vec::new());
    while acknowledged < total {
        while sent < total && credit.take(frame.len() as u64) {
            sender.send(HostFrame::Data(Data { cut, chunks: frame.clone() }).into()).await?;
            sent += frame.len() as u64;
            chunks += per_frame as u64;
            chunk_bytes += frame.len() as u64;
            cut_hashes.extend_from_slice(&hashes);
            if chunk_bytes >= CUT_BYTES || sent >= total {
                let end = end_of(cut, CutKind::Scan, chunks, chunk_bytes, &cut_hashes);
                sender.send(HostFrame::CutEnd(end).into()).await?;
                ended.push((cut, sent));
                cut = cut.next();
                (chunks, chunk_bytes) = (0, 0);
                cut_hashes.clear();
            }
        }
        if sent < total && wanted < WANT_BYTES {
            wanted = 2 * WANT_BYTES;
            sender.send(HostFrame::Want(wanted).into()).await?;
        }
        match frames.message().await?.map(ServerFrame::try_from) {
            Some(Ok(ServerFrame::Grant(bytes))) => {
                wanted = wanted.saturating_sub(bytes);
                credit.grant(bytes);
            }
            Some(Ok(ServerFrame::Durable(durable))) => {
                let covered = ended.iter().take_while(|(cut, _)| *cut <= durable.cut).count();
                if let Some((_, bytes)) = ended.drain(..covered).next_back() {
                    credit.acknowledge(bytes - acknowledged);
                    acknowledged = bytes;
                }
            }
            other => return Err(format!("unexpected {other:?}").into()),
        }
    }
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    println!(
        "{:.0} MB durable in {seconds:.2} s: {:.0} MB/s, {:.2} CPU-s/GB for both ends (frames of {} bytes)",
        sent as f64 / 1e6,
        sent as f64 / 1e6 / seconds,
        cpu / (sent as f64 / 1e9),
        frame.len()
    );
    server.stop().await;
    Ok(())
}

fn cpu_seconds() -> f64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .map_or(0.0, |time| time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}
