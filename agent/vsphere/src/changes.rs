//! What changed of a disk between two snapshots.

use std::fmt;

use roxmltree::Node;
use tidemark_base::{Extent, ExtentSet};

use crate::error::VsphereError;
use crate::session::Session;
use crate::soap::{Reference, argument, child, child_text, children};

/// Answers to one question: each covers some of the disk, at least a sector.
const ANSWERS_MAX: usize = 1 << 20;
const METHOD: &str = "QueryChangedDiskAreas";

/// `UUID/N`: since when changes are told. N grows within one UUID.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChangeId {
    pub uuid: String,
    pub number: u64,
}

impl ChangeId {
    pub fn parse(text: &str) -> Option<Self> {
        let (uuid, number) = text.rsplit_once('/')?;
        Some(Self { uuid: uuid.to_owned(), number: number.parse().ok()? }).filter(|id| !id.uuid.is_empty())
    }

    /// Why what changed between the two is not known, if it is not.
    pub fn gap_until(&self, later: &Self) -> Option<String> {
        if self.uuid != later.uuid {
            return Some("VMware began to track its changes anew".to_owned());
        }
        if later.number < self.number {
            return Some("the machine was reverted to an older snapshot".to_owned());
        }
        None
    }
}

impl fmt::Display for ChangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.uuid, self.number)
    }
}

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub enum Since<'a> {
    Id(&'a ChangeId),
    /// Everything that was ever written.
    Ever,
}

/// What changed until a snapshot. `Ok(Err(reason))`: nobody knows.
pub fn query(
    session: &Session,
    machine: &Reference,
    snapshot: &Reference,
    key: i64,
    disk_bytes: u64,
    since: Since<'_>,
) -> Result<Result<ExtentSet, String>, VsphereError> {
    let since = match since {
        Since::Id(id) => id.to_string(),
        Since::Ever => "*".to_owned(),
    };
    let mut changed = ExtentSet::new();
    let mut from = 0;
    for _ in 0..ANSWERS_MAX {
        let arguments = snapshot.argument("snapshot")
            + &argument("deviceKey", &key.to_string())
            + &argument("startOffset", &from.to_string())
            + &argument("changeId", &since);
        let part = session.query(METHOD, machine, &arguments, |answer| {
            let told = child(answer, "returnval").ok_or_else(|| wrong("it is empty"))?;
            part(told, from, disk_bytes)
        });
        let part = match part {
            Ok(part) => part,
            Err(error) if error.is_fault(&["FileFault", "InvalidArgument"]) => {
                return Ok(Err(format!("VMware cannot tell what changed since {since} ({error})")));
            }
            Err(error) => return Err(error),
        };
        part.areas.into_iter().for_each(|area| changed.insert(area));
        from = part.end;
        if from >= disk_bytes {
            return Ok(Ok(changed));
        }
    }
    Err(wrong("it does not come to an end"))
}

struct Part {
    areas: Vec<Extent>,
    end: u64,
}

fn wrong(reason: impl Into<String>) -> VsphereError {
    VsphereError::Answer { what: METHOD.to_owned(), reason: reason.into() }
}

/// One answer. Whatever is not exactly what was asked would leave out changes.
fn part(told: Node<'_, '_>, from: u64, disk_bytes: u64) -> Result<Part, VsphereError> {
    let number = |node: Node<'_, '_>, name: &str| {
        let text = child_text(node, name).unwrap_or_default();
        text.parse::<u64>().map_err(|_| wrong(format!("{name} is {text:?}")))
    };
    let (start, length) = (number(told, "startOffset")?, number(told, "length")?);
    let end = start.checked_add(length).ok_or_else(|| wrong("it ends nowhere"))?;
    if start != from {
        return Err(wrong(format!("it begins at {start}, {from} was asked for")));
    }
    if length == 0 {
        return Err(wrong(format!("it covers nothing at {from}")));
    }
    let mut areas = Vec::new();
    for area in children(told, "changedArea") {
        let (start, length) = (number(area, "start")?, number(area, "length")?);
        let area = start.checked_add(length).map(|_| Extent::new(start, length));
        let area = area.filter(|area| area.end() <= disk_bytes && area.length > 0);
        areas.push(area.ok_or_else(|| wrong(format!("{length} bytes at {start} are not on the disk")))?);
    }
    Ok(Part { areas, end })
}

#[cfg(test)]
mod tests {
    use roxmltree::Document;

    use super::*;

    #[test]
    fn change_ids_tell_whether_there_is_a_gap() {
        let of = |text: &str| ChangeId::parse(text).unwrap();
        let id = of("52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81");
        assert_eq!(id.number, 81);
        assert_eq!(id.to_string(), "52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81");
        assert_eq!(id.gap_until(&of("52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/90")), None);
        assert!(of("a/9").gap_until(&of("b/10")).unwrap().contains("anew"));
        assert!(of("a/9").gap_until(&of("a/8")).unwrap().contains("reverted"));
        for wrong in ["", "*", "/3", "a/", "a/x", "a/-1"] {
            assert_eq!(ChangeId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_answer_to_something_else_is_no_answer() {
        let part_of = |text: &str, from| {
            let document = Document::parse(text).unwrap();
            part(document.root_element(), from, 1 << 20)
        };
        let area = |start: i64, length: i64| {
            format!("<changedArea><start>{start}</start><length>{length}</length></changedArea>")
        };
        let told = |start: u64, length: i64, areas: &str| {
            format!("<r><startOffset>{start}</startOffset><length>{length}</length>{areas}</r>")
        };
        let good = part_of(&told(4096, 65536, &(area(8192, 4096) + &area(4096, 8192))), 4096).unwrap();
        assert_eq!((good.end, good.areas.len()), (69632, 2));
        for (text, from) in [
            (told(0, 65536, ""), 4096),
            (told(4096, 0, ""), 4096),
            (told(4096, -1, ""), 4096),
            (told(0, 1 << 20, &area(-512, 512)), 0),
            (told(0, 1 << 20, &area((1 << 20) - 512, 1024)), 0),
            (told(0, 1 << 20, &area(512, 0)), 0),
            ("<r/>".to_owned(), 0),
        ] {
            assert!(part_of(&text, from).is_err(), "{text}");
        }
    }
}
