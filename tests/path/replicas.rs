//! What a process server's folder holds, looked at without a server.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tidemark_tests::Site;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::offline;

#[test]
fn all_replicas_of_a_process_server_are_looked_at_by_its_folder() {
    let mut site = Site::start();
    let disks = [site.path("one.img"), site.path("two.img")];
    disks.iter().zip(1..).for_each(|(disk, seed)| image::make_mixed(disk, 2 * MIB, seed));
    site.protect("web", &[&disks[0], &disks[1]], &[]);
    site.wait_protected("web");
    site.point("web");
    site.down();
    let folder = site.state().join("process-server");
    let dir = folder.to_str().unwrap();
    let inspected = offline(&["replica", "inspect", dir, "--json"]).json();
    let replicas: Vec<String> =
        inspected.as_array().unwrap().iter().map(|one| one["folder"].as_str().unwrap().to_owned()).collect();
    assert!(replicas.len() == 2 && replicas.iter().all(|one| one.starts_with(dir)), "{inspected}");
    // One by itself is the object that it was.
    assert!(offline(&["replica", "inspect", &replicas[0], "--json"]).json()["segments"].is_array());
    let shown = offline(&["replica", "inspect", dir]);
    assert!(replicas.iter().all(|one| shown.stdout.contains(one.as_str())), "{}", shown.describe());
    let verified = offline(&["replica", "verify", dir]);
    assert!(verified.code == 0 && verified.stdout.matches("sound").count() == 2, "{}", verified.describe());

    turn_a_byte(&largest(Path::new(&replicas[1])).unwrap());
    let verified = offline(&["replica", "verify", dir]);
    verified.assert_refused(&[&replicas[1], "damaged"]);
    assert!(verified.stdout.contains(&format!("{}: sound", replicas[0])), "{}", verified.describe());
}

fn largest(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter_map(|path| if path.is_dir() { largest(&path) } else { Some(path) });
    files.max_by_key(|path| path.metadata().map_or(0, |found| found.len()))
}

fn turn_a_byte(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let (middle, mut byte) = (file.metadata().unwrap().len() / 2, [0]);
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();
}
