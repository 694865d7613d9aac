/// The format's checksum: the one's complement of the wrapping sum of the bytes.
pub fn checksum(bytes: &[u8]) -> u32 {
    !byte_sum(bytes)
}

/// Sums eight bytes at a time in four lanes of 16 bits: 128 steps add at most 128 · 510 to a lane, which still fits.
pub(crate) fn byte_sum(bytes: &[u8]) -> u32 {
    const LANES: u64 = 0x00ff_00ff_00ff_00ff;
    let mut sum = 0u32;
    for block in bytes.chunks(8 * 128) {
        let (words, rest) = block.as_chunks::<8>();
        let mut lanes = 0u64;
        for word in words {
            let word = u64::from_le_bytes(*word);
            lanes += (word & LANES) + ((word >> 8) & LANES);
        }
        let lanes = (lanes & 0xffff) + (lanes >> 16 & 0xffff) + (lanes >> 32 & 0xffff) + (lanes >> 48);
        sum = sum.wrapping_add(lanes as u32);
        sum = rest.iter().fold(sum, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lanes_sum_like_bytes(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert_eq!(byte_sum(&bytes), bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>());
        }
    }

    #[test]
    fn full_lanes_do_not_overflow() {
        assert_eq!(byte_sum(&[0xff; 3 * 1024 + 7]), 255 * (3 * 1024 + 7));
    }
}
