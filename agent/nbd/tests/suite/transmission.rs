//! Requests: hostile, overlapping, slow, and more than anybody reads.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tidemark_base::Extent;
use tidemark_base::disk::Allocation;
use tidemark_nbd::{Client, ClientError, Limits};

use crate::raw::{Memory, PATIENCE, Raw, request, serve};

const MIB: u32 = 1 << 20;

/// Small, reproducible, good enough to mix things up.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % end
    }
}

#[test]
fn what_lies_beyond_the_end_is_refused_and_the_rest_goes_on() {
    for structured in [false, true] {
        let (server, export) = serve(Memory::new(1 << 20), Limits::default());
        let mut raw = Raw::open(&server, "disk", structured);
        let end = 1 << 20;
        let error = |raw: &mut Raw, of_read: bool| match of_read && structured {
            true => {
                let (kind, cookie, payload) = raw.structured_reply();
                assert_eq!((kind, payload.len()), (0x8001, 6));
                (cookie, u32::from(payload[3]))
            }
            false => raw.simple_reply(),
        };
        for (number, (command, offset, length, errno)) in [
            (0, end, 512, 22),
            (0, end - 512, 1024, 22),
            (0, u64::MAX - 511, 1024, 22),
            (0, 0, u32::MAX, 22),
            (0, 0, 0, 22),
            (0, 1, 512, 22),
            (6, end - 512, 1024, 28),
            (6, u64::MAX, u32::MAX - 511, 22),
            (4, end, 512, 22),
            (4, 0, 100, 22),
            (4711, 0, 512, 22),
            (5, 0, 512, 22),
        ]
        .into_iter()
        .enumerate()
        {
            raw.send(&request(command, 0, number as u64, offset, length));
            assert_eq!(error(&mut raw, command == 0), (number as u64, errno), "{command} {offset} {length}");
        }
        raw.send(&request(0, 0x8000, 99, 0, 512));
        assert_eq!(error(&mut raw, true), (99, 22), "an unknown flag");
        // A refused write brings its data all the same.
        let data = vec![7; 1024];
        raw.send(
            &[request(1, 0, 1, end - 512, 1024), data.clone(), request(1, 0, 2, 100, 1024), data.clone()].concat(),
        );
        raw.send(&[request(1, 0, 3, u64::MAX - 1023, 1024), data.clone(), request(1, 0, 4, 1024, 1024), data].concat());
        let replies = [(); 4].map(|()| raw.simple_reply());
        let mut sorted = replies;
        sorted.sort();
        assert_eq!(sorted, [(1, 28), (2, 22), (3, 28), (4, 0)]);
        assert_eq!(export.data.lock().unwrap().iter().filter(|&&byte| byte == 7).count(), 1024);
    }
}

#[test]
fn a_write_over_the_limit_is_skipped_without_memory_for_it() {
    let limits = Limits { request_bytes_max: MIB, ..Limits::default() };
    let (server, _) = serve(Memory::new(64 << 20), limits);
    let mut raw = Raw::open(&server, "disk", false);
    raw.send(&request(1, 0, 1, 0, 32 * MIB));
    assert_eq!(raw.simple_reply(), (1, 22));
    for _ in 0..32 {
        raw.send(&vec![0x25; MIB as usize]);
    }
    raw.send(&request(3, 0, 2, 0, 0));
    assert_eq!(raw.simple_reply(), (2, 0));
}

#[test]
fn requests_larger_than_the_buffer_arrive_whole() {
    for inline in [true, false] {
        let (server, export) = serve(Memory { inline, ..Memory::new(64 << 20) }, Limits::default());
        let mut raw = Raw::open(&server, "disk", true);
        let data: Vec<u8> = (0..32 * MIB).map(|index| (index % 251) as u8).collect();
        let writer = std::thread::spawn({
            let mut socket = raw.0.try_clone().unwrap();
            let data = data.clone();
            move || {
                socket.write_all(&[request(1, 0, 1, 512, 512), vec![9; 512]].concat()).unwrap();
                socket.write_all(&request(1, 0, 2, 4096, 32 * MIB)).unwrap();
                socket.write_all(&data).unwrap();
                socket.write_all(&[request(1, 0, 3, 1024, 512), vec![8; 512]].concat()).unwrap();
            }
        });
        let mut replies = [(); 3].map(|()| raw.simple_reply());
        replies.sort();
        assert_eq!(replies, [(1, 0), (2, 0), (3, 0)]);
        writer.join().unwrap();
        assert!(export.data.lock().unwrap()[4096..][..data.len()] == data);
        // The don't-fragment flag is what is done anyway.
        raw.send(&request(0, 4, 4, 4096, 32 * MIB));
        let (kind, cookie, payload) = raw.structured_reply();
        assert_eq!((kind, cookie), (1, 4));
        assert_eq!(payload[..8], 4096u64.to_be_bytes());
        assert!(payload[8..] == data);
    }
}

