//! A whole process server: streams over TLS into real journals, points, serves, exports.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::storage::RealStorage;
use tidemark_base::{DiskId, Extent, Generation, HostId, MachineId, MarkId, ServerId};
use tidemark_proto::control::{
    BackupPart, DiskSpec, FailureKind, ImageFormat, MachineGrant, Reply, Retention, Selector, ServerCommand,
};
use tidemark_proto::replication::{CutKind, Mark, Refusal, RefusalReason};
use tidemark_transport::recovery::RecoveryKey;
use tidemark_transport::{Authority, Identity, PeerIdentity};

use super::{ProcessServer, ProcessServerConfig};
use crate::accept::testing::{DISK_BYTES, Endpoint, TestHost, hello};
use crate::offline;
use crate::points::PointSelector;

#[path = "tests_failover.rs"]
mod failover;

struct Site {
    folder: tempfile::TempDir,
    authority: Authority,
    identity: Identity,
    server: ProcessServer,
    machine: MachineId,
    agent: HostId,
}

impl Site {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create(&*RealStorage::open_folder(folder.path())).unwrap();
        let identity = authority.issue(PeerIdentity::ProcessServer(ServerId::random()), &[]).unwrap();
        let server = Self::start_server(folder.path().join("ps"), &identity).await;
        Self { folder, authority, identity, server, machine: MachineId::random(), agent: HostId::random() }
    }

    async fn start_server(folder: PathBuf, identity: &Identity) -> ProcessServer {
        let mut config = ProcessServerConfig::new(folder, ([127, 0, 0, 1], 0).into(), identity.clone());
        config.limits.reserve_bytes = 0;
        ProcessServer::start(config).await.unwrap()
    }

    async fn restart(&mut self) {
        self.server.stop().await;
        self.server = Self::start_server(self.folder.path().join("ps"), &self.identity).await;
    }

    fn grant(&self, disks: &[DiskId]) -> MachineGrant {
        let spec = |disk: &DiskId| DiskSpec {
            disk: *disk,
            path: "/source".to_owned(),
            export: "name".to_owned(),
            generation: Generation::FIRST,
            bytes: DISK_BYTES,
            added: false,
        };
        MachineGrant {
            machine: self.machine,
            name: "mail".to_owned(),
            host: self.agent,
            disks: disks.iter().map(spec).collect(),
            retention: Retention {
                any_time: Duration::from_secs(7200),
                age: None,
                count: None,
                grid: Default::default(),
            },
        }
    }

    async fn protect(&self, disks: &[DiskId]) {
        self.server.authorise(self.grant(disks)).await.unwrap();
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint { address: self.server.address().to_string(), peer: self.identity.peer() }
    }

    fn agent(&self) -> Identity {
        self.authority.issue(PeerIdentity::Agent(self.agent), &[]).unwrap()
    }

    async fn host(&self, disk: DiskId) -> TestHost {
        TestHost::open(&self.endpoint(), &self.agent(), disk).await
    }

    /// A disk that was scanned and has a first point, and the reference of its content.
    async fn replicated(&self, disk: DiskId) -> (TestHost, Vec<u8>, Mark) {
        let mut host = self.host(disk).await;
        let mut reference = vec![0; DISK_BYTES as usize];
        host.end(CutKind::ScanStart, None).await;
        for chunk in [0u64, 3, 700] {
            let data = pattern(chunk, 65536);
            reference[(chunk << 16) as usize..][..65536].copy_from_slice(&data);
            host.write(chunk << 16, &data).await;
        }
        host.end(CutKind::Scan, None).await;
        let mark = host.mark(self.machine, vec![disk], true);
        host.end(CutKind::ScanEnd, Some(mark.clone())).await;
        host.durable().await;
        (host, reference, mark)
    }
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut data);
    data
}

