//! Loading, pinning and asking the kernel: everything that is a system call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{BtfTracePoint, ProgramError, ProgramInfo};
use aya::{Btf, EbpfLoader};

use crate::device::Device;

static OBJECT: &[u8] = aya::include_bytes_aligned!("track.bpf.o");
/// Program in the object → tracepoint.
const PROGRAMS: [(&str, &str); 3] =
    [("submitted", "block_bio_queue"), ("completed", "block_bio_complete"), ("request_completed", "block_rq_complete")];
const TYPES: &str = "/sys/kernel/btf/vmlinux";
/// `BPF_FS_MAGIC` of linux/magic.h
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("this kernel does not describe its types ({TYPES} is missing)")]
    NoTypes,
    #[error("this process may not load programs into the kernel")]
    NotPermitted(#[source] io::Error),
    #[error("no BPF file system can be used at {folder}")]
    NoFileSystem { folder: PathBuf, source: io::Error },
    #[error("the kernel does not take the programs that watch writes")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot use {path}")]
    Pin { path: PathBuf, source: io::Error },
}

impl KernelError {
    pub fn help(&self) -> &'static str {
        match self {
            KernelError::NoTypes => {
                "run a kernel from 5.15 on that was built with CONFIG_DEBUG_INFO_BTF; Debian's and Ubuntu's are"
            }
            KernelError::NotPermitted(_) => {
                "run the agent as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN; kernel lockdown must not be `confidentiality`"
            }
            KernelError::NoFileSystem { .. } => "mount it: `mount -t bpf bpf /sys/fs/bpf`",
            KernelError::Refused(_) => "a kernel from 5.15 on is needed; report this with its version",
            KernelError::Pin { .. } => "see the system's message",
        }
    }
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> KernelError {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(at) = cause {
        if let Some(found) = at.downcast_ref::<io::Error>()
            && matches!(found.raw_os_error(), Some(libc::EPERM | libc::EACCES))
            // The verifier says EACCES as well, to those who may load.
            && !nix::unistd::geteuid().is_root()
        {
            return KernelError::NotPermitted(io::Error::from_raw_os_error(
                found.raw_os_error().unwrap_or(libc::EPERM),
            ));
        }
        cause = at.source();
    }
    KernelError::Refused(Box::new(error))
}

/// The maps of one tracker.
pub struct Pinned {
    pub live: MapData,
    pub claimed: MapData,
    pub state: MapData,
}

/// Whether trackers can be made here at all. Nothing is changed.
pub fn check() -> Result<(), KernelError> {
    if !Path::new(TYPES).exists() {
        return Err(KernelError::NoTypes);
    }
    if !nix::unistd::geteuid().is_root() {
        // What a capability allows shows when it is used.
        return Array::<MapData, u64>::create(1, 0).map(drop).map_err(refused);
    }
    Ok(())
}

/// Mounts the BPF file system where it belongs, unless it is there.
pub fn ensure_file_system(folder: &Path) -> Result<(), KernelError> {
    let failed = |source| KernelError::NoFileSystem { folder: folder.to_owned(), source };
    let is_there = || -> io::Result<bool> {
        let found = nix::sys::statfs::statfs(folder).map_err(io::Error::from)?;
        Ok(found.filesystem_type().0 as u64 & 0xffff_ffff == BPF_FS_MAGIC)
    };
    if is_there().map_err(failed)? {
        return Ok(());
    }
    let path = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()).map_err(|error| failed(error.into()))?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: all pointers are to strings that end with a zero and outlive the call.
    let result =
        unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), flags, c"mode=0700".as_ptr().cast()) };
    match result {
        0 => Ok(()),
        _ => Err(failed(io::Error::last_os_error())),
    }
}

