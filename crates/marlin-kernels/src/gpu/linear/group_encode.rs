//! Records linears of groups.

use super::LinearKernels;
use super::encode::{Epilogue, LinearEncoder, with_shape};
use super::group::{GpuLinearGroup, GroupPart};
use super::layout::UNIT;
use super::pack::{Prepared, RowsToPack, Source, VECTOR, rows};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::experts::{GpuRoutes, select_parameters};
use crate::gpu::recorder::Recorder;
use crate::gpu::{GpuBackend, GpuBuffer};
use crate::{Activation, Input, KernelError};

/// Which rows a group's linears multiply, and where their products go.
struct Run<'a> {
    /// Of all linears, or of each head.
    m: usize,
    eps: f32,
    /// Rows of the output that share one of the input; 0 if each has its own.
    slots: usize,
    /// Heads that rows are divided among; 0 if tiles say which rows a linear has.
    heads: usize,
    /// How far apart rows of the input are in single precision.
    input_stride: usize,
    /// Columns of the output from one head to the next.
    head_width: usize,
    /// Columns of the output.
    width: usize,
    /// Heads are packed, too, by kernels that may do so.
    packs_output: bool,
    rows: RowsOf<'a>,
    /// Where experts are chosen.
    routing: Option<[u32; 9]>,
}

/// What says which rows a matrix has.
#[derive(Clone, Copy)]
enum RowsOf<'a> {
    /// Tiles, and the pairs that they are of.
    Tiles([&'a Storage; 2]),
    /// Logits of one token and their corrections, and where its experts and their weights go.
    Logits([&'a Storage; 4]),
}

impl<'a> RowsOf<'a> {
    fn of_routes(routes: &'a GpuRoutes, prepared: Prepared) -> Self {
        match &routes.correction {
            Some(correction) if prepared == Prepared::Unpacked => {
                Self::Logits([&routes.logits, &correction.values, &routes.experts, &routes.weights])
            }
            _ => Self::Tiles([&routes.tiles, &routes.sorted]),
        }
    }

    fn buffers(self) -> impl Iterator<Item = &'a Storage> + Clone {
        let [first, last] = match self {
            Self::Tiles([tiles, pairs]) => [[Some(tiles), Some(pairs)], [None; 2]],
            Self::Logits([a, b, c, d]) => [[Some(a), Some(b)], [Some(c), Some(d)]],
        };
        first.into_iter().chain(last).flatten()
    }
}

impl Run<'_> {
    fn parameters(&self, part: &GroupPart, epilogue: Epilogue, first: usize) -> [u32; 23] {
        let &Self { m, eps, slots, heads, input_stride, head_width, width, packs_output, .. } = self;
        let of_linear = [m as u32, first as u32, width as u32, epilogue as u32, eps.to_bits()];
        let of_heads = [heads as u32, input_stride as u32, head_width as u32, u32::from(packs_output)];
        let mut rest = [0; 20];
        rest[..5].copy_from_slice(&of_linear);
        rest[5..7].copy_from_slice(&[u32::from(part.is_whole), slots as u32]);
        rest[7..11].copy_from_slice(&of_heads);
        rest[11..].copy_from_slice(&self.routing.unwrap_or_default());
        with_shape(&part.shape, &rest)
    }

    /// What kernels read of it.
    fn buffers<'b>(&self, part: &'b GroupPart) -> impl Iterator<Item = &'b Storage> + Clone
    where
        Self: 'b,
    {
        self.rows.buffers().chain([&part.places])
    }
}

