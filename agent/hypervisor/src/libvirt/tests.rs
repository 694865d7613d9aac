//! With a real libvirtd, started here on folders of its own: in a mount namespace where the user that it runs machines as is
//! there, and its configuration is the test's.

use std::os::unix::process::CommandExt;
use std::process::Stdio;

use super::*;
use crate::drill::{self, Drill, Outcome, Sign};
use crate::machine::{Card, CardModel, Hardware};
use crate::owner::Owner;
use crate::qemu::find_program;
use crate::qemu::tests::{boot_disk, listening_disk, skip};

struct Daemon {
    folder: tempfile::TempDir,
    child: std::process::Child,
    uri: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let virsh = |arguments: &[&str]| {
            let output = std::process::Command::new("virsh").args(["-q", "-c", &self.uri]).args(arguments).output();
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
        };
        for id in virsh(&["list", "--uuid"]).lines() {
            virsh(&["destroy", id.trim()]);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemon, or why there is none. Its machines' screens are at ports from this one on: daemons side by side choose the same ones.
async fn daemon(screens: u16) -> std::result::Result<Daemon, String> {
    for program in ["libvirtd", "virsh", "unshare", "qemu-system-x86_64"] {
        let known = find_program(Path::new(program)).is_some() || Path::new("/usr/sbin").join(program).is_file();
        if !known {
            return Err(format!("{program} is not installed"));
        }
    }
    if !nix::unistd::Uid::effective().is_root() {
        return Err("needs root: mounts in a namespace".to_owned());
    }
    let folder = tempfile::Builder::new().prefix("lv").tempdir().map_err(|error| error.to_string())?;
    let at = folder.path().display().to_string();
    let script = format!(
        "set -e
        mkdir {at}/etc {at}/run {at}/state {at}/log {at}/cache
        (cat /etc/passwd; echo 'libvirt-qemu:x:64055:64055::/:/bin/false') > {at}/passwd
        (cat /etc/group; echo 'libvirt-qemu:x:64055:'; echo 'kvm:x:64056:') > {at}/group
        printf 'user = \"root\"\\ngroup = \"root\"\\nsecurity_driver = \"none\"\\nremember_owner = 0\\n' > {at}/etc/qemu.conf
        printf 'stdio_handler = \"file\"\\nnamespaces = []\\ncgroup_controllers = []\\n' >> {at}/etc/qemu.conf
        printf 'remote_display_port_min = {screens}\\nremote_display_port_max = {}\\n' >> {at}/etc/qemu.conf
        printf 'unix_sock_dir = \"{at}/run\"\\nauth_unix_rw = \"none\"\\nauth_unix_ro = \"none\"\\n' > {at}/etc/libvirtd.conf
        mount --make-rprivate /
        mount --bind {at}/passwd /etc/passwd
        mount --bind {at}/group /etc/group
        for pair in etc:/etc/libvirt run:/run state:/var/lib/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
            [ ! -d \"${{pair#*:}}\" ] || mount --bind {at}/${{pair%%:*}} \"${{pair#*:}}\"
        done
        export PATH=\"$PATH:/usr/sbin:/sbin\"
        exec libvirtd -f {at}/etc/libvirtd.conf -p {at}/pid > {at}/libvirtd.log 2>&1",
        screens + 99
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["-m", "sh", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: prctl is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let child = command.spawn().map_err(|error| error.to_string())?;
    let socket = folder.path().join("run/libvirt-sock");
    let daemon = Daemon { child, uri: format!("qemu:///system?socket={}", socket.display()), folder };
    let mut again = tokio::time::interval(Duration::from_millis(50));
    let answers = async {
        loop {
            again.tick().await;
            let asked = Command::new("virsh").args(["-c", &daemon.uri, "version"]).output().await;
            if socket.exists() && asked.is_ok_and(|output| output.status.success()) {
                return;
            }
        }
    };
    match tokio::time::timeout(Duration::from_secs(60), answers).await {
        Ok(()) => Ok(daemon),
        Err(_) => {
            let log = std::fs::read_to_string(daemon.folder.path().join("libvirtd.log")).unwrap_or_default();
            let last: String = log.lines().last().unwrap_or_default().chars().take(200).collect();
            Err(format!("libvirtd does not start here: {last}"))
        }
    }
}

fn machine(name: &str, path: &Path) -> Machine {
    let hardware = Hardware { memory_mib: 64, ..Hardware::default() };
    Machine { hardware, ..crate::qemu::tests::machine(name, path) }
}

#[tokio::test]
async fn a_real_libvirt_runs_machines_and_drills() {
    let daemon = match daemon(5900).await {
        Ok(daemon) => daemon,
        Err(why) => return skip("a_real_libvirt_runs_machines_and_drills", &why),
    };
    let folder = daemon.folder.path();
    let settings = LibvirtSettings { virt: Some("qemu".into()), ..LibvirtSettings::new(&daemon.uri, folder.join("c")) };
    let libvirt = Libvirt::open(settings).unwrap();
    let about = libvirt.check().await.unwrap();
    assert!(about.version.contains("QEMU"), "{about:?}");

    let path = folder.join("disk.img");
    boot_disk(&path, "tick");
    let web = machine("web", &path);
    assert!(matches!(libvirt.power(web.id).await, Err(HypervisorError::Unknown { .. })));
    libvirt.delete(web.id).await.unwrap();
    libvirt.define(&web).await.unwrap();
    assert_eq!(libvirt.describe(web.id).await.unwrap(), web);
    let twin = Machine { id: Uuid::new_v4(), ..web.clone() };
    assert!(matches!(libvirt.define(&twin).await, Err(HypervisorError::Exists { .. })));
    libvirt.start(web.id).await.unwrap();
    assert!(matches!(libvirt.start(web.id).await, Err(HypervisorError::Running { .. })));
    assert!(matches!(libvirt.define(&web).await, Err(HypervisorError::Running { .. })));
    let listed = libvirt.inventory().await.unwrap();
    assert_eq!(listed, [Listed { id: web.id, name: "web".into(), power: Power::On, ours: true }]);

    // The disk moves while the machine runs, and stays where it is when it cannot.
    let to = folder.join("to.img");
    std::fs::File::create(&to).unwrap().set_len(8 << 20).unwrap();
    let place = Place::Raw { path: to.clone() };
    libvirt.move_disk(web.id, 0, &place, Duration::from_secs(60)).await.unwrap();
    assert_eq!(libvirt.places(web.id).await.unwrap(), std::slice::from_ref(&place));
    assert!(std::fs::read(&to).unwrap() == std::fs::read(&path).unwrap());
    let nowhere = Place::Raw { path: folder.join("nowhere/x.img") };
    libvirt.move_disk(web.id, 0, &nowhere, Duration::from_secs(60)).await.unwrap_err();
    assert_eq!(libvirt.places(web.id).await.unwrap(), [place]);
    assert_eq!(libvirt.stop(web.id, Some(Duration::from_millis(500))).await.unwrap(), Stopped::TurnedOff);
    assert_eq!(libvirt.stop(web.id, None).await.unwrap(), Stopped::WasOff);
    libvirt.delete(web.id).await.unwrap();
    assert!(to.exists() && libvirt.inventory().await.unwrap().is_empty());

    let mut guest = machine("drill", &path);
    // Its own network, where libvirt can make one.
    if find_program(Path::new("/usr/sbin/iptables")).is_some() {
        let network = Network::Isolated;
        guest.hardware.cards = vec![Card { network, mac: None, model: CardModel::Virtio, addresses: Vec::new() }];
    }
    let sign = Some(Sign::Console { text: "tick".into() });
    let limit = Duration::from_secs(60);
    let drill = Drill { machine: guest, sign, limit, evidence: folder.join("evidence"), keep: false };
    let report = drill::run(&libvirt, &drill, Instant::now(), &|_| {}).await;
    assert_eq!(report.outcome, Outcome::Alive, "{report:?}");
    assert!(report.left.is_none() && report.console.is_some() && report.screen.is_some(), "{report:?}");
    assert!(libvirt.inventory().await.unwrap().is_empty());

    let wrong = Libvirt::open(LibvirtSettings::new("qemu:///system?socket=/nowhere", folder.join("c"))).unwrap();
    let failed = wrong.check().await.unwrap_err();
    assert!(matches!(failed, HypervisorError::Unreachable { .. }), "{failed}");
}

/// H36: a machine that libvirt runs is shut down at its source, by its guest; one whose guest does not listen is left on, and turned off when
/// that is asked for; it is started again.
#[tokio::test]
async fn h36_libvirt_shuts_a_guest_down_and_starts_it_again() {
    let daemon = match daemon(6000).await {
        Ok(daemon) => daemon,
        Err(why) => return skip("h36_libvirt_shuts_a_guest_down_and_starts_it_again", &why),
    };
    let folder = daemon.folder.path();
    let settings = LibvirtSettings { virt: Some("qemu".into()), ..LibvirtSettings::new(&daemon.uri, folder.join("c")) };
    let libvirt = Libvirt::open(settings).unwrap();
    let owner = |domain: &str| Owner::Libvirt {
        settings: LibvirtSettings::new(&daemon.uri, folder.join("nobody")),
        domain: domain.to_owned(),
    };
    let says = async |id: Uuid, text: &str| {
        let mut again = tokio::time::interval(Duration::from_millis(50));
        let heard = async {
            loop {
                again.tick().await;
                let console = libvirt.console(id, 0).await.unwrap();
                if String::from_utf8_lossy(&console.bytes).contains(text) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), heard).await.expect("its guest boots");
    };
    for (name, text) in [("listens", "here"), ("deaf", "tick")] {
        let path = folder.join(format!("{name}.img"));
        if name == "listens" {
            listening_disk(&path, text)
        } else {
            boot_disk(&path, text)
        }
        let machine = machine(name, &path);
        libvirt.define(&machine).await.unwrap();
        let owner = owner(name);
        assert_eq!(owner.power().await.unwrap(), Power::Off);
        assert_eq!(owner.shut_down(Duration::from_secs(60)).await.unwrap(), Some(Stopped::WasOff));
        owner.start().await.unwrap();
        says(machine.id, text).await;
        assert_eq!(owner.power().await.unwrap(), Power::On);
        if name == "listens" {
            assert_eq!(owner.shut_down(Duration::from_secs(60)).await.unwrap(), Some(Stopped::ByGuest));
        } else {
            assert_eq!(owner.shut_down(Duration::from_millis(500)).await.unwrap(), None, "it is left on");
            assert_eq!(owner.power().await.unwrap(), Power::On);
            owner.turn_off().await.unwrap();
        }
        assert_eq!(owner.power().await.unwrap(), Power::Off);
        libvirt.delete(machine.id).await.unwrap();
    }
    let unknown = owner("nobody").power().await.unwrap_err();
    assert!(unknown.to_string().contains("nobody"), "{unknown}");
}
