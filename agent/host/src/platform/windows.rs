//! Windows.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;
use std::os::windows::fs::OpenOptionsExt;
use std::os::windows::io::AsRawHandle;
use std::path::Path;

use tidemark_base::{Timestamp, storage};
use windows_sys::Wdk::System::SystemInformation::{NtQuerySystemInformation, SystemTimeOfDayInformation};
use windows_sys::Win32::Storage::FileSystem::{
    FILE_FLAG_BACKUP_SEMANTICS, FILE_READ_ATTRIBUTES, GetFinalPathNameByHandleW, VOLUME_NAME_NT,
};

/// From 1601, in units of 100 ns, to 1970.
const EPOCH_DIFFERENCE: i64 = 116_444_736_000_000_000;
/// `SYSTEM_TIMEOFDAY_INFORMATION`: when the system started, now, the time zone, its number, and by how much the first was moved since.
const TIMES: usize = 6;
const BOOT_TIME: usize = 0;
const BOOT_TIME_BIAS: usize = 4;

/// When the kernel started, to 100 ns. Setting the clock moves that time, and the kernel remembers by how much: without it, the time
/// stays the same for as long as this boot lasts. A fast start-up goes on with the kernel of before, and its page cache.
pub fn boot() -> io::Result<(String, Timestamp)> {
    let mut times = [0i64; TIMES];
    // SAFETY: the buffer is as long as it is said, and of plain numbers.
    let status = unsafe {
        let buffer = times.as_mut_ptr().cast::<c_void>();
        NtQuerySystemInformation(SystemTimeOfDayInformation, buffer, size_of_val(&times) as u32, std::ptr::null_mut())
    };
    if status < 0 || times[BOOT_TIME] == 0 {
        return Err(io::Error::other(format!("the system does not say when it started (status {status:#x})")));
    }
    let first = times[BOOT_TIME] - times[BOOT_TIME_BIAS];
    let nanoseconds = times[BOOT_TIME].saturating_sub(EPOCH_DIFFERENCE).max(0) as u64 * 100;
    Ok((format!("{first:016x}"), Timestamp(nanoseconds)))
}

/// The volume's serial number, and a digest of the device's name (`\Device\HarddiskVolume3`), which is another one where a disk was
/// pulled out and put in again.
pub fn mount_of(folder: &Path) -> io::Result<(u64, u64)> {
    let mut options = OpenOptions::new();
    options.access_mode(FILE_READ_ATTRIBUTES).custom_flags(FILE_FLAG_BACKUP_SEMANTICS);
    let folder_handle = options.open(folder)?;
    let mut name = vec![0u16; 1024];
    // SAFETY: the handle is open, and the buffer is as long as it is said.
    let length = unsafe {
        GetFinalPathNameByHandleW(folder_handle.as_raw_handle(), name.as_mut_ptr(), name.len() as u32, VOLUME_NAME_NT)
    };
    // 0: it has no such name (a share); longer than the buffer: the beginning is not there.
    let name = String::from_utf16_lossy(name.get(..length as usize).unwrap_or_default());
    let device: String = name.split('\\').take(3).collect::<Vec<_>>().join("\\");
    let digest = blake3::hash(device.as_bytes());
    let mount = u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("eight bytes"));
    Ok((storage::volume_of(folder)?, mount))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_and_mount_stay_the_same() {
        assert_eq!(boot().unwrap(), boot().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("below");
        std::fs::create_dir(&below).unwrap();
        assert_eq!(mount_of(folder.path()).unwrap(), mount_of(&below).unwrap());
        assert!(mount_of(&folder.path().join("absent")).is_err());
    }
}
