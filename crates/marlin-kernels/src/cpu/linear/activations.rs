//! The inputs of a linear, in the forms kernels read.

use bytemuck::Zeroable;

use super::codes::CHUNK;
use crate::KernelError;
use crate::cpu::simd::{Simd, SimdLevel, WithSimd};
use crate::cpu::threads::Threads;
use crate::host::allocate;

/// 32 activations quantised to int8: `x ≈ scale · code`, codes within ±127.
#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(C)]
pub(super) struct Block {
    pub(super) scale: f32,
    /// Sums of the codes of each half, negated, which weights with an offset are corrected by.
    pub(super) minus_sums: [i16; 2],
    pub(super) codes: [i8; CHUNK],
}

impl Block {
    /// The codes of each half.
    #[inline(always)]
    pub(super) fn halves(&self) -> [&[i8; CHUNK / 2]; 2] {
        let (first, second) = self.codes.split_first_chunk().expect("32 codes");
        [first, second.first_chunk().expect("32 codes")]
    }
}

/// The columns of an input.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    pub(super) count: usize,
    /// The order that they are multiplied in; empty if it is their own.
    pub(super) order: &'a [u32],
}

/// Scratch memory for the inputs of linears; reused, so that applying one allocates nothing.
#[derive(Debug)]
pub(crate) struct Activations {
    blocks: Vec<Block>,
    /// Rows padded to whole chunks, for widths that are none. Untouched memory of it costs nothing.
    padded: Vec<[f32; CHUNK]>,
}

/// The inputs of one linear: every form is `[rows, chunks]`, and empty if no kernel of the linear reads it.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) blocks: &'a [Block],
    pub(super) floats: &'a [[f32; CHUNK]],
    /// The row to multiply at each place; as they are if `None`.
    pub(super) order: Option<&'a [u32]>,
}

impl Inputs<'_> {
    /// The inputs after so many rows of `chunks`.
    pub(super) fn after(self, rows: usize, chunks: usize) -> Self {
        let skip = rows * chunks;
        Self {
            blocks: self.blocks.get(skip..).unwrap_or_default(),
            floats: self.floats.get(skip..).unwrap_or_default(),
            ..self
        }
    }
}

/// Values of a task that prepares rows: fewer are not worth waking threads for.
const TASK_VALUES: usize = 2048;

impl Activations {
    /// Room for `max_rows` rows of at most `max_width` values.
    pub(crate) fn new(max_rows: usize, max_width: usize) -> Result<Self, KernelError> {
        let sizes = [max_rows, max_width.div_ceil(CHUNK)];
        let blocks = allocate("quantised activations", &sizes, "cpu")?;
        Ok(Self { blocks, padded: allocate("padded activations", &sizes, "cpu")? })
    }

    /// Memory that [`Activations::new`] takes.
    pub(crate) fn bytes(max_rows: usize, max_width: usize) -> usize {
        let chunk = size_of::<Block>() + size_of::<[f32; CHUNK]>();
        max_rows.saturating_mul(max_width.div_ceil(CHUNK)).saturating_mul(chunk)
    }

    /// Rows of so many values that there is room for.
    pub(crate) fn room(&self, width: usize) -> usize {
        self.blocks.len() / width.div_ceil(CHUNK).max(1)
    }

