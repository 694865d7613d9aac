//! `tidemark hrl`: offline tools for Hyper-V Replica Log files. What they do is in [`tidemark_hrl::tools`]; this prints.

mod image;

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use tidemark_base::disk::DiskError;
use tidemark_hrl::tools::ToolError;
use tidemark_hrl::tools::apply::{ApplyPlan, ApplyReport};
use tidemark_hrl::tools::inspect::{EntryView, HeaderView, Inspection};
use tidemark_hrl::tools::verify::{Companion, FileReport, LISTED_MAX, VerifyReport, verify};
use tidemark_proto::control::ImageFormat;

#[derive(Args, Debug)]
pub struct HrlArgs {
    #[command(subcommand)]
    command: HrlCommand,
}

#[derive(Subcommand, Debug)]
enum HrlCommand {
    /// Shows header and entries of a log
    Inspect {
        /// The log
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Checks that each file is a sound log, and that together they are a chain
    Verify {
        /// The logs, oldest first
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// Replays logs onto a disk image, oldest first
    Apply {
        /// The logs, oldest first
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// The disk image or block device to write
        #[arg(long, value_name = "DISK")]
        to: PathBuf,
        /// Format of the image; by default the file name's ending says it
        #[arg(long, value_name = "FORMAT", value_parser = super::args::image_format())]
        format: Option<ImageFormat>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum HrlError {
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Image(#[from] image::ImageError),
    #[error("cannot print")]
    Print(#[from] io::Error),
}

impl HrlError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            HrlError::Tool(error) => error.help(),
            HrlError::Disk(error) => error.help(),
            HrlError::Image(error) => error.help(),
            HrlError::Print(_) => "see the system's message",
        }
    }
}

pub fn run(args: HrlArgs, json: bool) -> Result<ExitCode, HrlError> {
    let out = &mut BufWriter::new(io::stdout().lock());
    let code = match args.command {
        HrlCommand::Inspect { file } => {
            let inspection = Inspection::open(&file)?;
            if json {
                inspect_json(&inspection, out)?
            } else {
                inspect_text(&inspection, out)?
            }
            ExitCode::SUCCESS
        }
        HrlCommand::Verify { files } => {
            let report = verify(&files)?;
            if json {
                print_json(&report, out)?
            } else {
                verify_text(&report, out)?
            }
            if report.sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        HrlCommand::Apply { files, to, format } => {
            // The logs are checked before the disk is even opened.
            let plan = ApplyPlan::check(&files)?;
            let report = image::with_disk(&to, format, |disk| plan.apply(disk).map_err(HrlError::from))?;
            if json {
                print_json(&report, out)?
            } else {
                apply_text(&report, out)?
            }
            ExitCode::SUCCESS
        }
    };
    out.flush()?;
    Ok(code)
}

fn print_json(value: &impl serde::Serialize, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)
}

/// One document, written entry by entry: a log may hold millions.
fn inspect_json(inspection: &Inspection, out: &mut impl Write) -> Result<(), HrlError> {
    write!(out, "{{\"header\":")?;
    serde_json::to_writer(&mut *out, &inspection.header).map_err(io::Error::from)?;
    write!(out, ",\"entries\":[")?;
    let mut separator = "";
    let warnings = inspection.entries(|entry| {
        write!(out, "{separator}")?;
        separator = ",";
        Ok(serde_json::to_writer(&mut *out, entry)?)
    })?;
    write!(out, "],\"closed\":{},\"warnings\":", inspection.closed)?;
    serde_json::to_writer(&mut *out, &warnings).map_err(io::Error::from)?;
    writeln!(out, "}}")?;
    Ok(())
}

fn inspect_text(inspection: &Inspection, out: &mut impl Write) -> Result<(), HrlError> {
    print_header(&inspection.header, inspection.closed, out)?;
    writeln!(
        out,
        "\n{:>16} {:>12} {:<20} {:>10} {:>3} {:>14}",
        "BYTE OFFSET", "LENGTH", "TIME", "CHECKSUM", "OK", "DATA AT"
    )?;
    let warnings = inspection.entries(|entry| print_entry(entry, out))?;
    for warning in warnings {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}

fn print_header(header: &HeaderView, closed: bool, out: &mut impl Write) -> io::Result<()> {
    let checksum = if header.checksum_ok { "sound" } else { "does not match" };
    writeln!(out, "format version     {}", header.log_format_version)?;
    writeln!(out, "state              {}", if closed { "closed" } else { "open" })?;
    writeln!(out, "unique id          {}", header.unique_id)?;
    writeln!(out, "previous           {}", header.previous_unique_id)?;
    writeln!(out, "created            {} by {}", header.created, header.creator_application)?;
    writeln!(out, "last modified      {}", header.last_modified)?;
    writeln!(out, "size               {}", header.current_size)?;
    writeln!(out, "end of log         {}", header.eol_location)?;
    writeln!(out, "entries            {}", header.total_metadata_entries)?;
    writeln!(out, "metadata size      {}", header.metadata_size)?;
    writeln!(out, "error code         {}", header.error_code)?;
    writeln!(out, "data write guid    {}", header.vhd2_data_write_guid)?;
    writeln!(out, "header checksum    {} ({checksum})", header.checksum)
}

fn print_entry(entry: &EntryView, out: &mut impl Write) -> io::Result<()> {
    let ok = if entry.checksum_ok { "yes" } else { "NO" };
    let time = humantime::format_rfc3339_seconds(entry.time.to_system());
    writeln!(
        out,
        "{:>16} {:>12} {:<20} {:>10} {:>3} {:>14}",
        entry.byte_offset, entry.data_length, time, entry.checksum, ok, entry.data_offset
    )
}

fn verify_text(report: &VerifyReport, out: &mut impl Write) -> io::Result<()> {
    for file in &report.files {
        verify_file_text(file, out)?;
    }
    for defect in &report.chain_defects {
        writeln!(out, "chain: {defect}")?;
    }
    match (report.sound, report.files.len()) {
        (true, 1) => writeln!(out, "sound"),
        (true, _) => writeln!(out, "sound, and one chain"),
        (false, _) => writeln!(out, "not sound"),
    }
}

fn verify_file_text(file: &FileReport, out: &mut impl Write) -> io::Result<()> {
    let companion = match file.companion {
        Companion::Absent => "no companion",
        Companion::Verified => "verified by its companion",
        Companion::Defective => "its companion disagrees",
    };
    let path = file.path.display();
    writeln!(out, "{path}: {} entries, {} bytes of data, {companion}", file.entries, file.data_bytes)?;
    if file.entries_without_data_checksum > 0 {
        writeln!(out, "  {} entries carry no checksum of their data:", file.entries_without_data_checksum)?;
        for entry in &file.without_data_checksum {
            writeln!(out, "    entry at byte {}: {}+{}", entry.entry_offset, entry.byte_offset, entry.data_length)?;
        }
        if file.entries_without_data_checksum > LISTED_MAX as u64 {
            writeln!(out, "    and {} more", file.entries_without_data_checksum - LISTED_MAX as u64)?;
        }
    }
    for defect in &file.defects {
        let place = if defect.in_companion { "companion, byte" } else { "byte" };
        writeln!(out, "  {place} {}: {}", defect.offset, defect.what)?;
    }
    if file.defect_count > file.defects.len() as u64 {
        writeln!(out, "  and {} more defects", file.defect_count - file.defects.len() as u64)?;
    }
    Ok(())
}

fn apply_text(report: &ApplyReport, out: &mut impl Write) -> io::Result<()> {
    for warning in &report.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    for log in &report.logs {
        writeln!(out, "applied {}", log.display())?;
    }
    if report.entries_without_data_checksum > 0 {
        writeln!(out, "{} entries carried no checksum of their data", report.entries_without_data_checksum)?;
    }
    writeln!(out, "{} entries, {} bytes", report.entries, report.data_bytes)
}
