//! What is named as a disk: itself, or an image of another format that holds it.
//!
//! A file's name says which, and its content must agree; where it does not, neither is believed. The content of a raw disk never
//! decides: its guest writes it, and could make it look like an image that lies on any file of the host.
//!
//! *Consistency.* An image is locked before it is looked at, and its times are taken before anybody opens what is inside: they prove
//! that nobody wrote since we left it, as those of a raw disk do. The lock is that of QEMU's programs, and is inherited by the one of ours that reads
//! and writes the image ([`tidemark_nbd::image`]). What an image lies on (backing files) is read alone; its times count as well. *Retries.*
//! After a kill of the agent that program ends by itself, a moment later: an attach waits for that. *Cancellation.* None.
//! *Crash.* As of a raw disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tidemark_base::MarkId;
use tidemark_base::disk::{Access, Disk, DiskError, FileDisk, LockedFile};
use tidemark_base::stop::Stop;
use tidemark_base::storage::{OpenMode, RealStorage};
use tidemark_base::time::Instant;
use tidemark_nbd::image::{Opening, QemuImage};
use tidemark_nbd::qemu::QemuNbdError;
use tidemark_proto::control::ImageFormat;

use crate::error::HostError;

/// How long the program of an agent that was killed may take to close an image.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// A VHD's last sector, and where in it its kind stands.
const VHD_FOOTER_BYTES: u64 = 512;
const VHD_KIND_AT: usize = 60;
const VHD_DIFFERENCING: u32 = 4;
const VMDK_DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";
/// The parent of one that has none.
const VMDK_NO_PARENT: u64 = 0xffff_ffff;
const MESSAGE_CHARS_MAX: usize = 1000;

#[derive(Debug, thiserror::Error)]
pub enum DiskImageError {
    #[error("{} begins like a {format} image and is not named as one", path.display())]
    Ambiguous { path: PathBuf, format: &'static str },
    #[error("{} is named as a {format} image and is none", path.display())]
    Misnamed { path: PathBuf, format: &'static str },
    #[error("qemu-img cannot be run")]
    Tools { source: std::io::Error },
    #[error("image {} cannot be used: {message}", path.display())]
    Unreadable { path: PathBuf, message: String },
    #[error("image {} {why}", path.display())]
    Refused { path: PathBuf, why: &'static str, help: &'static str },
    #[error("image {} lies on {}, which is no file of this host", path.display(), below.display())]
    Below { path: PathBuf, below: PathBuf },
    #[error(transparent)]
    Open(#[from] QemuNbdError),
}

impl DiskImageError {
    pub fn help(&self) -> &'static str {
        match self {
            DiskImageError::Ambiguous { .. } => {
                "name it by its format (.qcow2, .vhdx, .vhd, .vmdk), or .raw where the bytes of the file themselves are the disk"
            }
            DiskImageError::Misnamed { .. } => "name it by the format that it has; a plain disk is .raw or .img",
            DiskImageError::Tools { .. } | DiskImageError::Open(QemuNbdError::Run { .. }) => {
                "install QEMU's tools (Debian: qemu-utils): they read and write images of this format"
            }
            DiskImageError::Unreadable { .. } | DiskImageError::Open(_) => {
                "check it with `qemu-img check`, and that everything it lies on is there"
            }
            DiskImageError::Refused { help, .. } => help,
            DiskImageError::Below { .. } => "make it an image that lies on nothing: `qemu-img convert`",
        }
    }

    /// Another disk must be named, or this one another way.
    pub fn is_a_wrong_question(&self) -> bool {
        match self {
            DiskImageError::Ambiguous { .. }
            | DiskImageError::Misnamed { .. }
            | DiskImageError::Refused { .. }
            | DiskImageError::Below { .. } => true,
            DiskImageError::Tools { .. } | DiskImageError::Unreadable { .. } | DiskImageError::Open(_) => false,
        }
    }
}

/// What `qemu-img info` says of one image of a chain.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    filename: String,
    virtual_size: u64,
    cluster_size: Option<u64>,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    snapshots: Vec<serde_json::Value>,
    format_specific: Option<Specific>,
}

#[derive(Default, Deserialize)]
struct Specific {
    #[serde(default)]
    data: Details,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Details {
    // qcow2
    #[serde(default)]
    corrupt: bool,
    #[serde(default)]
    extended_l2: bool,
    data_file: Option<String>,
    // VMDK
    create_type: Option<String>,
    parent_cid: Option<u64>,
}

/// Whether the disk could be protected, and its size. Nothing is changed.
pub fn probe(path: &Path) -> Result<u64, HostError> {
    match format_of(path) {
        ImageFormat::Raw => {
            if path.is_file()
                && let Ok(file) = File::open(path)
            {
                refuse_disguised(path, &file)?;
            }
            Ok(FileDisk::open(path, Access::Exclusive)?.bytes())
        }
        format => {
            let locked = LockedFile::open(path)?;
            Ok(look(path, format, locked.file())?.first().map_or(0, |info| info.virtual_size))
        }
    }
}

/// Opens it to be written, by us alone.
pub fn open(path: &Path) -> Result<FileDisk, HostError> {
    let format = format_of(path);
    if format == ImageFormat::Raw {
        return Ok(FileDisk::open(path, Access::Exclusive)?);
    }
    let mut locked = lock(path)?;
    let chain = look(path, format, locked.file())?;
    let below = chain.iter().skip(1).map(|info| PathBuf::from(&info.filename)).collect();
    locked.lies_on(below)?;
    let full =
        tidemark_base::storage::canonical(path).map_err(|source| DiskError::Open { path: path.to_owned(), source })?;
    let name = full.to_str().ok_or_else(|| HostError::NoName { path: path.to_owned() })?;
    // We hold QEMU's locks ourselves, for it: it would refuse an image that is locked.
    let options = json!({
        "driver": format.qemu_name(),
        "file": { "driver": "file", "filename": name, "locking": "off" },
    });
    let opening = Opening {
        options: options.to_string(),
        locked: locked.file().clone(),
        block_bytes: chain.first().and_then(block_bytes),
        path: full,
    };
    let image = QemuImage::open(opening).map_err(DiskImageError::from)?;
    Ok(FileDisk::inside(locked, Arc::new(image))?)
}

/// Makes an empty image where there is nothing, durably; a plain file where the name says nothing else.
pub fn make(path: &Path, bytes: u64) -> Result<(), HostError> {
    let failed = |source| HostError::Io { what: "make a disk", source };
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(HostError::NoName { path: path.to_owned() });
    };
    let storage = RealStorage::open_folder(folder);
    let format = ImageFormat::of_name(path);
    if format == ImageFormat::Raw {
        let file = storage.open(name, OpenMode::Create).map_err(failed)?;
        return file.set_bytes(bytes).and_then(|()| file.sync()).and_then(|()| storage.sync_folder("")).map_err(failed);
    }
    // Under its name there is a whole image or none: what was cut off is no image.
    let partial = format!(".{name}.{}.partial", MarkId::random());
    let at = storage.path(&partial);
    let created = create(&at, format, bytes).and_then(|()| {
        let file = storage.open(&partial, OpenMode::ReadWrite).map_err(failed)?;
        file.sync().map_err(failed)?;
        drop(file);
        std::fs::hard_link(&at, path).map_err(failed)
    });
    let removed = storage.remove(&partial).and_then(|()| storage.sync_folder("")).map_err(failed);
    created.and(removed)
}

fn create(at: &Path, format: ImageFormat, bytes: u64) -> Result<(), HostError> {
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", format.qemu_name()])
        .args(format.qemu_options().into_iter().flat_map(|options| ["-o", options]))
        .arg("--")
        .arg(at)
        .arg(bytes.to_string())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| DiskImageError::Tools { source })?;
    if output.status.success() {
        return Ok(());
    }
    Err(DiskImageError::Unreadable { path: at.to_owned(), message: message_of(&output.stderr) }.into())
}

