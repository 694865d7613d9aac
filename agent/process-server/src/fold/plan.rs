//! How far a fold may go.

/// What holds the base back, each as a cut of this disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Holds {
    pub newest_complete: Option<u64>,
    pub oldest_retained: Option<u64>,
    /// Where the any-time window begins; none while all that is held lies inside it.
    pub window_start: Option<u64>,
    pub oldest_pin: Option<u64>,
}

/// The cut to fold to; `None`: the base stays where it is.
pub fn target(base: u64, holds: Holds, consistent_at_or_before: impl FnOnce(u64) -> u64) -> Option<u64> {
    let target = holds
        .newest_complete?
        .min(holds.window_start?)
        .min(holds.oldest_retained.unwrap_or(u64::MAX))
        .min(holds.oldest_pin.unwrap_or(u64::MAX));
    let target = consistent_at_or_before(target);
    (target > base).then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hold_holds() {
        let all = Holds {
            newest_complete: Some(90),
            oldest_retained: Some(80),
            window_start: Some(70),
            oldest_pin: Some(60),
        };
        let same = |cut| cut;
        assert_eq!(target(10, all, same), Some(60));
        assert_eq!(target(10, Holds { oldest_pin: None, ..all }, same), Some(70));
        assert_eq!(target(10, Holds { oldest_pin: None, window_start: Some(100), ..all }, same), Some(80));
        let free = Holds { oldest_pin: None, oldest_retained: None, window_start: Some(100), ..all };
        assert_eq!(target(10, free, same), Some(90));
        assert_eq!(target(10, Holds { newest_complete: None, ..all }, same), None);
        assert_eq!(target(10, Holds { window_start: None, ..all }, same), None);
        // A scan from 50 to beyond: the base stops before it.
        assert_eq!(target(10, all, |_| 49), Some(49));
        assert_eq!(target(49, all, |_| 49), None);
    }
}
