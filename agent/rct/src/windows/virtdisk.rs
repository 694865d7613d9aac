//! `virtdisk.dll`: which disk a file holds, since when its changes are told, and what changed.
//!
//! Found when it is needed: Windows before Server 2016 has no `QueryChangesVirtualDisk`, and a program that names it could not start there.

use std::ffi::OsStr;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::windows::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

use tidemark_base::Extent;
use tidemark_base::sync::Mutex;
use vhdx::VhdxReader;
use windows_sys::Win32::Foundation::{CloseHandle, ERROR_INSUFFICIENT_BUFFER, ERROR_MORE_DATA, ERROR_SUCCESS, HANDLE};
use windows_sys::Win32::Storage::Vhd::{
    GET_VIRTUAL_DISK_INFO, GET_VIRTUAL_DISK_INFO_0, GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE,
    GET_VIRTUAL_DISK_INFO_SIZE, GET_VIRTUAL_DISK_INFO_VERSION, GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID,
    OPEN_VIRTUAL_DISK_FLAG, OPEN_VIRTUAL_DISK_FLAG_NONE, OPEN_VIRTUAL_DISK_PARAMETERS, OPEN_VIRTUAL_DISK_VERSION_2,
    QUERY_CHANGES_VIRTUAL_DISK_FLAG, QUERY_CHANGES_VIRTUAL_DISK_FLAG_NONE, QUERY_CHANGES_VIRTUAL_DISK_RANGE,
    SET_VIRTUAL_DISK_INFO, SET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE, VIRTUAL_DISK_ACCESS_MASK,
    VIRTUAL_DISK_ACCESS_NONE, VIRTUAL_STORAGE_TYPE, VIRTUAL_STORAGE_TYPE_DEVICE_VHDX,
    VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT,
};
use windows_sys::Win32::System::LibraryLoader::{GetProcAddress, LOAD_LIBRARY_SEARCH_SYSTEM32, LoadLibraryExW};
use windows_sys::core::PCWSTR;

use crate::error::RctError;
use crate::hypervisor::{Facts, Image, Part};

type Open = unsafe extern "system" fn(
    *const VIRTUAL_STORAGE_TYPE,
    PCWSTR,
    VIRTUAL_DISK_ACCESS_MASK,
    OPEN_VIRTUAL_DISK_FLAG,
    *const OPEN_VIRTUAL_DISK_PARAMETERS,
    *mut HANDLE,
) -> u32;
type GetInformation = unsafe extern "system" fn(HANDLE, *mut u32, *mut GET_VIRTUAL_DISK_INFO, *mut u32) -> u32;
type SetInformation = unsafe extern "system" fn(HANDLE, *const SET_VIRTUAL_DISK_INFO) -> u32;
type QueryChanges = unsafe extern "system" fn(
    HANDLE,
    PCWSTR,
    u64,
    u64,
    QUERY_CHANGES_VIRTUAL_DISK_FLAG,
    *mut QUERY_CHANGES_VIRTUAL_DISK_RANGE,
    *mut u32,
    *mut u64,
) -> u32;

/// Areas in one answer.
const AREAS_MAX: usize = 4096;
/// The longest change id (`VIRTUAL_DISK_MAXIMUM_CHANGE_TRACKING_ID_LENGTH`), in bytes of UTF-16, and what stands before it.
const INFO_BYTES: usize = 16 + 2 * 256;
const INFO_BYTES_MAX: usize = 64 << 10;

#[derive(Clone, Copy)]
pub struct Library {
    open: Open,
    get: GetInformation,
    set: SetInformation,
    query: QueryChanges,
}

fn wide(text: &OsStr) -> Vec<u16> {
    text.encode_wide().chain([0]).collect()
}

fn reason(code: u32) -> String {
    format!("{} (error {code})", io::Error::from_raw_os_error(code as i32))
}

impl Library {
    pub fn find() -> Result<Self, String> {
        let name = wide("virtdisk.dll".as_ref());
        // SAFETY: a terminated name; the library stays for as long as this process does.
        let library = unsafe { LoadLibraryExW(name.as_ptr(), null_mut(), LOAD_LIBRARY_SEARCH_SYSTEM32) };
        if library.is_null() {
            return Err(format!("virtdisk.dll cannot be loaded: {}", io::Error::last_os_error()));
        }
        // SAFETY: a library that is loaded, and terminated names.
        let find = |name: &'static [u8]| unsafe { GetProcAddress(library, name.as_ptr()) };
        let all = [
            find(b"OpenVirtualDisk\0"),
            find(b"GetVirtualDiskInformation\0"),
            find(b"SetVirtualDiskInformation\0"),
            find(b"QueryChangesVirtualDisk\0"),
        ];
        let [Some(open), Some(get), Some(set), Some(query)] = all else {
            return Err("virtdisk.dll has no QueryChangesVirtualDisk".to_owned());
        };
        // SAFETY: the types are those of virtdisk.h.
        unsafe {
            Ok(Self {
                open: std::mem::transmute::<unsafe extern "system" fn() -> isize, Open>(open),
                get: std::mem::transmute::<unsafe extern "system" fn() -> isize, GetInformation>(get),
                set: std::mem::transmute::<unsafe extern "system" fn() -> isize, SetInformation>(set),
                query: std::mem::transmute::<unsafe extern "system" fn() -> isize, QueryChanges>(query),
            })
        }
    }