fn message_of(said: &[u8]) -> String {
    String::from_utf8_lossy(said).trim().chars().take(MESSAGE_CHARS_MAX).collect()
}

/// A device is what it is, whatever its name.
fn format_of(path: &Path) -> ImageFormat {
    match ImageFormat::of_name(path) {
        ImageFormat::Raw => ImageFormat::Raw,
        _ if std::fs::metadata(path).is_ok_and(|of| !of.is_file()) => ImageFormat::Raw,
        format => format,
    }
}

fn lock(path: &Path) -> Result<LockedFile, DiskError> {
    let deadline = Instant::now() + CLOSE_WAIT;
    let never = Stop::new();
    loop {
        match LockedFile::open(path) {
            Err(DiskError::InUse { .. }) if Instant::now() < deadline => drop(never.wait_for(LOOK_AGAIN)),
            result => return result,
        }
    }
}

/// What is allocated at once, in memory first.
fn block_bytes(info: &Info) -> Option<u64> {
    /// Each cluster of 32 parts has a bit for each.
    const PARTS: u64 = 32;
    let is_in_parts = info.format_specific.as_ref().is_some_and(|of| of.data.extended_l2);
    info.cluster_size.map(|bytes| if is_in_parts { bytes / PARTS } else { bytes }).filter(|bytes| *bytes > 0)
}

/// What the file begins or ends like.
fn begins_like(file: &File) -> Option<ImageFormat> {
    let mut start = [0; 32];
    let count = file.read_at(&mut start, 0).unwrap_or(0);
    match &start[..count] {
        [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..] => Some(ImageFormat::Vhdx),
        [b'c', b'o', b'n', b'e', b'c', b't', b'i', b'x', ..] => Some(ImageFormat::Vhd),
        [b'Q', b'F', b'I', 0xfb, ..] => Some(ImageFormat::Qcow2),
        [b'K', b'D', b'M', b'V', ..] => Some(ImageFormat::Vmdk),
        start if start.starts_with(VMDK_DESCRIPTOR) => Some(ImageFormat::Vmdk),
        _ => None,
    }
}

