//! The datastore's door for files.

use super::{DATACENTER, DATASTORE, State};

pub struct File {
    pub status: u16,
    pub headers: Vec<String>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub cut_at: Option<usize>,
}

fn only(status: u16) -> File {
    File { status, headers: Vec::new(), body: Vec::new(), cut_at: None }
}

fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8(bytes).unwrap()
}

pub fn read(state: &mut State, target: &str, range: Option<&str>, cookie: Option<&str>) -> File {
    if !cookie.is_some_and(|session| state.sessions.contains(session)) {
        return only(401);
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: Vec<String> = query.split('&').map(decoded).collect();
    if query != [format!("dcPath={DATACENTER}"), format!("dsName={DATASTORE}")] {
        return only(404);
    }
    let path = decoded(path.trim_start_matches("/folder/"));
    let (folder, file) = path.split_once('/').unwrap_or(("", &path));
    let Some(machine) = state.machines.values().find(|machine| machine.name == folder) else { return only(404) };
    let Some(disk) = file.strip_prefix("disk").and_then(|rest| rest.split(['-', '.']).next()?.parse::<usize>().ok())
    else {
        return only(404);
    };
    let Some(disk) = machine.disks.get(disk) else { return only(404) };
    if let Some(name) = file.strip_suffix(".vmdk").filter(|name| !name.ends_with("-flat")) {
        let is_base = !name.contains('-');
        let (kind, extent, parent) = match is_base {
            true => ("VMFS", format!("{name}-flat.vmdk"), "ffffffff"),
            false => ("VMFSSPARSE", format!("{name}-delta.vmdk"), "4f2a11b7"),
        };
        let text = format!(
            "# Disk DescriptorFile\nversion=3\nencoding=\"UTF-8\"\nCID=4f2a11b7\nparentCID={parent}\ncreateType=\"vmfs\"\n\n# Extent description\n\
             RW {} {kind} \"{extent}\"\n\n# Change Tracking File\nchangeTrackPath=\"{name}-ctk.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n",
            disk.bytes / 512
        );
        return File { status: 200, headers: Vec::new(), body: text.into_bytes(), cut_at: None };
    }
    // Its host writes to it.
    if machine.is_on && machine.snapshots.is_empty() {
        return only(500);
    }
    let Some((from, to)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
        return only(400);
    };
    let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
    if to >= disk.bytes || from > to {
        return only(416);
    }
    let mut body = disk.read_base(from, to - from + 1);
    let all = disk.bytes;
    let faults = &mut state.faults;
    let happens = |count: &mut u32| {
        let now = *count > 0;
        *count = count.saturating_sub(1);
        now
    };
    let (mut status, mut first, mut cut_at) = (206, from, None);
    if happens(&mut faults.busy_reads) {
        return only(503);
    }
    if happens(&mut faults.cut_reads) {
        cut_at = Some(body.len() / 2);
    } else if happens(&mut faults.short_reads) {
        body.truncate(body.len() / 2);
    } else if happens(&mut faults.other_ranges) {
        first = from.saturating_sub(512);
    } else if happens(&mut faults.whole_reads) {
        status = 200;
    }
    state.reads += 1;
    let headers = vec![format!("Content-Range: bytes {first}-{}/{all}", first + to - from)];
    File { status, headers, body, cut_at }
}
