//! Printing: one JSON document, or tables for people.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;
use tidemark_base::{Clock, SystemClock, Timestamp};

pub struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// One document, on one line.
    pub fn json(&self, value: &Value) -> io::Result<()> {
        self.line(&value.to_string())
    }

    pub fn line(&self, text: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}")?;
        stdout.flush()
    }

    /// How far something is: for people at a terminal only.
    pub fn progress(&self, text: &str) {
        if !self.json && io::stderr().is_terminal() {
            let _ = writeln!(io::stderr(), "… {text}");
        }
    }

    /// For a job that is waited for.
    pub fn bar(&self) -> Bar {
        Bar { is_shown: !self.json && io::stderr().is_terminal(), steps_told: 0 }
    }

    /// Columns as wide as their widest cell.
    pub fn table(&self, header: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
        self.line(table(header, rows).trim_end())
    }
}

/// What a job does, in one line that is written over; steps that ended stay above it. For people at a terminal only.
pub struct Bar {
    is_shown: bool,
    steps_told: usize,
}

impl Bar {
    pub fn draw(&mut self, job: &Value) {
        if !self.is_shown {
            return;
        }
        let steps = job["steps"].as_array().map(Vec::as_slice).unwrap_or_default();
        let ended = steps.len().saturating_sub(1);
        let mut text = String::new();
        for step in steps.iter().take(ended).skip(self.steps_told) {
            text.push_str(&format!("\r\x1b[K✓ {}\n", step["name"].as_str().unwrap_or_default()));
        }
        self.steps_told = self.steps_told.max(ended);
        text.push_str(&format!("\r\x1b[K{}", bar_line(job, SystemClock::new().wall_now())));
        let mut stderr = io::stderr();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.is_shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

const BAR_CELLS: usize = 30;

/// The step that runs; how far it is and how long it is likely to take, where the job says so.
fn bar_line(job: &Value, now: Timestamp) -> String {
    let step = job["steps"].as_array().and_then(|steps| steps.last()).and_then(|step| step["name"].as_str());
    let mut line = format!("… {}", step.unwrap_or("waiting"));
    let figure = |name: &str| job["progress"][name].as_u64();
    if let (Some(done), Some(total)) = (figure("done_bytes"), figure("total_bytes").filter(|total| *total > 0)) {
        let share = done.min(total) as f64 / total as f64;
        let filled = (share * BAR_CELLS as f64) as usize;
        let (full, empty) = ("█".repeat(filled), "░".repeat(BAR_CELLS - filled));
        line.push_str(&format!(" {full}{empty} {:.0} %  {} of {}", share * 100.0, bytes(done), bytes(total)));
        if let Some(end) = job["estimated"].as_str().and_then(|text| Timestamp::parse(text).ok()) {
            line.push_str(&format!("  {} s left", end.saturating_since(now).as_secs()));
        }
    }
    line
}

pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&text| text.to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&header).chain(rows).collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

pub use tidemark_base::size::text as bytes;

/// Text at a pointer, or a dash.
pub fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        Some(Value::Bool(flag)) => flag.to_string(),
        _ => "–".to_owned(),
    }
}

pub fn bytes_at(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_u64).map_or_else(|| "–".to_owned(), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["longer".to_owned(), "2".to_owned()]];
        assert_eq!(table(&["NAME", "N"], &rows), "NAME    N\na       1\nlonger  2\n");
    }

    #[test]
    fn a_bar_says_how_far_the_step_is_and_how_long_it_takes() {
        let now = Timestamp::parse("2026-11-22T06:00:00Z").unwrap();
        let mut job = serde_json::json!({ "steps": [{ "name": "check" }, { "name": "export" }] });
        assert_eq!(bar_line(&job, now), "… export");
        job["progress"] = serde_json::json!({ "done_bytes": 512, "total_bytes": 1024 });
        job["estimated"] = serde_json::json!("2026-11-22T06:00:42Z");
        let (full, empty) = ("█".repeat(15), "░".repeat(15));
        assert_eq!(bar_line(&job, now), format!("… export {full}{empty} 50 %  512 B of 1.0 KiB  42 s left"));
        job["progress"] = serde_json::json!({ "done_bytes": 9, "total_bytes": 0 });
        assert_eq!(bar_line(&job, now), "… export");
        assert_eq!(bar_line(&Value::Null, now), "… waiting");
    }
}