    fn handle(&self, file: &Path, is_read_only: bool) -> Result<Handle, RctError> {
        let kind = VIRTUAL_STORAGE_TYPE {
            DeviceId: VIRTUAL_STORAGE_TYPE_DEVICE_VHDX,
            VendorId: VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT,
        };
        let mut parameters =
            OPEN_VIRTUAL_DISK_PARAMETERS { Version: OPEN_VIRTUAL_DISK_VERSION_2, ..Default::default() };
        parameters.Anonymous.Version2.ReadOnly = i32::from(is_read_only);
        let (name, mut handle) = (wide(file.as_os_str()), null_mut());
        // SAFETY: structures of the version that they name, a terminated name, and the address of one handle. This version wants no access mask.
        let code = unsafe {
            let (flags, access) = (OPEN_VIRTUAL_DISK_FLAG_NONE, VIRTUAL_DISK_ACCESS_NONE);
            (self.open)(&raw const kind, name.as_ptr(), access, flags, &raw const parameters, &raw mut handle)
        };
        match code {
            ERROR_SUCCESS => Ok(Handle { library: *self, handle, path: file.to_owned() }),
            code => Err(read_error(file, code)),
        }
    }

    /// Tracking begins, of a disk that nobody has open.
    pub fn switch_on(&self, file: &Path) -> Result<(), RctError> {
        let handle = self.handle(file, false)?;
        let mut info =
            SET_VIRTUAL_DISK_INFO { Version: SET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE, ..Default::default() };
        info.Anonymous.ChangeTrackingEnabled = 1;
        // SAFETY: the handle is open, and the structure is of the version that it names.
        match unsafe { (self.set)(handle.handle, &raw const info) } {
            ERROR_SUCCESS => Ok(()),
            code => Err(RctError::Refused { what: "switch change tracking on", reason: reason(code) }),
        }
    }

    pub fn open(&self, file: &Path) -> Result<Box<dyn Image>, RctError> {
        let handle = self.handle(file, true)?;
        let failed = |error| RctError::Read { path: file.to_owned(), source: io::Error::other(error) };
        let content = Mutex::new(VhdxReader::open(file).map_err(failed)?);
        Ok(Box::new(Opened { handle, content }))
    }
}

fn read_error(path: &Path, code: u32) -> RctError {
    RctError::Read { path: path.to_owned(), source: io::Error::from_raw_os_error(code as i32) }
}

/// A virtual disk that is open.
struct Handle {
    library: Library,
    handle: HANDLE,
    path: PathBuf,
}

// SAFETY: a handle may be used by any thread, and by several.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it is open, and closed once.
        unsafe { CloseHandle(self.handle) };
    }
}

impl Handle {
    /// The structure of one version, with what follows it: `u64`s, as it is aligned.
    fn information(&self, version: GET_VIRTUAL_DISK_INFO_VERSION) -> Result<Vec<u64>, RctError> {
        let mut bytes = INFO_BYTES as u32;
        loop {
            let mut buffer = vec![0u64; (bytes as usize).div_ceil(8)];
            let info = buffer.as_mut_ptr().cast::<GET_VIRTUAL_DISK_INFO>();
            let mut given = (buffer.len() * 8) as u32;
            // SAFETY: the buffer is longer than the structure, aligned as it, and as long as it is said.
            let code = unsafe {
                (&raw mut (*info).Version).write(version);
                (self.library.get)(self.handle, &raw mut given, info, null_mut())
            };
            match code {
                ERROR_SUCCESS => return Ok(buffer),
                ERROR_INSUFFICIENT_BUFFER if given > bytes && given as usize <= INFO_BYTES_MAX => bytes = given,
                code => return Err(read_error(&self.path, code)),
            }
        }
    }

    /// What follows the version.
    fn read<T: Copy>(info: &[u64], field: impl FnOnce(&GET_VIRTUAL_DISK_INFO_0) -> T) -> T {
        const { assert!(size_of::<GET_VIRTUAL_DISK_INFO>() <= INFO_BYTES) };
        // SAFETY: at least `INFO_BYTES`, aligned, and all zeroes or filled by the call.
        let info = unsafe { &*info.as_ptr().cast::<GET_VIRTUAL_DISK_INFO>() };
        field(&info.Anonymous)
    }
}

