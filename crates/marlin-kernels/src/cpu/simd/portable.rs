//! Plain arrays, for processors without a level of their own.

use std::array::from_fn;

use half::{bf16, f16};

use super::{Simd, WithSimd, first, first_mut};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

/// The low halves of two numbers, one in each half.
#[inline(always)]
fn pair(low: i32, high: i32) -> i32 {
    high << 16 | low & 0xffff
}

impl Simd for Portable {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const ANY_UNSIGNED: bool = true;
    type Bytes = [u8; 32];
    type I32 = [i32; 8];
    type F32 = [f32; 8];
    type Base = Self;

    fn base(self) -> Self {
        self
    }

    fn vectorize<W: WithSimd>(self, operation: W) -> W::Output {
        operation.with_simd(self)
    }

    #[inline(always)]
    fn bytes(self, from: &[u8]) -> [u8; 32] {
        let from: &[u8; 32] = first(from);
        *from
    }
    #[inline(always)]
    fn bits(self, v: [u8; 32], shift: u32, mask: u8) -> [u8; 32] {
        v.map(|b| (b >> shift) & mask)
    }
    #[inline(always)]
    fn shift_left(self, v: [u8; 32], shift: u32) -> [u8; 32] {
        v.map(|b| b << shift)
    }
    #[inline(always)]
    fn or(self, a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn plus_128(self, v: [u8; 32]) -> [u8; 32] {
        v.map(|b| b ^ 0x80)
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: [u8; 32]) -> [u8; 32] {
        v.map(|b| table[usize::from(b & 15)])
    }

    #[inline(always)]
    fn quad(self, x: &[i8; 16], q: usize) -> [u8; 32] {
        from_fn(|i| x[4 * q + i % 4] as u8)
    }
    #[inline(always)]
    fn repeat_byte(self, v: [i32; 8]) -> [u8; 32] {
        from_fn(|i| v[i / 4] as u8)
    }
    #[inline(always)]
    fn add_dot_unsigned(self, mut sums: [i32; 8], weights: [[u8; 32]; 4], x: [[u8; 32]; 4]) -> [i32; 8] {
        for (q, w) in weights.iter().enumerate() {
            for (lane, sum) in sums.iter_mut().enumerate() {
                for j in 0..4 {
                    *sum += i32::from(w[4 * lane + j]) * i32::from(x[q][4 * lane + j] as i8);
                }
            }
        }
        sums
    }
    #[inline(always)]
    fn add_dot_signed(self, mut sums: [i32; 8], weights: [[u8; 32]; 4], x: [[u8; 32]; 4]) -> [i32; 8] {
        for (q, w) in weights.iter().enumerate() {
            for (lane, sum) in sums.iter_mut().enumerate() {
                for j in 0..4 {
                    *sum += i32::from(w[4 * lane + j] as i8) * i32::from(x[q][4 * lane + j] as i8);
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> [i32; 8] {
        [value; 8]
    }
    #[inline(always)]
    fn widen_i8(self, from: &[i8]) -> [i32; 8] {
        let from: &[i8; 8] = first(from);
        from.map(i32::from)
    }
    #[inline(always)]
    fn add_i32(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub_i32(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn widen_pairs(self, from: &[i8]) -> [i32; 8] {
        let from: &[i8; 16] = first(from);
        from_fn(|i| pair(from[2 * i].into(), from[2 * i + 1].into()))
    }
    #[inline(always)]
    fn pair(self, low: [i32; 8], high: [i32; 8]) -> [i32; 8] {
        from_fn(|i| pair(low[i], high[i]))
    }
    #[inline(always)]
    fn mul_pairs(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        from_fn(|i| pair(i32::from(a[i] as i16) * i32::from(b[i] as i16), (a[i] >> 16) * (b[i] >> 16)))
    }
    #[inline(always)]
    fn dot_pairs(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        from_fn(|i| i32::from(a[i] as i16) * i32::from(b[i] as i16) + (a[i] >> 16) * (b[i] >> 16))
    }
    #[inline(always)]
    fn to_f32(self, v: [i32; 8]) -> [f32; 8] {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    fn byte_to_f32(self, v: [u8; 32], j: usize) -> [f32; 8] {
        from_fn(|lane| f32::from(v[4 * lane + j]))
    }
    #[inline(always)]
    fn signed_byte_to_f32(self, v: [u8; 32], j: usize) -> [f32; 8] {
        from_fn(|lane| f32::from(v[4 * lane + j] as i8))
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 8] {
        [value; 8]
    }
    #[inline(always)]
    fn select(self, x: &[f32; 4], lanes: [u8; 32], shift: u32) -> [f32; 8] {
        from_fn(|i| {
            let lane = u32::from_le_bytes([lanes[4 * i], lanes[4 * i + 1], lanes[4 * i + 2], lanes[4 * i + 3]]);
            x[(lane >> shift & 3) as usize]
        })
    }
    #[inline(always)]
    fn load_le_f32(self, from: &[u8]) -> [f32; 8] {
        let from: &[u8; 32] = first(from);
        from_fn(|i| f32::from_le_bytes([from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]]))
    }
    #[inline(always)]
    fn load_le_f16(self, from: &[u8]) -> [f32; 8] {
        let from: &[u8; 16] = first(from);
        from_fn(|i| f16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn load_le_bf16(self, from: &[u8]) -> [f32; 8] {
        let from: &[u8; 16] = first(from);
        from_fn(|i| bf16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn load_e8m0(self, from: &[u8]) -> [f32; 8] {
        let from: &[u8; 8] = first(from);
        // Exponent 0 is the subnormal 2^−127.
        from.map(|e| f32::from_bits((u32::from(e) << 23).max(1 << 22)))
    }
    #[inline(always)]
    fn load_e4m3_over_256(self, from: &[u8]) -> [f32; 8] {
        let from: &[u8; 8] = first(from);
        // Exponent and mantissa in place of f32's; the factor is the difference of the exponent biases, less 8.
        from.map(|code| {
            let code = u32::from(code);
            f32::from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * f32::from_bits((127 + 112) << 23)
        })
    }
    #[inline(always)]
    fn store(self, v: [f32; 8], to: &mut [f32]) {
        *first_mut(to) = v;
    }
    #[inline(always)]
    fn sums_of_lanes(self, vectors: [[f32; 8]; 8]) -> [f32; 8] {
        vectors.map(|v| ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])))
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] * b[i] + c[i])
    }
}
