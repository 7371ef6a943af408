//! Cached keys and values in single precision.

use half::f16;
use marlin_format::Element;

use super::simd::{CACHE_LINE, MOST_LANES, Simd};
use super::vector::load;
use crate::host::{KvData, KvPlane};
use crate::kv_codes::KvRow;

/// Loads one head's key or value of one token; zeros beyond the end.
#[inline(always)]
pub(super) fn load_cached<S: Simd>(simd: S, plane: &KvPlane, head: usize, slot: usize, to: &mut [f32]) {
    let (to, beyond) = to.split_at_mut(plane.dim.next_multiple_of(S::LANES));
    beyond.fill(0.0);
    match &plane.data {
        KvData::F16(data) => {
            for (to, from) in to.chunks_exact_mut(S::LANES).zip(data[plane.range(head, slot)].chunks(S::LANES)) {
                if from.len() == S::LANES {
                    simd.store(simd.load_f16(from), to);
                } else {
                    let mut padded = [f16::ZERO; MOST_LANES];
                    padded[..from.len()].copy_from_slice(from);
                    simd.store(simd.load_f16(&padded), to);
                }
            }
        }
        KvData::F32(data) => {
            let from = &data[plane.range(head, slot)];
            for (i, to) in to.chunks_exact_mut(S::LANES).enumerate() {
                simd.store(load(simd, from, i * S::LANES), to);
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

/// Asks for one head's key or value of one token to be fetched from memory.
#[inline(always)]
pub(super) fn prefetch_cached<S: Simd>(simd: S, plane: &KvPlane, head: usize, slot: usize) {
    let bytes: &[u8] = match &plane.data {
        KvData::F16(data) => bytemuck::cast_slice(&data[plane.range(head, slot)]),
        KvData::F32(data) => bytemuck::cast_slice(&data[plane.range(head, slot)]),
        KvData::Codes(codes) => codes.row(plane.row(head, slot)).codes,
    };
    for line in bytes.chunks(CACHE_LINE) {
        simd.prefetch(line, 0);
    }
}

/// Codes that become numbers a vector at a time.
trait KvElement {
    /// Bits of a code.
    const BITS: usize;
    /// What [`KvElement::decode`] leaves out, a power of two.
    const FACTOR: f32;
    /// The values of a vector of codes, over `FACTOR`; codes that are missing are 0.
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32;
}

/// Loads the values of a row.
#[inline(always)]
fn load_codes<S: Simd, E: KvElement>(simd: S, row: &KvRow<'_>, to: &mut [f32]) {
    let mut left = row.dim;
    for (i, to) in to.chunks_exact_mut(S::LANES).enumerate() {
        // Groups are whole vectors, or all of a row.
        let scale = row.scales[(i * S::LANES / row.group).min(row.scales.len() - 1)].to_f32() * E::FACTOR;
        let values = E::decode(simd, &row.codes[i * S::LANES * E::BITS / 8..]);
        simd.store(simd.mul(values, simd.splat(scale)), to);
        if left < S::LANES {
            to[left..].fill(0.0);
        }
        left = left.saturating_sub(S::LANES);
    }
}

/// As many bytes as the longest vector has lanes; zeros beyond the end.
#[inline(always)]
fn padded(codes: &[u8]) -> [u8; MOST_LANES] {
    match codes.first_chunk() {
        Some(whole) => *whole,
        None => {
            let mut padded = [0; MOST_LANES];
            padded[..codes.len()].copy_from_slice(codes);
            padded
        }
    }
}

/// Integers from −127 to 127, 128 more of them as codes.
struct Int8;

impl KvElement for Int8 {
    const BITS: usize = 8;
    const FACTOR: f32 = 1.0;

    #[inline(always)]
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32 {
        let signed = u128::from_le_bytes(padded(codes)) ^ 0x8080_8080_8080_8080_8080_8080_8080_8080;
        let signed: [i8; MOST_LANES] = bytemuck::cast(signed.to_le_bytes());
        simd.to_f32(simd.widen_i8(&signed))
    }
}

struct E4M3;

impl KvElement for E4M3 {
    const BITS: usize = 8;
    const FACTOR: f32 = 256.0;

    #[inline(always)]
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32 {
        simd.load_e4m3_over_256(&padded(codes))
    }
}

struct E2M1;

impl KvElement for E2M1 {
    const BITS: usize = 4;
    /// E4M3 has an exponent that is larger by 6, and is loaded over 256.
    const FACTOR: f32 = 64.0 * 256.0;

    #[inline(always)]
    fn decode<S: Simd>(simd: S, codes: &[u8]) -> S::F32 {
        let codes = u128::from_le_bytes(padded(codes)) as u64;
        let wide = [e2m1_as_e4m3(codes as u32), e2m1_as_e4m3((codes >> 32) as u32)];
        simd.load_e4m3_over_256(bytemuck::bytes_of(&wide))
    }
}

/// Eight codes as E4M3, with exponents that are too small by 6.
#[inline(always)]
fn e2m1_as_e4m3(codes: u32) -> u64 {
    // Each nibble into a byte of its own.
    let mut bits = u64::from(codes);
    bits = (bits | bits << 16) & 0x0000_ffff_0000_ffff;
    bits = (bits | bits << 8) & 0x00ff_00ff_00ff_00ff;
    bits = (bits | bits << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    // Sign, exponent and mantissa where E4M3 has them.
    (bits & 0x0808_0808_0808_0808) << 4 | (bits & 0x0707_0707_0707_0707) << 2
}
