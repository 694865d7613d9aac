//! Points in use: served, exported, verified.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tidemark_base::disk::Disk;
use tidemark_base::meter::{Meter, Metered};
use tidemark_base::stop::Stop;
use tidemark_base::{Clock, DiskId, MachineId, MarkId, SystemClock};
use tidemark_proto::control::{
    Exported, ExportedFile, Failure, FailureKind, ImageFormat, PointInfo, Selector, ServeId, Serving, Verified,
};

use super::pins::DurablePins;
use super::{Inner, ProcessServer, blocking, point_failed, replica_failed, set_failed, store_failed};
use crate::export::{ExportError, export_raw, export_with_qemu, targets};
use crate::replica::Place;
use crate::scrub::{self, Finding};
use crate::serve::ServedPoint;
use crate::view::View;
use crate::view::scratch::ScratchDisk;

/// Defects of one disk that are named; more are counted.
const DEFECTS_MAX: usize = 100;

/// What a point is served for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Listed {
        writable: bool,
        listen: Option<SocketAddr>,
    },
    /// With a scratch layer, for a machine that is run here.
    Machine,
}

/// Ends what a dropped future began.
struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl ProcessServer {
    /// Serves a point's disks until [`ProcessServer::stop_serve`]: read-only, or each with a scratch layer of its own.
    pub async fn serve(
        &self,
        machine: MachineId,
        selector: Selector,
        writable: bool,
        listen: Option<SocketAddr>,
    ) -> Result<Serving, Failure> {
        let inner = self.0.clone();
        blocking(move || inner.serve(ServeId::random(), machine, selector, How::Listed { writable, listen })).await
    }

    /// As [`ProcessServer::serve`], writable, for a machine that is run here: not listed, so that nobody lets it expire.
    pub async fn serve_machine(&self, machine: MachineId, selector: Selector) -> Result<Serving, Failure> {
        let inner = self.0.clone();
        blocking(move || inner.serve(ServeId::random(), machine, selector, How::Machine)).await
    }

    /// Notes on a point that a machine booted from it and showed a sign of life. A place between points has nowhere to note it.
    pub async fn prove_point(&self, machine: MachineId, point: MarkId) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let points = inner.set.points(machine).map_err(point_failed)?;
            match points.get(point) {
                Some(_) => points.prove(point, SystemClock::new().wall_now()).map(drop).map_err(point_failed),
                None => Ok(()),
            }
        })
        .await
    }

    /// Ends the connections to it and drops its scratch layers.
    pub async fn stop_serve(&self, id: ServeId) -> Result<Serving, Failure> {
        let inner = self.0.clone();
        blocking(move || Ok(inner.serves.stop(id)?)).await
    }

    pub fn serves(&self) -> Vec<Serving> {
        self.0.serves.list()
    }

    /// Writes a point's disks as plain images: to the file `to`, or into the folder `to`.
    pub async fn export(
        &self,
        machine: MachineId,
        selector: Selector,
        to: &str,
        format: ImageFormat,
    ) -> Result<Exported, Failure> {
        self.export_metered(machine, selector, to, format, &Arc::default()).await
    }

    pub(super) async fn export_metered(
        &self,
        machine: MachineId,
        selector: Selector,
        to: &str,
        format: ImageFormat,
        meter: &Arc<Meter>,
    ) -> Result<Exported, Failure> {
        let inner = self.0.clone();
        let (point, views, pins) = blocking(move || {
            let (point, views, place) = inner.open_views(machine, selector)?;
            let pins = DurablePins::of_export(&inner.set, MarkId::random(), &place).map_err(set_failed)?;
            Ok((point, views, pins))
        })
        .await?;
        let _pins = ReleaseLater(Some(pins));
        let disks: Vec<DiskId> = views.iter().map(|(disk, _)| *disk).collect();
        let paths = targets(Path::new(to), &disks, format)?;
        meter.expect(views.iter().map(|(_, view)| view.bytes()).sum());
        let (mut files, mut from) = (Vec::new(), 0);
        for ((disk, view), path) in views.into_iter().zip(paths) {
            let bytes = view.bytes();
            let view = Arc::new(Metered { disk: view, meter: meter.clone(), from });
            from += bytes;
            let exporting = async {
                match format {
                    ImageFormat::Raw => self.export_raw(view, &path).await,
                    _ => self.export_with_qemu(machine, &point, disk, view, &path, format).await,
                }
            };
            let bytes = tokio::select! {
                result = exporting => result,
                () = self.0.stop.cancelled() => Err(ExportError::Stopped.into()),
            }
            .map_err(|failure| with_written(failure, &files))?;
            files.push(ExportedFile { id: disk, path: path.display().to_string(), bytes });
        }
        Ok(Exported { point: point.id, time: point.time, files })
    }

    async fn export_raw(&self, view: Arc<dyn Disk>, path: &Path) -> Result<u64, Failure> {
        let stop = Stop::new();
        let _ending = StopOnDrop(stop.clone());
        let path = path.to_owned();
        blocking(move || {
            let image = export_raw(&*view, &path, &stop)?;
            tracing::info!(path = %path.display(), bytes = image.bytes, "point exported");
            Ok(image.bytes)
        })
        .await
    }

    async fn export_with_qemu(
        &self,
        machine: MachineId,
        point: &PointInfo,
        disk: DiskId,
        view: Arc<dyn Disk>,
        path: &Path,
        format: ImageFormat,
    ) -> Result<u64, Failure> {
        let id = ServeId::random();
        let disks: Vec<(DiskId, Arc<dyn Disk>)> = vec![(disk, view)];
        let (point, time) = (point.id, point.time);
        let served = ServedPoint { machine, point, time, writable: false, disks, listen: None, held: None };
        let serving = self.0.serves.start(id, served, true)?;
        let _ending = StopServing { inner: self.0.clone(), id };
        let nbd = serving.disks.first().and_then(|disk| disk.nbd.clone()).unwrap_or_default();
        let image = export_with_qemu(&self.0.qemu_img, &nbd, format, path).await?;
        tracing::info!(path = %path.display(), bytes = image.bytes, "point exported");
        Ok(image.bytes)
    }

    /// Reads every byte that the point needs; each is checked on the way.
    pub async fn verify(&self, machine: MachineId, selector: Selector) -> Result<Verified, Failure> {
        self.verify_metered(machine, selector, &Arc::default()).await
    }

    pub(super) async fn verify_metered(
        &self,
        machine: MachineId,
        selector: Selector,
        meter: &Arc<Meter>,
    ) -> Result<Verified, Failure> {
        let meter = meter.clone();
        let stop = Stop::new();
        let _ending = StopOnDrop(stop.clone());
        let inner = self.0.clone();
        let verifying = blocking(move || inner.verify(machine, selector, &stop, &meter));
        tokio::select! {
            result = verifying => result,
            () = self.0.stop.cancelled() => {
                Err(Failure::new(FailureKind::Unavailable, "the process server stops", "verify again"))
            }
        }
    }
}

