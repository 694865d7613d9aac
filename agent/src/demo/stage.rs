//! The play: acts in order, each told in one line.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidemark_base::random::Random;
use tidemark_base::stop::Stop;
use tidemark_base::storage::create_private_folder;

use super::api::Api;
use super::content::{DATABASE, make_tree, make_version};
use super::disks::{self, NbdDisk, failed};
use super::proof::{self, Known, Marked, Proof, Reference};
use super::report::Report;
use super::site::Site;
use super::tools;
use super::writers::Writers;
use crate::cli::{CliError, Output};
use crate::client::Client;

const MACHINE: &str = "demo";
/// How long the initial replication, or catching up, may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Load before and after each mark.
const LOAD: Duration = Duration::from_millis(1500);
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
const DAMAGE_BYTES: usize = 8 << 20;

/// Where everything of the demonstration is; gone with it unless it is kept.
pub struct WorkFolder {
    path: PathBuf,
    keep: bool,
}

impl WorkFolder {
    pub fn create(wanted: Option<&Path>, keep: bool) -> Result<Self, CliError> {
        let path = match wanted {
            Some(path) => std::path::absolute(path).map_err(|error| failed(path, error))?,
            None => {
                let parent = Path::new("/var/tmp");
                let parent = if parent.is_dir() { parent.to_owned() } else { std::env::temp_dir() };
                parent.join(format!("tidemark-demo-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]))
            }
        };
        create_private_folder(&path).map_err(|error| failed(&path, error))?;
        let mut entries = std::fs::read_dir(&path).map_err(|error| failed(&path, error))?;
        if entries.next().is_some() {
            return Err(CliError::new(
                format!("the folder {} is not empty", path.display()),
                "name a folder that is empty or absent: the demonstration removes what it made",
            ));
        }
        Ok(Self { path, keep })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn log(&self) -> PathBuf {
        self.path.join("up.log")
    }

    /// The end of the log of `up`, for whoever must find out what went wrong.
    pub fn tell_log(&self) {
        if let Ok(log) = std::fs::read_to_string(self.log()) {
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(20)..] {
                eprintln!("up: {line}");
            }
        }
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the demonstration's folder is not removed");
        }
    }
}

pub struct Stage<'a> {
    folder: &'a WorkFolder,
    site: Site,
    api: Api,
    sampler: Sampler,
    /// As `protect` answered.
    disks: Vec<Value>,
    sources: Vec<PathBuf>,
    addresses: Vec<String>,
    databases: Vec<Vec<u32>>,
    references: Vec<Reference>,
    marked: Vec<Marked>,
    initial_seconds: f64,
    initial_bytes: u64,
}

impl<'a> Stage<'a> {
    /// Disks with file systems, a running site, and the disks protected and replicated.
    pub fn set(folder: &'a WorkFolder, size: u64, output: &Output) -> Result<Self, CliError> {
        let path = folder.path();
        for name in ["work", "reference", "recovered"] {
            let folder = path.join(name);
            std::fs::create_dir(&folder).map_err(|error| failed(&folder, error))?;
        }
        let sources = vec![path.join("files.img"), path.join("data.img")];
        tell(output, "making two disks with file systems and real files");
        let tree = path.join("work/tree");
        let files = make_tree(&tree, (size / 4).min(160 << 20), (size / 8).min(48 << 20))?;
        make_disk(&sources[0], size, &tree)?;
        std::fs::remove_dir_all(&tree).map_err(|error| failed(&tree, error))?;
        make_tree(&tree, 0, (size / 8).min(32 << 20))?;
        make_disk(&sources[1], (size / 4).max(64 << 20), &tree)?;
        std::fs::remove_dir_all(&tree).map_err(|error| failed(&tree, error))?;
        let databases = sources.iter().map(|image| tools::blocks_of(image, DATABASE)).collect::<Result<Vec<_>, _>>()?;
        // The next versions are made on a copy, and written through the agent.
        disks::copy(&sources[0], &path.join("work/next.img"))?;

        tell(output, &format!("starting all roles; protecting {files} files and two databases"));
        let site = Site::start(&path.join("site"), &folder.log())?;
        let ready = |field: &str| site.ready[field].as_str().unwrap_or_default().to_owned();
        let client = Client::new(&ready("api"), Path::new(&ready("token_file")), Path::new(&ready("ca_file")))?;
        let api = Api::new(client.clone())?;
        let began = Instant::now();
        let protected = api.job("/machines", &json!({ "name": MACHINE, "disks": sources }))?;
        let disks = protected["disks"].as_array().cloned().unwrap_or_default();
        let addresses =
            disks.iter().map(|disk| disk["attach"]["nbd"].as_str().unwrap_or_default().to_owned()).collect();
        let status = api.wait(MACHINE, "the initial replication", LIMIT, |status| status["state"] == "protected")?;
        Ok(Self {
            folder,
            site,
            api,
            sampler: Sampler::start(client)?,
            disks,
            sources,
            addresses,
            databases,
            references: Vec::new(),
            marked: Vec::new(),
            initial_seconds: began.elapsed().as_secs_f64(),
            initial_bytes: status["sent_bytes"].as_u64().unwrap_or_default(),
        })
    }