fn vhd_footer(file: &File) -> Option<[u8; VHD_FOOTER_BYTES as usize]> {
    let mut footer = [0; VHD_FOOTER_BYTES as usize];
    let at = file.metadata().ok()?.len().checked_sub(VHD_FOOTER_BYTES)?;
    file.read_exact_at(&mut footer, at).ok()?;
    footer.starts_with(b"conectix").then_some(footer)
}

/// A raw disk that is about to be protected, and looks like something else: what is meant is not known.
fn refuse_disguised(path: &Path, file: &File) -> Result<(), DiskImageError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
    if name.ends_with(".raw") || name.ends_with("-flat.vmdk") {
        return Ok(());
    }
    match begins_like(file) {
        None => Ok(()),
        Some(format) => Err(DiskImageError::Ambiguous { path: path.to_owned(), format: format.name() }),
    }
}

/// The image and what it lies on, top first; refused where it cannot be written to, or where recovery points would not hold all of it.
fn look(path: &Path, format: ImageFormat, file: &File) -> Result<Vec<Info>, DiskImageError> {
    let named = || path.to_owned();
    let refuse = |why, help| Err(DiskImageError::Refused { path: named(), why, help });
    let footer = if format == ImageFormat::Vhd { vhd_footer(file) } else { None };
    if begins_like(file) != Some(format) && footer.is_none() {
        return Err(DiskImageError::Misnamed { path: named(), format: format.name() });
    }
    if let Some(kind) = footer.and_then(|footer| footer.get(VHD_KIND_AT..VHD_KIND_AT + 4)?.try_into().ok())
        && u32::from_be_bytes(kind) == VHD_DIFFERENCING
    {
        return refuse(
            "holds the differences to another VHD alone",
            "merge it, or protect a copy that holds all: `qemu-img convert`",
        );
    }
    let chain = information(path, format)?;
    for below in chain.iter().skip(1) {
        let below = PathBuf::from(&below.filename);
        if !below.is_absolute() || !below.is_file() {
            return Err(DiskImageError::Below { path: named(), below });
        }
    }
    if chain.iter().any(|info| info.encrypted) {
        return refuse("is encrypted", "decrypt it (`qemu-img convert`), and encrypt its replica by the policy");
    }
    let Some(top) = chain.first() else {
        return Err(DiskImageError::Unreadable { path: named(), message: "qemu-img says nothing of it".into() });
    };
    if !top.snapshots.is_empty() {
        return refuse(
            "holds snapshots of its own, which recovery points do not",
            "delete them (`qemu-img snapshot -d`), or protect a copy without them: `qemu-img convert`",
        );
    }
    let details = top.format_specific.as_ref().map(|specific| &specific.data);
    if details.is_some_and(|details| details.corrupt) {
        return refuse("is marked as corrupt", "repair it: `qemu-img check -r all`");
    }
    if details.is_some_and(|details| details.data_file.is_some()) {
        return refuse(
            "keeps its data in another file",
            "protect that file, which is raw, or a copy: `qemu-img convert`",
        );
    }
    if let Some(kind) = details.and_then(|details| details.create_type.as_deref())
        && kind != "monolithicSparse"
    {
        return match kind {
            "streamOptimized" => refuse(
                "is compressed and cannot be written to",
                "protect a copy of it: `qemu-img convert -O vmdk`, or another format",
            ),
            _ => refuse(
                "only names the files that hold the disk",
                "a disk in one file NAME-flat.vmdk is protected by naming that; protect a copy of others: `qemu-img convert`",
            ),
        };
    }
    if details.and_then(|details| details.parent_cid).is_some_and(|parent| parent != VMDK_NO_PARENT) {
        return refuse(
            "holds the differences to another VMDK alone",
            "consolidate its snapshots, or protect a copy: `qemu-img convert`",
        );
    }
    Ok(chain)
}

fn information(path: &Path, format: ImageFormat) -> Result<Vec<Info>, DiskImageError> {
    let unreadable = |message: String| DiskImageError::Unreadable { path: path.to_owned(), message };
    let full = std::path::absolute(path).map_err(|error| unreadable(error.to_string()))?;
    let output = Command::new("qemu-img")
        // We hold the lock that it would respect.
        .args(["info", "--output=json", "--backing-chain", "-U", "-f", format.qemu_name(), "--"])
        .arg(full)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| DiskImageError::Tools { source })?;
    if !output.status.success() {
        return Err(unreadable(message_of(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| unreadable(format!("qemu-img's answer: {error}")))
}