/// Gives pins back beside the runtime: that waits for the disk.
struct ReleaseLater(Option<DurablePins>);

impl Drop for ReleaseLater {
    fn drop(&mut self) {
        let pins = self.0.take();
        tokio::task::spawn_blocking(move || drop(pins));
    }
}

/// Ends an internal serve, whatever became of what it was for.
struct StopServing {
    inner: Arc<Inner>,
    id: ServeId,
}

impl Drop for StopServing {
    fn drop(&mut self) {
        let (inner, id) = (self.inner.clone(), self.id);
        // Waits for connections, so not on this thread.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = inner.serves.stop(id) {
                tracing::error!(serve = %id, %error, "an export's serve does not end");
            }
        });
    }
}

impl Inner {
    pub(super) fn open_views(
        &self,
        machine: MachineId,
        selector: Selector,
    ) -> Result<(PointInfo, Vec<(DiskId, Arc<View>)>, Place), Failure> {
        let (place, info) = self.resolve(machine, selector)?;
        let views = self.set.views(&place).map_err(set_failed)?;
        Ok((info, views.into_iter().map(|(disk, view)| (disk, Arc::new(view))).collect(), place))
    }

    fn serve(&self, id: ServeId, machine: MachineId, selector: Selector, how: How) -> Result<Serving, Failure> {
        let (writable, listen) = match how {
            How::Listed { writable, listen } => (writable, listen),
            How::Machine => (true, None),
        };
        let (info, views, place) = self.open_views(machine, selector)?;
        let pins = DurablePins::of_serve(&self.set, id, &place).map_err(set_failed)?;
        let result = self.open_disks(id, views, writable).and_then(|disks| {
            let held: Option<Box<dyn Send>> = Some(Box::new(pins));
            let point = ServedPoint { machine, point: info.id, time: info.time, writable, disks, listen, held };
            Ok(self.serves.start(id, point, how == How::Machine)?)
        });
        if result.is_err()
            && let Err(error) = self.serves.discard(id)
        {
            tracing::warn!(serve = %id, %error, "scratch layers are left until the next start");
        }
        result
    }