async fn exported(site: &Site, selector: Selector) -> Vec<u8> {
    let path = site.folder.path().join(format!("{}.raw", MarkId::random()));
    let to = path.display().to_string();
    site.server.export(site.machine, selector, &to, ImageFormat::Raw).await.unwrap();
    std::fs::read(path).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_point_equals_the_source_and_survives_a_restart() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, first, mark) = site.replicated(disk).await;
    let mut second = first.clone();
    second[4096..8192].fill(0xee);
    host.write(4096, &[0xee; 4096]).await;
    let later = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(later.clone())).await;
    host.durable().await;
    let limit = Duration::from_secs(60);
    assert_eq!(site.server.wait_point(site.machine, later.id, limit).await.unwrap().id, later.id);
    assert!(exported(&site, Selector::Point(mark.id)).await == first);
    assert!(exported(&site, Selector::Latest).await == second);
    let ids = |points: Vec<tidemark_proto::control::PointInfo>| points.iter().map(|point| point.id).collect::<Vec<_>>();
    assert_eq!(ids(site.server.points(site.machine).await.unwrap()), [mark.id, later.id]);
    let position = host.position;
    // The host does not close: the server stops under it.
    site.restart().await;
    drop(host);
    assert_eq!(ids(site.server.points(site.machine).await.unwrap()), [mark.id, later.id]);
    assert!(exported(&site, Selector::Latest).await == second);
    let host = site.host(disk).await;
    let welcome = host.welcome.clone().unwrap();
    assert_eq!((welcome.durable, welcome.cut.0, welcome.scan_open), (Some(position), 4, false));
    drop(host);
    let verified = site.server.verify(site.machine, Selector::Latest).await.unwrap();
    assert!(verified.defects.is_empty() && verified.bytes >= 3 * 65536, "{verified:?}");
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_configuration_server_the_recovery_key_takes_a_machine_over_and_its_old_host_is_refused() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, first, mark) = site.replicated(disk).await;
    host.write(4096, &[0xee; 4096]).await;
    let later = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(later.clone())).await;
    host.durable().await;
    drop(host);
    let folder = site.folder.path().join("ps");
    let key = RecoveryKey::generate().unwrap();
    let failover =
        |point: PointSelector, key: &RecoveryKey| offline::failover(&folder, Some("mail"), point, &[], None, key);
    let refused = failover(PointSelector::Latest, &key).err().unwrap();
    assert!(refused.message.contains("never told"), "{refused}");
    let backup = BackupPart {
        name: format!("backup-{:020}.tidemark", 1),
        offset: 0,
        bytes: 3,
        digest: *blake3::hash(b"abc").as_bytes(),
        data: b"abc".to_vec(),
        break_glass: key.keeper().unwrap().break_glass(),
    };
    site.server.execute(ServerCommand::KeepBackup(backup)).await.unwrap();
    let refused = failover(PointSelector::Latest, &key).err().unwrap();
    assert!(refused.message.contains("in use"), "the process server runs: {refused}");
    site.server.stop().await;
    let refused = failover(PointSelector::Latest, &RecoveryKey::generate().unwrap()).err().unwrap();
    assert!(refused.message.contains("not that of this installation"), "{refused}");
    let refused = offline::failover(&folder, Some("nobody"), PointSelector::Latest, &[], None, &key).err().unwrap();
    assert!(refused.message.contains("no such machine"), "{refused}");
    assert!(refused.message.contains(&format!("mail ({}", site.machine)), "it says which there are: {refused}");
    let nowhere = site.folder.path().join("no/folder.raw");
    let there = site.folder.path().join("there.raw");
    std::fs::File::create(&there).unwrap();
    for to in [&nowhere, &there] {
        let tried = offline::failover(&folder, Some("mail"), PointSelector::Latest, &[], Some(to), &key);
        assert!(tried.err().unwrap().message.contains(to.to_str().unwrap()), "it cannot be written");
    }
    // Nothing of that changed anything.
    site.server = Site::start_server(folder.clone(), &site.identity).await;
    drop(site.host(disk).await);
    site.server.stop().await;

    // By the folder of its one disk, and to the older point.
    let of_disk = folder.join("replicas").join(disk.to_string());
    let done = offline::failover(&of_disk, None, PointSelector::Id(mark.id), &[], None, &key).unwrap();
    assert_eq!(done.record.disks[&disk].generation, Generation(2));
    let image = site.folder.path().join("failed-over.raw");
    done.export(&image, &tidemark_base::stop::Stop::new()).unwrap();
    assert!(std::fs::read(&image).unwrap() == first);
    drop(done);
    // Another point, once more: the generation stands.
    let done = failover(PointSelector::Latest, &key).unwrap();
    assert_eq!(done.record.disks[&disk].generation, Generation(2));
    let (serving, serves) = done.serve(&site.folder.path().join("s/failover.sock")).unwrap();
    assert_eq!(serving.disks[0].bytes, DISK_BYTES);
    drop((serves, done));
    let records = offline::records(RealStorage::open_folder(&folder)).unwrap();
    let record = &records[&site.machine];
    assert!(record.point == Some(later.id) && record.is_signed_for(&key.keeper().unwrap().break_glass()));
    let forged = offline::Record { name: "other".into(), ..record.clone() };
    assert!(!forged.is_signed_for(&key.keeper().unwrap().break_glass()));

    // The process server again: the old host writes nothing any more, whatever an older configuration server says.
    site.server = Site::start_server(folder.clone(), &site.identity).await;
    let refused = async |site: &Site| {
        TestHost::open_with(&site.endpoint(), &site.agent(), hello(disk)).await.err().expect("a refusal").reason
    };
    assert_eq!(refused(&site).await, RefusalReason::Generation);
    let behind = site.server.authorise(site.grant(&[disk])).await.unwrap_err();
    assert!(behind.kind == FailureKind::Conflict && behind.message.contains("generation 2"), "{behind}");
    assert_eq!(refused(&site).await, RefusalReason::Generation, "a lower generation was not taken");
    // Its points stay, and what was failed over to is not folded away.
    assert_eq!(site.server.points(site.machine).await.unwrap().len(), 2);
    site.server.maintain_now().await;
    let mut expected = first;
    expected[4096..8192].fill(0xee);
    assert!(exported(&site, Selector::Latest).await == expected);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_verify_is_refused_and_harms_nothing() {
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (host, first, _) = site.replicated(disk).await;
    let position = host.position;
    drop(host);
    let sealed_for = |disk, generation, data: &[u8]| {
        let mut bytes = Vec::new();
        let key = ChunkKey::new(disk, generation);
        Sealer::new(key, Compression::Level(1)).seal(&[Extent::new(0, data.len() as u64)], data, &mut bytes);
        bytes
    };
    let good = sealed_for(disk, Generation::FIRST, &[1; 4096]);
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut moved = good.clone();
    moved[49] ^= 0x10;
    let mut bomb = sealed_for(disk, Generation::FIRST, &[1; 65536]);
    bomb[4..8].copy_from_slice(&512u32.to_le_bytes());
    bomb[56..60].copy_from_slice(&1u32.to_le_bytes());
    let mut huge = good.clone();
    huge[4..8].copy_from_slice(&(1u32 << 31).to_le_bytes());
    let mut beyond = Vec::new();
    Sealer::new(ChunkKey::new(disk, Generation::FIRST), Compression::Off)
        .seal_zeroes(&[Extent::new(DISK_BYTES - 512, 1024)], &mut beyond);
    for (what, chunks) in [
        ("a flipped bit", flipped),
        ("another place", moved),
        ("another disk", sealed_for(DiskId::random(), Generation::FIRST, &[1; 4096])),
        ("another generation", sealed_for(disk, Generation(2), &[1; 4096])),
        ("a bomb", bomb),
        ("an impossible size", huge),
        ("beyond the disk", beyond),
        ("half a chunk", good[..good.len() / 2].to_vec()),
        ("noise", pattern(1, 300)),
    ] {
        let mut host = site.host(disk).await;
        assert_eq!(host.welcome.as_ref().unwrap().durable, Some(position), "{what}");
        host.write_sealed(chunks).await;
        host.end(CutKind::Records, None).await;
        let refusal = host.refused().await;
        assert_eq!(refusal.reason, RefusalReason::Damaged, "{what}: {refusal:?}");
        assert!(refusal.message.contains(&disk.to_string()) && !refusal.help.is_empty(), "{what}: {refusal:?}");
    }
    // Totals and continuity are checked as well.
    let mut host = site.host(disk).await;
    let mut end = host.cut_end(CutKind::Records, None);
    end.from.sequence.0 += 1;
    end.to.sequence.0 += 1;
    host.end_with(end).await;
    host.refused_for(RefusalReason::Gap).await;
    let mut host = site.host(disk).await;
    host.write(0, &[3; 512]).await;
    let mut end = host.cut_end(CutKind::Records, None);
    end.chunks_hash[0] ^= 1;
    host.end_with(end).await;
    host.refused_for(RefusalReason::Damaged).await;
    assert!(exported(&site, Selector::Latest).await == first);
    // And it goes on.
    let mut host = site.host(disk).await;
    host.write(0, &[9; 512]).await;
    host.end(CutKind::Records, None).await;
    host.durable().await;
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_dies_in_the_middle_of_a_cut_leaves_nothing_of_it() {
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, first, _) = site.replicated(disk).await;
    let position = host.position;
    for chunk in 0..20u64 {
        host.write(chunk << 16, &pattern(99, 65536)).await;
    }
    drop(host);
    let mut host = site.host(disk).await;
    assert_eq!(host.welcome.as_ref().unwrap().durable, Some(position));
    host.write(512, &[5; 512]).await;
    let mark = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(mark)).await;
    host.durable().await;
    let mut expected = first;
    expected[512..1024].fill(5);
    assert!(exported(&site, Selector::Latest).await == expected);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_point_of_two_disks_waits_for_both() {
    let site = Site::start().await;
    let (one, two) = (DiskId::random(), DiskId::random());
    site.protect(&[one, two]).await;
    let (mut first, _, _) = site.replicated(one).await;
    let mark = first.mark(site.machine, vec![one, two], true);
    first.end(CutKind::Records, Some(mark.clone())).await;
    first.durable().await;
    let short = Duration::from_millis(50);
    let failure = site.server.wait_point(site.machine, mark.id, short).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::TimedOut);
    let waiting = tokio::spawn({
        let (server, machine, id) = (site.server.clone(), site.machine, mark.id);
        async move { server.wait_point(machine, id, Duration::from_secs(60)).await }
    });
    let (mut second, _, _) = site.replicated(two).await;
    second.end(CutKind::Records, Some(mark.clone())).await;
    second.durable().await;
    assert_eq!(waiting.await.unwrap().unwrap().id, mark.id);
    let folder = site.folder.path().join("images");
    std::fs::create_dir(&folder).unwrap();
    let to = folder.display().to_string();
    let exported = site.server.export(site.machine, Selector::Point(mark.id), &to, ImageFormat::Raw).await.unwrap();
    assert_eq!(exported.files.len(), 2);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn points_are_served_read_only_or_with_a_layer_of_their_own() {
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (_host, first, mark) = site.replicated(disk).await;
    let read_only = site.server.serve(site.machine, Selector::Latest, false, None).await.unwrap();
    let writable = site.server.serve(site.machine, Selector::Point(mark.id), true, None).await.unwrap();
    assert_eq!(site.server.status().await.unwrap().serves.len(), 2);
    if Command::new("qemu-io").arg("--version").output().is_ok() {
        let uri = |serving: &tidemark_proto::control::Serving| serving.disks[0].nbd.clone().unwrap();
        let qemu_io = |uri: String, command: &'static str| {
            tokio::task::spawn_blocking(move || {
                let output = Command::new("qemu-io").args(["-f", "raw", "-c", command, &uri]).output().unwrap();
                (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
            })
        };
        let (_, said) = qemu_io(uri(&read_only), "write -P 7 0 4096").await.unwrap();
        assert!(!said.contains("wrote 4096"), "{said}");
        let (done, said) = qemu_io(uri(&writable), "write -P 7 0 4096").await.unwrap();
        assert!(done && said.contains("wrote 4096"), "{said}");
        let (done, said) = qemu_io(uri(&writable), "read -P 7 0 4096").await.unwrap();
        assert!(done && !said.contains("failed"), "{said}");
    }
    site.server.stop_serve(writable.serve).await.unwrap();
    let gone = site.server.stop_serve(writable.serve).await.unwrap_err();
    assert_eq!(gone.kind, FailureKind::NotFound);
    assert!(exported(&site, Selector::Latest).await == first, "a scratch layer never reaches the replica");
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_of_other_formats_hold_the_same() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return;
    }
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (_host, first, _) = site.replicated(disk).await;
    for format in ImageFormat::ALL.into_iter().filter(|format| *format != ImageFormat::Raw) {
        let path = site.folder.path().join(format.name()).with_extension(format.ending());
        let to = path.display().to_string();
        site.server.export(site.machine, Selector::Latest, &to, format).await.unwrap();
        let raw = site.folder.path().join("back.raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", format.qemu_name(), "-O", "raw"]).arg(&path).arg(&raw);
        let converted = convert.output().unwrap();
        assert!(converted.status.success(), "{}", String::from_utf8_lossy(&converted.stderr));
        assert!(std::fs::read(raw).unwrap() == first, "{}", format.name());
    }
    assert!(site.server.serves().is_empty());
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_can_be_taken_away() {
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, _, _) = site.replicated(disk).await;
    let command = ServerCommand::Deauthorise { machine: site.machine, delete_replica: false };
    assert_eq!(site.server.execute(command).await, Ok(Reply::Done));
    host.refused_for(RefusalReason::UnknownDisk).await;
    assert_eq!(site.server.points(site.machine).await.unwrap().len(), 1, "the points stay");
    let grant = site.grant(&[disk]);
    let folder = site.folder.path().join(format!("ps/machines/{}", site.machine));
    assert!(folder.exists());
    site.server.deauthorise(site.machine, true).await.unwrap();
    assert!(!folder.exists(), "points of cuts that are gone");
    assert_eq!(site.server.points(site.machine).await.unwrap_err().kind, FailureKind::NotFound);
    let refusal = TestHost::open_with(&site.endpoint(), &site.agent(), hello(disk)).await.err();
    assert!(matches!(refusal, Some(Refusal { reason: RefusalReason::UnknownDisk, .. })), "{refusal:?}");
    // Protected again it begins anew.
    site.server.authorise(grant).await.unwrap();
    assert!(site.server.points(site.machine).await.unwrap().is_empty());
    let (_host, content, _) = site.replicated(disk).await;
    assert!(exported(&site, Selector::Latest).await == content);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_has_one_process_server() {
    let site = Site::start().await;
    let mut config =
        ProcessServerConfig::new(site.folder.path().join("ps"), ([127, 0, 0, 1], 0).into(), site.identity.clone());
    config.socket = site.folder.path().join("other/points.sock");
    let failure = ProcessServer::start(config).await.err().expect("a failure");
    assert_eq!(failure.kind, FailureKind::Conflict);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_generation_ends_the_stream_of_the_old() {
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, _, _) = site.replicated(disk).await;
    let mut grant = site.grant(&[disk]);
    grant.disks[0].generation = Generation(2);
    site.server.authorise(grant.clone()).await.unwrap();
    let refusal = host.refused().await;
    assert_eq!(refusal.reason, RefusalReason::Generation, "{refusal:?}");
    grant.disks[0].generation = Generation(1);
    assert_eq!(site.server.authorise(grant).await.unwrap_err().kind, FailureKind::Conflict);
    site.server.stop().await;
}

