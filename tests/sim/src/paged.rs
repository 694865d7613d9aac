//! The bytes of a file or disk in pages that copies share until one of them is written: what is durable, what programs
//! see and what an oracle remembers are mostly the same pages.

use std::rc::Rc;

pub const PAGE: usize = 4096;
type Page = [u8; PAGE];

#[derive(Clone, Default)]
pub struct Paged {
    /// Absent: never written, reads as zeroes.
    pages: Vec<Option<Rc<Page>>>,
    bytes: u64,
}

/// The parts of `range` by pages: the page, where in it, and how many bytes.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let place = offset + at as u64;
        let (page, within) = ((place / PAGE as u64) as usize, (place % PAGE as u64) as usize);
        let part = (PAGE - within).min(length - at);
        at += part;
        (part > 0).then_some((page, within, part))
    })
}

impl Paged {
    /// So many zeroes.
    pub fn new(bytes: u64) -> Self {
        let mut made = Self::default();
        made.resize(bytes);
        made
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn resize(&mut self, bytes: u64) {
        self.pages.resize(bytes.div_ceil(PAGE as u64) as usize, None);
        let within = (bytes % PAGE as u64) as usize;
        if bytes < self.bytes
            && within > 0
            && let Some(Some(page)) = self.pages.last_mut()
        {
            Rc::make_mut(page)[within..].fill(0);
        }
        self.bytes = bytes;
    }

    /// Fills `buffer`; bytes past the end are zeroes.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut rest = buffer;
        for (page, within, length) in parts(offset, rest.len()) {
            let (part, after) = rest.split_at_mut(length);
            rest = after;
            match self.pages.get(page).and_then(Option::as_ref) {
                Some(found) => part.copy_from_slice(&found[within..within + length]),
                None => part.fill(0),
            }
        }
    }

    /// Writes, and grows to hold what is written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = offset + data.len() as u64;
        if self.bytes < end {
            self.resize(end);
        }
        let mut rest = data;
        for (page, within, length) in parts(offset, data.len()) {
            let (part, after) = rest.split_at(length);
            rest = after;
            let place = &mut self.pages[page];
            match (place.as_mut(), <&Page>::try_from(part)) {
                (Some(found), Ok(whole)) => match Rc::get_mut(found) {
                    Some(own) => own.copy_from_slice(whole),
                    None => *place = Some(Rc::new(*whole)),
                },
                (None, Ok(whole)) => *place = Some(Rc::new(*whole)),
                (Some(found), Err(_)) => Rc::make_mut(found)[within..within + length].copy_from_slice(part),
                (None, Err(_)) => {
                    let mut content = [0; PAGE];
                    content[within..within + length].copy_from_slice(part);
                    *place = Some(Rc::new(content));
                }
            }
        }
    }

    /// Zeroes within what there is.
    pub fn zero(&mut self, offset: u64, length: u64) {
        let length = length.min(self.bytes.saturating_sub(offset));
        for (page, within, length) in parts(offset, length as usize) {
            if let Some(found) = &mut self.pages[page] {
                Rc::make_mut(found)[within..within + length].fill(0);
            }
        }
    }

    /// Takes the pages of a range as `other` has them.
    pub fn share(&mut self, other: &Paged, offset: u64, length: u64) {
        let last = (offset + length).div_ceil(PAGE as u64) as usize;
        if self.pages.len() < last {
            self.pages.resize(last.min(other.pages.len()), None);
        }
        for page in (offset / PAGE as u64) as usize..last.min(self.pages.len()) {
            self.pages[page] = other.pages.get(page).cloned().flatten();
        }
        self.bytes = self.bytes.max((offset + length).min(other.bytes));
    }

    /// Whether the page was ever written.
    pub fn holds(&self, page: u64) -> bool {
        self.pages.get(page as usize).is_some_and(Option::is_some)
    }

    /// The page, or nothing where it was never written.
    pub fn page(&self, page: u64) -> Option<&[u8]> {
        self.pages.get(page as usize)?.as_ref().map(|found| &found[..])
    }

    pub fn flip(&mut self, byte: usize, mask: u8) -> u8 {
        let mut content = [0];
        self.read(byte as u64, &mut content);
        content[0] ^= mask;
        self.write(byte as u64, &content);
        content[0]
    }
}

impl PartialEq for Paged {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
            && self.pages.iter().zip(&other.pages).all(|pair| match pair {
                (Some(one), Some(another)) => Rc::ptr_eq(one, another) || one == another,
                (one, another) => one.is_none() && another.is_none(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::random::Random;

    /// The same operations on plain bytes.
    #[test]
    fn it_reads_as_plain_bytes_do() {
        let mut random = Random::new(1);
        for _ in 0..200 {
            let (mut paged, mut plain) = (Paged::default(), Vec::<u8>::new());
            let (mut copy, mut copied) = (paged.clone(), plain.clone());
            for _ in 0..60 {
                let (at, length) = (random.below(20_000), random.below(9000));
                match random.below(8) {
                    0 => {
                        paged.resize(at);
                        plain.resize(at as usize, 0);
                    }
                    1 => {
                        paged.zero(at, length);
                        let end = (at + length).min(plain.len() as u64);
                        if at < end {
                            plain[at as usize..end as usize].fill(0);
                        }
                    }
                    2 => {
                        copy = paged.clone();
                        copied = plain.clone();
                    }
                    _ => {
                        let mut data = vec![0; if random.chance(1, 4) { PAGE } else { length as usize }];
                        let at = if random.chance(1, 4) { at / PAGE as u64 * PAGE as u64 } else { at };
                        random.fill(&mut data);
                        paged.write(at, &data);
                        let end = at as usize + data.len();
                        if !data.is_empty() {
                            plain.resize(plain.len().max(end), 0);
                            plain[at as usize..end].copy_from_slice(&data);
                        }
                    }
                }
                for (paged, plain) in [(&paged, &plain), (&copy, &copied)] {
                    let mut content = vec![0; plain.len()];
                    paged.read(0, &mut content);
                    assert!(content == *plain && paged.bytes() == plain.len() as u64);
                }
            }
        }
    }

    #[test]
    fn shared_pages_are_those_of_the_range() {
        let (mut one, mut other) = (Paged::new(5 << 12), Paged::new(5 << 12));
        one.write(0, &[1; 5 << 12]);
        other.write(0, &[2; 5 << 12]);
        one.share(&other, 4096, 4097);
        let mut content = vec![0; 5 << 12];
        one.read(0, &mut content);
        let firsts: Vec<u8> = content.chunks(PAGE).map(|page| page[0]).collect();
        assert_eq!(firsts, [1, 2, 2, 1, 1]);
    }
}
