//! Which node of a QEMU is a disk, and what it has.

use std::path::Path;

use serde_json::Value;

use crate::error::QemuError;
use crate::find::{Place, is_same};

/// They open files; what a guest sees is above them, but for a raw image that is given to it as it is.
const PROTOCOLS: [&str; 8] = ["file", "host_device", "nbd", "iscsi", "rbd", "nfs", "https", "io_uring"];

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    pub name: String,
    pub driver: String,
    pub bytes: u64,
    pub is_read_only: bool,
    pub bitmaps: Vec<Bitmap>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bitmap {
    pub name: String,
    /// What is dirty, in bytes.
    pub bytes: u64,
    pub granularity: u64,
    pub is_recording: bool,
    pub is_busy: bool,
    pub is_inconsistent: bool,
}

impl Node {
    fn of(value: &Value) -> Option<Self> {
        let bitmaps = value["dirty-bitmaps"].as_array().into_iter().flatten().filter_map(Bitmap::of).collect();
        Some(Self {
            name: value["node-name"].as_str()?.to_owned(),
            driver: value["drv"].as_str()?.to_owned(),
            bytes: value["image"]["virtual-size"].as_u64()?,
            is_read_only: value["ro"] == true,
            bitmaps,
        })
    }

    /// Of the image, not of how it is opened: what a guest gets as it lies there is raw.
    pub fn format(&self) -> &str {
        if PROTOCOLS.contains(&self.driver.as_str()) { "raw" } else { &self.driver }
    }

    /// A bitmap of it outlives its QEMU.
    pub fn keeps_bitmaps(&self) -> bool {
        self.driver == "qcow2"
    }
}

impl Bitmap {
    fn of(value: &Value) -> Option<Self> {
        Some(Self {
            name: value["name"].as_str()?.to_owned(),
            bytes: value["count"].as_u64()?,
            granularity: value["granularity"].as_u64()?,
            is_recording: value["recording"] == true,
            is_busy: value["busy"] == true,
            is_inconsistent: value["inconsistent"] == true,
        })
    }
}

/// The node that is the disk: `devices` as query-block tells (null where it is not known), `nodes` as query-named-block-nodes. Where there are guest
/// devices, it is the root of one: what lies below a snapshot does not change any more.
pub fn select(place: &Place, devices: &Value, nodes: &Value, monitor: &str) -> Result<Node, QemuError> {
    let path = place.path();
    let nodes: Vec<&Value> = nodes.as_array().into_iter().flatten().collect();
    let named = |name: &str| nodes.iter().copied().find(|node| node["node-name"] == name);
    let devices: Vec<&Value> = devices.as_array().into_iter().flatten().collect();
    let roots: Vec<&str> = devices.iter().filter_map(|device| device["inserted"]["node-name"].as_str()).collect();
    let no_node = || QemuError::NoNode { monitor: monitor.to_owned(), path: path.clone() };
    let not_root = || QemuError::NotTheRoot { path: path.clone() };
    let found = match place {
        Place::Node { node, .. } => {
            let root = devices.iter().find_map(|device| {
                let root = device["inserted"]["node-name"].as_str()?;
                let of_device = device["device"] == node.as_str()
                    || device["qdev"].as_str().is_some_and(|qdev| qdev.split('/').any(|part| part == node));
                (root == node || of_device).then_some(root)
            });
            match (root.and_then(named), named(node)) {
                (Some(root), _) => root,
                (None, Some(_)) if !roots.is_empty() => return Err(not_root()),
                (None, Some(node)) => node,
                (None, None) => return Err(no_node()),
            }
        }
        Place::Image(image) => {
            let of_image: Vec<&Value> = nodes.iter().copied().filter(|node| is_of(node, image)).collect();
            let is_root = |node: &&Value| node["node-name"].as_str().is_some_and(|name| roots.contains(&name));
            let is_format = |node: &&Value| node["drv"].as_str().is_some_and(|driver| !PROTOCOLS.contains(&driver));
            match of_image.iter().copied().find(is_root) {
                Some(root) => root,
                None if of_image.is_empty() => return Err(no_node()),
                None if !roots.is_empty() => return Err(not_root()),
                None => of_image.iter().copied().find(is_format).unwrap_or(of_image[0]),
            }
        }
    };
    let node = Node::of(found).ok_or(QemuError::Answer { command: "query-named-block-nodes" })?;
    if node.is_read_only {
        return Err(QemuError::ReadOnly { path });
    }
    if node.bytes == 0 || !node.bytes.is_multiple_of(512) {
        return Err(QemuError::OddSize { path, bytes: node.bytes });
    }
    Ok(node)
}