impl LinearEncoder {
    /// As [`Encoder::expert_gated`](crate::Encoder::expert_gated).
    pub(in crate::gpu) fn expert_gated(
        &mut self,
        recorder: &mut Recorder,
        x: Input<'_, GpuBackend>,
        routes: &mut GpuRoutes,
        gate_up: &GpuLinearGroup,
        activation: Activation,
        out: &mut GpuBuffer,
    ) {
        assert!(matches!(gate_up.rows[..], [gate, up] if gate == up), "a gate and as large a matrix");
        routes.check(gate_up.count, rows(&x).rows);
        assert_eq!(rows(&x).width, gate_up.cols, "an input of the linears' columns");
        let half = gate_up.outputs() / 2;
        assert!(half <= routes.width, "routes have room for rows as wide");
        out.output(routes.pairs(), half);
        if out.rows == 0 {
            return;
        }
        let eps = match &x {
            Input::Rows(_) => None,
            Input::Normed { x, weight, eps } => {
                assert_eq!(weight.values.len(), x.width, "a weight for each value of a row");
                Some(*eps)
            }
        };
        let normalises = |part: &GroupPart| part.kernels.linear.few_rows.normalises(routes.tokens);
        let prepared = if eps.is_some() && gate_up.parts.iter().all(normalises) {
            Prepared::Unpacked
        } else {
            routes.choose(recorder);
            self.packer.prepare(recorder, &x, false)
        };
        let run = Run {
            m: out.rows,
            eps: eps.unwrap_or(0.0),
            slots: routes.routing.slots(),
            heads: 0,
            input_stride: gate_up.cols,
            head_width: 0,
            width: half,
            packs_output: false,
            rows: RowsOf::of_routes(routes, prepared),
            routing: routes.correction.as_ref().map(|correction| select_parameters(&routes.routing, correction)),
        };
        // Those that choose experts are one more, which writes them down.
        let tiles = routes.tile_count() + usize::from(prepared == Prepared::Unpacked);
        let packs = |part: &GroupPart| part.kernels.linear.few_rows.packs_output(routes.height);
        for part in &gate_up.parts {
            let (epilogue, first) = match part.matrix {
                _ if part.kernels.is_gated => (Epilogue::gate(activation), part.first),
                0 => (Epilogue::Store, part.first),
                _ => (Epilogue::gate(activation), part.first - half),
            };
            let (kernel, workgroups) = part.kernels.of_height(routes.height, prepared);
            let input = self.packer.input(prepared, &x);
            let packed = routes.packed.iter().flat_map(|packed| packed.buffers()).filter(|_| packs(part));
            let buffers = part.buffers.iter().chain(input).chain([&out.storage]).chain(run.buffers(part)).chain(packed);
            recorder.dispatch(kernel, buffers, &run.parameters(part, epilogue, first), [workgroups, tiles, 1]);
        }
        // If not before, they are chosen now.
        routes.is_chosen = true;
        let is_packed = gate_up.parts.iter().all(packs);
        self.packed_experts =
            routes.packed.as_ref().filter(|_| is_packed).map(|packed| (packed.id(), Source::of(&Input::Rows(out))));
    }

    /// As [`Encoder::expert_combine`](crate::Encoder::expert_combine).
    pub(in crate::gpu) fn expert_combine(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        x: &GpuBuffer,
        routes: &mut GpuRoutes,
        down: &GpuLinearGroup,
        out: &mut GpuBuffer,
    ) {
        assert_eq!(down.rows.len(), 1, "linears of one matrix");
        routes.check(down.count, out.rows);
        assert_eq!((x.rows, x.width), (routes.pairs(), down.cols), "a row of each token for each of its experts");
        assert_eq!(out.width, down.outputs(), "the residual stream has a value for each output");
        assert!(x.width.max(out.width) <= routes.width, "routes have room for rows as wide");
        routes.choose(recorder);
        out.written();
        if out.rows == 0 {
            return;
        }
        let prepared = self.prepare_experts(recorder, x, routes);
        let packed = routes.packed.iter().flat_map(|packed| packed.buffers());
        let exact = routes.packed.is_none().then_some(&x.storage);
        let input = exact.into_iter().chain(packed);
        let slots = routes.routing.slots();
        // In batch-invariant mode one token is summed up as many are.
        if out.rows == 1 && !gpu.batch_invariant {
            for part in &down.parts {
                let Some((kernel, workgroups)) = &part.kernels.sum else { continue };
                let chosen = [&out.storage, &routes.experts, &routes.weights, &part.places];
                let buffers = part.buffers.iter().chain(input.clone()).chain(chosen);
                let parameters = [part.first as u32, slots as u32, u32::from(part.is_whole)];
                recorder.dispatch(kernel, buffers, &with_shape::<6>(&part.shape, &parameters), [*workgroups, 1, 1]);
            }
            return;
        }
        let run = Run {
            m: x.rows,
            eps: 0.0,
            slots: 0,
            heads: 0,
            input_stride: down.cols,
            head_width: 0,
            width: out.width,
            packs_output: false,
            rows: RowsOf::Tiles([&routes.tiles, &routes.sorted]),
            routing: None,
        };
        for part in &down.parts {
            let (kernel, workgroups) = part.kernels.of_height(routes.height, prepared);
            let buffers = part.buffers.iter().chain(input.clone()).chain([&routes.products]).chain(run.buffers(part));
            let parameters = run.parameters(part, Epilogue::Store, part.first);
            recorder.dispatch(kernel, buffers, &parameters, [workgroups, routes.tile_count(), 1]);
        }
        let buffers = [&routes.products, &routes.places, &routes.weights, &out.storage];
        let parameters = [out.width as u32, slots as u32];
        recorder.dispatch(&routes.combine, buffers, &parameters, [out.width.div_ceil(256), out.rows, 1]);
    }

