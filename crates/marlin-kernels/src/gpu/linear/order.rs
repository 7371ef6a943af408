//! Linears whose columns are in another order than their input's (GPTQ's act-order): the input is put into theirs beforehand.

use std::borrow::Cow;
use std::sync::Arc;

use marlin_format::{ColumnOrder, PackedMatrix, Scheme};

use super::format::DeviceFormat;
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::recorder::Recorder;
use crate::gpu::upload::Upload;
use crate::gpu::{GpuBackend, GpuBuffer};
use crate::{Input, KernelError, LinearPart};

/// The order of a linear's columns.
#[derive(Debug)]
pub(super) struct Columns {
    /// The column of the input at each place, u32 `[K]`.
    order: Storage,
    /// The place of each column of the input.
    inverse: Storage,
    /// Of rows as they are, and of their norms.
    kernels: [Arc<Pipeline>; 2],
}

impl Columns {
    /// Puts matrices of a linear into one order of columns, in which they need no index; `None` if they have none. A matrix with other groups
    /// than that order has becomes f32.
    pub(super) fn of<'p>(
        gpu: &Gpu,
        parts: &'p [LinearPart<'p>],
    ) -> Result<Option<(Self, Vec<LinearPart<'p>>)>, KernelError> {
        let native = |part: &&LinearPart<'_>| !DeviceFormat::of(&part.weight.scheme, gpu.arithmetic).is_converted;
        let Some(order) = parts.iter().filter(native).find_map(|part| part.weight.group_order()) else {
            return Ok(None);
        };
        let mut inverse = vec![0; order.len()];
        order.iter().zip(0u32..).for_each(|(&column, place)| inverse[column as usize] = place);
        let columns = Self {
            order: Upload::all(gpu, "the order of columns", &order)?,
            inverse: Upload::all(gpu, "the order of columns", &inverse)?,
            kernels: Self::compile(gpu)?,
        };
        let put =
            |part: &LinearPart<'_>| Ok(LinearPart { weight: in_order(&part.weight, &order)?, bias: part.bias.clone() });
        Ok(Some((columns, parts.iter().map(put).collect::<Result<_, KernelError>>()?)))
    }

    /// The kernels that put rows into another order.
    pub(super) fn compile(gpu: &Gpu) -> Result<[Arc<Pipeline>; 2], KernelError> {
        Ok([gpu.pipeline(&order_columns(false))?, gpu.pipeline(&order_columns(true))?])
    }

    /// The same in memory of its own.
    pub(super) fn duplicate(&self, gpu: &Gpu) -> Result<Self, KernelError> {
        let (order, inverse) = (gpu.duplicate(&self.order)?, gpu.duplicate(&self.inverse)?);
        Ok(Self { order, inverse, kernels: self.kernels.clone() })
    }

    /// Bytes of device memory for so many columns.
    pub(super) fn bytes(scheme: &Scheme, cols: usize) -> usize {
        if scheme.order == ColumnOrder::GroupIndex { cols.saturating_mul(2 * size_of::<u32>()) } else { 0 }
    }

    /// Writes rows of an input to `out` in this order, normalised if they must be.
    pub(super) fn put_in_order(&self, recorder: &mut Recorder, x: &Input<'_, GpuBackend>, out: &mut GpuBuffer) {
        match x {
            Input::Rows(x) => {
                out.output(x.rows, x.width);
                let parameters = [x.width as u32, 0, x.width as u32];
                recorder.dispatch(
                    &self.kernels[0],
                    [&x.storage, &self.order, &out.storage],
                    &parameters,
                    workgroups(x.rows, x.width),
                );
            }
            Input::Normed { x, weight, eps } => {
                let width = weight.values.len();
                out.output(x.rows, width);
                let parameters = [width as u32, eps.to_bits(), x.width as u32];
                let buffers = [&x.storage, &weight.storage, &self.order, &out.storage];
                recorder.dispatch(&self.kernels[1], buffers, &parameters, workgroups(x.rows, width));
            }
        }
    }

    /// Writes rows in this order to `out` in the order of inputs.
    pub(super) fn put_back(&self, recorder: &mut Recorder, rows: &GpuBuffer, out: &mut GpuBuffer) {
        out.output(rows.rows, rows.width);
        let parameters = [rows.width as u32, 0, rows.width as u32];
        let buffers = [&rows.storage, &self.inverse, &out.storage];
        recorder.dispatch(&self.kernels[0], buffers, &parameters, workgroups(rows.rows, rows.width));
    }
}

/// Columns that a workgroup puts in order, as in `order_columns.wgsl`.
const SIZE: usize = 256;

fn workgroups(rows: usize, width: usize) -> [usize; 3] {
    [rows, width.div_ceil(SIZE), 1]
}

/// A matrix with columns in this order; in f32 if its groups do not allow it.
fn in_order(matrix: &PackedMatrix<'_>, order: &[u32]) -> Result<PackedMatrix<'static>, KernelError> {
    let has_order = matrix.group_order().is_some_and(|own| own == order);
    let matrix =
        if has_order || matrix.scheme.is_dense() { Cow::Borrowed(matrix) } else { Cow::Owned(matrix.to_f32()?) };
    Ok(matrix.with_columns(order)?)
}

fn order_columns(is_normed: bool) -> Kernel {
    let mut bindings = vec![Binding::read("x", "f32")];
    let mut prelude = format!("const NORMED = {is_normed};\n");
    if is_normed {
        bindings.push(Binding::read("weight", "f32"));
        prelude += "fn norm_weight(column: u32) -> f32 { return weight[column]; }\n";
    } else {
        prelude += "fn norm_weight(column: u32) -> f32 { return 1.0; }\n";
    }
    bindings.extend([Binding::read("columns", "u32"), Binding::write("out", "f32")]);
    Kernel {
        name: "order_columns",
        prelude,
        bindings,
        files: vec![
            include_str!("../shaders/reduce.wgsl"),
            include_str!("../shaders/norm.wgsl"),
            include_str!("../shaders/order_columns.wgsl"),
        ],
    }
}
