//! How a disk of a running machine is named, which QEMU has it, and how that one is spoken to.
//!
//! A disk is named by its image as it lies on this host, or, where that says too little (images behind a network, machines in containers), by
//! the machine's QMP socket and the node or device behind it: `/run/web.qmp/drive0`. Sockets are found on the command line of the
//! process that has the image open. libvirt keeps its monitors to itself; its machines are asked through it.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::QemuError;

/// What libvirt calls the channel that it holds itself.
const LIBVIRT_MONITOR: &str = "charmonitor";

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    Image(PathBuf),
    Node { socket: PathBuf, node: String },
}

/// How a QEMU is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Way {
    /// Any of these.
    Sockets(Vec<PathBuf>),
    Libvirt {
        domain: String,
        owner: (u32, u32),
    },
}

impl Way {
    pub fn name(&self) -> String {
        match self {
            Way::Sockets(sockets) => sockets.first().map(|socket| socket.display().to_string()).unwrap_or_default(),
            Way::Libvirt { domain, .. } => format!("libvirt's machine {domain}"),
        }
    }
}

impl Place {
    pub fn of(path: &Path) -> Result<Self, QemuError> {
        let absent = || QemuError::Absent { path: path.to_owned() };
        if let Ok(metadata) = std::fs::metadata(path) {
            let is_disk = metadata.is_file() || metadata.file_type().is_block_device();
            return if is_disk { Ok(Place::Image(path.to_owned())) } else { Err(absent()) };
        }
        let (Some(socket), Some(node)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return Err(absent());
        };
        match std::fs::metadata(socket) {
            Ok(metadata) if metadata.file_type().is_socket() => {
                Ok(Place::Node { socket: socket.to_owned(), node: node.to_owned() })
            }
            // The machine is off, and took its socket with it.
            Err(_) if socket.extension().is_some_and(|ending| ending == "qmp" || ending == "sock") => {
                Ok(Place::Node { socket: socket.to_owned(), node: node.to_owned() })
            }
            _ => Err(absent()),
        }
    }

    pub fn path(&self) -> PathBuf {
        match self {
            Place::Image(path) => path.clone(),
            Place::Node { socket, node } => socket.join(node),
        }
    }

    pub fn way(&self) -> Result<Way, QemuError> {
        match self {
            Place::Node { socket, .. } => Ok(Way::Sockets(vec![socket.clone()])),
            Place::Image(path) => of_image(path),
        }
    }
}

/// Whether both are the same file or device.
pub(crate) fn is_same(one: &Metadata, other: &Metadata) -> bool {
    let is_device = one.file_type().is_block_device();
    is_device == other.file_type().is_block_device()
        && if is_device { one.rdev() == other.rdev() } else { (one.dev(), one.ino()) == (other.dev(), other.ino()) }
}

fn of_image(path: &Path) -> Result<Way, QemuError> {
    let failed = |source| QemuError::Io { what: "examine", path: path.to_owned(), source };
    let image = std::fs::metadata(path).map_err(failed)?;
    let mut silent = None;
    for process in std::fs::read_dir("/proc").map_err(failed)?.filter_map(Result::ok) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(command) = std::fs::read(process.path().join("cmdline")) else { continue };
        let arguments: Vec<String> =
            command.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        let program = arguments[0].rsplit('/').next().unwrap_or_default();
        if !program.contains("qemu") && !program.contains("kvm") {
            continue;
        }
        let Ok(open) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let has_it = open
            .filter_map(Result::ok)
            .any(|file| std::fs::metadata(file.path()).is_ok_and(|found| is_same(&image, &found)));
        if !has_it {
            continue;
        }
        let folder = std::fs::read_link(process.path().join("cwd")).unwrap_or_default();
        match monitor_of(&arguments) {
            Some(Told::Sockets(sockets)) => {
                return Ok(Way::Sockets(sockets.iter().map(|socket| folder.join(socket)).collect()));
            }
            Some(Told::Libvirt(domain)) => {
                let owner = process.metadata().map(|metadata| (metadata.uid(), metadata.gid())).map_err(failed)?;
                return Ok(Way::Libvirt { domain, owner });
            }
            None => silent = Some(pid),
        }
    }
    Err(match silent {
        Some(pid) => QemuError::NoMonitor { path: path.to_owned(), pid },
        None => QemuError::NotRunning { path: path.to_owned() },
    })
}