    /// Prepares `x`, `[rows, columns]`, in the forms asked for.
    pub(super) fn prepare<'a>(
        &'a mut self,
        x: &'a [f32],
        columns: Columns<'_>,
        forms: Forms,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Inputs<'a> {
        let width = columns.count;
        // Rows of whole chunks are read where they are.
        let in_place = forms.floats && width.is_multiple_of(CHUNK) && columns.order.is_empty();
        let copied = Forms { floats: forms.floats && !in_place, ..forms };
        let row = |row| &x[row * width..][..width];
        let inputs = self.gather(x.len() / width, columns, row, copied, simd, threads);
        if in_place { Inputs { floats: x.as_chunks().0, ..inputs } } else { inputs }
    }

    /// Prepares so many rows of values, from wherever they are.
    pub(super) fn gather<'x>(
        &mut self,
        rows: usize,
        columns: Columns<'_>,
        row: impl Fn(usize) -> &'x [f32] + Sync,
        forms: Forms,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Inputs<'_> {
        let Columns { count: width, order } = columns;
        let chunks = width.div_ceil(CHUNK);
        let task_rows = (TASK_VALUES / width).max(1);
        let mut inputs = Inputs { blocks: &[], floats: &[], order: None };
        let Self { blocks, padded } = self;
        let is_copied = forms.floats || !order.is_empty();
        let padded = &mut padded[..if is_copied { rows * chunks } else { 0 }];
        if is_copied {
            threads.for_each_chunk(padded, task_rows * chunks, |task, padded| {
                for (i, padded) in padded.chunks_exact_mut(chunks).enumerate() {
                    let (values, rest) = padded.as_flattened_mut().split_at_mut(width);
                    let from = row(task * task_rows + i);
                    if order.is_empty() {
                        values.copy_from_slice(from);
                    } else {
                        values.iter_mut().zip(order).for_each(|(value, &column)| *value = from[column as usize]);
                    }
                    rest.fill(0.0);
                }
            });
        }
        let padded = &*padded;
        if forms.floats {
            inputs.floats = padded;
        }
        if forms.blocks {
            let blocks = &mut blocks[..rows * chunks];
            threads.for_each_chunk(blocks, task_rows * chunks, |task, blocks| {
                for (i, blocks) in blocks.chunks_exact_mut(chunks).enumerate() {
                    let index = task * task_rows + i;
                    let x = match padded.get(index * chunks..(index + 1) * chunks) {
                        Some(padded) => &padded.as_flattened()[..width],
                        None => row(index),
                    };
                    let quantise = Quantise { x, blocks };
                    simd.dispatch(quantise).expect("the level was checked when the linear was loaded");
                }
            });
            inputs.blocks = blocks;
        }
        inputs
    }
}

/// Which forms of its input a linear's kernels read.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Forms {
    pub(super) blocks: bool,
    pub(super) floats: bool,
}

impl Forms {
    /// These and others.
    pub(super) fn or(self, other: Self) -> Self {
        Self { blocks: self.blocks || other.blocks, floats: self.floats || other.floats }
    }
}

/// Quantises one row.
struct Quantise<'a> {
    x: &'a [f32],
    blocks: &'a mut [Block],
}

impl WithSimd for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (whole, tail) = self.x.as_chunks::<CHUNK>();
        let (blocks, last) = self.blocks.split_at_mut(whole.len());
        for (block, x) in blocks.iter_mut().zip(whole) {
            quantise(x, block);
        }
        if let Some(block) = last.first_mut() {
            let mut x = [0.0; CHUNK];
            x[..tail.len()].copy_from_slice(tail);
            quantise(&x, block);
        }
    }
}

/// Added to a float below 2^22 in magnitude, this leaves the float rounded to the nearest integer (ties to even) in the low
/// bits of the sum.
const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23

/// Codes are x · (127 / max|x|), rounded to the nearest, ties to even. An input that is infinite or NaN makes the scale so,
/// and with it every output that depends on it.
#[inline(always)]
fn quantise(x: &[f32; CHUNK], block: &mut Block) {
    // Bit patterns of magnitudes order like the magnitudes, infinity and NaN last.
    let mut max = 0;
    for &value in x {
        max = max.max(value.to_bits() & 0x7fff_ffff);
    }
    let max = f32::from_bits(max);
    if max < 1e-30 {
        // The reciprocal might overflow; such inputs are zeros in all but name.
        *block = Block::zeroed();
        return;
    }
    block.scale = max / 127.0;
    let inverse = 127.0 / max;
    let mut codes = [0i32; CHUNK];
    for (code, &value) in codes.iter_mut().zip(x) {
        *code = (value * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
    }
    for (half, codes) in codes.as_chunks::<{ CHUNK / 2 }>().0.iter().enumerate() {
        let mut sum = 0;
        for &code in codes {
            sum += code as i8 as i32;
        }
        block.minus_sums[half] = -sum as i16;
    }
    for (to, &code) in block.codes.iter_mut().zip(&codes) {
        *to = code as i8;
    }
}