    pub fn play(&mut self, report: &mut Report, output: &Output) -> Result<(), CliError> {
        report.initial_replication_seconds = self.initial_seconds;
        report.initial_replication_bytes_sent = self.initial_bytes;
        let mut writers = Writers::start(&self.addresses, &self.databases)?;
        let mut files = NbdDisk::connect(&self.addresses[0])?;
        self.sampler.record(true);

        tell(output, "writing; making app- and crash-consistent points under load");
        self.app_point(&writers, &mut files, 2)?;
        self.crash_point(&writers, "crash 1")?;
        self.app_point(&writers, &mut files, 3)?;
        self.crash_point(&writers, "crash 2")?;
        load(&writers, LOAD)?;
        self.sampler.record(false);
        writers.end()?;
        self.app_point(&writers, &mut files, 4)?;

        tell(output, "damaging the source, as ransomware would");
        self.damage(report)?;
        tell(output, "test failover to the point before the damage");
        self.drill(report)?;
        tell(output, "recovering every point, comparing with what it must be");
        self.recover_all(&writers, report)?;
        self.figures(report)
    }

    pub fn end(self) -> Result<(), CliError> {
        self.sampler.end();
        self.site.stop()
    }

    /// The next version of the files, applied as an application does that is quiet at its mark.
    fn app_point(&mut self, writers: &Writers, files: &mut NbdDisk, version: u32) -> Result<(), CliError> {
        let work = self.folder.path().join("work");
        let (next, before) = (work.join("next.img"), work.join("before.img"));
        disks::copy(&next, &before)?;
        make_version(&next, &work, version)?;
        let changes = disks::differences(&before, &next)?;
        load(writers, LOAD)?;
        let name = format!("app {}", version - 1);
        writers.held(|| {
            for (offset, data) in &changes {
                files.write(*offset, data)?;
            }
            files.flush()?;
            let point = self.api.point(MACHINE, true, &format!("version {version} of the files"))?;
            let folder = self.folder.path().join("reference");
            let mut reference = Reference { hashes: Vec::new(), images: Vec::new() };
            for (index, source) in self.sources.iter().enumerate() {
                let image = folder.join(format!("version-{version}-disk-{index}.img"));
                reference.hashes.push(disks::copy(source, &image)?);
                reference.images.push(image);
            }
            self.marked.push(Marked { name, point, known: Known::Source(reference.hashes.clone()) });
            self.references.push(reference);
            Ok(())
        })
    }

    fn crash_point(&mut self, writers: &Writers, name: &str) -> Result<(), CliError> {
        load(writers, LOAD)?;
        let before = writers.progress();
        let point = self.api.point(MACHINE, false, name)?;
        let after = writers.progress();
        let known = Known::Between {
            base: self.references.len() - 1,
            acknowledged: before.iter().map(|(acknowledged, _)| *acknowledged).collect(),
            issued: after.iter().map(|(_, issued)| *issued).collect(),
        };
        self.marked.push(Marked { name: name.to_owned(), point, known });
        Ok(())
    }

    /// Overwrites the beginning of each disk, and a run in the middle of it.
    fn damage(&mut self, report: &mut Report) -> Result<(), CliError> {
        let mut random = Random::new(0x7261_6e73_6f6d);
        let mut noise = vec![0; 1 << 20];
        for address in &self.addresses {
            let mut disk = NbdDisk::connect(address)?;
            random.fill(&mut noise);
            disk.write(0, &noise)?;
            let middle = disk.bytes() / 2 / 4096 * 4096;
            for part in 0..DAMAGE_BYTES as u64 >> 20 {
                random.fill(&mut noise);
                disk.write(middle + (part << 20), &noise)?;
            }
            disk.flush()?;
        }
        // The damage arrives as well: what was recovered is a point before it, not a replica that lags.
        self.api.wait(MACHINE, "sending the damage", LIMIT, |status| status["pending_bytes"] == 0)?;
        self.api.point(MACHINE, false, "after the damage")?;
        report.source_damaged = !tools::is_clean(&self.sources[0])? && !tools::is_clean(&self.sources[1])?;
        Ok(())
    }

