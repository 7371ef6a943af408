//! Codes of 1 to 8 bits packed least-significant bit first.

/// Code number `index` of a packed run; `bits` is 1 to 8.
pub fn get(bytes: &[u8], index: usize, bits: u32) -> u8 {
    let bit = index * bits as usize;
    let (byte, shift) = (bit / 8, bit % 8);
    let low = u16::from(bytes[byte]);
    let high = if shift + bits as usize > 8 { u16::from(bytes[byte + 1]) } else { 0 };
    (((high << 8 | low) >> shift) & mask(bits)) as u8
}

/// Unpacks `out.len()` codes from the start of `bytes`.
pub fn unpack(bytes: &[u8], bits: u32, out: &mut [u8]) {
    match bits {
        8 => out.copy_from_slice(&bytes[..out.len()]),
        4 => {
            // Whole pairs by themselves, so that they are vectorised.
            let (pairs, last) = out.as_chunks_mut();
            for (pair, &byte) in pairs.iter_mut().zip(bytes) {
                *pair = [byte & 15, byte >> 4];
            }
            if let [last] = last {
                *last = bytes[pairs.len()] & 15;
            }
        }
        _ => {
            // Eight codes take `bits` bytes, so every chunk starts on a byte border.
            for (codes, bytes) in out.chunks_mut(8).zip(bytes.chunks(bits as usize)) {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                let mut word = u64::from_le_bytes(word);
                for code in codes {
                    *code = (word & u64::from(mask(bits))) as u8;
                    word >>= bits;
                }
            }
        }
    }
}

/// Packs `codes` to the start of `out`; the unused bits of the last byte become 0.
pub fn pack(codes: &[u8], bits: u32, out: &mut [u8]) {
    match bits {
        8 => out[..codes.len()].copy_from_slice(codes),
        4 => {
            for (pair, byte) in codes.chunks(2).zip(out) {
                *byte = pair[0] | pair.get(1).map_or(0, |high| high << 4);
            }
        }
        _ => {
            for (codes, out) in codes.chunks(8).zip(out.chunks_mut(bits as usize)) {
                let word = codes.iter().rev().fold(0u64, |word, &code| word << bits | u64::from(code));
                out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
            }
        }
    }
}

fn mask(bits: u32) -> u16 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bit `k` of code `i` is bit `i · bits + k` of the stream: the definition, one bit at a time.
    fn bit(bytes: &[u8], position: usize) -> u8 {
        bytes[position / 8] >> (position % 8) & 1
    }

    proptest! {
        #[test]
        fn packing_is_a_bit_stream(bits in 1u32..=8, codes in proptest::collection::vec(any::<u8>(), 1..70)) {
            let codes: Vec<u8> = codes.iter().map(|c| (u16::from(*c) & mask(bits)) as u8).collect();
            let length = (codes.len() * bits as usize).div_ceil(8);
            let mut packed = vec![0xff; length];
            pack(&codes, bits, &mut packed);
            for (i, &code) in codes.iter().enumerate() {
                for k in 0..bits as usize {
                    prop_assert_eq!(bit(&packed, i * bits as usize + k), code >> k & 1);
                }
                prop_assert_eq!(get(&packed, i, bits), code);
            }
            for position in codes.len() * bits as usize..length * 8 {
                prop_assert_eq!(bit(&packed, position), 0, "padding");
            }
            let mut unpacked = vec![0; codes.len()];
            unpack(&packed, bits, &mut unpacked);
            prop_assert_eq!(unpacked, codes);
        }
    }
}
