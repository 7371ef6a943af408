//! Quantised keys and values in host memory.

use half::f16;
use marlin_format::Element;

use crate::KernelError;
use crate::host::{allocate, copy_blocks};
use crate::kv::KvCode;

/// Rows of `dim` values, a head's slot each, as codes and scales.
#[derive(Debug)]
pub(crate) struct KvCodes {
    code: KvCode,
    dim: usize,
    /// Least-significant bits first.
    codes: Vec<u8>,
    scales: Vec<f16>,
}

/// A row of codes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvRow<'a> {
    pub(crate) element: Element,
    pub(crate) dim: usize,
    pub(crate) codes: &'a [u8],
    /// One for each group.
    pub(crate) scales: &'a [f16],
    /// Values of a group, at least one.
    pub(crate) group: usize,
}

impl KvCodes {
    pub(crate) fn new(code: KvCode, rows: usize, dim: usize, device: &str) -> Result<Self, KernelError> {
        let what = "the KV cache";
        let codes = allocate(what, &[rows, code.bytes(dim)], device)?;
        let scales = allocate(what, &[rows, code.scales(dim)], device)?;
        Ok(Self { code, dim, codes, scales })
    }

    /// Rounds `dim` values to the codes of a row.
    pub(crate) fn store(&mut self, row: usize, values: &[f32]) {
        let KvCode { element, largest, group } = self.code;
        let (bytes, scales) = (self.code.bytes(self.dim), self.code.scales(self.dim));
        let codes = &mut self.codes[row * bytes..][..bytes];
        let per_byte = 8 / element.bits() as usize;
        codes.fill(0);
        let scales = &mut self.scales[row * scales..][..scales];
        let group = group.min(self.dim).max(1);
        for (g, (values, scale)) in values.chunks(group).zip(scales).enumerate() {
            // A product, which devices round alike.
            *scale = f16::from_f32(magnitude(values) * (1.0 / largest));
            let inverse = if *scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
            for (i, value) in (g * group..).zip(values) {
                let code = element.encode_nearest(value * inverse) as u8;
                codes[i / per_byte] |= code << (i % per_byte * element.bits() as usize);
            }
        }
    }

    /// A row as it is stored.
    pub(crate) fn row(&self, row: usize) -> KvRow<'_> {
        let (bytes, scales) = (self.code.bytes(self.dim), self.code.scales(self.dim));
        KvRow {
            element: self.code.element,
            dim: self.dim,
            codes: &self.codes[row * bytes..][..bytes],
            scales: &self.scales[row * scales..][..scales],
            group: self.code.group.min(self.dim).max(1),
        }
    }

    /// The `dim` values of a row.
    pub(crate) fn load(&self, row: usize, values: &mut [f32]) {
        let KvRow { element, dim, codes, scales, group } = self.row(row);
        let decoded = element.values();
        for ((g, values), scale) in values[..dim].chunks_mut(group).enumerate().zip(scales) {
            let scale = scale.to_f32();
            if element.bits() == 8 {
                for (value, &code) in values.iter_mut().zip(&codes[g * group..]) {
                    *value = decoded[usize::from(code)] * scale;
                }
            } else {
                for (values, &codes) in values.chunks_mut(2).zip(&codes[g * group / 2..]) {
                    for (value, code) in values.iter_mut().zip([codes & 0xf, codes >> 4]) {
                        *value = decoded[usize::from(code)] * scale;
                    }
                }
            }
        }
    }

    /// Codes and scales as bytes, each with the bytes of a row.
    pub(crate) fn bytes(&self) -> [(&[u8], usize); 2] {
        let [codes, scales] = self.row_bytes();
        [(&self.codes, codes), (bytemuck::cast_slice(&self.scales), scales)]
    }

    /// The same, to be written.
    pub(crate) fn bytes_mut(&mut self) -> [(&mut [u8], usize); 2] {
        let [codes, scales] = self.row_bytes();
        [(&mut self.codes, codes), (bytemuck::cast_slice_mut(&mut self.scales), scales)]
    }

    /// Bytes of a row's codes, and of its scales.
    fn row_bytes(&self) -> [usize; 2] {
        [self.code.bytes(self.dim), self.code.scales(self.dim) * size_of::<f16>()]
    }

    /// Copies blocks of each head's `slots` rows.
    pub(crate) fn copy_blocks(&mut self, slots: usize, block_tokens: usize, pairs: &[(u32, u32)]) {
        let (bytes, scales) = (self.code.bytes(self.dim), self.code.scales(self.dim));
        copy_blocks(&mut self.codes, slots * bytes, block_tokens * bytes, pairs);
        copy_blocks(&mut self.scales, slots * scales, block_tokens * scales, pairs);
    }
}

/// The largest absolute value, or the largest number there is if a value is not finite.
fn magnitude(values: &[f32]) -> f32 {
    let sizes = values.iter().map(|value| if value.is_finite() { value.abs() } else { f32::MAX });
    sizes.fold(0.0, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvType;

    /// A value of each type for each of `values`, through rows of 40 values, of which a group holds all or 32.
    fn rounded(kv_type: KvType, values: &[f32; 40]) -> [f32; 40] {
        let code = kv_type.code().expect("a quantised type");
        let mut codes = KvCodes::new(code, 3, 40, "a test").expect("memory");
        codes.store(1, values);
        let mut found = [f32::NAN; 40];
        codes.load(1, &mut found);
        found
    }

    #[test]
    fn values_are_rounded_to_the_nearest_code() {
        let values: [f32; 40] = std::array::from_fn(|i| ((i * i) as f32).sin() * (i as f32 - 7.0));
        for (kv_type, group) in [(KvType::Fp8, 40), (KvType::Int8, 40), (KvType::Fp4, 32)] {
            let KvCode { element, largest, .. } = kv_type.code().expect("a quantised type");
            let found = rounded(kv_type, &values);
            for (values, found) in values.chunks(group).zip(found.chunks(group)) {
                let scale = f16::from_f32(magnitude(values) / largest).to_f32();
                for (value, found) in values.iter().zip(found) {
                    let errors = element.values().iter().map(|code| (code * scale - value).abs());
                    let least = errors.fold(f32::INFINITY, f32::min);
                    assert!((found - value).abs() <= least * 1.00001, "{kv_type:?}: {value} became {found}");
                }
            }
        }
    }

    #[test]
    fn rows_may_be_empty() {
        for code in KvType::ALL.into_iter().filter_map(KvType::code) {
            let mut codes = KvCodes::new(code, 4, 0, "test").unwrap();
            codes.store(3, &[]);
            codes.load(3, &mut []);
            codes.copy_blocks(4, 2, &[(1, 0)]);
            assert_eq!((codes.row(3).codes.len(), codes.row(3).scales.len()), (0, 0));
        }
    }

    #[test]
    fn zeros_stay_and_what_is_not_finite_is_not_lost() {
        for kv_type in [KvType::Fp8, KvType::Int8, KvType::Fp4] {
            assert_eq!(rounded(kv_type, &[0.0; 40]), [0.0; 40]);
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = [1.0; 40];
                values[3] = odd;
                assert!(rounded(kv_type, &values)[..32].iter().all(|value| !value.is_finite()), "{kv_type:?} {odd}");
            }
        }
    }
}