/// Flips a bit in the middle of each sealed segment or active one.
fn damage_segments(folder: &std::path::Path) {
    use std::os::unix::fs::FileExt;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        let at = 1000;
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_on_the_media_is_found_and_named() {
    let site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (_host, _, mark) = site.replicated(disk).await;
    damage_segments(&site.folder.path().join(format!("ps/replicas/{disk}/segments")));
    let verified = site.server.verify(site.machine, Selector::Latest).await.unwrap();
    assert!(!verified.defects.is_empty() && verified.defects[0].contains(&disk.to_string()), "{verified:?}");
    let points = site.server.points(site.machine).await.unwrap();
    assert_eq!((points[0].id, points[0].flags.as_slice()), (mark.id, &["damaged".to_owned()][..]));
    let to = site.folder.path().join("never.raw").display().to_string();
    let failure = site.server.export(site.machine, Selector::Point(mark.id), &to, ImageFormat::Raw).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Damaged, "{failure:?}");
    assert!(!std::path::Path::new(&to).exists());
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_scrub_finds_flags_points_and_is_told_after_a_restart() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, content, first) = site.replicated(disk).await;
    site.server.scrub_now().await;
    assert!(site.server.status().await.unwrap().disks[0].problems.is_empty());
    damage_segments(&site.folder.path().join(format!("ps/replicas/{disk}/segments")));
    // Written over: the point at this mark does not need what is damaged.
    host.write(0, &content[..65536]).await;
    let second = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(second.clone())).await;
    host.durable().await;
    drop(host);
    site.server.scrub_now().await;
    for restarted in [false, true] {
        if restarted {
            site.restart().await;
        }
        let points = site.server.points(site.machine).await.unwrap();
        let flags: Vec<(MarkId, bool)> = points.iter().map(|point| (point.id, !point.flags.is_empty())).collect();
        // The segment was sealed when it was found, so a restart knows what the damage touched.
        assert_eq!(flags, [(first.id, true), (second.id, false)], "restarted: {restarted}");
        let problems = site.server.status().await.unwrap().disks[0].problems.clone();
        assert!(problems.iter().any(|problem| problem.critical), "restarted: {restarted}, {problems:?}");
    }
    site.server.stop().await;
}