fn is_of(node: &Value, image: &Path) -> bool {
    let Some(file) = node["file"].as_str() else { return false };
    let name = match file.strip_prefix("json:") {
        Some(options) => serde_json::from_str::<Value>(options).ok().and_then(|options| file_name(&options)),
        None => Some(file.to_owned()),
    };
    let Some(name) = name else { return false };
    Path::new(&name) == image
        || match (std::fs::metadata(&name), std::fs::metadata(image)) {
            (Ok(one), Ok(other)) => is_same(&one, &other),
            _ => false,
        }
}

fn file_name(options: &Value) -> Option<String> {
    let own = options["filename"].as_str().or_else(|| options["file.filename"].as_str());
    own.map(str::to_owned).or_else(|| options.get("file").and_then(file_name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, driver: &str, file: &str) -> Value {
        json!({ "node-name": name, "drv": driver, "file": file, "ro": false, "image": { "virtual-size": 1 << 20 } })
    }

    fn image(path: &str) -> Place {
        Place::Image(path.into())
    }

    fn at(name: &str) -> Place {
        Place::Node { socket: "/run/q".into(), node: name.to_owned() }
    }

    #[test]
    fn the_node_of_a_disk_is_what_its_guest_sees() {
        let nodes = json!([
            node("f", "file", "/i/a.qcow2"),
            node("q", "qcow2", "/i/a.qcow2"),
            node("r", "qcow2", r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/i/b.qcow2"}}"#),
            node("raw", "file", "/i/c.raw"),
        ]);
        let alone = Value::Null;
        let name = |place, devices: &Value| select(&place, devices, &nodes, "m").map(|node| node.name);
        assert_eq!(name(image("/i/a.qcow2"), &alone).unwrap(), "q");
        assert_eq!(name(image("/i/b.qcow2"), &alone).unwrap(), "r");
        assert_eq!(name(image("/i/c.raw"), &alone).unwrap(), "raw");
        assert_eq!(name(at("f"), &alone).unwrap(), "f");
        assert!(matches!(name(image("/i/d.raw"), &alone), Err(QemuError::NoNode { .. })));
        let device = |root: &str| json!([{ "device": "drive0", "qdev": "/machine/peripheral/disk0/virtio-backend", "inserted": { "node-name": root } }]);
        for place in [image("/i/a.qcow2"), at("drive0"), at("disk0"), at("q")] {
            assert_eq!(name(place, &device("q")).unwrap(), "q");
        }
        // Below a snapshot.
        assert!(matches!(name(image("/i/a.qcow2"), &device("r")), Err(QemuError::NotTheRoot { .. })));
        assert!(matches!(name(at("q"), &device("r")), Err(QemuError::NotTheRoot { .. })));
        assert!(matches!(name(at("x"), &device("r")), Err(QemuError::NoNode { .. })));
    }

    #[test]
    fn what_cannot_be_tracked_is_refused() {
        let mut odd = node("a", "qcow2", "/i/a");
        odd["image"]["virtual-size"] = json!(1000);
        assert!(matches!(select(&at("a"), &Value::Null, &json!([odd]), "m"), Err(QemuError::OddSize { .. })));
        let mut read_only = node("a", "qcow2", "/i/a");
        read_only["ro"] = json!(true);
        assert!(matches!(select(&at("a"), &Value::Null, &json!([read_only]), "m"), Err(QemuError::ReadOnly { .. })));
        let old = json!([{ "node-name": "a" }]);
        assert!(matches!(select(&at("a"), &Value::Null, &old, "m"), Err(QemuError::Answer { .. })));
    }
}
