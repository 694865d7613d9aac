//! Our own files: logs, companions, bitmaps, journals, manifests.
//!
//! Every open, rename, create and sync of a file that must survive a crash goes through here, so that the order of
//! durable steps can be read in one place, replaced by a simulated one, and frozen at its n-th sync by a test.
//!
//! *Crash.* A new file is durable when its content was synced *and* its folder was ([`Storage::sync_folder`]). A rename
//! is durable when its folder was synced. [`replace_file`] does all of it.
//!
//! *Failed syncs latch.* The page cache is marked clean after a failed sync, so a second one would succeed over lost
//! data. A file whose sync failed refuses every later write and sync until it is opened again.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::platform;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    Read,
    /// The file must exist.
    ReadWrite,
    /// The file must not exist.
    Create,
    /// Made when it is missing.
    OpenOrCreate,
}

/// One folder of ours and everything beneath it. Names are relative to it and never leave it.
pub trait Storage: Send + Sync {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>>;
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// The name is free at once, whoever still has the file open.
    fn remove(&self, name: &str) -> io::Result<()>;
    fn create_folder(&self, name: &str) -> io::Result<()>;
    /// Removes a folder with everything in it.
    fn remove_folder(&self, name: &str) -> io::Result<()>;
    /// The names in a folder (`""` is the root), sorted.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    fn exists(&self, name: &str) -> io::Result<bool>;
    /// Makes creations, renames and removals in a folder durable.
    fn sync_folder(&self, folder: &str) -> io::Result<()>;
    /// Bytes that can still be written here.
    fn available_bytes(&self) -> io::Result<u64>;
    /// Where a name is, for messages and for programs that need a path.
    fn path(&self, name: &str) -> PathBuf;
    /// A storage rooted at a folder of this one.
    fn folder(&self, name: &str) -> Arc<dyn Storage>;
}

pub trait StorageFile: Send + Sync {
    /// Reads exactly `buffer.len()` bytes; an end of file before that is `UnexpectedEof`.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Writes the buffers one after another from `offset`. The slices are not kept.
    fn write_vectored_at(&self, offset: u64, data: &[IoSlice<'_>]) -> io::Result<()>;
    /// Makes all data written so far, and the length, durable.
    fn sync(&self) -> io::Result<()>;
    fn set_bytes(&self, bytes: u64) -> io::Result<()>;
    fn bytes(&self) -> io::Result<u64>;
    /// What the file occupies on the media: holes count nothing.
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// Makes a range read as zeroes and gives its room back.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Reserves room, so that later writes to the range cannot fail for want of it. The range reads as it did.
    fn reserve(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The file itself, for `mmap`, locks and `SEEK_DATA`; `None` in a simulation.
    fn as_file(&self) -> Option<&File>;

    /// The first place from `from` on, before `until`, that may hold something else than zeroes.
    fn next_data(&self, from: u64, until: u64) -> io::Result<Option<u64>> {
        let Some(file) = self.as_file() else { return Ok((from < until).then_some(from)) };
        Ok(platform::next_data(file, from)?.filter(|place| *place < until))
    }
}

/// Removes a file that may be gone already: by an earlier try, whose removal was perhaps not synced. The caller syncs the folder.
pub fn remove_if_there(storage: &dyn Storage, name: &str) -> io::Result<()> {
    match storage.remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Replaces the content of a small file so that a crash leaves the old or the new one, never a mix.
///
/// 1. write `name.new`, 2. sync it, 3. rename it over `name`, 4. sync the folder.
///
/// Crash before 3: the old content, and a `name.new` that the next call overwrites. Between 3 and 4: either. After 4: the new.
pub fn replace_file(storage: &dyn Storage, name: &str, content: &[u8]) -> io::Result<()> {
    let new = format!("{name}.new");
    let file = storage.open(&new, OpenMode::OpenOrCreate)?;
    file.set_bytes(0)?;
    file.write_at(0, content)?;
    if !crate::sabotage::is("replace-sync") {
        file.sync()?;
    }
    drop(file);
    storage.rename(&new, name)?;
    storage.sync_folder(name.rsplit_once('/').map_or("", |(folder, _)| folder))
}

/// Replaces a small text that is worth nothing once a bit of it flipped: its first line is the BLAKE3 of the rest, in hexadecimal digits.
pub fn replace_with_digest(storage: &dyn Storage, name: &str, text: &str) -> io::Result<()> {
    let whole = format!("{}\n{text}", blake3::hash(text.as_bytes()).to_hex());
    replace_file(storage, name, whole.as_bytes())
}

/// What [`replace_with_digest`] stored. `None`: nothing is there, or something else.
pub fn read_with_digest(storage: &dyn Storage, name: &str, bytes_max: u64) -> io::Result<Option<String>> {
    if !storage.exists(name)? {
        return Ok(None);
    }
    let bytes = match read_file(storage, name, bytes_max) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        other => other?,
    };
    let found = std::str::from_utf8(&bytes).ok().and_then(|whole| whole.split_once('\n'));
    let sound = found.filter(|(digest, text)| blake3::hash(text.as_bytes()).to_hex().as_str() == *digest);
    Ok(sound.map(|(_, text)| text.to_owned()))
}

/// Writes the bytes `from..to` of a file over themselves. After a sync that failed the page cache holds data that looks clean
/// and never reached the media, and the process that knew may be gone: before what was found in a file counts as durable, it
/// is written once more, then synced.
pub fn write_again(file: &dyn StorageFile, from: u64, to: u64) -> io::Result<()> {
    let mut buffer = vec![0; to.saturating_sub(from).min(1 << 20) as usize];
    let mut at = from;
    while at < to {
        let part = &mut buffer[..(to - at).min(1 << 20) as usize];
        file.read_at(at, part)?;
        file.write_at(at, part)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// The whole of a file that is at most `bytes_max` long.
pub fn read_file(storage: &dyn Storage, name: &str, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = storage.open(name, OpenMode::Read)?;
    let bytes = file.bytes()?;
    if bytes > bytes_max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} has {bytes} bytes, at most {bytes_max} are expected", storage.path(name).display()),
        ));
    }
    let mut content = vec![0; bytes as usize];
    file.read_at(0, &mut content)?;
    Ok(content)
}

/// A folder of this machine.
pub struct RealStorage {
    root: PathBuf,
}

impl RealStorage {
    /// The folder must exist.
    pub fn open_folder(root: impl Into<PathBuf>) -> Arc<dyn Storage> {
        let root = root.into();
        #[cfg(feature = "simulation")]
        if let Some(world) = crate::seam::current() {
            return world.folder(&root);
        }
        Arc::new(Self { root })
    }

