//! A protected disk over TCP: mutual TLS with the machine's own certificates, as libnbd and QEMU speak it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::{Machine, Site, need, tools};

/// Where a disk is served over TLS, in its parts.
struct Remote {
    uri: String,
    port: String,
    export: String,
    certificates: PathBuf,
}

fn remote(protected: &Value) -> Remote {
    parts(text(&protected["disks"][0]["attach"]["nbds"]))
}

fn parts(uri: String) -> Remote {
    let (place, rest) = uri.strip_prefix("nbds://127.0.0.1:").unwrap().split_once('/').unwrap();
    let (export, certificates) = rest.split_once("?tls-certificates=").unwrap();
    let (port, export, certificates) = (place.to_owned(), export.to_owned(), PathBuf::from(certificates));
    Remote { uri, port, export, certificates }
}

impl Remote {
    /// The same place, with what another folder holds; without certificates at all for `None`.
    fn with(&self, certificates: Option<&Path>) -> String {
        let place = format!("nbds://127.0.0.1:{}/{}", self.port, self.export);
        certificates.map_or(place.clone(), |folder| format!("{place}?tls-certificates={}", folder.display()))
    }
}

fn disk(site: &Site, name: &str) -> PathBuf {
    let disk = site.path(name);
    image::make_mixed(&disk, 16 * MIB, 1);
    disk
}

fn protect(site: &Site, name: &str, disk: &Path, listen: &str) -> Value {
    site.json(&["protect", name, "--disk", disk.to_str().unwrap(), "--listen", listen])
}

#[track_caller]
fn assert_opens(uri: &str) {
    assert_eq!(tools::run("nbdinfo", &["--size", uri]).trim(), (16 * MIB).to_string());
}

#[track_caller]
fn assert_refused(uri: &str) {
    let outcome = tools::outcome("nbdinfo", &["--size", uri]);
    assert!(!outcome.status.success(), "{}", tools::describe("nbdinfo", &[uri], &outcome));
}

#[test]
fn nbdcopy_and_qemu_write_over_mutual_tls_and_the_address_stays() {
    need!("nbdinfo", "nbdcopy", "qemu-img", "qemu-io");
    let mut site = Site::start();
    let disk = disk(&site, "disk.img");
    let protected = protect(&site, "web", &disk, "127.0.0.1:0");
    let remote = remote(&protected);
    site.wait_protected("web");
    assert_opens(&remote.uri);
    let new = site.path("new.img");
    image::make_mixed(&new, 16 * MIB, 2);
    tools::run("nbdcopy", &["--flush", "--connections=4", new.to_str().unwrap(), &remote.uri]);
    image::assert_same(&new, &disk);
    // QEMU, with a write of its own.
    let credentials =
        format!("tls-creds-x509,id=tls,dir={},endpoint=client,verify-peer=yes", remote.certificates.display());
    let options = format!("driver=nbd,host=127.0.0.1,port={},export={},tls-creds=tls", remote.port, remote.export);
    let write = ["--object", &credentials, "--image-opts", "-c", "write -P 7 1M 64k", "-c", "flush", &options];
    let output = tools::run("qemu-io", &write);
    assert!(output.contains("wrote 65536/65536"), "{output}");
    // The other way in sees it: it is one disk.
    let machine = Machine::from_json(&protected);
    tools::qemu_io(machine.nbd(), &["read -P 7 1M 64k", "write -P 8 2M 4k", "flush"]);
    let read = ["--object", &credentials, "--image-opts", "-c", "read -P 8 2M 4k", &options];
    assert!(!tools::run("qemu-io", &read).contains("failed"));
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));

    site.down();
    site.up();
    site.wait_protected("web");
    assert_opens(&remote.uri);
    assert_eq!(
        protect(&site, "web", &disk, "127.0.0.1:0")["disks"],
        protected["disks"],
        "the same addresses as before"
    );
}