#[derive(PartialEq, Eq, Debug)]
enum Told {
    Sockets(Vec<PathBuf>),
    Libvirt(String),
}

/// What a command line says of the machine's QMP sockets.
fn monitor_of(arguments: &[String]) -> Option<Told> {
    let mut sockets = Vec::new();
    let (mut channels, mut monitors) = (Vec::new(), Vec::new());
    let mut domain = None;
    for pair in arguments.windows(2) {
        let [option, value] = pair else { continue };
        match option.trim_start_matches('-') {
            "qmp" | "qmp-pretty" => {
                if let Some(path) = value.strip_prefix("unix:") {
                    sockets.push(PathBuf::from(path.split(',').next().unwrap_or_default()));
                }
            }
            "chardev" => channels.push(value.as_str()),
            // Of the storage daemon, whose monitors speak nothing else.
            "monitor" if option.starts_with("--") => monitors.push(field(value, "chardev").or_else(|| first(value))),
            "mon" if field(value, "mode") == Some("control") => {
                monitors.push(field(value, "chardev").or_else(|| first(value)));
            }
            "name" => domain = field(value, "guest").or_else(|| first(value)).map(str::to_owned),
            _ => {}
        }
    }
    for id in monitors.into_iter().flatten() {
        let channel = channels.iter().find(|channel| field(channel, "id") == Some(id));
        match channel.and_then(|channel| field(channel, "path")) {
            Some(path) => sockets.push(path.into()),
            None if id == LIBVIRT_MONITOR && sockets.is_empty() => return domain.map(Told::Libvirt),
            None => {}
        }
    }
    // Where libvirt was told to add a socket for others, that one is better.
    (!sockets.is_empty()).then_some(Told::Sockets(sockets))
}

fn field<'a>(options: &'a str, name: &str) -> Option<&'a str> {
    options.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
}

fn first(options: &str) -> Option<&str> {
    options.split(',').next().filter(|word| !word.is_empty() && !word.contains('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str) -> Option<Told> {
        monitor_of(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_command_line_tells_how_its_machine_is_asked() {
        let sockets = |paths: &[&str]| Some(Told::Sockets(paths.iter().map(PathBuf::from).collect()));
        assert_eq!(told("qemu -qmp unix:/run/a.qmp,server=on,wait=off"), sockets(&["/run/a.qmp"]));
        assert_eq!(
            told("kvm -chardev socket,id=q,path=/r/q,server=on -mon chardev=q,mode=control"),
            sockets(&["/r/q"])
        );
        assert_eq!(told("kvm -chardev socket,id=q,path=/r/q -mon chardev=q,mode=readline"), None, "for people");
        assert_eq!(told("qemu-storage-daemon --chardev socket,path=s,id=m --monitor chardev=m"), sockets(&["s"]));
        let libvirt = "qemu -name guest=web,debug-threads=on -chardev socket,id=charmonitor,fd=22,server=on \
                       -mon chardev=charmonitor,id=monitor,mode=control";
        assert_eq!(told(libvirt), Some(Told::Libvirt("web".to_owned())));
        assert_eq!(told(&format!("{libvirt} -qmp unix:/run/b,server=on")), sockets(&["/run/b"]));
        assert_eq!(told("qemu -monitor stdio -qmp stdio"), None);
    }

    #[test]
    fn a_disk_is_an_image_or_a_node_behind_a_socket() {
        let folder = tempfile::tempdir().unwrap();
        let (image, socket) = (folder.path().join("a.qcow2"), folder.path().join("web"));
        std::fs::File::create(&image).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(Place::of(&image).unwrap(), Place::Image(image.clone()));
        assert_eq!(Place::of(&socket.join("drive0")).unwrap(), Place::Node { socket, node: "drive0".to_owned() });
        assert!(matches!(Place::of(&image.join("drive0")), Err(QemuError::Absent { .. })));
        assert!(matches!(Place::of(folder.path()), Err(QemuError::Absent { .. })));
        let off = folder.path().join("gone.qmp").join("drive0");
        assert!(matches!(Place::of(&off), Ok(Place::Node { .. })), "one that is off is named as well");
        assert!(matches!(Place::Image(image).way(), Err(QemuError::NotRunning { .. })));
    }
}
