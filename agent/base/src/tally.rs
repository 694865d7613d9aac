//! Counts of what went wrong, by what tells one kind from another: for figures that somebody fetches now and then.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// Kinds that are told apart; what comes after that is counted together.
const KINDS_MAX: usize = 4096;
/// What is kept of each text, for others may have chosen it.
const TEXT_BYTES_MAX: usize = 128;
/// In the place of each text of what is counted together.
const OTHER: &str = "other";

/// Names and texts, in the order in which they were given.
pub type Labels = Vec<(&'static str, String)>;

#[derive(Debug, Default)]
pub struct Tally {
    counts: Mutex<BTreeMap<Labels, u64>>,
}

impl Tally {
    /// One more of this.
    pub fn add(&self, labels: &[(&'static str, &str)]) {
        let key: Labels = labels.iter().map(|(name, text)| (*name, clipped(text))).collect();
        let mut counts = self.counts.lock().expect("no panic while held");
        let key = match counts.contains_key(&key) || counts.len() < KINDS_MAX {
            true => key,
            false => labels.iter().map(|(name, _)| (*name, OTHER.to_owned())).collect(),
        };
        *counts.entry(key).or_default() += 1;
    }

    /// All since the start.
    pub fn all(&self) -> Vec<(Labels, u64)> {
        let counts = self.counts.lock().expect("no panic while held");
        counts.iter().map(|(labels, count)| (labels.clone(), *count)).collect()
    }
}

fn clipped(text: &str) -> String {
    let end = (0..=TEXT_BYTES_MAX.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text[..end.unwrap_or_default()].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_and_too_many_are_counted_together() {
        let tally = Tally::default();
        tally.add(&[("kind", "a")]);
        tally.add(&[("kind", "b")]);
        tally.add(&[("kind", "a")]);
        assert_eq!(tally.all(), [(vec![("kind", "a".to_owned())], 2), (vec![("kind", "b".to_owned())], 1)]);
        for number in 0..2 * KINDS_MAX {
            tally.add(&[("kind", &number.to_string())]);
        }
        let all = tally.all();
        assert_eq!(all.len(), KINDS_MAX + 1);
        assert_eq!(all.iter().map(|(_, count)| count).sum::<u64>(), 3 + 2 * KINDS_MAX as u64, "none is lost");
        tally.add(&[("kind", "a")]);
        assert!(tally.all().contains(&(vec![("kind", "a".to_owned())], 3)), "what is known goes on");
        let long = Tally::default();
        long.add(&[("kind", &"\u{fc}".repeat(TEXT_BYTES_MAX))]);
        assert_eq!(long.all()[0].0[0].1.len(), TEXT_BYTES_MAX);
    }
}
