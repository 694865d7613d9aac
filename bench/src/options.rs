//! The command line of the bench.

use std::path::{Path, PathBuf};

pub const USAGE: &str = "\
usage: tidemark-bench WHAT… [--size 4G] [--rounds 3] [--seconds 3] [--working-set 8G] [--dir /dev/shm] [--json FILE] [--only TOOL,TOOL…] [--quick]

WHAT: all, initial, delta, append, resync, frontend, files, intent, rpo, serve
--size     of the disk that is replicated
--rounds   how often each is measured; tools alternate within a round, and medians are compared
--seconds  of each load at the front end; the RPO is measured for ten times as long
--working-set  that the write-intent bitmap is measured on
--dir      where the disks lie: a tmpfs, so that the media is not the limit
--only     tools to measure, by the beginnings of their names; goals that need others are not judged
--quick    does not touch the machine's memory before each turn: for a try, not for numbers";

/// What can be measured, in the order it is.
const KINDS: [&str; 9] = ["initial", "delta", "append", "resync", "frontend", "files", "intent", "rpo", "serve"];

pub struct Options {
    pub what: Vec<String>,
    pub bytes: u64,
    pub rounds: usize,
    pub seconds: u64,
    pub working_set: u64,
    pub dir: PathBuf,
    pub json: Option<PathBuf>,
    pub only: Vec<String>,
    pub quick: bool,
    /// As it was typed, for the report.
    pub command: String,
}

impl Options {
    pub fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self {
            what: Vec::new(),
            bytes: 4 << 30,
            rounds: 3,
            seconds: 3,
            working_set: 8 << 30,
            dir: "/dev/shm".into(),
            json: None,
            only: Vec::new(),
            quick: false,
            command: arguments.join(" "),
        };
        let mut rest = arguments.iter();
        while let Some(word) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--size" => options.bytes = size(value()?)?,
                "--rounds" => options.rounds = number(value()?)?.max(1) as usize,
                "--seconds" => options.seconds = number(value()?)?.max(1),
                "--working-set" => options.working_set = size(value()?)?,
                "--dir" => options.dir = value()?.into(),
                "--json" => options.json = Some(value()?.into()),
                "--only" => options.only = value()?.split(',').map(str::to_owned).collect(),
                "--quick" => options.quick = true,
                "all" => options.what = KINDS.map(str::to_owned).to_vec(),
                kind if KINDS.contains(&kind) => options.what.push(kind.to_owned()),
                other => return Err(format!("{other} is nothing to measure and no option")),
            }
        }
        if options.what.is_empty() {
            return Err("what is to be measured?".to_owned());
        }
        Ok(options)
    }

    pub fn wants(&self, kind: &str) -> bool {
        self.what.iter().any(|what| what == kind)
    }

    /// Before each turn of a tool.
    pub fn before_a_turn(&self, folder: &Path) -> std::io::Result<()> {
        if self.quick { Ok(()) } else { crate::isolate::touch_memory(folder) }
    }

    /// Whether a tool is to be measured.
    pub fn takes(&self, tool: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|start| tool.starts_with(start.as_str()))
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

/// Whole MiB, so that blocks and areas divide it.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'M') => (&text[..text.len() - 1], 20),
        _ => return Err(format!("{text}: a size is a number with M or G")),
    };
    let bytes = number(digits)? << shift;
    if bytes < 64 << 20 { Err(format!("{text} is too small: from 64M on")) } else { Ok(bytes) }
}
