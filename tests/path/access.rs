//! Who may ask: nobody without the token, and nobody is trusted that the authority did not certify.

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::{Site, wait};

#[test]
fn a_wrong_token_and_a_foreign_authority_are_refused() {
    let site = Site::start();
    let stranger = Site::start();
    let server = text(&site.ready["api"]).replace("/api/v1", "");
    let [token, ca] = ["token_file", "ca_file"].map(|key| text(&site.ready[key]));
    let [their_token, their_ca] = ["token_file", "ca_file"].map(|key| text(&stranger.ready[key]));

    let ask = |token: &str, ca: &str| {
        site.run_bare(&["status", "--json", "--server", &server, "--token-file", token, "--ca-file", ca])
    };
    let fine = ask(&token, &ca);
    assert_eq!(fine.code, 0, "{}", fine.describe());
    ask(&their_token, &ca).assert_refused(&[]);
    ask(&token, &their_ca).assert_refused(&[]);
    ask("/nonexistent/token", &ca).assert_refused(&["/nonexistent/token"]);
}

#[test]
fn what_the_site_keeps_is_for_its_owner_alone() {
    use std::os::unix::fs::MetadataExt;
    let site = Site::start();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o077;
    assert_eq!(mode(&site.state()), 0, "others can look into {}", site.state().display());
    let token = text(&site.ready["token_file"]);
    assert_eq!(mode(std::path::Path::new(&token)), 0, "others can read {token}");
}

/// A process server that is revoked gets nothing more, also over the streams that were open before.
#[test]
fn a_process_server_that_is_revoked_gets_nothing_more() {
    let mut site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 8 * MIB, 3);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    let server = site.peer_ids("process-server").remove(0);
    assert_eq!(site.run(&["identity", "revoke", &server, "--reason", "stolen"]).code, 0);
    let ended = wait::until("the streams end", LIMIT, || {
        let status = site.status("web");
        (status["state"] == "disconnected").then_some(status)
    });
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(MIB, &[9; 128 << 10]).unwrap();
    client.flush().unwrap();
    client.disconnect().unwrap();
    let waiting = wait::until("the change waits at the host", LIMIT, || {
        let status = site.status("web");
        (status["pending_bytes"].as_u64() >= Some(128 << 10)).then_some(status)
    });
    assert_eq!(waiting["disks"][0]["positions"]["durable"], ended["disks"][0]["positions"]["durable"], "{waiting}");
    // Taken back: it goes on where it was.
    assert_eq!(site.run(&["identity", "restore", &server]).code, 0);
    wait::until("a point is made again", LIMIT, || (site.run(&["point", "create", "web"]).code == 0).then_some(()));
    let exported = site.export("web", "latest", "exported.raw", "raw");
    image::assert_same(&disk, &exported);
    site.down();
}
