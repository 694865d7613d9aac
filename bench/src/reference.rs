//! A minimal tracked sender: what a program could reach that knows what changed and does nothing else.
//!
//! Two processes, one TCP stream, 256 KiB of blocks a frame, BLAKE3 of each frame checked by the receiver, zstd at
//! level 1 or none. No TLS, no journal, no recovery, nothing durable: a floor to compare with, not something to use.
//!
//! A frame: `u32` extents, `u32` stored bytes, `u32` raw bytes (equal: not compressed), 32 bytes of BLAKE3 of the raw
//! bytes; then per extent `u64` offset and `u32` length, then the stored bytes. A frame without extents ends the stream.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use crate::Failure;

const FRAME_BYTES: usize = 256 << 10;
const HEAD_BYTES: usize = 44;
/// Frames that wait between the compressing and the sending thread.
const FRAMES_WAITING_MAX: usize = 16;

/// `reference-receive PORT DISK`, or `reference-send PORT DISK raw|zstd [EXTENTS]`.
pub fn run_if_asked(arguments: &[String]) -> Option<Result<(), Failure>> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["reference-receive", port, disk] => Some(receive(port, Path::new(disk))),
        ["reference-send", port, disk, mode] => Some(send(port, Path::new(disk), mode == "zstd", None)),
        ["reference-send", port, disk, mode, extents] => {
            Some(send(port, Path::new(disk), mode == "zstd", Some(Path::new(extents))))
        }
        _ => None,
    }
}

pub fn receiver(port: u16, disk: &Path) -> Result<Command, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["reference-receive", &port.to_string()]).arg(disk);
    Ok(command)
}

pub fn sender(port: u16, disk: &Path, mode: &str, extents: Option<&Path>) -> Result<Command, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["reference-send", &port.to_string()]).arg(disk).arg(mode).args(extents);
    Ok(command)
}

/// What a tracker would hand to the sender.
pub fn write_extents(path: &Path, writes: &[crate::image::Write]) -> Result<(), Failure> {
    let mut extents: Vec<(u64, u32)> = writes.iter().map(|write| (write.offset, write.data.len() as u32)).collect();
    extents.sort_unstable();
    let mut file = std::io::BufWriter::new(File::create(path)?);
    for (offset, length) in extents {
        file.write_all(&offset.to_le_bytes())?;
        file.write_all(&length.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

fn send(port: &str, disk: &Path, compress: bool, extents: Option<&Path>) -> Result<(), Failure> {
    let disk = File::open(disk)?;
    let extents = match extents {
        Some(list) => read_extents(list)?,
        None => allocated(&disk)?,
    };
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}"))?;
    let (frames, waiting) = mpsc::sync_channel::<Vec<u8>>(FRAMES_WAITING_MAX);
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || -> Result<(), Failure> {
            for frame in waiting {
                stream.write_all(&frame)?;
            }
            stream.write_all(&[0; HEAD_BYTES])?;
            // The receiver's word that it wrote everything.
            Ok(stream.read_exact(&mut [0])?)
        });
        let mut compressor = zstd::bulk::Compressor::new(1)?;
        let mut raw = Vec::new();
        let mut rest = &extents[..];
        while !rest.is_empty() {
            raw.clear();
            let mut count = 0;
            while let Some((offset, length)) = rest.get(count)
                && (count == 0 || raw.len() + *length as usize <= FRAME_BYTES)
            {
                let start = raw.len();
                raw.resize(start + *length as usize, 0);
                disk.read_exact_at(&mut raw[start..], *offset)?;
                count += 1;
            }
            let (now, later) = rest.split_at(count);
            rest = later;
            let packed = if compress { compressor.compress(&raw)? } else { Vec::new() };
            let stored = if compress && packed.len() < raw.len() { &packed } else { &raw };
            let mut frame = Vec::with_capacity(HEAD_BYTES + 12 * now.len() + stored.len());
            for number in [now.len(), stored.len(), raw.len()] {
                frame.extend((number as u32).to_le_bytes());
            }
            frame.extend(blake3::hash(&raw).as_bytes());
            for (offset, length) in now {
                frame.extend(offset.to_le_bytes());
                frame.extend(length.to_le_bytes());
            }
            frame.extend(stored);
            if frames.send(frame).is_err() {
                break;
            }
        }
        drop(frames);
        sending.join().map_err(|_| "the sending thread panicked")?
    })
}

fn receive(port: &str, disk: &Path) -> Result<(), Failure> {
    let listener = TcpListener::bind(format!("127.0.0.1:{port}"))?;
    let disk = File::options().write(true).open(disk)?;
    let mut stream = BufReader::with_capacity(1 << 20, listener.accept()?.0);
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    loop {
        let mut head = [0; HEAD_BYTES];
        stream.read_exact(&mut head)?;
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
        let (count, stored_bytes, raw_bytes) = (number(0), number(4), number(8));
        if count == 0 {
            stream.get_mut().write_all(&[1])?;
            return Ok(());
        }
        if count.max(stored_bytes).max(raw_bytes) > 64 << 20 {
            return Err("a frame is larger than any that the sender makes".into());
        }
        let mut extents = vec![0; 12 * count];
        stream.read_exact(&mut extents)?;
        let mut stored = vec![0; stored_bytes];
        stream.read_exact(&mut stored)?;
        let raw = if stored_bytes == raw_bytes { stored } else { decompressor.decompress(&stored, raw_bytes)? };
        if blake3::hash(&raw).as_bytes() != &head[12..] {
            return Err("a frame was damaged on its way".into());
        }
        let mut at = 0;
        for (offset, length) in parse_extents(&extents) {
            disk.write_all_at(&raw[at..at + length as usize], offset)?;
            at += length as usize;
        }
    }
}

fn parse_extents(bytes: &[u8]) -> impl Iterator<Item = (u64, u32)> {
    bytes.chunks_exact(12).map(|extent| {
        let (offset, length) = extent.split_at(8);
        (
            u64::from_le_bytes(offset.try_into().expect("eight bytes")),
            u32::from_le_bytes(length.try_into().expect("four")),
        )
    })
}

fn read_extents(path: &Path) -> Result<Vec<(u64, u32)>, Failure> {
    Ok(parse_extents(&std::fs::read(path)?).collect())
}

/// All that is not a hole, in pieces of a frame.
fn allocated(disk: &File) -> Result<Vec<(u64, u32)>, Failure> {
    let bytes = disk.metadata()?.len();
    let mut extents = Vec::new();
    let mut position = 0;
    while position < bytes {
        // SAFETY: takes a descriptor, which is open, and numbers.
        let start = unsafe { libc::lseek(disk.as_raw_fd(), position as i64, libc::SEEK_DATA) };
        if start < 0 {
            break;
        }
        // SAFETY: as above.
        let end = unsafe { libc::lseek(disk.as_raw_fd(), start, libc::SEEK_HOLE) };
        let mut at = start as u64;
        position = if end < 0 { bytes } else { end as u64 };
        while at < position {
            let length = (position - at).min(FRAME_BYTES as u64);
            extents.push((at, length as u32));
            at += length;
        }
    }
    Ok(extents)
}