    /// Serves the last point before the damage with a scratch layer, checks and changes it, and throws it away.
    fn drill(&mut self, report: &mut Report) -> Result<(), CliError> {
        let marked = self.marked.last().expect("points were made");
        let Known::Source(expected) = &marked.known else { unreachable!("the last point is app-consistent") };
        let point = marked.point["id"].as_str().unwrap_or_default();
        let began = Instant::now();
        let request = json!({ "writable": true });
        let serving = self.api.post(&format!("/machines/{MACHINE}/points/{point}/serve"), &request)?;
        let served = serving["disks"].as_array().cloned().unwrap_or_default();
        let mut first = true;
        for (index, disk) in self.disks.iter().enumerate() {
            let address =
                served.iter().find(|served| served["id"] == disk["id"]).and_then(|served| served["nbd"].as_str());
            let mut nbd = NbdDisk::connect(address.unwrap_or_default())?;
            if first {
                nbd.read(0, &mut [0; 4096])?;
                report.rto_seconds = began.elapsed().as_secs_f64();
                first = false;
            }
            let copy = self.folder.path().join("work/drill.img");
            let found = nbd.copy_to(&copy)?;
            let clean = tools::is_clean(&copy)?;
            // The drill's own writes: they are read back, and go with it.
            let mut scribble = vec![0; 1 << 20];
            Random::new(index as u64).fill(&mut scribble);
            nbd.write(4 << 20, &scribble)?;
            let mut read_back = vec![0; scribble.len()];
            nbd.read(4 << 20, &mut read_back)?;
            let kept = read_back == scribble;
            let identical = found == expected[index];
            report.proofs.push(Proof {
                name: "test failover".to_owned(),
                kind: "drill",
                disk: format!("disk {index}"),
                point: point.to_owned(),
                time: marked.point["time"].as_str().unwrap_or_default().to_owned(),
                expected_blake3: expected[index].to_hex().to_string(),
                recovered_blake3: found.to_hex().to_string(),
                identical,
                e2fsck_clean: clean,
                holds: identical && clean && kept,
                detail: "served with a scratch layer, read whole over NBD, written to and read back".to_owned(),
            });
        }
        let serve = serving["serve"].as_str().unwrap_or_default();
        self.api.delete(&format!("/serves/{serve}"))?;
        // The machine was replicated all the time.
        let status = self.api.status(MACHINE)?;
        report.replication_went_on = status["state"] == "protected";
        Ok(())
    }

    fn recover_all(&mut self, writers: &Writers, report: &mut Report) -> Result<(), CliError> {
        let path = self.folder.path();
        for (number, marked) in self.marked.iter().enumerate() {
            let folder = path.join(format!("recovered/{number}"));
            let began = Instant::now();
            let images = proof::recover(&self.api, MACHINE, marked, &folder, &self.disks)?;
            report.recovery_seconds.push(began.elapsed().as_secs_f64());
            let proofs = proof::check(marked, &images, &self.references, &self.databases, writers, &path.join("work"))?;
            report.proofs.extend(proofs);
            if !self.folder.keep {
                std::fs::remove_dir_all(&folder).map_err(|error| failed(&folder, error))?;
            }
        }
        Ok(())
    }

    fn figures(&mut self, report: &mut Report) -> Result<(), CliError> {
        let status = self.api.status(MACHINE)?;
        report.written_bytes = status["written_bytes"].as_u64().unwrap_or_default();
        report.sent_bytes = status["sent_bytes"].as_u64().unwrap_or_default();
        let points = self.api.get(&format!("/machines/{MACHINE}/points"))?;
        report.points = points.as_array().map_or(0, Vec::len);
        report.rpo_samples = self.sampler.taken();
        Ok(())
    }
}

fn tell(output: &Output, text: &str) {
    output.progress(text);
}

fn make_disk(image: &Path, bytes: u64, tree: &Path) -> Result<(), CliError> {
    let file = std::fs::File::create(image).map_err(|error| failed(image, error))?;
    file.set_len(bytes).map_err(|error| failed(image, error))?;
    drop(file);
    tools::make_file_system(image, tree)?;
    if tools::is_clean(image)? {
        return Ok(());
    }
    Err(CliError::new("mkfs.ext4 made a file system that e2fsck does not accept", "install a current e2fsprogs"))
}

/// Lets the writers write for a while.
fn load(writers: &Writers, duration: Duration) -> Result<(), CliError> {
    Stop::new().wait_for(duration);
    if writers.have_failed() {
        return Err(CliError::new("a write through the agent failed", "see the log of `up`"));
    }
    Ok(())
}

/// Asks for the RPO all the time, beside the play.
struct Sampler {
    stop: Stop,
    recording: Arc<AtomicBool>,
    samples: Arc<std::sync::Mutex<Vec<f64>>>,
    thread: std::thread::JoinHandle<()>,
}

impl Sampler {
    fn start(client: Client) -> Result<Self, CliError> {
        let (stop, recording, samples) = (Stop::new(), Arc::new(AtomicBool::new(false)), Arc::default());
        let api = Api::new(client)?;
        let sampling = (stop.clone(), recording.clone(), Arc::clone(&samples));
        let thread = std::thread::Builder::new()
            .name("rpo-sampler".to_owned())
            .spawn(move || {
                let (stop, recording, samples): (Stop, Arc<AtomicBool>, Arc<std::sync::Mutex<Vec<f64>>>) = sampling;
                while !stop.wait_for(SAMPLE_EVERY) {
                    if recording.load(Ordering::Acquire)
                        && let Ok(status) = api.status(MACHINE)
                        && let Some(rpo) = status["rpo_seconds"].as_f64()
                    {
                        samples.lock().expect("no panic while held").push(rpo);
                    }
                }
            })
            .map_err(CliError::runtime)?;
        Ok(Self { stop, recording, samples, thread })
    }

    fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Release);
    }

    fn taken(&self) -> Vec<f64> {
        self.samples.lock().expect("no panic while held").clone()
    }

    fn end(self) {
        self.stop.stop();
        let _ = self.thread.join();
    }
}