    /// Makes the folder, readable to its owner alone, when it is missing.
    pub fn create(root: impl Into<PathBuf>) -> io::Result<Arc<dyn Storage>> {
        let root = root.into();
        create_private_folder(&root)?;
        Ok(Self::open_folder(root))
    }

    fn resolve(&self, name: &str) -> io::Result<PathBuf> {
        let relative = Path::new(name);
        if relative.components().all(|part| matches!(part, Component::Normal(_))) {
            Ok(self.root.join(relative))
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} is not a name inside {}", self.root.display()),
            ))
        }
    }
}

/// Makes a folder, and those above it, with mode 0700.
pub fn create_private_folder(path: &Path) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(world) = crate::seam::current() {
        return world.create_folder(path);
    }
    platform::create_private_folder(path)
}

/// The path without links and relative parts. In a simulation there are none.
pub fn canonical(path: &Path) -> io::Result<PathBuf> {
    #[cfg(feature = "simulation")]
    if crate::seam::current().is_some() {
        return Ok(path.to_owned());
    }
    path.canonicalize()
}

/// Adds the path to an error, which the system leaves out.
fn with_path<T>(result: io::Result<T>, path: &Path) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), PathError { path: path.to_owned(), error }))
}

/// An I/O error that names the file. Its [`raw_os_error`](io::Error::raw_os_error) is kept within.
#[derive(Debug)]
pub struct PathError {
    pub path: PathBuf,
    pub error: io::Error,
}

impl std::fmt::Display for PathError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.error)
    }
}

impl std::error::Error for PathError {}

/// The system's error number, looked for inside errors that carry a path.
pub fn os_error(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| error.get_ref()?.downcast_ref::<PathError>()?.error.raw_os_error())
}

/// What kind of error the system's number is, wherever it is.
fn kind_of(error: &io::Error) -> io::ErrorKind {
    os_error(error).map_or(error.kind(), |number| io::Error::from_raw_os_error(number).kind())
}

