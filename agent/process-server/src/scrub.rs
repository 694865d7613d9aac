//! Reads everything and says what is not sound.

use std::sync::Arc;

use crate::journal::{FrameKey, Header, SegmentFile};

/// An active segment as it was at some moment.
pub struct ActiveSegment {
    pub segment: Arc<SegmentFile>,
    pub header: Header,
    pub key: FrameKey,
    pub end: u64,
}
