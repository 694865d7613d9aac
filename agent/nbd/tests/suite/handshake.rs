//! Negotiation by hand, well and badly meant.

use std::io::Write;
use std::time::{Duration, Instant};

use tidemark_nbd::{Client, ClientError, Limits};

use crate::raw::{Memory, PATIENCE, Raw, named, option_bytes, request, serve};

const UNSUP: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;

#[test]
fn go_tells_size_flags_and_block_sizes() {
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::connect(&server);
    let mut data = named("disk");
    data.extend([0, 2, 0, 3, 0, 1]);
    let replies = raw.ask(7, &data);
    let kinds: Vec<u32> = replies.iter().map(|reply| reply.0).collect();
    assert_eq!(kinds, [3, 3, 3, 1]);
    // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN
    assert_eq!(replies[0].1, [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0b1, 0b0110_1101]);
    assert_eq!(replies[1].1, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!(replies[2].1, b"\0\x01disk");
    raw.send(&request(0, 0, 77, 0, 512));
    assert_eq!(raw.simple_reply(), (77, 0));
    assert_eq!(raw.take(512), [0; 512]);
}

#[test]
fn a_read_only_export_says_so_and_refuses_writes() {
    let (server, export) = serve(Memory { read_only: true, ..Memory::new(1 << 20) }, Limits::default());
    let mut raw = Raw::connect(&server);
    let replies = raw.go("disk");
    assert_eq!(replies[0].1[11], 0b0000_0111);
    raw.send(&[request(1, 0, 1, 0, 512), vec![7; 512], request(4, 0, 2, 0, 512), request(6, 0, 3, 0, 512)].concat());
    assert_eq!([raw.simple_reply(), raw.simple_reply(), raw.simple_reply()], [(1, 1), (2, 1), (3, 1)]);
    assert!(export.data.lock().unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn the_old_way_to_choose_works_and_an_unknown_name_ends_it() {
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::silent(&server);
    raw.take(18);
    raw.send(&1u32.to_be_bytes());
    raw.send(&option_bytes(1, 4, b"disk"));
    let answer = raw.take(134);
    assert_eq!(answer[..8], (1u64 << 20).to_be_bytes());
    assert_eq!(answer[10..], [0; 124]);
    raw.send(&request(0, 0, 1, 512, 512));
    assert_eq!(raw.simple_reply(), (1, 0));

    let mut raw = Raw::connect(&server);
    raw.send(&option_bytes(1, 4, b"dusk"));
    assert!(raw.is_closed());
}

#[test]
fn a_refused_option_leaves_the_handshake_going() {
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::connect(&server);
    assert_eq!(raw.ask(4711, b"what")[0].0, UNSUP);
    assert_eq!(raw.ask(5, &[])[0].0, UNSUP, "STARTTLS where the system knows the peer");
    assert_eq!(raw.ask(8, b"data")[0].0, INVALID);
    assert_eq!(raw.ask(3, b"data")[0].0, INVALID);
    assert_eq!(raw.go("/etc/passwd")[0].0, UNKNOWN);
    assert_eq!(raw.ask(7, b"\0\0\0\xffdisk\0\0")[0].0, INVALID, "a name longer than its option");
    assert_eq!(raw.ask(7, b"\0\0\0\x04disk\xff\xff")[0].0, INVALID, "65535 information requests that are not there");
    assert_eq!(raw.ask(7, b"\0\0\0\x04\xff\xfe\xfd\xfc\0\0")[0].0, INVALID, "a name that is not text");
    let mut query = named("disk");
    query.extend([0, 0, 0, 1]);
    query.extend(named("base:allocation"));
    assert_eq!(raw.ask(10, &query)[0].0, INVALID, "meta contexts without structured replies");
    assert_eq!(raw.ask(8, &[])[0].0, 1);
    let mut many = named("disk");
    many.extend(u32::MAX.to_be_bytes());
    assert_eq!(raw.ask(10, &many)[0].0, INVALID, "four billion queries that are not there");
    assert_eq!(raw.ask(9, &[&named("disk")[..], &[0; 4]].concat())[0].1[4..], *b"base:allocation");
    assert_eq!(raw.ask(10, &[&named("disk")[..], &[0, 0, 0, 1], &named("qemu:dirty-bitmap:x")].concat()).len(), 1);
    assert_eq!(raw.ask(3, &[])[0].1, named("disk"));
    assert_eq!(raw.go("disk").last().unwrap().0, 1);
}

#[test]
fn block_status_needs_its_context_for_this_export() {
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::connect(&server);
    assert_eq!(raw.ask(8, &[])[0].0, 1);
    assert_eq!(raw.go("disk").last().unwrap().0, 1);
    raw.send(&request(7, 0, 9, 0, 4096));
    assert_eq!(raw.structured_reply(), (0x8001, 9, vec![0, 0, 0, 22, 0, 0]));
}

#[test]
fn what_cannot_be_understood_ends_the_connection() {
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let alien = [0x41u8; 64];
    for bytes in [&alien[..], &option_bytes(7, u32::MAX, b"\0\0\0\x04disk"), &option_bytes(4711, 1 << 20, &[0; 100])] {
        let started = Instant::now();
        let mut raw = Raw::connect(&server);
        // The server may be gone before it has everything.
        let _ = raw.0.write_all(bytes);
        assert!(raw.is_closed());
        assert!(started.elapsed() < PATIENCE / 4);
    }
    let mut raw = Raw::silent(&server);
    raw.take(18);
    raw.send(&u32::MAX.to_be_bytes());
    assert!(raw.is_closed(), "client flags that do not exist");
    let mut raw = Raw::connect(&server);
    for _ in 0..Limits::default().options_max {
        raw.ask(3, &[]);
    }
    assert!(raw.is_closed(), "options without end");
    let mut raw = Raw::connect(&server);
    assert_eq!(raw.ask(2, &[]), [(1, vec![])]);
    assert!(raw.is_closed(), "ABORT");
}

#[test]
fn who_says_nothing_or_little_is_cut_off_in_time() {
    let limits = Limits { handshake_timeout: Duration::from_millis(200), ..Limits::default() };
    let (server, _) = serve(Memory::new(1 << 20), limits);
    let started = Instant::now();
    let mut silent = Raw::silent(&server);
    let mut slow = Raw::connect(&server);
    slow.send(&option_bytes(7, 400, b"\0\0"));
    silent.take(18);
    assert!(silent.is_closed() && slow.is_closed());
    assert!(started.elapsed() < PATIENCE / 4);
}

#[test]
fn connections_have_limits_by_name() {
    let limits = Limits { connections_in_handshake_max: 2, connections_per_export_max: 1, ..Limits::default() };
    let (server, _) = serve(Memory::new(1 << 20), limits);
    let first = Raw::open(&server, "disk", false);
    let mut second = Raw::connect(&server);
    assert_eq!(second.go("disk")[0].0, POLICY);
    let _third = Raw::connect(&server);
    let (_, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(server.serve_stream(theirs).is_err(), "a third one in the handshake");
    drop(first);
    // The place becomes free once the server noticed.
    let deadline = Instant::now() + PATIENCE;
    while server.connections("disk") > 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(second.go("disk").last().unwrap().0, 1);
}

#[test]
fn our_client_is_told_why_it_is_refused() {
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    server.serve_stream(theirs).unwrap();
    let Err(ClientError::Refused { name, reason }) = Client::over_unix(ours, "dusk") else { panic!("it was let in") };
    assert_eq!((&name[..], &reason[..]), ("dusk", "there is no export \"dusk\""));
}
