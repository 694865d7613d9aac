//! The records of one cut, gathered into extents: a later record replaces an earlier one.

use std::collections::VecDeque;
use std::time::Duration;

use tidemark_base::extent::Sliced;
use tidemark_base::{Extent, ExtentMap, Position, Sequence, Timestamp};
use tidemark_proto::replication::Mark;

use crate::source::{DataRef, Record, RecordBody, RecordReader, Source, SourceError};

/// Records read from the log at once.
const BATCH_RECORDS: usize = 1024;

/// Records in order, with a look at the next one.
pub struct Records {
    reader: Box<dyn RecordReader>,
    next: VecDeque<Record>,
    batch: Vec<Record>,
}

impl Records {
    pub fn after(source: &dyn Source, position: &Position) -> Result<Self, SourceError> {
        Ok(Self { reader: source.read_after(position)?, next: VecDeque::new(), batch: Vec::new() })
    }

    /// The next record up to `until`.
    fn next(&mut self, until: Sequence) -> Result<Option<Record>, SourceError> {
        if self.next.is_empty() {
            self.reader.read(until, BATCH_RECORDS, &mut self.batch)?;
            self.next.extend(self.batch.drain(..));
        }
        match self.next.front() {
            Some(record) if record.sequence <= until => Ok(self.next.pop_front()),
            _ => Ok(None),
        }
    }

    /// The record that comes next.
    pub fn peek(&mut self, until: Sequence) -> Result<Option<&Record>, SourceError> {
        if let Some(record) = self.next(until)? {
            self.put_back(record);
        }
        Ok(self.next.front().filter(|record| record.sequence <= until))
    }

    fn put_back(&mut self, record: Record) {
        self.next.push_front(record);
    }
}

/// Where a cut ends at the latest. It always ends at a mark.
#[derive(Clone, Copy, Debug)]
pub struct CutLimits {
    pub until: Sequence,
    pub data_bytes_max: u64,
    pub records_max: u64,
    pub span_max: Duration,
}

impl CutLimits {
    /// All up to `until`, or to the first mark.
    pub fn unlimited(until: Sequence) -> Self {
        Self { until, data_bytes_max: u64::MAX, records_max: u64::MAX, span_max: Duration::MAX }
    }
}

/// What a cut spans.
#[derive(Clone, PartialEq, Debug)]
pub struct CutSpan {
    pub from: Position,
    pub to: Position,
    pub first_time: Timestamp,
    pub time: Timestamp,
    pub clock_stepped: bool,
    pub records: u64,
    pub written_bytes: u64,
    pub mark: Option<Mark>,
}

/// What is known of a range within a cut.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Piece {
    /// The record that this is of: the last one of the cut in its range.
    pub sequence: Sequence,
    pub content: Content,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Content {
    /// The data of a record from its `skip`-th byte on.
    Data {
        data: DataRef,
        skip: u32,
    },
    Zeroes,
}

impl Sliced for Piece {
    fn slice(&self, more: u64) -> Self {
        let content = match self.content {
            Content::Data { data, skip } => Content::Data { data, skip: skip + more as u32 },
            Content::Zeroes => Content::Zeroes,
        };
        Self { content, ..*self }
    }
}

/// The pieces of a cut in disk order, gathered in as many passes over its records as its size needs.
pub struct CutPieces {
    disk_bytes: u64,
    entries_max: usize,
    pass: ExtentMap<Piece>,
    /// What lies before this was returned, or is in `pass`.
    covered: u64,
    passes: u32,
}

impl CutPieces {
    /// Reads the records of the next cut. `None` when there are none.
    pub fn gather(
        source: &dyn Source,
        records: &mut Records,
        from: Position,
        limits: &CutLimits,
        entries_max: usize,
    ) -> Result<Option<(CutSpan, Self)>, SourceError> {
        let mut window = Window::new(0, source.identity().disk_bytes, entries_max);
        let Some(span) = read_span(records, from, limits, &mut window)? else {
            return Ok(None);
        };
        let pieces = Self {
            disk_bytes: source.identity().disk_bytes,
            entries_max,
            covered: window.end,
            pass: window.map,
            passes: 1,
        };
        Ok(Some((span, pieces)))
    }

