use std::fmt;

/// The name of one log: `<stem>.<number>`, of which there are an `.hrl` and a `.companion`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LogName {
    pub stem: String,
    /// Counts from 1.
    pub number: u64,
}

impl LogName {
    pub fn new(stem: impl Into<String>, number: u64) -> Self {
        Self { stem: stem.into(), number }
    }

    pub fn next(&self) -> Self {
        Self { stem: self.stem.clone(), number: self.number + 1 }
    }

    pub fn hrl(&self) -> String {
        format!("{self}.hrl")
    }

    pub fn companion(&self) -> String {
        format!("{self}.companion")
    }

    /// The log whose `.hrl` or `.companion` this file is, and whether it is the `.hrl`.
    pub(crate) fn parse(stem: &str, file: &str) -> Option<(Self, bool)> {
        let rest = file.strip_prefix(stem)?.strip_prefix('.')?;
        let (number, is_hrl) = match (rest.strip_suffix(".hrl"), rest.strip_suffix(".companion")) {
            (Some(number), _) => (number, true),
            (_, Some(number)) => (number, false),
            _ => return None,
        };
        if number.len() < 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let name = Self::new(stem, number.parse().ok().filter(|&number| number > 0)?);
        // One number has one name: 000000001 is not ours.
        (name.hrl() == file || name.companion() == file).then_some((name, is_hrl))
    }
}

impl fmt::Display for LogName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:08}", self.stem, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let name = LogName::new("disk.img", 42);
        assert_eq!(name.hrl(), "disk.img.00000042.hrl");
        assert_eq!(LogName::parse("disk.img", &name.hrl()), Some((name.clone(), true)));
        assert_eq!(LogName::parse("disk.img", &name.companion()), Some((name, false)));
        for other in
            ["disk.img", "disk.img.00000042.hrl.damaged", "disk.img.1.hrl", "disk.img.00000000.hrl", "a.00000001.hrl"]
        {
            assert_eq!(LogName::parse("disk.img", other), None, "{other}");
        }
        assert_eq!(LogName::parse("disk", "disk.img.00000042.hrl"), None);
        assert_eq!(LogName::parse("d", "d.000000001.hrl"), None);
    }
}
