//! Who may ask: nobody without the token, and nobody is trusted that the authority did not certify.

use tidemark_tests::Site;
use tidemark_tests::site::text;

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