    /// The next piece; `span` is what [`CutPieces::gather`] returned with it.
    pub fn next(&mut self, source: &dyn Source, span: &CutSpan) -> Result<Option<(Extent, Piece)>, SourceError> {
        loop {
            if let Some(piece) = self.pass.pop_first() {
                return Ok(Some(piece));
            }
            if self.covered >= self.disk_bytes {
                return Ok(None);
            }
            let mut records = Records::after(source, &span.from)?;
            let mut window = Window::new(self.covered, self.disk_bytes, self.entries_max);
            let again = read_span(&mut records, span.from, &CutLimits::unlimited(span.to.sequence), &mut window)?;
            // The same records, or the log changed under us.
            if again.map(|again| again.to) != Some(span.to) {
                return Err(SourceError::History { disk: source.identity().disk, after: span.from });
            }
            self.covered = window.end;
            self.pass = window.map;
            self.passes += 1;
        }
    }

    /// As [`CutPieces::next`], with at most `data_bytes_max` bytes of data in the piece; the rest of it comes next.
    pub fn next_within(
        &mut self,
        source: &dyn Source,
        span: &CutSpan,
        data_bytes_max: u64,
    ) -> Result<Option<(Extent, Piece)>, SourceError> {
        let Some((extent, piece)) = self.next(source, span)? else { return Ok(None) };
        if piece.content == Content::Zeroes || extent.length <= data_bytes_max {
            return Ok(Some((extent, piece)));
        }
        let (now, rest) = (Extent::new(extent.offset, data_bytes_max), extent.length - data_bytes_max);
        self.pass.insert(Extent::new(now.end(), rest), piece.slice(data_bytes_max));
        Ok(Some((now, piece)))
    }

    /// How often the records were read.
    pub fn passes(&self) -> u32 {
        self.passes
    }
}

/// A part of the disk, as much of it as a map of limited size can describe.
struct Window {
    start: u64,
    end: u64,
    entries_max: usize,
    map: ExtentMap<Piece>,
}

impl Window {
    fn new(start: u64, end: u64, entries_max: usize) -> Self {
        Self { start, end, entries_max: entries_max.max(2), map: ExtentMap::new() }
    }

    fn insert(&mut self, extent: Extent, piece: Piece) {
        let Some(part) = extent.intersection(&Extent::new(self.start, self.end - self.start)) else {
            return;
        };
        self.map.insert(part, piece.slice(part.offset - extent.offset));
        // An insertion adds two entries at most: itself and the tail of what it split.
        while self.map.len() > self.entries_max {
            let middle = self.map.iter().nth(self.map.len() / 2).expect("the map has at least two entries").0.offset;
            self.map.remove(Extent::new(middle, self.end - middle));
            self.end = middle;
        }
    }
}

fn read_span(
    records: &mut Records,
    from: Position,
    limits: &CutLimits,
    window: &mut Window,
) -> Result<Option<CutSpan>, SourceError> {
    let mut span: Option<CutSpan> = None;
    let mut data_bytes = 0u64;
    while let Some(record) = records.next(limits.until)? {
        if let Some(span) = &span {
            let late = record.time.saturating_since(span.first_time) > limits.span_max;
            if late || data_bytes >= limits.data_bytes_max || span.records >= limits.records_max {
                records.put_back(record);
                break;
            }
        }
        let span = span.get_or_insert(CutSpan {
            from,
            to: from,
            first_time: record.time,
            time: record.time,
            clock_stepped: false,
            records: 0,
            written_bytes: 0,
            mark: None,
        });
        span.to = Position { epoch: from.epoch, sequence: record.sequence, hash: record.hash };
        span.time = span.time.max(record.time);
        span.clock_stepped |= record.clock_stepped;
        span.records += 1;
        let sequence = record.sequence;
        match record.body {
            RecordBody::Write { extent, data } => {
                window.insert(extent, Piece { sequence, content: Content::Data { data, skip: 0 } });
                data_bytes += extent.length;
                span.written_bytes += extent.length;
            }
            RecordBody::Zeroes { extent } => {
                window.insert(extent, Piece { sequence, content: Content::Zeroes });
                span.written_bytes += extent.length;
            }
            RecordBody::Mark(mark) => {
                span.mark = Some(*mark);
                break;
            }
        }
    }
    Ok(span)
}