#[test]
fn writes_that_came_together_are_one_batch_with_one_result_each() {
    let (server, export) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    let mut bytes = Vec::new();
    for number in 0..32u64 {
        bytes.extend(request(1, 0, number, number * 512, 512));
        bytes.extend([if number == 5 { 0xff } else { number as u8 }; 512]);
    }
    raw.send(&bytes);
    let replies: Vec<_> = (0..32).map(|_| raw.simple_reply()).collect();
    assert!((0..32).all(|number| replies[number as usize] == (number, if number == 5 { 5 } else { 0 })));
    assert!(export.largest_batch.load(Ordering::Relaxed) > 1);
}

/// Many writes, FUA writes and zeroings over few blocks, without waiting for a reply: the disk must end as if they had
/// been executed one by one.
#[test]
fn overlapping_writes_of_a_connection_keep_their_order() {
    for (inline, seed) in (0..24).map(|seed| (seed % 2 == 0, seed)) {
        let (server, export) = serve(Memory { inline, ..Memory::new(64 << 10) }, Limits::default());
        let raw = Raw::open(&server, "disk", false);
        let mut random = Random(seed);
        let mut model = vec![0u8; 64 << 10];
        let mut bytes = Vec::new();
        let count = 600;
        for number in 0..count {
            let (offset, blocks) = (random.below(120) * 512, 1 + random.below(8));
            let range = offset as usize..(offset + blocks * 512) as usize;
            let value = 1 + random.below(250) as u8;
            let length = (blocks * 512) as u32;
            match random.below(4) {
                0 => {
                    bytes.extend(request(6, 0, number, offset, length));
                    model[range].fill(0);
                }
                kind => {
                    bytes.extend(request(1, u16::from(kind == 1), number, offset, length));
                    bytes.extend(vec![value; range.len()]);
                    model[range].fill(value);
                }
            }
        }
        let writer = std::thread::spawn({
            let mut socket = raw.0.try_clone().unwrap();
            move || socket.write_all(&bytes).unwrap()
        });
        let mut raw = raw;
        for _ in 0..count {
            assert_eq!(raw.simple_reply().1, 0);
        }
        writer.join().unwrap();
        assert!(*export.data.lock().unwrap() == model, "seed {seed}");
    }
}