    /// What clients see of the views: themselves, or scratch layers over them.
    fn open_disks(
        &self,
        id: ServeId,
        views: Vec<(DiskId, Arc<View>)>,
        writable: bool,
    ) -> Result<Vec<(DiskId, Arc<dyn Disk>)>, Failure> {
        let mut disks: Vec<(DiskId, Arc<dyn Disk>)> = Vec::new();
        for (disk, view) in views {
            if writable {
                let folder = self.serves.scratch_folder(id, disk)?;
                let scratch = ScratchDisk::open(view, &*folder).map_err(|error| store_failed(&error))?;
                disks.push((disk, Arc::new(scratch)));
            } else {
                disks.push((disk, view));
            }
        }
        Ok(disks)
    }

    fn verify(&self, machine: MachineId, selector: Selector, stop: &Stop, meter: &Meter) -> Result<Verified, Failure> {
        let (place, info) = self.resolve(machine, selector)?;
        // Held open, so that nothing that is being read is folded away.
        let views = self.set.views(&place).map_err(set_failed)?;
        meter.expect(views.values().map(|view| view.bytes()).sum());
        let mut from = 0;
        let mut verified = Verified { point: info.id, time: info.time, bytes: 0, defects: Vec::new() };
        for &(disk, cut) in &place.cuts {
            let replica = self.set.get(disk).map_err(replica_failed)?;
            let report = scrub::verify(&replica, cut, stop, &|at| meter.reach(from + at)).map_err(replica_failed)?;
            from += replica.info().disk_bytes;
            if !report.finished {
                return Err(Failure::new(FailureKind::Unavailable, "the verification was stopped", "verify again"));
            }
            verified.bytes += report.bytes;
            let found = report.findings.iter().take(DEFECTS_MAX);
            verified.defects.extend(found.map(|finding| format!("disk {disk}: {}", describe(finding))));
            let more = report.findings.len().saturating_sub(DEFECTS_MAX) as u64 + report.findings_left_off;
            if more > 0 {
                verified.defects.push(format!("disk {disk}: {more} defects more"));
            }
        }
        if let Some(id) = place.id {
            let damaged = !verified.defects.is_empty();
            let points = self.set.points(machine).map_err(point_failed)?;
            if points.get(id).is_some_and(|point| point.damaged != damaged) {
                points.flag_damaged(id, damaged).map_err(point_failed)?;
            }
        }
        Ok(verified)
    }
}

pub(super) fn describe(finding: &Finding) -> String {
    match finding.extent {
        Some(extent) => format!("{} ({extent} of the disk): {}", finding.file, finding.what),
        None => format!("{}: {}", finding.file, finding.what),
    }
}

/// An export of several disks that fails keeps the images that are whole, and says so.
fn with_written(mut failure: Failure, files: &[ExportedFile]) -> Failure {
    if !files.is_empty() {
        let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
        failure.message = format!("{}; whole images were written to {}", failure.message, paths.join(", "));
    }
    failure
}
