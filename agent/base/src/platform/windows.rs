//! Windows. Files have the rights that the folder above gives them: a service's state folder is its own.

use std::ffi::{OsStr, c_void};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::windows::ffi::OsStrExt;
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::os::windows::io::AsRawHandle;
use std::path::Path;
use std::ptr::{null, null_mut};

use windows_sys::Win32::Foundation::LocalFree;
use windows_sys::Win32::Security::Authorization::{
    ConvertStringSecurityDescriptorToSecurityDescriptorW, SDDL_REVISION_1,
};
use windows_sys::Win32::Security::SECURITY_ATTRIBUTES;
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, CreateDirectoryW, DELETE, FILE_BASIC_INFO, FILE_FLAG_BACKUP_SEMANTICS,
    FILE_FLAG_DELETE_ON_CLOSE, FILE_FLAG_OPEN_REPARSE_POINT, FILE_READ_ATTRIBUTES, FILE_RENAME_INFO,
    FILE_STANDARD_INFO, FileBasicInfo, FileRenameInfo, FileStandardInfo, GetDiskFreeSpaceExW,
    GetFileInformationByHandle, GetFileInformationByHandleEx, SetFileInformationByHandle,
};
use windows_sys::Win32::System::IO::DeviceIoControl;
use windows_sys::Win32::System::Ioctl::{
    FILE_ALLOCATED_RANGE_BUFFER, FILE_ZERO_DATA_INFORMATION, FSCTL_QUERY_ALLOCATED_RANGES, FSCTL_SET_SPARSE,
    FSCTL_SET_ZERO_DATA,
};

use crate::disk::{Allocation, DiskIdentity};

const ERROR_MORE_DATA: i32 = 234;
/// From 1601, in units of 100 ns, to 1970.
const EPOCH_DIFFERENCE: i128 = 116_444_736_000_000_000;

/// A link is opened itself, and is no file of ours.
pub(crate) fn open_private(options: &mut OpenOptions) {
    options.custom_flags(FILE_FLAG_OPEN_REPARSE_POINT);
}

/// For the system, for administrators and for who made it, in whatever folder it lies: everybody may read what is below
/// `C:\ProgramData`. What is made in it inherits that.
const PRIVATE: &str = "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;FA;;;OW)";

/// A folder that is there already is left as it is.
pub(crate) fn create_private_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_private_folder(parent)?;
    }
    let (mut descriptor, rights) = (null_mut(), wide(PRIVATE.as_ref()));
    // SAFETY: a terminated text, and the address of one pointer, whose memory is freed below.
    let done = unsafe {
        let text = rights.as_ptr();
        ConvertStringSecurityDescriptorToSecurityDescriptorW(text, SDDL_REVISION_1, &raw mut descriptor, null_mut())
    };
    if done == 0 {
        return Err(io::Error::last_os_error());
    }
    let attributes = SECURITY_ATTRIBUTES {
        nLength: size_of::<SECURITY_ATTRIBUTES>() as u32,
        lpSecurityDescriptor: descriptor,
        bInheritHandle: 0,
    };
    let name = wide(path.as_os_str());
    // SAFETY: a terminated name, and a descriptor that lives until the call returned.
    let made = match unsafe { CreateDirectoryW(name.as_ptr(), &raw const attributes) } {
        0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: what the conversion allocated, once.
    unsafe { LocalFree(descriptor) };
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made,
    }
}

fn wide(text: &OsStr) -> Vec<u16> {
    text.encode_wide().chain([0]).collect()
}

/// A folder that is opened to be written can be flushed.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(FILE_FLAG_BACKUP_SEMANTICS);
    options.open(path).and_then(|file| file.sync_all())
}

/// Its name is free at once. Windows before 10 1809, shares and some file systems keep it until the last one who has the file open closes it (a
/// scanner, a backup, a reader of ours), and refuse everybody who opens it meanwhile: so it gets a name that means nothing first.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    // From here on it goes, whatever becomes of us.
    options.access_mode(DELETE).custom_flags(FILE_FLAG_DELETE_ON_CLOSE | FILE_FLAG_OPEN_REPARSE_POINT);
    let file = options.open(path)?;
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}.removed", crate::random::uuid().simple()));
    if let Err(error) = rename_open(&file, Path::new(&aside)) {
        tracing::debug!(path = %path.display(), %error, "its name is free once nobody has it open");
    }
    Ok(())
}