/// The same inside one round, where nothing is with the workers yet.
#[test]
fn what_came_together_keeps_its_order_too() {
    let (server, export) = serve(Memory::new(64 << 10), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    for round in 1..100u8 {
        let write = |fua, cookie, value| [request(1, fua, cookie, 0, 512), vec![value; 512]].concat();
        let first = if round % 2 == 0 { request(6, 0, 1, 0, 4096) } else { write(1, 1, 200) };
        raw.send(&[write(0, 0, 201), first, write(0, 2, round)].concat());
        for _ in 0..3 {
            assert_eq!(raw.simple_reply().1, 0);
        }
        assert_eq!(export.data.lock().unwrap()[..512], [round; 512]);
    }
}

/// Long writes go to the workers and short ones do not: what overlaps is done in the order in which it came all the same.
#[test]
fn long_and_short_writes_keep_their_order() {
    for seed in 0..6 {
        let (server, export) = serve(Memory::new(1 << 20), Limits::default());
        let mut raw = Raw::open(&server, "disk", false);
        let mut random = Random(seed);
        let mut model = vec![0; 1 << 20];
        let mut bytes = Vec::new();
        for cookie in 0..80u64 {
            let length = 512 * if random.below(2) == 0 { 1 + random.below(8) } else { 100 + random.below(300) };
            let offset = 512 * random.below((model.len() as u64 - length) / 512 + 1);
            let value = 1 + (cookie % 200) as u8;
            bytes.extend(request(1, 0, cookie, offset, length as u32));
            bytes.extend(vec![value; length as usize]);
            model[offset as usize..][..length as usize].fill(value);
        }
        let mut socket = raw.0.try_clone().unwrap();
        let writer = std::thread::spawn(move || socket.write_all(&bytes).unwrap());
        let mut answered: Vec<u64> = (0..80)
            .map(|_| raw.simple_reply())
            .map(|(cookie, error)| {
                assert_eq!(error, 0);
                cookie
            })
            .collect();
        writer.join().unwrap();
        answered.sort_unstable();
        assert_eq!(answered, (0..80).collect::<Vec<_>>());
        assert!(*export.data.lock().unwrap() == model, "seed {seed}");
    }
}

/// A client that asks and asks is not listened to while its limit of requests is with the workers.
#[test]
fn requests_in_flight_have_a_limit() {
    let limits = Limits { in_flight_requests_max: 3, workers_per_export_max: 8, ..Limits::default() };
    let (server, export) = serve(Memory::new(1 << 20), limits);
    let mut raw = Raw::open(&server, "disk", false);
    let mut other = Raw::open(&server, "disk", false);
    export.flushing.set(true);
    raw.send(&(0..10).flat_map(|cookie| request(3, 0, cookie, 0, 0)).collect::<Vec<_>>());
    raw.send(&request(0, 0, 77, 0, 512));
    export.flushing.wait_for(3);
    // Nothing of this connection is answered, not even a read from memory; another connection is served.
    other.send(&request(0, 0, 1, 0, 512));
    assert_eq!(other.simple_reply(), (1, 0));
    raw.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(raw.0.read(&mut [0; 1]).is_err(), "the eleventh request was answered");
    assert_eq!(export.flushing.waiting(), 3, "the fourth flush waits for a place");
    raw.0.set_read_timeout(Some(PATIENCE)).unwrap();
    export.flushing.set(false);
    let mut answered = Vec::new();
    for _ in 0..11 {
        let (cookie, error) = raw.simple_reply();
        assert_eq!(error, 0);
        if cookie == 77 {
            raw.take(512);
        }
        answered.push(cookie);
    }
    answered.sort_unstable();
    assert_eq!(answered, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 77]);
}