/// Whether there is no room, or no more for this user.
pub fn is_full(error: &io::Error) -> bool {
    matches!(kind_of(error), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether it is the rights that are missing.
pub fn is_denied(error: &io::Error) -> bool {
    matches!(kind_of(error), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Whether nothing is there.
pub fn is_absent(error: &io::Error) -> bool {
    kind_of(error) == io::ErrorKind::NotFound
}

/// A number that is the same for all folders that share their room.
pub fn volume_of(folder: &Path) -> io::Result<u64> {
    platform::volume_of(folder)
}

/// How much room the content of a file takes.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    platform::allocated_bytes(&File::open(path)?)
}

/// Fills `buffer` from there on, whatever the file's own position is.
pub fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    platform::read_exact_at(file, buffer, offset)
}

impl Storage for RealStorage {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let path = self.resolve(name)?;
        let mut options = OpenOptions::new();
        options.read(true);
        platform::open_private(&mut options);
        match mode {
            OpenMode::Read => {}
            OpenMode::ReadWrite => {
                options.write(true);
            }
            OpenMode::Create => {
                options.write(true).create_new(true);
            }
            OpenMode::OpenOrCreate => {
                options.write(true).create(true);
            }
        }
        let file = with_path(options.open(&path), &path)?;
        Ok(Arc::new(RealFile { file, path, sync_failed: AtomicBool::new(false) }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.resolve(from)?, self.resolve(to)?);
        #[expect(clippy::disallowed_methods, reason = "this is the module that the ban points to")]
        with_path(std::fs::rename(&from, to), &from)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.resolve(name)?;
        with_path(platform::remove_file(&path), &path)
    }

    fn create_folder(&self, name: &str) -> io::Result<()> {
        let path = self.resolve(name)?;
        with_path(create_private_folder(&path), &path)
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        let path = self.resolve(name)?;
        with_path(std::fs::remove_dir_all(&path), &path)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let path = self.resolve(folder)?;
        let mut names = Vec::new();
        for entry in with_path(std::fs::read_dir(&path), &path)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        let path = self.resolve(name)?;
        with_path(path.try_exists(), &path)
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        let path = self.resolve(folder)?;
        with_path(platform::sync_folder(&path), &path)
    }

    fn available_bytes(&self) -> io::Result<u64> {
        platform::available_bytes(&self.root)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn folder(&self, name: &str) -> Arc<dyn Storage> {
        Arc::new(Self { root: self.root.join(name) })
    }
}

struct RealFile {
    file: File,
    path: PathBuf,
    sync_failed: AtomicBool,
}

impl RealFile {
    fn check_latch(&self) -> io::Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(io::Error::other(format!("{}: an earlier sync failed; reopen the file", self.path.display())));
        }
        Ok(())
    }
}

impl StorageFile for RealFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        with_path(platform::read_exact_at(&self.file, buffer, offset), &self.path)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check_latch()?;
        with_path(platform::write_all_at(&self.file, data, offset), &self.path)
    }

    fn write_vectored_at(&self, offset: u64, data: &[IoSlice<'_>]) -> io::Result<()> {
        self.check_latch()?;
        with_path(write_all_vectored_at(&self.file, offset, data), &self.path)
    }

    fn sync(&self) -> io::Result<()> {
        self.check_latch()?;
        let result = self.file.sync_data();
        if result.is_err() {
            self.sync_failed.store(true, Ordering::Release);
        }
        with_path(result, &self.path)
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.check_latch()?;
        with_path(self.file.set_len(bytes), &self.path)
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        platform::allocated_bytes(&self.file)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_latch()?;
        with_path(platform::punch_hole(&self.file, offset, length), &self.path)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_latch()?;
        with_path(platform::reserve(&self.file, offset, length), &self.path)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Writes the buffers one after another until everything is written.
pub fn write_all_vectored_at(file: &File, offset: u64, slices: &[IoSlice<'_>]) -> io::Result<()> {
    platform::write_all_vectored_at(file, offset, slices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_never_leave_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        for name in ["../x", "/etc/passwd", "a/../../x", "./x"] {
            assert_eq!(
                storage.open(name, OpenMode::OpenOrCreate).err().map(|error| error.kind()),
                Some(io::ErrorKind::InvalidInput),
                "{name}"
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/hostname", folder.path().join("link")).unwrap();
        assert!(RealStorage::open_folder(folder.path()).open("link", OpenMode::Read).is_err());
    }

    #[test]
    fn a_replaced_file_has_the_new_content() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        replace_file(&*storage, "state", b"a long first content").unwrap();
        replace_file(&*storage, "state", b"second").unwrap();
        assert_eq!(read_file(&*storage, "state", 100).unwrap(), b"second");
        assert_eq!(storage.list("").unwrap(), ["state"]);
        assert!(read_file(&*storage, "state", 5).is_err());
    }

    #[test]
    fn a_file_that_is_removed_while_somebody_has_it_open_is_gone_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let file = storage.open("log", OpenMode::Create).unwrap();
        file.write_at(0, b"old").unwrap();
        let reader = storage.open("log", OpenMode::Read).unwrap();
        storage.remove("log").unwrap();
        assert!(!storage.exists("log").unwrap() && !storage.list("").unwrap().contains(&"log".to_owned()));
        let again = storage.open("log", OpenMode::Create).unwrap();
        again.write_at(0, b"new").unwrap();
        let mut content = [0; 3];
        reader.read_at(0, &mut content).unwrap();
        assert_eq!(&content, b"old");
        drop((file, reader));
        assert_eq!(read_file(&*storage, "log", 10).unwrap(), b"new");
        assert_eq!(storage.list("").unwrap(), ["log"], "nothing else is left of it");
        let absent = storage.remove("absent").unwrap_err();
        assert!(is_absent(&absent), "{absent}");
    }

    #[test]
    fn many_slices_are_written_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let file = storage.open("file", OpenMode::Create).unwrap();
        let parts: Vec<Vec<u8>> =
            (0..3000u32).map(|number| number.to_le_bytes().repeat(1 + number as usize % 5)).collect();
        let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        file.write_vectored_at(7, &slices).unwrap();
        let mut read = vec![0; parts.concat().len()];
        file.read_at(7, &mut read).unwrap();
        assert_eq!(read, parts.concat());
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = RealStorage::open_folder(folder.path()).open("absent", OpenMode::Read).err().unwrap();
        assert!(error.to_string().contains("absent"), "{error}");
        assert_eq!(os_error(&error), Some(libc::ENOENT));
    }
}
