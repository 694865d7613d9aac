//! Machines that failed over to here.

use std::path::Path;

use tidemark_nbd::client::Client;
use uuid::Uuid;

use super::*;
use crate::failed_over::Promote;
use crate::server::failover::FailoverState;

fn client(state: &FailoverState) -> Client {
    let uri = state.disks[0].nbd.clone().expect("it is served");
    let (name, socket) = uri.strip_prefix("nbd+unix:///").and_then(|rest| rest.split_once("?socket=")).unwrap();
    Client::connect_unix(Path::new(socket), name).unwrap()
}

async fn with_client<T: Send + 'static>(
    state: &FailoverState,
    work: impl FnOnce(&mut Client) -> T + Send + 'static,
) -> T {
    let state = state.clone();
    tokio::task::spawn_blocking(move || work(&mut client(&state))).await.unwrap()
}

async fn content(state: &FailoverState) -> Vec<u8> {
    with_client(state, |client| {
        let mut content = vec![0; DISK_BYTES as usize];
        for (at, part) in (0..).step_by(1 << 20).zip(content.chunks_mut(1 << 20)) {
            client.read(at, part).unwrap();
        }
        content
    })
    .await
}

async fn write(state: &FailoverState, at: u64, data: Vec<u8>) {
    with_client(state, move |client| client.write(at, &data).unwrap()).await;
}

/// A machine with two points, the first of them locked, and retention that keeps nothing.
async fn two_points(site: &Site, disk: DiskId) -> (TestHost, [Vec<u8>; 2], [Mark; 2]) {
    site.protect(&[disk]).await;
    let (mut host, first, early) = site.replicated(disk).await;
    let nothing =
        Retention { any_time: Duration::ZERO, age: Some(Duration::ZERO), count: Some(1), grid: Default::default() };
    site.server.set_retention(site.machine, nothing).await.unwrap();
    let mut second = first.clone();
    second[5 << 16..][..65536].copy_from_slice(&pattern(99, 65536));
    host.write(5 << 16, &pattern(99, 65536)).await;
    let late = host.mark(site.machine, vec![disk], true);
    host.end(CutKind::Records, Some(late.clone())).await;
    host.durable().await;
    (host, [first, second], [early, late])
}