#[test]
fn a_slow_flush_or_read_holds_up_nothing_else() {
    let (server, export) = serve(Memory::new(8 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    export.flushing.set(true);
    raw.send(&request(3, 0, 1, 0, 0));
    export.flushing.wait_for(1);
    raw.send(&[request(1, 0, 2, 0, 512), vec![3; 512]].concat());
    assert_eq!(raw.simple_reply(), (2, 0));
    raw.send(&request(0, 0, 3, 0, 512));
    assert_eq!(raw.simple_reply(), (3, 0));
    assert_eq!(raw.take(512), [3; 512]);
    export.flushing.set(false);
    assert_eq!(raw.simple_reply(), (1, 0));
}

#[test]
fn a_client_that_reads_no_replies_harms_only_itself() {
    let limits = Limits { in_flight_bytes_max: 4 << 20, stop_timeout: Duration::from_millis(300), ..Limits::default() };
    let (server, _) = serve(Memory { inline: false, ..Memory::new(8 << 20) }, limits);
    let mut greedy = Raw::open(&server, "disk", true);
    // In one piece: this has to fit into the socket, because the server soon stops reading.
    let requests: Vec<u8> = (0..2000).flat_map(|number| request(0, 0, number, 0, MIB)).collect();
    greedy.send(&requests);
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.serve_stream(theirs).unwrap();
    let mut other = Client::over_unix(ours, "disk").unwrap();
    for round in 0..50 {
        other.write(512 * round, &[5; 512]).unwrap();
        other.read(512 * round, &mut [0; 512]).unwrap();
        other.flush().unwrap();
    }
    // Stopping does not wait for it for ever either.
    server.stop().unwrap();
}

#[test]
fn half_a_request_and_away_releases_the_export() {
    let (server, export) = serve(Memory::new(1 << 20), Limits::default());
    let bytes = [request(1, 0, 1, 0, 4096), vec![1; 4096]].concat();
    for cut in [1, 27, 28, 29, 4123] {
        let mut raw = Raw::open(&server, "disk", true);
        raw.send(&bytes[..cut]);
        drop(raw);
    }
    server.close_export("disk").unwrap();
    assert_eq!(server.connections("disk"), 0);
    assert!(export.data.lock().unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn work_in_flight_ends_before_the_export_is_released() {
    let (server, export) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    export.flushing.set(true);
    raw.send(&request(3, 0, 1, 0, 0));
    export.flushing.wait_for(1);
    let only_server: Weak<Memory> = Arc::downgrade(&export);
    drop(raw);
    let closing = std::thread::scope(|scope| {
        let closing = scope.spawn(|| server.close_export("disk"));
        assert_eq!(server.connections("disk"), 1);
        assert!(!closing.is_finished());
        export.flushing.set(false);
        closing.join().unwrap()
    });
    closing.unwrap();
    drop(export);
    // The provider's and nobody else's.
    assert_eq!(only_server.strong_count(), 1);
}

#[test]
fn stopping_answers_what_was_received() {
    let (server, export) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    export.flushing.set(true);
    raw.send(&[request(1, 0, 1, 0, 512), vec![3; 512], request(3, 0, 2, 0, 0)].concat());
    export.flushing.wait_for(1);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| server.stop());
        assert_eq!(raw.simple_reply(), (1, 0));
        export.flushing.set(false);
        assert_eq!(raw.simple_reply(), (2, 0));
        assert!(raw.is_closed());
        stopping.join().unwrap().unwrap();
    });
    let (_, theirs) = UnixStream::pair().unwrap();
    assert!(server.serve_stream(theirs).is_err());
}

#[test]
fn a_hung_disk_is_named_when_stopping_gives_up() {
    let limits = Limits { stop_timeout: Duration::from_millis(50), ..Limits::default() };
    let (server, export) = serve(Memory::new(1 << 20), limits);
    let mut raw = Raw::open(&server, "disk", false);
    export.flushing.set(true);
    raw.send(&request(3, 0, 1, 0, 0));
    export.flushing.wait_for(1);
    let started = Instant::now();
    assert_eq!(server.stop().unwrap_err().connections, 1);
    assert!(started.elapsed() < PATIENCE / 4);
    export.flushing.set(false);
    server.stop().unwrap();
}

/// A bug of an export costs the connection, not the server: nothing hangs, the export is released.
#[test]
fn an_export_that_panics_ends_its_connection_alone() {
    for (inline, fua) in [(true, 0), (true, 1), (false, 0)] {
        let (server, export) = serve(Memory { inline, ..Memory::new(1 << 20) }, Limits::default());
        let mut other = Raw::open(&server, "disk", false);
        let mut raw = Raw::open(&server, "disk", false);
        raw.send(&request(3, 0, 1, 0, 0));
        assert_eq!(raw.simple_reply(), (1, 0));
        raw.send(&[request(1, fua, 2, 0, 512), vec![0xfe; 512], request(1, fua, 3, 0, 512), vec![1; 512]].concat());
        assert!(raw.is_closed());
        other.send(&[request(1, fua, 4, 0, 512), vec![2; 512]].concat());
        assert_eq!(other.simple_reply(), (4, 0));
        server.stop().unwrap();
        // The provider's and this test's; a thread of the connection that ended may be about to let go.
        let deadline = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&export) != 2 {
            assert!(Instant::now() < deadline, "{} hold it: inline {inline}, fua {fua}", Arc::strong_count(&export));
            std::thread::yield_now();
        }
    }
}

#[test]
fn disconnecting_answers_what_came_before() {
    let (server, export) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    export.flushing.set(true);
    raw.send(&[request(3, 0, 1, 0, 0), request(2, 0, 2, 0, 0), request(3, 0, 3, 0, 0)].concat());
    export.flushing.wait_for(1);
    export.flushing.set(false);
    assert_eq!(raw.simple_reply(), (1, 0));
    assert!(raw.is_closed());
}

