//! A disk as it was at a snapshot, read from the file of its blocks (`-flat.vmdk`) through the datastore's door for files (`/folder`).
//!
//! *Consistency.* While a snapshot is there the machine writes elsewhere, so the file stands still. Nothing is taken for data that is not exactly the range that was asked for.
//! *Retries.* [`ATTEMPTS`] of each read. *Cancellation.* None. *Crash.* Nothing is kept.

use std::time::Duration;

use hyper::header::{CONTENT_RANGE, HeaderMap};

use crate::error::VsphereError;
use crate::inventory::Datastore;
use crate::session::Session;

const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(100);
const DESCRIPTOR_BYTES_MAX: usize = 64 << 10;
/// Of one read.
pub const READ_BYTES_MAX: u64 = 1 << 20;
const WHAT: &str = "a read of a datastore";

/// Where the blocks of a disk are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Flat {
    /// What is asked for.
    path: String,
    pub bytes: u64,
}

impl Flat {
    /// By the descriptor of a disk: `[datastore] folder/name.vmdk`.
    pub fn find(session: &Session, file: &str, datastore: &Datastore, disk_bytes: u64) -> Result<Self, VsphereError> {
        let wrong = |reason: String| VsphereError::Answer { what: format!("the descriptor {file}"), reason };
        let inside =
            file.split_once("] ").map(|(_, inside)| inside).ok_or_else(|| wrong("it has no datastore".into()))?;
        let path = folder_path(inside, datastore);
        let answer = with_attempts(session, || {
            let answer = session.read(&path, None, DESCRIPTOR_BYTES_MAX)?;
            if answer.status == 200 { Ok(answer) } else { Err(status(session, answer.status)) }
        })?;
        let text = String::from_utf8_lossy(&answer.body);
        let extent = extent_of(&text).map_err(&wrong)?;
        if extent.bytes != disk_bytes {
            return Err(wrong(format!("its blocks have {} bytes, the disk {disk_bytes}", extent.bytes)));
        }
        let beside = inside.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        Ok(Self { path: folder_path(&format!("{beside}{}", extent.file), datastore), bytes: disk_bytes })
    }

    pub fn read(&self, session: &Session, offset: u64, buffer: &mut [u8]) -> Result<(), VsphereError> {
        for (index, part) in buffer.chunks_mut(READ_BYTES_MAX as usize).enumerate() {
            let from = offset + index as u64 * READ_BYTES_MAX;
            with_attempts(session, || self.read_part(session, from, part))?;
        }
        Ok(())
    }

    fn read_part(&self, session: &Session, from: u64, part: &mut [u8]) -> Result<(), VsphereError> {
        let wrong = |reason: String| VsphereError::Answer { what: WHAT.to_owned(), reason };
        let length = part.len() as u64;
        let answer = session.read(&self.path, Some((from, length)), part.len())?;
        if answer.status != 206 {
            return Err(match answer.status {
                // All of it, whatever was asked for.
                200 => wrong("it is not the range that was asked for".to_owned()),
                other => status(session, other),
            });
        }
        let range = range_of(&answer.headers);
        if range != Some((from, from + length - 1, Some(self.bytes))) && range != Some((from, from + length - 1, None))
        {
            return Err(wrong(format!(
                "it is of {range:?}, {length} bytes at {from} of {} were asked for",
                self.bytes
            )));
        }
        if answer.body.len() != part.len() {
            return Err(wrong(format!("it has {} bytes instead of {length}", answer.body.len())));
        }
        part.copy_from_slice(&answer.body);
        Ok(())
    }
}

fn status(session: &Session, status: u16) -> VsphereError {
    VsphereError::Status { server: session.server(), what: WHAT.to_owned(), status }
}

/// What is over in a moment is tried again: a cut, a server that is busy, an answer that is short.
fn with_attempts<T>(session: &Session, mut read: impl FnMut() -> Result<T, VsphereError>) -> Result<T, VsphereError> {
    let mut attempt = 1;
    loop {
        match read() {
            Err(
                error @ (VsphereError::Cut { .. }
                | VsphereError::TimedOut { .. }
                | VsphereError::Unreachable { .. }
                | VsphereError::Answer { .. }
                | VsphereError::Status { status: 429 | 500..=599, .. }),
            ) if attempt < ATTEMPTS => {
                tracing::debug!(%error, attempt, "a read is tried again");
                if session.stopping().wait_for(PAUSE * attempt * attempt) {
                    return Err(VsphereError::Stopping);
                }
                attempt += 1;
            }
            other => return other,
        }
    }
}