fn rename_open(file: &File, to: &Path) -> io::Result<()> {
    let name = wide(std::path::absolute(to)?.as_os_str());
    let header_bytes = std::mem::offset_of!(FILE_RENAME_INFO, FileName);
    let bytes = header_bytes + size_of_val(&*name);
    // Aligned as the structure is; a flag and a folder that are zero: nothing is replaced, the name is a whole path.
    let mut buffer = vec![0u64; bytes.max(size_of::<FILE_RENAME_INFO>()).div_ceil(8)];
    let info = buffer.as_mut_ptr().cast::<FILE_RENAME_INFO>();
    // SAFETY: the buffer holds the header and the name behind it, with its end, which does not count to its length.
    let done = unsafe {
        (&raw mut (*info).FileNameLength).write(size_of_val(&name[..name.len() - 1]) as u32);
        std::ptr::copy_nonoverlapping(name.as_ptr(), (&raw mut (*info).FileName).cast::<u16>(), name.len());
        SetFileInformationByHandle(file.as_raw_handle(), FileRenameInfo, info.cast(), bytes as u32)
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn available_bytes(folder: &Path) -> io::Result<u64> {
    let name = wide(folder.as_os_str());
    let mut available = 0;
    // SAFETY: a terminated name, and the address of one number.
    match unsafe { GetDiskFreeSpaceExW(name.as_ptr(), &raw mut available, null_mut(), null_mut()) } {
        0 => Err(io::Error::last_os_error()),
        _ => Ok(available),
    }
}

fn information<T: Default>(file: &File, class: i32) -> io::Result<T> {
    let mut found = T::default();
    // SAFETY: the handle is open, and the buffer is of the type that the class fills.
    let done = unsafe {
        GetFileInformationByHandleEx(file.as_raw_handle(), class, (&raw mut found).cast(), size_of::<T>() as u32)
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
}

pub(crate) fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(information::<FILE_STANDARD_INFO>(file, FileStandardInfo)?.AllocationSize as u64)
}

/// Which file it is, and when it changed last.
pub(crate) fn identity(file: &File) -> io::Result<DiskIdentity> {
    let mut of = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: the handle is open, and the call fills one such structure.
    if unsafe { GetFileInformationByHandle(file.as_raw_handle(), &raw mut of) } == 0 {
        return Err(io::Error::last_os_error());
    }
    let times: FILE_BASIC_INFO = information(file, FileBasicInfo)?;
    let ns = |time: i64| (i128::from(time) - EPOCH_DIFFERENCE) * 100;
    Ok(DiskIdentity {
        device: u64::from(of.dwVolumeSerialNumber),
        inode: u64::from(of.nFileIndexHigh) << 32 | u64::from(of.nFileIndexLow),
        bytes: u64::from(of.nFileSizeHigh) << 32 | u64::from(of.nFileSizeLow),
        changed_ns: ns(times.ChangeTime),
        modified_ns: ns(times.LastWriteTime),
        // A file that takes another one's name within seconds takes this time as well; its index has a number that counts how often it was used.
        born_ns: None,
        is_block_device: false,
        data_write_guid: None,
    })
}

pub(crate) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.seek_read(buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(crate) fn write_all_at(file: &File, mut data: &[u8], mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        match file.seek_write(data, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                data = &data[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// One after another: Windows gathers whole pages alone.
pub(crate) fn write_all_vectored_at(file: &File, mut offset: u64, slices: &[IoSlice<'_>]) -> io::Result<()> {
    for slice in slices {
        write_all_at(file, slice, offset)?;
        offset += slice.len() as u64;
    }
    Ok(())
}

/// Which volume a folder is on.
pub(crate) fn volume_of(folder: &Path) -> io::Result<u64> {
    let mut options = OpenOptions::new();
    // Its name and times alone.
    options.access_mode(FILE_READ_ATTRIBUTES).custom_flags(FILE_FLAG_BACKUP_SEMANTICS);
    Ok(identity(&options.open(folder)?)?.device)
}

/// ERROR_NOT_SUPPORTED: what is asked for is not done here.
pub(crate) const NOT_SUPPORTED: i32 = 50;
/// WSAESHUTDOWN: who is asked has ended.
pub(crate) const SHUT_DOWN: i32 = 10058;

/// Asks the file system; how many bytes it answered.
fn control(file: &File, code: u32, input: &[u8], output: &mut [u8]) -> io::Result<usize> {
    let mut answered = 0;
    let (given, taken) = (input.as_ptr().cast::<c_void>(), output.as_mut_ptr().cast::<c_void>());
    // SAFETY: the handle is open; both buffers are as long as it is said, and the call is over when it returns.
    let done = unsafe {
        DeviceIoControl(
            file.as_raw_handle(),
            code,
            if input.is_empty() { null() } else { given },
            input.len() as u32,
            if output.is_empty() { null_mut() } else { taken },
            output.len() as u32,
            &raw mut answered,
            null_mut(),
        )
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(answered as usize) }
}

/// A range reads as zeroes; where the file may have holes, its room is given back.
pub(crate) fn zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    const { assert!(size_of::<FILE_ZERO_DATA_INFORMATION>() == 16) };
    // Where there are no sparse files, zeroes are written.
    let _ = control(file, FSCTL_SET_SPARSE, &[], &mut []);
    let range = [offset.to_le_bytes(), (offset + length).to_le_bytes()].concat();
    if control(file, FSCTL_SET_ZERO_DATA, &range, &mut []).is_ok() {
        return Ok(());
    }
    let zeroes = vec![0; 1 << 20];
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let part = (end - at).min(zeroes.len() as u64);
        write_all_at(file, &zeroes[..part as usize], at)?;
        at += part;
    }
    Ok(())
}

/// Within the file: what lies beyond its end is no part of it.
pub(crate) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let end = (offset + length).min(file.metadata()?.len());
    if offset < end { zero(file, offset, end - offset) } else { Ok(()) }
}

/// The file becomes as long as that; whether its room is there, the writes find out.
pub(crate) fn reserve(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if file.metadata()?.len() < offset + length { file.set_len(offset + length) } else { Ok(()) }
}

/// The run of one kind that begins at `offset`.
pub(crate) fn allocation(file: &File, offset: u64, bytes: u64) -> io::Result<(u64, Allocation)> {
    const ONE: usize = size_of::<FILE_ALLOCATED_RANGE_BUFFER>();
    const { assert!(ONE == 16) };
    let asked = [offset.to_le_bytes(), (bytes - offset).to_le_bytes()].concat();
    let mut answer = [0; ONE];
    let count = match control(file, FSCTL_QUERY_ALLOCATED_RANGES, &asked, &mut answer) {
        Ok(count) => count,
        // There are more than one.
        Err(error) if error.raw_os_error() == Some(ERROR_MORE_DATA) => ONE,
        // A file system that cannot tell.
        Err(_) => return Ok((bytes - offset, Allocation::Data)),
    };
    if count < ONE {
        return Ok((bytes - offset, Allocation::Hole));
    }
    let number = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().expect("eight bytes"));
    let (start, end) = (number(0).clamp(offset, bytes), number(0).saturating_add(number(8)).clamp(offset, bytes));
    Ok(match start > offset {
        true => (start - offset, Allocation::Hole),
        false => ((end - offset).max(1), Allocation::Data),
    })
}

/// The first place from `from` on that is no hole; `None`: nothing but holes up to the end.
pub(crate) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    let bytes = file.metadata()?.len();
    if from >= bytes {
        return Ok(None);
    }
    match allocation(file, from, bytes)? {
        (_, Allocation::Data) => Ok(Some(from)),
        (length, Allocation::Hole) => Ok(Some(from + length).filter(|place| *place < bytes)),
    }
}

/// Its access list would say it, and is not looked at: nothing that others could have changed is run.
pub(crate) fn distrust(path: &Path) -> io::Result<Option<&'static str>> {
    path.metadata().map(|_| Some("who may write it cannot be told on Windows"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_folders_are_made_with_all_above_them_and_left_where_they_are() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("a").join("b");
        create_private_folder(&path).unwrap();
        create_private_folder(&path).unwrap();
        assert!(path.is_dir());
        std::fs::write(path.join("file"), b"x").unwrap();
        assert!(create_private_folder(&path.join("file")).is_err(), "that is a file");
    }
}