    /// Packs what experts multiply, unless that was done where it was computed.
    fn prepare_experts(&mut self, recorder: &mut Recorder, x: &GpuBuffer, routes: &GpuRoutes) -> Prepared {
        let Some(packed) = &routes.packed else {
            return Prepared::Exact;
        };
        let source = Some((packed.id(), Source::of(&Input::Rows(x))));
        if self.packed_experts != source {
            let rows = RowsToPack {
                x: &x.storage,
                rows: routes.tokens,
                stretches: routes.routing.slots(),
                width: x.width,
                stride: x.width,
                by_rows: self.packer.packs_rows(routes.tokens),
            };
            self.packer.pack_rows_of(recorder, &rows, packed);
            self.packed_experts = source;
        }
        Prepared::Packed
    }

    /// As [`Encoder::head_linear`](crate::Encoder::head_linear).
    pub(in crate::gpu) fn head_linear(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        x: &GpuBuffer,
        heads: &GpuLinearGroup,
        out: &mut GpuBuffer,
    ) -> Result<(), KernelError> {
        let &GpuLinearGroup { ref parts, cols, ref rows, count } = heads;
        let (from, to) = (x.width / count, out.width / count);
        assert!(x.width.is_multiple_of(count) && out.width.is_multiple_of(count), "stretches of equal width");
        assert!(
            matches!(rows[..], [rows] if rows <= to) && cols <= from,
            "linears of one matrix that fit into stretches"
        );
        out.output(x.rows, out.width);
        if x.rows == 0 {
            return Ok(());
        }
        let is_direct = |part: &GroupPart| part.kernels.linear.few_rows.choose_direct(x.rows).is_some();
        let prepared = if from.is_multiple_of(VECTOR) && parts.iter().all(is_direct) {
            Prepared::Unpacked
        } else {
            let by_rows = self.packer.packs_rows(x.rows);
            let rows = RowsToPack { x: &x.storage, rows: x.rows, stretches: count, width: cols, stride: from, by_rows };
            self.packer.prepare_heads(gpu, recorder, &rows)?
        };
        // Heads that are whole units, without gaps, make whole rows of them.
        let packs_output = prepared == Prepared::Unpacked
            && to == heads.outputs()
            && to.is_multiple_of(UNIT)
            && parts.iter().all(|part| part.first.is_multiple_of(UNIT))
            && self.packer.has_room_for_output(out);
        let input = Input::Rows(x);
        for part in parts {
            let run = Run {
                m: x.rows,
                eps: 0.0,
                slots: 0,
                heads: count,
                input_stride: from,
                head_width: to,
                width: out.width,
                packs_output,
                rows: RowsOf::Tiles([&part.places; 2]),
                routing: None,
            };
            let LinearKernels { few_rows, many_rows } = &part.kernels.linear;
            let of_few = match prepared {
                Prepared::Unpacked => few_rows.choose_direct(x.rows),
                _ => few_rows.choose(x.rows, prepared),
            };
            let (kernel, workgroups) = match of_few {
                Some((kernel, [of_outputs, of_rows, _])) => (kernel, [of_outputs, of_rows, count]),
                None => many_rows.choose_for_each(x.rows, count),
            };
            let inputs = self.packer.input(prepared, &input);
            let output = self.packer.output().filter(|_| prepared == Prepared::Unpacked);
            let buffers =
                part.buffers.iter().chain(inputs).chain([&out.storage]).chain(run.buffers(part)).chain(output);
            recorder.dispatch(kernel, buffers, &run.parameters(part, Epilogue::Store, part.first), workgroups);
        }
        if packs_output {
            self.packer.output_is_packed(out);
        }
        Ok(())
    }
}
