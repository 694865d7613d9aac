//! What the disks hold: this machine's own files, and a database.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::disks::failed;
use super::tools;
use super::writers::BLOCK_BYTES;
use crate::cli::CliError;

/// Where files of every machine are.
const SOURCES: [&str; 5] = ["/etc", "/usr/share", "/usr/lib", "/usr/bin", "/usr/include"];
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Inodes of a small file system are few.
const FILES_MAX: usize = 3000;
pub const DATABASE: &str = "/database";

/// A folder with real files, about `budget` bytes, and a database of `database` bytes.
pub fn make_tree(tree: &Path, budget: u64, database: u64) -> Result<usize, CliError> {
    std::fs::create_dir(tree).map_err(|error| failed(tree, error))?;
    let mut copied = 0;
    let mut files = 0;
    for (index, source) in SOURCES.iter().enumerate() {
        // Each source gets its share; what one does not use, the later ones may.
        let share = budget * (index as u64 + 1) / SOURCES.len() as u64;
        let most = FILES_MAX * (index + 1) / SOURCES.len();
        let mut folders = vec![PathBuf::from(source)];
        while let Some(folder) = folders.pop() {
            if copied >= share || files >= most {
                break;
            }
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            let mut entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            entries.sort();
            for path in entries {
                let Ok(metadata) = path.symlink_metadata() else { continue };
                if metadata.is_dir() {
                    folders.push(path);
                } else if metadata.is_file() && metadata.len() <= FILE_BYTES_MAX && copied < share && files < most {
                    // What this user may not read is left out.
                    if let Ok(bytes) = copy_into(tree, &path)? {
                        copied += bytes;
                        files += 1;
                    }
                }
            }
        }
    }
    make_database(&tree.join(DATABASE.trim_start_matches('/')), database)?;
    Ok(files)
}

/// The outer error is ours, the inner one of the file that cannot be read.
fn copy_into(tree: &Path, path: &Path) -> Result<io::Result<u64>, CliError> {
    let mut source = match File::open(path) {
        Ok(source) => source,
        Err(error) => return Ok(Err(error)),
    };
    let to = tree.join(path.strip_prefix("/").unwrap_or(path));
    let parent = to.parent().unwrap_or(tree);
    std::fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
    let mut target = File::create(&to).map_err(|error| failed(&to, error))?;
    Ok(io::copy(&mut source, &mut target))
}

/// Every block has content, so that every block has a place on the disk.
fn make_database(path: &Path, bytes: u64) -> Result<(), CliError> {
    let mut file = io::BufWriter::new(File::create(path).map_err(|error| failed(path, error))?);
    for block in 0..bytes / BLOCK_BYTES as u64 {
        let line = format!("row {block:012} of the demonstration's database, before anyone wrote to it; ");
        let mut page = line.repeat(BLOCK_BYTES / line.len() + 1).into_bytes();
        page.truncate(BLOCK_BYTES);
        file.write_all(&page).map_err(|error| failed(path, error))?;
    }
    file.flush().map_err(|error| failed(path, error))
}

/// Makes the next version of the file system in `image`: new files come, one of the version before goes.
pub fn make_version(image: &Path, scratch: &Path, version: u32) -> Result<(), CliError> {
    let mut commands = format!("mkdir /version-{version}\ncd /version-{version}\n");
    let sources = ["/etc/passwd", "/etc/services", "/etc/group", "/proc/cpuinfo", "/proc/meminfo"];
    for (index, source) in sources.iter().enumerate() {
        let Ok(content) = std::fs::read(source) else { continue };
        // Of some size, and different in each version.
        let mut content = content.repeat(1 + (256 << 10) / content.len().max(1));
        content.extend_from_slice(format!("version {version}\n").as_bytes());
        let staged = scratch.join(format!("staged-{index}"));
        File::create(&staged).and_then(|mut file| file.write_all(&content)).map_err(|error| failed(&staged, error))?;
        commands.push_str(&format!("write {} file-{index}\n", staged.display()));
    }
    if version > 2 {
        commands.push_str(&format!("rm /version-{}/file-0\n", version - 1));
    }
    let script = scratch.join("commands");
    File::create(&script)
        .and_then(|mut file| file.write_all(commands.as_bytes()))
        .map_err(|error| failed(&script, error))?;
    tools::edit(image, &script)
}