/// The text that begins within the structure and ends with a zero.
fn change_id_of(info: &[u64]) -> Option<String> {
    // SAFETY: every state of the bits is a valid one of these plain numbers.
    let enabled = Handle::read(info, |info| unsafe { info.ChangeTrackingState.Enabled });
    if enabled == 0 {
        return None;
    }
    let state = std::mem::offset_of!(GET_VIRTUAL_DISK_INFO, Anonymous);
    let begin = state + std::mem::offset_of!(windows_sys::Win32::Storage::Vhd::GET_VIRTUAL_DISK_INFO_0_3, MostRecentId);
    let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_le_bytes()).collect();
    let letters = bytes[begin..].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let id = String::from_utf16_lossy(&letters.take_while(|letter| *letter != 0).collect::<Vec<_>>());
    Some(id).filter(|id| !id.is_empty())
}

/// A file that stands still.
struct Opened {
    handle: Handle,
    content: Mutex<VhdxReader>,
}

impl Image for Opened {
    fn facts(&self) -> Result<Facts, RctError> {
        let size = self.handle.information(GET_VIRTUAL_DISK_INFO_SIZE)?;
        let id = self.handle.information(GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID)?;
        let tracking = self.handle.information(GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE)?;
        // SAFETY: every state of the bits is a valid one of these plain numbers.
        let (bytes, id) = unsafe {
            let bytes = Handle::read(&size, |info| info.Size.VirtualSize);
            (bytes, Handle::read(&id, |info| info.VirtualDiskId))
        };
        let read = self.content.lock().expect("no panic while held").virtual_disk_size();
        if read != bytes {
            let reason = format!("{} has {bytes} bytes, and {read} as it is read", self.handle.path.display());
            return Err(RctError::Answer { what: "how large a disk is", reason });
        }
        let last = id.data4.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let uuid = format!("{:08x}-{:04x}-{:04x}-{last}", id.data1, id.data2, id.data3);
        Ok(Facts { uuid, bytes, change_id: change_id_of(&tracking) })
    }

    fn query(&self, since: &str, from: u64, length: u64) -> Result<Part, String> {
        let since = wide(since.as_ref());
        let mut ranges = vec![QUERY_CHANGES_VIRTUAL_DISK_RANGE::default(); AREAS_MAX];
        let (mut count, mut processed) = (AREAS_MAX as u32, 0);
        // SAFETY: the handle is open, the id is terminated, and the array is as long as it is said.
        let code = unsafe {
            let flags = QUERY_CHANGES_VIRTUAL_DISK_FLAG_NONE;
            let (ranges, count) = (ranges.as_mut_ptr(), &raw mut count);
            (self.handle.library.query)(
                self.handle.handle,
                since.as_ptr(),
                from,
                length,
                flags,
                ranges,
                count,
                &raw mut processed,
            )
        };
        // More areas than fit: what was processed is told.
        if code != ERROR_SUCCESS && code != ERROR_MORE_DATA {
            return Err(reason(code));
        }
        let told = ranges.get(..count as usize).ok_or_else(|| format!("{count} areas where {AREAS_MAX} fit"))?;
        // As they are: whether they lie on the disk is looked at elsewhere.
        let areas = told.iter().map(|range| Extent { offset: range.ByteOffset, length: range.ByteLength }).collect();
        Ok(Part { areas, processed })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut content = self.content.lock().expect("no panic while held");
        content.seek(SeekFrom::Start(offset))?;
        content.read_exact(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As virtdisk.h lays it out on 64 bits.
    #[test]
    fn the_newest_change_id_is_read_where_it_stands() {
        let mut bytes = vec![0u8; INFO_BYTES];
        bytes[..4].copy_from_slice(&15u32.to_le_bytes());
        bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
        let id = "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001";
        for (number, letter) in id.encode_utf16().enumerate() {
            bytes[16 + number * 2..][..2].copy_from_slice(&letter.to_le_bytes());
        }
        let words = |bytes: &[u8]| -> Vec<u64> {
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
        };
        assert_eq!(change_id_of(&words(&bytes)).as_deref(), Some(id));
        bytes[8] = 0;
        assert_eq!(change_id_of(&words(&bytes)), None, "nothing is tracked");
        bytes[8] = 1;
        bytes[16..].fill(0);
        assert_eq!(change_id_of(&words(&bytes)), None);
        bytes[16..].fill(0x41);
        assert_eq!(change_id_of(&words(&bytes)).unwrap().chars().count(), 256, "it ends with the buffer");
    }
}