#[test]
fn only_certificates_of_this_machine_open_it() {
    need!("nbdinfo");
    let site = Site::start();
    let (disk, other_disk) = (disk(&site, "disk.img"), disk(&site, "other.img"));
    let web = remote(&protect(&site, "web", &disk, "127.0.0.1:0"));
    let other = remote(&protect(&site, "other", &other_disk, "127.0.0.1:0"));
    assert_opens(&web.uri);
    assert_opens(&other.uri);
    // Nothing in the clear, nobody without a certificate, none of another authority, no disk of another machine.
    assert_refused(&format!("nbd://127.0.0.1:{}/{}", web.port, web.export));
    assert_refused(&web.with(None));
    assert_refused(&web.with(Some(&other.certificates)));
    assert_refused(&format!(
        "nbds://127.0.0.1:{}/{}?tls-certificates={}",
        web.port,
        other.export,
        web.certificates.display()
    ));
    // A client that checks the server with the right authority, and shows the certificate of a stranger.
    let mixed = site.path("mixed");
    std::fs::create_dir(&mixed).unwrap();
    std::fs::copy(web.certificates.join("ca-cert.pem"), mixed.join("ca-cert.pem")).unwrap();
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(other.certificates.join(file), mixed.join(file)).unwrap();
    }
    assert_refused(&web.with(Some(&mixed)));
    // The same client with no certificate at all: nobody but the server can turn it away.
    let nobody = site.path("nobody");
    std::fs::create_dir(&nobody).unwrap();
    std::fs::copy(web.certificates.join("ca-cert.pem"), nobody.join("ca-cert.pem")).unwrap();
    assert_refused(&web.with(Some(&nobody)));
    // The identity of a role opens no disk either.
    let identity = std::fs::read_to_string(site.state().join("process-server/identity.pem")).unwrap();
    let certificate = identity.find("-----BEGIN CERTIFICATE-----").unwrap();
    for (file, content) in [("client-key.pem", &identity[..certificate]), ("client-cert.pem", &identity[certificate..])]
    {
        std::fs::remove_file(mixed.join(file)).unwrap();
        std::io::Write::write_all(&mut std::fs::File::create(mixed.join(file)).unwrap(), content.as_bytes()).unwrap();
    }
    assert_refused(&web.with(Some(&mixed)));

    // Protected anew: certificates from before, which somebody may have copied, are worth nothing.
    let stolen = site.path("stolen");
    tools::run("cp", &["-r", web.certificates.to_str().unwrap(), stolen.to_str().unwrap()]);
    assert_opens(&web.with(Some(&stolen)));
    site.json(&["unprotect", "web"]);
    assert!(!web.certificates.exists(), "they go with the machine");
    let again = remote(&protect(&site, "web", &disk, &format!("127.0.0.1:{}", web.port)));
    assert_eq!(again.port, web.port);
    assert_opens(&again.uri);
    assert_refused(&again.with(Some(&stolen)));
    // `none` ends it; the socket stays.
    let ended = protect(&site, "web", &disk, "none");
    assert!(ended["disks"][0]["attach"]["nbds"].is_null(), "{ended}");
    assert_refused(&again.uri);
    assert_opens(Machine::from_json(&ended).nbd());
    let refused = site.run(&["protect", "web", "--disk", disk.to_str().unwrap(), "--listen", "everywhere"]);
    refused.assert_refused(&["everywhere"]);
}

#[test]
fn a_point_is_served_over_mutual_tls_as_long_as_the_serve_lasts() {
    need!("nbdinfo", "nbdcopy", "qemu-io");
    let site = Site::start();
    let disk = disk(&site, "disk.img");
    protect(&site, "web", &disk, "127.0.0.1:0");
    site.wait_protected("web");
    site.point("web");
    let listen = ["--listen", "127.0.0.1:0"];
    let mut served = site.serve("web", "latest", &listen);
    let writable = site.serve("web", "latest", &["--writable", "--listen", "127.0.0.1:0"]);
    let (remote, scratch) = (parts(served.nbds()[0].clone()), parts(writable.nbds()[0].clone()));
    let copy = site.path("copy.img");
    tools::run("nbdcopy", &[&remote.uri, copy.to_str().unwrap()]);
    image::assert_same(&disk, &copy);
    // Certificates of one serve open that serve alone, not the protected disk and no other serve.
    assert_refused(&remote.with(None));
    assert_refused(&remote.with(Some(&scratch.certificates)));
    assert_refused(&format!("nbd://127.0.0.1:{}/{}", remote.port, remote.export));
    // Writes over TLS are in the scratch layer that the socket shows as well.
    let credentials =
        format!("tls-creds-x509,id=tls,dir={},endpoint=client,verify-peer=yes", scratch.certificates.display());
    let options = format!("driver=nbd,host=127.0.0.1,port={},export={},tls-creds=tls", scratch.port, scratch.export);
    let write = ["--object", &credentials, "--image-opts", "-c", "write -P 7 1M 64k", "-c", "flush", &options];
    assert!(tools::run("qemu-io", &write).contains("wrote 65536/65536"));
    tools::qemu_io(writable.nbd(), &["read -P 7 1M 64k"]);
    assert_opens(&remote.uri);
    assert!(served.process.stop(tidemark_tests::site::LIMIT).success());
    assert_refused(&remote.uri);
    assert!(!remote.certificates.exists(), "the certificates end with the serve");
    let refused = site.run(&["point", "serve", "web", "latest", "--listen", "everywhere"]);
    refused.assert_refused(&["everywhere"]);
}