fn pins(site: &Site, disk: DiskId) -> Vec<String> {
    let folder = RealStorage::open_folder(site.folder.path().join(format!("ps/replicas/{disk}")));
    let manifest = crate::replica::manifest::Manifest::load(&*folder).unwrap().manifest;
    manifest.pins.into_iter().map(|pin| pin.holder).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_served_is_pinned_for_as_long_as_it_is_served() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (mut host, content, mark) = site.replicated(disk).await;
    let serving = site.server.serve(site.machine, Selector::Point(mark.id), false, None).await.unwrap();
    assert_eq!(pins(&site, disk), [format!("serve {}", serving.serve)]);
    let nothing =
        Retention { any_time: Duration::ZERO, age: Some(Duration::ZERO), count: Some(1), grid: Default::default() };
    site.server.set_retention(site.machine, nothing).await.unwrap();
    host.write(0, &[8; 4096]).await;
    let later = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(later.clone())).await;
    host.durable().await;
    site.server.maintain_now().await;
    assert!(exported(&site, Selector::Point(mark.id)).await == content, "retention let go of a served point");
    site.server.stop_serve(serving.serve).await.unwrap();
    // A pin that a killed process left.
    site.server.serve(site.machine, Selector::Point(mark.id), false, None).await.unwrap();
    let folder = RealStorage::open_folder(site.folder.path().join(format!("ps/replicas/{disk}")));
    let left = crate::replica::manifest::Manifest::load(&*folder).unwrap().manifest;
    assert_eq!(left.pins.iter().filter(|pin| pin.holder.starts_with("serve")).count(), 1);
    site.server.stop().await;
    left.store(&*folder).unwrap();
    drop(host);
    site.server = Site::start_server(site.folder.path().join("ps"), &site.identity).await;
    assert!(pins(&site, disk).is_empty(), "{:?}", pins(&site, disk));
    site.server.maintain_now().await;
    let points = site.server.points(site.machine).await.unwrap();
    assert_eq!(points.iter().map(|point| point.id).collect::<Vec<_>>(), [later.id]);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_was_destroyed_is_told_and_the_next_scan_heals_it() {
    use std::os::unix::fs::FileExt;
    let mut site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (host, _, first) = site.replicated(disk).await;
    drop(host);
    site.server.stop().await;
    let segments = site.folder.path().join(format!("ps/replicas/{disk}/segments"));
    for entry in std::fs::read_dir(segments).unwrap() {
        let file = std::fs::OpenOptions::new().write(true).open(entry.unwrap().path()).unwrap();
        file.write_all_at(&[0xff; 64], 8).unwrap();
    }
    site.server = Site::start_server(site.folder.path().join("ps"), &site.identity).await;
    let status = site.server.status().await.unwrap();
    assert!(!status.disks[0].consistent && status.disks[0].problems.iter().any(|problem| problem.critical));
    let points = site.server.points(site.machine).await.unwrap();
    assert_eq!((points[0].id, points[0].flags.as_slice()), (first.id, &["damaged".to_owned()][..]));
    assert!(site.server.serve(site.machine, Selector::Point(first.id), false, None).await.is_err());
    // The host learns that nothing is held, and scans.
    let (host, content, second) = site.replicated(disk).await;
    let welcome = host.welcome.clone().unwrap();
    assert!(welcome.durable.is_none() && welcome.cut.0 >= 3, "{welcome:?}");
    assert!(exported(&site, Selector::Latest).await == content);
    assert_eq!(site.server.points(site.machine).await.unwrap().last().unwrap().id, second.id);
    assert!(site.server.status().await.unwrap().disks[0].consistent);
    drop(host);
    site.restart().await;
    assert!(exported(&site, Selector::Latest).await == content);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_leaves_its_machine_stays_for_its_points_and_goes_with_the_last() {
    let mut site = Site::start().await;
    let (one, two) = (DiskId::random(), DiskId::random());
    site.protect(&[one, two]).await;
    let (mut first, content, _) = site.replicated(one).await;
    let (mut second, _, _) = site.replicated(two).await;
    let both = first.mark(site.machine, vec![one, two], true);
    for host in [&mut first, &mut second] {
        host.end(CutKind::Records, Some(both.clone())).await;
        host.durable().await;
    }
    drop(second);
    site.protect(&[one]).await;
    let refused = TestHost::open_with(&site.endpoint(), &site.agent(), hello(two)).await.err().expect("a refusal");
    assert_eq!(refused.reason, RefusalReason::UnknownDisk, "{refused:?}");
    // The other one goes on, and its marks are points without the one that left.
    let alone = first.mark(site.machine, vec![one], true);
    first.end(CutKind::Records, Some(alone.clone())).await;
    first.durable().await;
    site.server.maintain_now().await;
    let folder = site.folder.path().join("both");
    std::fs::create_dir(&folder).unwrap();
    let to = folder.display().to_string();
    let files = site.server.export(site.machine, Selector::Point(both.id), &to, ImageFormat::Raw).await.unwrap().files;
    assert_eq!(files.len(), 2);
    assert!(exported(&site, Selector::Latest).await == content);

    // Back again, before its last point went: nothing of it was lost.
    drop(first);
    site.protect(&[one, two]).await;
    let tight = Retention { any_time: Duration::ZERO, age: None, count: Some(1), grid: Default::default() };
    site.server.set_retention(site.machine, tight).await.unwrap();
    site.server.maintain_now().await;
    assert!(site.server.0.set.get(two).is_ok(), "a disk of the machine was removed");
    // Out again, also for a process server that starts anew.
    site.server.authorise(MachineGrant { retention: tight, ..site.grant(&[one]) }).await.unwrap();
    site.restart().await;
    site.server.maintain_now().await;
    let gone = site.server.0.set.get(two).is_err();
    let left: Vec<MarkId> = site.server.points(site.machine).await.unwrap().iter().map(|point| point.id).collect();
    assert_eq!((gone, left), (true, vec![alone.id]), "a replica that no point needs stays, or the last point went");
    assert!(!site.folder.path().join("ps/replicas").join(two.to_string()).exists());
    assert!(exported(&site, Selector::Latest).await == content);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_disk_that_was_added_has_no_point_yet_the_newest_one_without_it_stays() {
    let site = Site::start().await;
    let (one, two) = (DiskId::random(), DiskId::random());
    site.protect(&[one]).await;
    let (mut first, content, _) = site.replicated(one).await;
    let last = first.mark(site.machine, vec![one], true);
    first.end(CutKind::Records, Some(last.clone())).await;
    first.durable().await;
    let none =
        Retention { any_time: Duration::ZERO, age: Some(Duration::ZERO), count: Some(0), grid: Default::default() };
    site.server.authorise(MachineGrant { retention: none, ..site.grant(&[one, two]) }).await.unwrap();
    site.server.maintain_now().await;
    let ids: Vec<MarkId> = site.server.points(site.machine).await.unwrap().iter().map(|point| point.id).collect();
    assert_eq!(ids, [last.id]);
    assert!(exported(&site, Selector::Latest).await == content);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_grows_with_its_disk_and_older_points_keep_their_size() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    site.protect(&[disk]).await;
    let (host, first, mark) = site.replicated(disk).await;
    let larger = 2 * DISK_BYTES;
    let grant = |site: &Site, generation, bytes| {
        let mut grant = site.grant(&[disk]);
        (grant.disks[0].generation, grant.disks[0].bytes) = (Generation(generation), bytes);
        grant
    };
    let failure = site.server.authorise(grant(&site, 1, larger)).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Conflict, "the same generation with another size: {failure}");
    let failure = site.server.authorise(grant(&site, 2, DISK_BYTES / 2)).await.unwrap_err();
    assert!(failure.kind == FailureKind::Conflict && failure.help.contains("only grows"), "{failure}");

    // A crash between the base and the manifest leaves a base that is too long.
    drop(host);
    site.server.stop().await;
    let replica = site.folder.path().join("ps/replicas").join(disk.to_string());
    std::fs::File::options().write(true).open(replica.join("base.raw")).unwrap().set_len(larger).unwrap();
    site.server = Site::start_server(site.folder.path().join("ps"), &site.identity).await;
    assert!(exported(&site, Selector::Latest).await == first);

    let host = site.host(disk).await;
    site.server.authorise(grant(&site, 2, larger)).await.unwrap();
    drop(host);
    site.server.authorise(grant(&site, 2, larger)).await.unwrap();
    let refused = TestHost::open_with(&site.endpoint(), &site.agent(), hello(disk)).await.err().expect("a refusal");
    assert_eq!(refused.reason, RefusalReason::Generation, "who still has the smaller one");
    let grown = tidemark_proto::replication::Hello { generation: Generation(2), disk_bytes: larger, ..hello(disk) };
    let mut host = TestHost::open_with(&site.endpoint(), &site.agent(), grown).await.unwrap();
    let mut expected = first.clone();
    expected.resize(larger as usize, 0);
    let at = DISK_BYTES + 8192;
    expected[at as usize..][..4096].fill(0xab);
    let mut sealed = Vec::new();
    let key = ChunkKey::new(disk, Generation(2));
    Sealer::new(key, Compression::Off).seal(&[Extent::new(at, 4096)], &[0xab; 4096], &mut sealed);
    host.write_sealed(sealed).await;
    let later = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(later)).await;
    host.durable().await;
    drop(host);
    for round in 0..2 {
        assert!(exported(&site, Selector::Point(mark.id)).await == first, "round {round}: an older point changed");
        assert!(exported(&site, Selector::Latest).await == expected, "round {round}");
        site.restart().await;
    }
    // And in the base.
    let tight = Retention { any_time: Duration::ZERO, age: None, count: Some(1), grid: Default::default() };
    site.server.set_retention(site.machine, tight).await.unwrap();
    site.server.maintain_now().await;
    assert_eq!(site.server.points(site.machine).await.unwrap().len(), 1);
    assert!(exported(&site, Selector::Latest).await == expected);
    site.restart().await;
    let verified = site.server.verify(site.machine, Selector::Latest).await.unwrap();
    assert!(verified.defects.is_empty(), "{verified:?}");
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_machine_is_failed_over_offline_only_where_that_is_said_and_what_it_holds_can_be_given_back() {
    let site = Site::start().await;
    let (one, two) = (DiskId::random(), DiskId::random());
    site.protect(&[one, two]).await;
    let (mut first, content, _) = site.replicated(one).await;
    let (mut second, _, _) = site.replicated(two).await;
    let both = first.mark(site.machine, vec![one, two], true);
    for host in [&mut first, &mut second] {
        host.end(CutKind::Records, Some(both.clone())).await;
        host.durable().await;
    }
    drop((first, second));
    let folder = site.folder.path().join("ps");
    let key = RecoveryKey::generate().unwrap();
    let backup = BackupPart {
        name: format!("backup-{:020}.tidemark", 1),
        offset: 0,
        bytes: 3,
        digest: *blake3::hash(b"abc").as_bytes(),
        data: b"abc".to_vec(),
        break_glass: key.keeper().unwrap().break_glass(),
    };
    site.server.execute(ServerCommand::KeepBackup(backup)).await.unwrap();
    site.server.stop().await;
    for name in ["manifest", "manifest.copy"] {
        let path = folder.join("replicas").join(two.to_string()).join(name);
        std::fs::File::options().write(true).open(path).unwrap().set_len(7).unwrap();
    }
    let failover = |without: &[DiskId], key: &RecoveryKey| {
        offline::failover(&folder, Some("mail"), PointSelector::Latest, without, None, key)
    };
    let refused = failover(&[], &key).err().unwrap();
    let named = refused.message.contains(&two.to_string()) && refused.help.contains("--without-disk");
    assert!(named && refused.kind == FailureKind::Damaged, "{refused}");
    let none = offline::release(&folder, Some("mail"), &key).err().unwrap();
    assert!(none.kind == FailureKind::NotFound && none.message.contains("not failed over"), "{none}");
    let done = failover(&[two], &key).unwrap();
    assert_eq!(done.record.disks.keys().collect::<Vec<_>>(), [&one]);
    let image = site.folder.path().join("one.raw");
    done.export(&image, &tidemark_base::stop::Stop::new()).unwrap();
    assert!(std::fs::read(&image).unwrap() == content);
    drop(done);

    let pins = || {
        let (set, _) = crate::replica::ReplicaSet::open(RealStorage::open_folder(&folder), Default::default()).unwrap();
        set.get(one).unwrap().durable_pins().len()
    };
    assert_eq!(pins(), 1);
    let wrong = offline::release(&folder, Some("mail"), &RecoveryKey::generate().unwrap()).err().unwrap();
    assert!(wrong.message.contains("not that of this installation"), "{wrong}");
    assert_eq!(pins(), 1);
    offline::release(&folder, Some("mail"), &key).unwrap();
    assert_eq!(pins(), 0);
    assert!(offline::records(RealStorage::open_folder(&folder)).unwrap().is_empty());
}