/// Makes maps and programs for a device, attaches them, and pins all of it in `folder`, which must not exist.
pub fn load(folder: &Path, device: &Device, words: u32) -> Result<Pinned, KernelError> {
    let types = Btf::from_sys_fs().map_err(refused)?;
    let mut loaded = EbpfLoader::new()
        .btf(Some(&types))
        .map_max_entries("live", words)
        .map_max_entries("claimed", words)
        .override_global("MAJOR", &(device.major as i32), true)
        .override_global("FIRST_MINOR", &(device.first_minor as i32), true)
        .override_global("FIRST_SECTOR", &device.first_sector, true)
        .override_global("SECTORS", &device.sectors, true)
        .load(OBJECT)
        .map_err(refused)?;
    let pin = |name: &str| folder.join(name);
    std::fs::create_dir(folder).map_err(|source| KernelError::Pin { path: folder.to_owned(), source })?;
    let mut take = |name: &str| -> Result<MapData, KernelError> {
        let Some(Map::Array(data)) = loaded.take_map(name) else {
            return Err(KernelError::Refused(format!("the object has no array {name}").into()));
        };
        data.pin(pin(name)).map_err(refused)?;
        Ok(data)
    };
    let pinned = Pinned { live: take("live")?, claimed: take("claimed")?, state: take("state")? };
    for (name, tracepoint) in PROGRAMS {
        let program = loaded
            .program_mut(name)
            .ok_or_else(|| KernelError::Refused(format!("the object has no program {name}").into()))?;
        let program: &mut BtfTracePoint = program.try_into().map_err(|error: ProgramError| refused(error))?;
        program.load(tracepoint, &types).map_err(refused)?;
        program.pin(pin(&format!("prog-{tracepoint}"))).map_err(refused)?;
        let link = program.attach().and_then(|link| program.take_link(link)).map_err(refused)?;
        FdLink::from(link).pin(pin(&format!("link-{tracepoint}"))).map_err(refused)?;
    }
    Ok(pinned)
}

/// What an earlier session pinned; `None` where a part of it is missing.
pub fn open(folder: &Path) -> Option<Pinned> {
    let map = |name: &str| MapData::from_pin(folder.join(name)).ok();
    let pinned = Pinned { live: map("live")?, claimed: map("claimed")?, state: map("state")? };
    for (_, tracepoint) in PROGRAMS {
        PinnedLink::from_pin(folder.join(format!("link-{tracepoint}"))).ok()?;
        ProgramInfo::from_pin(folder.join(format!("prog-{tracepoint}"))).ok()?;
    }
    Some(pinned)
}

/// Removes the pins, which detaches the programs and frees the maps.
pub fn remove(folder: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        std::fs::remove_file(entry?.path())?;
    }
    std::fs::remove_dir(folder)
}

/// What the kernel counted of the programs of one tracker, together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// Times that a program was not run because it was running.
    pub missed: u64,
    /// Only while `kernel.bpf_stats_enabled` is set.
    pub run_ns: u64,
    pub runs: u64,
}

pub fn figures(folder: &Path) -> io::Result<Figures> {
    let mut sum = Figures::default();
    for (_, tracepoint) in PROGRAMS {
        let info = ProgramInfo::from_pin(folder.join(format!("prog-{tracepoint}"))).map_err(io::Error::other)?;
        let program = info.fd().map_err(io::Error::other)?;
        let figures = figures_of(program.as_fd())?;
        sum.missed += figures.missed;
        sum.run_ns += figures.run_ns;
        sum.runs += figures.runs;
    }
    Ok(sum)
}

/// `struct bpf_prog_info` of linux/bpf.h as far as 5.12 had it; the library tells less of it.
fn figures_of(program: BorrowedFd<'_>) -> io::Result<Figures> {
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    const RUN_NS: usize = 192;
    const RUNS: usize = 200;
    const MISSES: usize = 208;
    #[repr(C)]
    struct Attributes {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut info = [0u64; 32];
    let mut attributes = Attributes {
        fd: program.as_raw_fd() as u32,
        length: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: `info` has the length that is told, and outlives the call, which is the only one that writes to it.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw mut attributes, size_of::<Attributes>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (attributes.length as usize) < MISSES + 8 {
        return Err(io::Error::other("the kernel does not count missed events"));
    }
    Ok(Figures { missed: info[MISSES / 8], run_ns: info[RUN_NS / 8], runs: info[RUNS / 8] })
}