/// First and last byte, and how many there are.
fn range_of(headers: &HeaderMap) -> Option<(u64, u64, Option<u64>)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, all) = text.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?, all.trim().parse().ok()))
}

fn folder_path(inside: &str, datastore: &Datastore) -> String {
    let parts: Vec<String> = inside.split('/').map(encoded).collect();
    format!("/folder/{}?dcPath={}&dsName={}", parts.join("/"), encoded(&datastore.datacenter), encoded(&datastore.name))
}

fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[derive(PartialEq, Eq, Debug)]
struct FlatExtent {
    file: String,
    bytes: u64,
}

/// The one extent of a descriptor whose blocks lie one after another in a file.
fn extent_of(text: &str) -> Result<FlatExtent, String> {
    let mut parent = None;
    let mut extents = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(value) = line.strip_prefix("parentCID=") {
            parent = Some(value.to_lowercase());
        }
        let mut words = line.splitn(4, ' ');
        if matches!(words.next(), Some("RW" | "RDONLY")) {
            let (sectors, kind, rest) = (words.next(), words.next(), words.next());
            extents.push((sectors.and_then(|text| text.parse::<u64>().ok()), kind.unwrap_or_default(), rest));
        }
    }
    if parent.is_some_and(|parent| parent != "ffffffff") {
        return Err("it lies above a snapshot".to_owned());
    }
    let [(sectors, kind, rest)] = extents[..] else { return Err(format!("it has {} extents", extents.len())) };
    if !matches!(kind, "VMFS" | "FLAT") {
        return Err(format!("its blocks are kept as {kind}, not one after another in a file"));
    }
    let mut quoted = rest.unwrap_or_default().split('"');
    let (Some(""), Some(file), Some(after)) = (quoted.next(), quoted.next(), quoted.next()) else {
        return Err("its extent names no file".to_owned());
    };
    if !matches!(after.trim(), "" | "0") || file.is_empty() || file.contains('/') || file.contains(':') {
        return Err(format!("its extent {file:?} lies elsewhere"));
    }
    let bytes = sectors.and_then(|sectors| sectors.checked_mul(512)).ok_or("its extent has no size")?;
    Ok(FlatExtent { file: file.to_owned(), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=4f2a\n";

    #[test]
    fn the_file_of_blocks_is_the_one_that_the_descriptor_names() {
        let of = |rest: &str| extent_of(&format!("{HEAD}{rest}"));
        let expected = FlatExtent { file: "web 1-flat.vmdk".into(), bytes: 8 << 20 };
        let good = "parentCID=ffffffff\ncreateType=\"vmfs\"\n# Extent description\nRW 16384 VMFS \"web 1-flat.vmdk\"\n";
        assert_eq!(of(good), Ok(expected));
        assert_eq!(of("RW 2 FLAT \"a-flat.vmdk\" 0\n").unwrap().bytes, 1024);
        for (wrong, reason) in [
            ("parentCID=4f2a\nRW 16384 VMFS \"a-flat.vmdk\"\n", "above a snapshot"),
            ("RW 16384 VMFSSPARSE \"a-000001-delta.vmdk\"\n", "VMFSSPARSE"),
            ("RW 16384 SESPARSE \"a-000001-sesparse.vmdk\"\n", "SESPARSE"),
            ("RW 16384 VMFS \"vsan://52/4a\"\n", "elsewhere"),
            ("RW 16384 VMFS \"../other/a-flat.vmdk\"\n", "elsewhere"),
            ("RW 16384 FLAT \"a-flat.vmdk\" 128\n", "elsewhere"),
            ("RW x VMFS \"a-flat.vmdk\"\n", "no size"),
            ("RW 16384 VMFS a-flat.vmdk\n", "no file"),
            ("RW 1 VMFS \"a\"\nRW 1 VMFS \"b\"\n", "2 extents"),
            ("", "0 extents"),
        ] {
            let told = of(wrong).unwrap_err();
            assert!(told.contains(reason), "{wrong}: {told}");
        }
    }

    #[test]
    fn names_are_encoded() {
        let datastore = Datastore { name: "SAN & 1".into(), free_bytes: 0, datacenter: "Lab/DC 0".into() };
        let path = folder_path("web #1/web.vmdk", &datastore);
        assert_eq!(path, "/folder/web%20%231/web.vmdk?dcPath=Lab%2FDC%200&dsName=SAN%20%26%201");
    }
}