fn folders(site: &Site) -> usize {
    std::fs::read_dir(site.folder.path().join("ps/failed-over")).map_or(0, |all| all.count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f1_a_failed_over_machine_finds_its_disks_again_after_a_restart() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    let (host, [_, second], _) = two_points(&site, disk).await;
    drop(host);
    let id = Uuid::new_v4();
    let state = site.server.fail_over(id, site.machine, Selector::Latest).await.unwrap();
    assert!(content(&state).await == second);
    let mut expected = second.clone();
    expected[4096..8192].fill(7);
    // Acknowledged, not flushed: its machine does not end with this process.
    write(&state, 4096, vec![7; 4096]).await;
    assert!(content(&state).await == expected);
    site.restart().await;
    let again = site.server.failover(id).await.unwrap();
    assert_eq!(again.disks, state.disks, "the address stays the same");
    assert!(content(&again).await == expected);
    let repeated = site.server.fail_over(id, site.machine, Selector::Latest).await.unwrap();
    assert_eq!(repeated.entry, again.entry, "asking again changes nothing");
    let other = site.server.fail_over(Uuid::new_v4(), site.machine, Selector::Latest).await.unwrap_err();
    assert_eq!(other.kind, FailureKind::Conflict);
    let refused = site.server.deauthorise(site.machine, true).await.unwrap_err();
    assert!(refused.message.contains("failed over"), "{refused}");
    assert!(exported(&site, Selector::Latest).await == second, "nothing of it reaches the replica");
    // Cancelled: nothing of it is left.
    site.server.end_failover(id).await.unwrap();
    site.server.end_failover(id).await.unwrap();
    assert_eq!((folders(&site), pins(&site, disk)), (0, Vec::<String>::new()));
    assert_eq!(site.server.failover(id).await.unwrap_err().kind, FailureKind::NotFound);
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn until_a_failover_is_committed_no_point_goes_and_each_can_be_chosen() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    let (host, [first, second], [early, late]) = two_points(&site, disk).await;
    drop(host);
    let id = Uuid::new_v4();
    let loss = site.server.loss(site.machine, Selector::Point(early.id)).await.unwrap();
    // As stored: with a chunk's header.
    assert!(loss.point.id == early.id && (65_536..66_000).contains(&loss.bytes), "{loss:?}");
    assert_eq!(site.server.loss(site.machine, Selector::Latest).await.unwrap().bytes, 0);
    let state = site.server.fail_over(id, site.machine, Selector::Latest).await.unwrap();
    write(&state, 0, vec![9; 4096]).await;
    site.server.maintain_now().await;
    site.restart().await;
    site.server.maintain_now().await;
    // The older point, which retention would have let go of.
    let changed = site.server.change_failover_point(id, Selector::Point(early.id)).await.unwrap();
    assert_eq!(changed.entry.point, early.id);
    assert!(content(&changed).await == first, "what was written since the failover is gone");
    assert_eq!(folders(&site), 1, "nothing is left of the point before");
    site.server.maintain_now().await;
    let back = site.server.change_failover_point(id, Selector::Point(late.id)).await.unwrap();
    assert!(content(&back).await == second);
    let wrong = site.server.change_failover_point(id, Selector::Point(MarkId::random())).await.unwrap_err();
    assert_eq!(wrong.kind, FailureKind::NotFound);
    assert!(content(&site.server.failover(id).await.unwrap()).await == second, "a refusal changes nothing");
    site.server.commit_failover(id).await.unwrap();
    site.server.maintain_now().await;
    let points = site.server.points(site.machine).await.unwrap();
    assert_eq!(points.iter().map(|point| point.id).collect::<Vec<_>>(), [late.id], "committed: retention goes on");
    let state = site.server.failover(id).await.unwrap();
    assert!(content(&state).await == second);
    for refused in [
        site.server.change_failover_point(id, Selector::Latest).await.map(drop).unwrap_err(),
        site.server.end_failover(id).await.unwrap_err(),
    ] {
        assert!(refused.message.contains("committed"), "{refused}");
    }
    site.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_goes_on_after_a_restart_and_ends_in_a_plain_disk() {
    let mut site = Site::start().await;
    let disk = DiskId::random();
    let (host, [first, second], [early, _]) = two_points(&site, disk).await;
    drop(host);
    let id = Uuid::new_v4();
    let state = site.server.fail_over(id, site.machine, Selector::Latest).await.unwrap();
    let mut expected = second.clone();
    expected[69_632..79_872].fill(5);
    write(&state, 69_632, vec![5; 10_240]).await;
    // So slow that it does not end: cancelled, and wanted again.
    site.server.promote(id, Some(1)).await.unwrap();
    assert_eq!(site.server.stop_promote(id).await.unwrap().entry.promote, Promote::No);
    assert_eq!(site.server.made_plain(id).await.unwrap_err().kind, FailureKind::Conflict);
    assert_eq!(site.server.let_go(id).await.unwrap_err().kind, FailureKind::Conflict);
    site.server.promote(id, Some(1)).await.unwrap();
    site.restart().await;
    let going_on = site.server.failover(id).await.unwrap();
    assert_eq!(going_on.entry.promote, Promote::Wanted { bytes_per_second: Some(1) });
    let mut changes = site.server.failovers_changed();
    site.server.promote(id, None).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), changes.changed()).await.unwrap().unwrap();
    let filled = site.server.failover(id).await.unwrap();
    assert_eq!((filled.entry.promote, filled.done_bytes), (Promote::Filled, filled.total_bytes));
    assert!(std::fs::read(&filled.disks[0].plain).unwrap() == expected);
    // What its machine writes from now on is in the plain disk as well.
    write(&filled, 0, vec![3; 512]).await;
    expected[..512].fill(3);
    site.server.made_plain(id).await.unwrap();
    let plain = site.server.failover(id).await.unwrap();
    assert_eq!((plain.entry.promote, &plain.disks[0].nbd), (Promote::Plain, &None));
    assert!(std::fs::read(&plain.disks[0].plain).unwrap() == expected);
    site.server.maintain_now().await;
    site.restart().await;
    // Still not committed: another point can be chosen, and the plain disk goes.
    let changed = site.server.change_failover_point(id, Selector::Point(early.id)).await.unwrap();
    assert!(content(&changed).await == first);
    assert!(!plain.disks[0].plain.exists());
    let mut changes = site.server.failovers_changed();
    site.server.promote(id, None).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), changes.changed()).await.unwrap().unwrap();
    site.server.made_plain(id).await.unwrap();
    site.server.commit_failover(id).await.unwrap();
    let kept = site.server.failover(id).await.unwrap().disks[0].plain.clone();
    site.server.let_go(id).await.unwrap();
    site.server.let_go(id).await.unwrap();
    site.server.deauthorise(site.machine, true).await.unwrap();
    site.restart().await;
    assert!(std::fs::read(kept).unwrap() == first, "the machine keeps its disk");
    site.server.stop().await;
}
