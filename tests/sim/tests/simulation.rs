//! Seeds, replayed; and what the simulation must find.

use std::process::{Command, Output};

use tidemark_sim::counts::{Counts, Kind};

fn simulate(arguments: &[&str]) -> (Output, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_simulate")).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output, text)
}

/// `TIDEMARK_SEEDS=A..B` chooses others.
#[test]
fn thousands_of_seeds_keep_every_promise() {
    let range = std::env::var("TIDEMARK_SEEDS").unwrap_or_else(|_| "0..2000".to_owned());
    let (output, text) = simulate(&["--seeds", &range]);
    println!("{text}");
    assert!(
        output.status.success(),
        "replay a seed with `cargo run -p tidemark-sim --bin simulate -- --seed N --trace`:\n{text}"
    );
    // A kind of fault that never happens tests nothing.
    let counts = text.lines().map(Counts::parse).find(|counts| counts.of(Kind::GuestWrite) > 0).unwrap();
    let missing: Vec<&str> = Kind::ALL.iter().filter(|kind| counts.of(**kind) < 5).map(|kind| kind.text()).collect();
    assert!(missing.is_empty(), "these hardly happened: {missing:?}\n{text}");
}

#[test]
fn the_same_seed_runs_the_same() {
    for seed in ["3", "77", "1053"] {
        let (output, text) = simulate(&["--seed", seed, "--twice"]);
        assert!(output.status.success(), "{text}");
    }
}

/// Stopped before and after each of the first syncs of every kind of file, killed and without power.
#[test]
fn a_stop_at_any_sync_loses_nothing() {
    let (output, text) = simulate(&["--stops"]);
    println!("{text}");
    assert!(output.status.success(), "{text}");
}

/// Each safeguard that the simulation can see the loss of, taken out: some seed must fail.
#[cfg(feature = "sabotage")]
#[test]
fn without_a_safeguard_some_seed_fails() {
    let unseen: Vec<&str> = tidemark_sim::SEEN_SABOTAGES
        .iter()
        .copied()
        .filter(|name| simulate(&["--seeds", "0..3000", "--until-failure", "--sabotage", name]).0.status.success())
        .collect();
    assert!(unseen.is_empty(), "nobody noticed that these were taken out: {unseen:?}");
}
