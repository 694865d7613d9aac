//! Memory for frames, used again when a frame has left: fresh memory costs as much as what is done with it.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_base::sync::Mutex;

/// Rooms that one worker keeps while nobody needs them.
const ROOMS_MAX: usize = 16;

/// One worker's rooms.
#[derive(Clone, Default)]
pub struct Rooms(Arc<Mutex<Vec<Vec<u8>>>>);

/// A frame's memory. What is in it at first is what the last frame left there.
pub struct Room {
    bytes: Vec<u8>,
    used: usize,
    home: Rooms,
}

impl Rooms {
    pub fn take(&self, bytes: usize) -> Room {
        let mut room = self.0.lock().expect("no panic while held").pop().unwrap_or_default();
        if room.len() < bytes {
            room.resize(bytes, 0);
        }
        Room { bytes: room, used: bytes, home: self.clone() }
    }
}

impl Room {
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.used]
    }

    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.used]
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut rooms = self.home.0.lock().expect("no panic while held");
        if rooms.len() < ROOMS_MAX {
            rooms.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_used_again_once_nobody_reads_it() {
        let rooms = Rooms::default();
        let mut room = rooms.take(100);
        room.as_mut_slice().fill(7);
        let frame = room.freeze();
        let held = frame.as_ptr();
        let part = frame.slice(10..20);
        drop(frame);
        // A part of the frame is still read.
        assert!(rooms.take(100).as_ref().as_ptr() != held);
        assert_eq!(part, [7; 10][..]);
        let other = rooms.take(100);
        drop(part);
        let again = rooms.take(60);
        assert_eq!((again.as_ref().as_ptr(), again.as_ref().len()), (held, 60));
        drop((again, other));
        (0..2 * ROOMS_MAX).map(|_| rooms.take(10)).collect::<Vec<_>>().clear();
        assert_eq!(rooms.0.lock().unwrap().len(), ROOMS_MAX);
    }
}
