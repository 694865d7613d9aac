//! Negative controls: each safeguard of the host is taken out, and a test that holds it must fail.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};

use tidemark_base::sabotage::choose;

use super::{barrier, gaps, images, marks, power, scenarios};

/// Runs `test` without a safeguard, on a thread of its own; it must fail.
fn fails_without(safeguard: &'static str, test: impl FnOnce() + Send) {
    let failed = std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            choose(Some(safeguard));
            catch_unwind(AssertUnwindSafe(test)).is_err()
        });
        run.join().unwrap()
    });
    assert!(failed, "nobody noticed that {safeguard} is taken out");
}

/// The same for tests of many threads: without the safeguard in all of a process that runs nothing else.
fn process_fails_without(safeguard: &str, test: &str) {
    let run = |safeguard: Option<&str>| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact"]).stdout(Stdio::piped()).stderr(Stdio::null());
        safeguard.map(|safeguard| command.env("TIDEMARK_SABOTAGE", safeguard));
        let output = command.output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("running 1 test"), "there is no test {test}");
        output.status.success()
    };
    assert!(run(None), "{test} fails by itself");
    assert!(!run(Some(safeguard)), "nobody noticed that {safeguard} is taken out");
}

#[test]
fn a_block_waits_for_the_records_that_its_read_saw() {
    const SCANS: &str = "send::tests::scans::an_unlogged_write_outlives_an_older_record_that_leaves_late";
    process_fails_without("scan-wait", SCANS);
    const COMPARES: &str = "send::tests::compare::a_block_is_not_settled_before_the_records_that_its_read_saw";
    process_fails_without("scan-wait", COMPARES);
    const CUT_OUT: &str = "send::tests::scans::a_delayed_read_never_undoes_a_write_that_left_before_it";
    process_fails_without("scan-cut-out", CUT_OUT);
}

#[test]
fn what_a_write_allocated_is_written_down() {
    fails_without("image-settle", images::a_killed_program_loses_nothing);
}

fn some_lives() {
    (0..10).for_each(power::live_and_die);
}

#[test]
fn the_order_of_a_write_is_held() {
    fails_without("intent-wait", gaps::a_power_cut_in_every_gap_of_a_write_names_its_regions);
    fails_without("intent-wait", some_lives);
    fails_without("slots-set", gaps::a_kill_in_every_gap_of_a_write_compares_nothing);
    fails_without("slots-read", gaps::a_kill_in_every_gap_of_a_write_compares_nothing);
}

#[test]
fn intent_bits_outlive_what_they_stand_for() {
    fails_without("intent-clear", crate::state::intent::tests::only_idle_and_synced_regions_are_cleared);
    let unit = crate::state::intent::tests::a_region_is_unshipped_until_its_last_record_is_acknowledged;
    fails_without("unshipped-clear", unit);
    fails_without("unshipped-clear", scenarios::a_log_that_is_gone_becomes_a_compare_of_the_unshipped_regions);
}

#[test]
fn what_is_not_logged_is_tracked() {
    fails_without("dirty-mark", scenarios::a_server_that_is_away_leaves_history_and_blocks_and_gets_both);
    fails_without("dirty-mark", scenarios::a_log_that_fails_steps_down_and_comes_back);
    fails_without("epoch-scan", scenarios::a_server_that_is_away_leaves_history_and_blocks_and_gets_both);
    fails_without("epoch-scan", scenarios::a_kill_in_the_middle_of_a_new_epoch_compares_nothing_that_is_known);
}

#[test]
fn a_mark_waits_for_writes_in_flight() {
    fails_without("mark-hold", marks::mark_under_load);
    fails_without("group-hold", barrier::barrier_under_load);
}

#[test]
fn the_newest_content_of_a_state_file_is_never_at_risk() {
    fails_without("state-slot", crate::state::sealed::tests::a_store_torn_at_every_byte_leaves_the_content_before);
}
