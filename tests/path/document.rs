//! The API keeps to what it says of itself, whatever it is asked: schemathesis makes requests from the served document.

use std::process::Command;

use tidemark_tests::Site;
use tidemark_tests::site::text;
use tidemark_tests::tools::counted;

/// What the run may take; it ends by itself before.
const SECONDS_MAX: &str = "40";

#[test]
fn no_request_that_the_document_allows_or_forbids_makes_a_server_error() {
    tidemark_tests::need!("schemathesis");
    let site = Site::start();
    let disk = site.path("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    site.protect("web", &[&disk], &[]);
    let token = std::fs::read_to_string(text(&site.ready["token_file"])).unwrap();
    let output = Command::new(tidemark_tests::tools::find("schemathesis").unwrap())
        .arg("run")
        .arg(format!("{}/openapi.json", text(&site.ready["api"])))
        .args(["--tls-verify", &text(&site.ready["ca_file"])])
        .args(["-H", &format!("Authorization: Bearer {}", token.trim())])
        .args(["--checks", "not_a_server_error", "--continue-on-failure", "--no-shrink"])
        .args(["--max-time", SECONDS_MAX, "--request-timeout", "20", "--seed", "1"])
        // Streams and long polls answer when something happens. A process server that was revoked is not there: to ask it
        // is answered 503, and rightly so.
        .args(["--exclude-path-regex", "/stream$|^/events$|^/jobs/|^/identities/"])
        .args(["--output-truncate", "true", "--warnings", "off"])
        .current_dir(site.folder())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let requests =
        said.lines().find_map(|line| line.trim().split_once(" generated").map(|(count, _)| count.to_owned()));
    counted("requests of schemathesis", requests.and_then(|count| count.replace(',', "").parse().ok()).unwrap_or(0));
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let after = site.run(&["status", "--json"]);
    assert_eq!(after.code, 0, "it does its work afterwards: {}", after.describe());
}