#[test]
fn a_wrong_magic_number_ends_it_after_the_requests_before() {
    let (server, export) = serve(Memory::new(1 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", false);
    raw.send(&[request(1, 0, 1, 0, 512), vec![3; 512], vec![0xee; 28]].concat());
    assert_eq!(raw.simple_reply(), (1, 0));
    assert!(raw.is_closed());
    assert_eq!(export.data.lock().unwrap()[511], 3);
}

#[test]
fn block_status_joins_and_cuts_runs() {
    let (server, _) = serve(Memory::new(8 << 20), Limits::default());
    let mut raw = Raw::open(&server, "disk", true);
    raw.send(&request(7, 0, 1, 512 << 10, 2 * MIB));
    let words = |payload: Vec<u8>| -> Vec<u32> {
        payload.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect()
    };
    let (kind, cookie, payload) = raw.structured_reply();
    assert_eq!((kind, cookie), (5, 1));
    assert_eq!(words(payload), [1, MIB / 2, 0, MIB, 3, MIB / 2, 0]);
    raw.send(&request(7, 8, 2, MIB as u64, 4 * MIB));
    assert_eq!(words(raw.structured_reply().2), [1, MIB, 3]);
}

#[test]
fn our_client_and_our_server_agree() {
    for inline in [true, false] {
        let (server, export) = serve(Memory { inline, ..Memory::new(8 << 20) }, Limits::default());
        let (ours, theirs) = UnixStream::pair().unwrap();
        server.serve_stream(theirs).unwrap();
        let mut client = Client::over_unix(ours, "disk").unwrap();
        assert_eq!(client.bytes(), 8 << 20);
        assert!(client.info().can_fua() && client.info().multi_conn() && !client.info().is_read_only());
        let data: Vec<u8> = (0..5 * MIB).map(|index| (index % 241) as u8).collect();
        client.write(MIB as u64, &data).unwrap();
        client.write_durable(0, &data[..4096]).unwrap();
        client.write_many((0..100).map(|number| (number * 1024 + 8192, &data[..512]))).unwrap();
        client.flush().unwrap();
        let mut read = vec![0; data.len()];
        client.read(MIB as u64, &mut read).unwrap();
        assert!(read == data);
        client.zero(Extent::new(MIB as u64, 4096), true).unwrap();
        client.trim(Extent::new(2 * MIB as u64, 4096)).unwrap();
        assert!(export.data.lock().unwrap()[MIB as usize..][..4096].iter().all(|&byte| byte == 0));
        let status = client.block_status(Extent::new(0, 3 << 20)).unwrap();
        let mib = |number: u64| Extent::new(number << 20, 1 << 20);
        assert_eq!(status, [(mib(0), Allocation::Data), (mib(1), Allocation::Hole), (mib(2), Allocation::Data)]);
        let error = client.write_many([(0, &[1; 512][..]), (512, &[0xff; 512]), (1024, &[1; 512])]).unwrap_err();
        assert!(matches!(error, ClientError::Server { operation: "write", extent, errno: 5 } if extent.offset == 512));
        assert!(matches!(client.read(1, &mut [0; 512]), Err(ClientError::Range { .. })));
        assert!(matches!(client.read(8 << 20, &mut [0; 512]), Err(ClientError::Range { .. })));
        client.close().unwrap();
    }
}

/// Garbage in every phase: nothing panics, and the server serves the next one.
#[test]
fn garbage_panics_nobody() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let meant = info.payload_as_str() == Some("this export is broken");
        if !meant && std::thread::current().name().is_some_and(|name| name.starts_with("nbd-")) {
            PANICS.fetch_add(1, Ordering::Relaxed);
        }
        before(info);
    }));
    let (server, _) = serve(Memory::new(1 << 20), Limits::default());
    let mut random = Random(7);
    for round in 0..300 {
        let mut raw = if round % 3 == 0 { Raw::connect(&server) } else { Raw::open(&server, "disk", round % 2 == 0) };
        let mut bytes = Vec::new();
        for _ in 0..1 + random.below(20) {
            let (kind, small) = (random.below(9) as u16, random.below(4) == 0);
            let length = if small { 512 << random.below(12) } else { random.below(1 << 32) };
            let offset = if small { 512 * random.below(2100) } else { random.below(u64::MAX) << 20 };
            if round % 3 == 0 {
                bytes.extend(crate::raw::option_bytes(u32::from(kind) + 1, (length % 100) as u32, &[]));
                bytes.extend((0..length % 100).map(|_| random.below(4) as u8));
            } else {
                bytes.extend(request(kind, random.below(64) as u16, 1, offset, length as u32));
                bytes.extend((0..random.below(3) * 100).map(|_| random.below(256) as u8));
            }
        }
        // The server may hang up in the middle of it.
        let _ = raw.0.write_all(&bytes);
        let _ = raw.0.shutdown(Shutdown::Write);
        raw.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = std::io::copy(&mut raw.0, &mut std::io::sink());
    }
    assert_eq!(Raw::open(&server, "disk", true).0.take_error().unwrap().map(|error| error.kind()), None);
    server.stop().unwrap();
    assert_eq!(PANICS.load(Ordering::Relaxed), 0);
}
