//! Cached keys and values in single precision.

use half::f16;
use marlin_format::Element;

use super::simd::Simd;
use super::vector::{LANES, load};
use crate::host::{KvData, KvPlane};
use crate::kv_codes::KvRow;

/// Loads one head's key or value of one token, padded with zeros to whole vectors.
#[inline(always)]
pub(super) fn load_cached<S: Simd>(simd: S, plane: &KvPlane, head: usize, slot: usize, to: &mut [f32]) {
    match &plane.data {
        KvData::F16(data) => {
            let (to, _) = to.as_chunks_mut::<LANES>();
            let (chunks, tail) = data[plane.range(head, slot)].as_chunks::<LANES>();
            for (to, from) in to.iter_mut().zip(chunks) {
                *to = simd.store(simd.load_f16(from));
            }
            if !tail.is_empty() {
                let mut padded = [f16::ZERO; LANES];
                padded[..tail.len()].copy_from_slice(tail);
                to[chunks.len()] = simd.store(simd.load_f16(&padded));
            }
        }
        KvData::F32(data) => {
            let from = &data[plane.range(head, slot)];
            for (i, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                *to = simd.store(load(simd, from, i * LANES));
            }
        }
        KvData::Codes(codes) => {
            let row = codes.row(plane.row(head, slot));
            match row.element {
                Element::E4M3 => load_codes::<S, E4M3>(simd, &row, to),
                Element::E2M1 => load_codes::<S, E2M1>(simd, &row, to),
                _ => load_codes::<S, Int8>(simd, &row, to),
            }
        }
    }
}

/// Codes that become numbers eight at a time.
trait KvElement {
    /// Bytes of eight codes.
    const BYTES: usize;
    /// What [`KvElement::decode`] leaves out, a power of two.
    const FACTOR: f32;
    /// The values of eight codes, over `FACTOR`; codes that are missing are 0.
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32;
}

/// Loads the values of a row.
#[inline(always)]
fn load_codes<S: Simd, E: KvElement>(simd: S, row: &KvRow<'_>, to: &mut [f32]) {
    let mut left = row.dim;
    for (i, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // Groups are whole vectors, or all of a row.
        let scale = row.scales[(i * LANES / row.group).min(row.scales.len() - 1)].to_f32() * E::FACTOR;
        let values = E::decode(simd, &row.codes[i * E::BYTES..]);
        *to = simd.store(simd.mul(values, simd.splat(scale)));
        if left < LANES {
            to[left..].fill(0.0);
        }
        left = left.saturating_sub(LANES);
    }
}

/// The first eight bytes; zeros beyond the end.
#[inline(always)]
fn eight(codes: &[u8]) -> [u8; 8] {
    match codes.first_chunk() {
        Some(whole) => *whole,
        None => {
            let mut padded = [0; 8];
            padded[..codes.len()].copy_from_slice(codes);
            padded
        }
    }
}

/// Integers from −127 to 127, 128 more of them as codes.
struct Int8;

impl KvElement for Int8 {
    const BYTES: usize = 8;
    const FACTOR: f32 = 1.0;

    #[inline(always)]
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32 {
        let signed = u64::from_le_bytes(eight(codes)) ^ 0x8080_8080_8080_8080;
        simd.to_f32(simd.widen_i8(&bytemuck::cast(signed.to_le_bytes())))
    }
}

struct E4M3;

impl KvElement for E4M3 {
    const BYTES: usize = 8;
    const FACTOR: f32 = 1.0;

    #[inline(always)]
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32 {
        simd.load_e4m3(&eight(codes))
    }
}

struct E2M1;

impl KvElement for E2M1 {
    const BYTES: usize = 4;
    /// E4M3 has an exponent that is larger by 6.
    const FACTOR: f32 = 64.0;

    #[inline(always)]
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32 {
        // Each nibble into a byte of its own.
        let [a, b, c, d, ..] = eight(codes);
        let mut bits = u64::from(u32::from_le_bytes([a, b, c, d]));
        bits = (bits | bits << 16) & 0x0000_ffff_0000_ffff;
        bits = (bits | bits << 8) & 0x00ff_00ff_00ff_00ff;
        bits = (bits | bits << 4) & 0x0f0f_0f0f_0f0f_0f0f;
        // Sign, exponent and mantissa where E4M3 has them.
        let bits = (bits & 0x0808_0808_0808_0808) << 4 | (bits & 0x0707_0707_0707_0707) << 2;
        simd.load_e4m3(&bits.to_le_bytes())
    }
}
