//! Rows of attention and what prepares it: rotary embedding, QK norm, the KV cache.

use std::ops::Range;

use crate::{AttentionShape, Backend, Encoder, KvLayer, KvLayout, KvType, QkNorm, RopeLayout, StepLimits, Values};

use super::support::{Case, Moves, Pages, Ragged, Rng, limits, poisoned, read, read_blocks, upload};
use super::{Device, Table};
use crate::reference::ReferenceBackend;

/// Ragged batches: what each sequence has in the cache, and what the step brings.
pub(super) const BATCHES: [&[Range<usize>]; 5] = [
    // The first token of a sequence.
    &[0..1, 0..0],
    // Decode on both sides of a block border.
    &[31..32, 32..33],
    // A chunk over several tiles and borders.
    &[5..75, 3..4],
    // Decode, prefill, verification of a draft, and a sequence that rests.
    &[100..101, 0..20, 47..52, 16..16, 15..17],
    // Decode and verification over several splits of a GPU, on both sides of their borders.
    &[300..301, 127..130, 7..8, 383..384],
];

/// Ragged batches of which some sequences bring many tokens.
pub(super) const TILED_BATCHES: [&[Range<usize>]; 3] = [
    // Less than a tile, a whole one, and more; decode between them.
    &[0..16, 3..4, 5..69, 40..41, 0..70],
    // A chunk far from the beginning, and a sequence that rests.
    &[250..290, 0..0],
    // Long enough for several tiles of queries and of keys; and one token.
    &[0..200, 9..10],
];

/// Widths of heads: those of models, and one that is no power of two of anything.
pub const HEAD_DIMS: [usize; 7] = [24, 64, 80, 96, 128, 192, 256];

pub(crate) fn add_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    // So long, for so many heads, that a GPU's splits are larger than the least.
    table.add(device, "attention/long".into(), |device| {
        let base = Attention::new(shape(32, 32, 64, None), KvType::F16, 16, &[600..601, 3..4]);
        device.check(&Attention { context: 1024, ..base }, bound(KvType::F16), "splits of 128 positions")
    });
    for kv_type in KvType::ALL {
        let suffix = format!("kv-{}", kv_type.name());
        let (dims, windows) = match kv_type {
            KvType::F16 => (&HEAD_DIMS[..], &[1, 7, 16, 33, 129, 200][..]),
            _ => (&[24, 80, 128][..], &[33, 129][..]),
        };
        let heads = [(2, 2), (4, 2), (4, 1), (9, 1)].map(|heads| (heads, 64));
        let dims = dims.iter().map(|&dim| ((14, 2), dim));
        for ((heads, kv_heads), dim) in heads.into_iter().chain(dims) {
            let name = format!("attention/heads={heads}:{kv_heads},dim={dim},{suffix}");
            let shape = shape(heads, kv_heads, dim, None);
            table.add(device, name, move |device| attention(device, shape, kv_type));
        }
        for &window in windows {
            let shape = shape(4, 2, 64, Some(window));
            table.add(device, format!("attention/window={window},{suffix}"), move |device| {
                attention(device, shape, kv_type)
            });
        }
        table.add(device, format!("attention/sinks,{suffix}"), move |device| {
            let cases = BATCHES
                .map(|batch| Attention { sinks: true, ..Attention::new(shape(4, 2, 64, None), kv_type, 16, batch) });
            cases.iter().try_for_each(|case| device.check(case, bound(kv_type), &format!("positions {:?}", case.batch)))
        });
        for rotary in [64, 32, 2] {
            for norm in [false, true] {
                let norm_name = if norm { "-qk-norm" } else { "" };
                for (layout_name, layout) in [("", RopeLayout::HalfSplit), (",interleaved", RopeLayout::Interleaved)] {
                    let name = format!("rope-store-kv{norm_name}/rotary={rotary}{layout_name},{suffix}");
                    table.add(device, name, move |device| rope_store_kv(device, rotary, layout, norm, kv_type));
                }
            }
        }
        table.add(device, format!("copy-kv-blocks/{suffix}"), move |device| {
            move_blocks(device, kv_type, Moves::OnDevice)
        });
        table.add(device, format!("read-write-kv-blocks/{suffix}"), move |device| {
            move_blocks(device, kv_type, Moves::ThroughHost)?;
            move_blocks(device, kv_type, Moves::FromReference)
        });
        // One kernel does it all for the usual type.
        let shapes = [(9, 1, 80), (4, 2, 64), (2, 2, 256), (14, 2, 128)];
        for &(heads, kv_heads, dim) in &shapes[..if kv_type == KvType::F16 { shapes.len() } else { 1 }] {
            table.add(device, format!("rope-attention/heads={heads}:{kv_heads},dim={dim},{suffix}"), move |device| {
                decode(device, shape(heads, kv_heads, dim, None), kv_type)
            });
        }
    }
}

/// Rows of attention in half precision, for steps that bring many tokens of a sequence; `dims` are widths of heads, of which the first
/// gets most of the rows.
pub(super) fn add_tiled_rows<B: Backend>(table: &mut Table, device: &Device<B>, dims: &[usize]) {
    let base = shape(4, 2, dims[0], None);
    // Queries, keys, values and weights are rounded by up to 2^-11 of themselves.
    let rounding = 1e-6;
    table.add(device, "attention-tiled/sinks".into(), move |device| {
        let cases =
            TILED_BATCHES.map(|batch| Attention { sinks: true, ..Attention::new(base, KvType::F16, 16, batch) });
        cases.iter().try_for_each(|case| device.check(case, rounding, &format!("positions {:?}", case.batch)))
    });
    let wide = device.with_heavy_rows(true);
    // So many tokens that a GPU may give each of its workgroups more.
    table.add(&wide, "attention-tiled/many".into(), move |device| {
        let many = Attention::new(AttentionShape { heads: 64, ..base }, KvType::F16, 16, &[0..505, 3..4]);
        device.check(&many, rounding, "505 tokens")
    });
    let mut add =
        |device: &Device<B>, name: String, shape: AttentionShape, kv_types: &'static [KvType], rounding: f64| {
            table.add(device, format!("attention-tiled/{name}"), move |device| {
                for (&kv_type, batch) in kv_types.iter().flat_map(|kv_type| TILED_BATCHES.map(|batch| (kv_type, batch)))
                {
                    let case = Attention::new(shape, kv_type, 16, batch);
                    let bound = bound(kv_type).max(rounding);
                    device.check(&case, bound, &format!("positions {batch:?}, {}", kv_type.name()))?;
                }
                Ok(())
            });
        };
    let codes = &[KvType::Fp8, KvType::Int8, KvType::Fp4];
    for (heads, kv_heads) in [(2, 2), (4, 2), (9, 1)] {
        let shape = AttentionShape { heads, kv_heads, ..base };
        add(device, format!("heads={heads}:{kv_heads},dim={}", dims[0]), shape, &[KvType::F16], rounding);
    }
    for &dim in &dims[1..] {
        add(&wide, format!("heads=4:2,dim={dim}"), shape(4, 2, dim, None), &[KvType::F16], rounding);
    }
    for window in [1, 16, 33, 200] {
        add(
            device,
            format!("window={window}"),
            AttentionShape { window: Some(window), ..base },
            &[KvType::F16],
            rounding,
        );
    }
    add(device, "quantised-kv".into(), base, codes, rounding);
    // Scores of up to ± 50, so that the largest one grows from tile to tile; the error of one changes its weight by as much.
    add(device, "sharp".into(), AttentionShape { scale: 12.0 * base.scale, ..base }, &[KvType::F16], 1e-3);
}

/// Rows of heads that are no whole units of a GPU.
pub(super) fn add_odd_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    for dim in [2, 6, 20] {
        let shape = shape(2, 1, dim, None);
        for kv_type in KvType::ALL {
            let suffix = format!("kv-{}", kv_type.name());
            table.add(device, format!("attention/heads=2:1,dim={dim},{suffix}"), move |device| {
                attention(device, shape, kv_type)
            });
        }
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        window,
        values: Values::Cached,
        rope: RopeLayout::HalfSplit,
    }
}

/// The error that rounding of keys and values to the other neighbour may cause now and then: the further apart neighbours are, the
/// larger it is.
pub(super) fn bound(kv_type: KvType) -> f64 {
    match kv_type {
        KvType::F32 => 1e-11,
        KvType::F16 => 1e-8,
        KvType::Fp8 | KvType::Int8 => 1e-5,
        KvType::Fp4 => 1e-4,
    }
}

fn attention<B: Backend>(device: &Device<B>, shape: AttentionShape, kv_type: KvType) -> Result<(), String> {
    for batch in BATCHES {
        for block_tokens in [16, 5] {
            let case = Attention::new(shape, kv_type, block_tokens, batch);
            device.check(&case, bound(kv_type), &format!("positions {batch:?}, blocks of {block_tokens}"))?;
        }
    }
    Ok(())
}

fn rope_store_kv<B: Backend>(
    device: &Device<B>,
    rotary: usize,
    rope: RopeLayout,
    norm: bool,
    kv_type: KvType,
) -> Result<(), String> {
    for (window, reads) in [(None, Reads::Queries), (Some(1), Reads::Attention), (None, Reads::Attention)] {
        let shape = AttentionShape { rope, ..shape(4, 2, 64, window) };
        let base = Attention::new(shape, kv_type, 16, BATCHES[3]);
        let case = Attention { rotary, norm, reads, ..base };
        device.check(&case, bound(kv_type), &format!("{reads:?}, window {window:?}"))?;
    }
    Ok(())
}

fn move_blocks<B: Backend>(device: &Device<B>, kv_type: KvType, moves: Moves) -> Result<(), String> {
    let base = Attention::new(shape(4, 2, 64, None), kv_type, 16, BATCHES[3]);
    let case = Attention { moves: Some(moves), ..base };
    device.check(&case, bound(kv_type), &format!("a sequence moved to other blocks: {moves:?}"))?;
    // What a device computed itself is the same there, to the bit.
    let bits = |case: &Attention<'_>| case.run(device.backend.as_ref()).iter().map(|y| y.to_bits()).collect::<Vec<_>>();
    if moves != Moves::FromReference && bits(&case) != bits(&Attention { moves: None, ..case }) {
        return Err(format!("a sequence moved to other blocks, {moves:?}, gives other bits"));
    }
    Ok(())
}

/// What a case reads back.
fn decode<B: Backend>(device: &Device<B>, shape: AttentionShape, kv_type: KvType) -> Result<(), String> {
    for batch in DECODES {
        for (rotary, rope) in [
            (shape.head_dim, RopeLayout::HalfSplit),
            (32, RopeLayout::HalfSplit),
            (48, RopeLayout::Interleaved),
            (24, RopeLayout::HalfSplit),
        ] {
            for is_normed in [false, true] {
                let window = is_normed.then_some(33);
                let base = Attention::new(AttentionShape { rope, window, ..shape }, kv_type, 16, batch);
                let case = Decode(Attention { rotary, norm: is_normed, sinks: is_normed, ..base });
                let name = format!("positions {batch:?}, rotary {rotary} {rope:?}, norm {is_normed}");
                // The other neighbour of a key is that of all heads that share it.
                device.check(&case, 10.0 * bound(kv_type), &name)?;
            }
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Reads {
    /// The prepared queries.
    Queries,
    /// What attention gives.
    Attention,
}

/// Fills the cache up to a batch, then runs the batch.
struct Attention<'a> {
    shape: AttentionShape,
    kv_type: KvType,
    block_tokens: usize,
    batch: &'a [Range<usize>],
    rotary: usize,
    norm: bool,
    sinks: bool,
    /// Tokens that a sequence may reach.
    context: usize,
    reads: Reads,
    /// Moves all blocks elsewhere between filling the cache and running the batch, and poisons the old ones.
    moves: Option<Moves>,
}

impl<'a> Attention<'a> {
    fn new(shape: AttentionShape, kv_type: KvType, block_tokens: usize, batch: &'a [Range<usize>]) -> Self {
        Self {
            shape,
            kv_type,
            block_tokens,
            batch,
            rotary: shape.head_dim,
            norm: false,
            sinks: false,
            context: 512,
            reads: Reads::Attention,
            moves: None,
        }
    }
}

impl Attention<'_> {
    fn layout(&self) -> KvLayout {
        let AttentionShape { kv_heads, head_dim, window, .. } = self.shape;
        let layer = KvLayer { heads: kv_heads, key_dim: head_dim, value_dim: head_dim, window };
        KvLayout { block_tokens: self.block_tokens, layers: vec![layer; LAYER + 1] }
    }
}

impl Case for Attention<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let mut rng = Rng(20);
        let lengths: Vec<usize> = self.batch.iter().map(|range| range.end).collect();
        let pages = Pages::new(self.block_tokens, &lengths, &mut rng);
        let mut layer = Layer::new(self, backend, 2 * pages.blocks, &mut rng);
        let width = layer.width;
        let batch = pages.step(self.batch);
        let mut out = poisoned(backend, batch.rows(), self.shape.heads * self.shape.head_dim);

        // All slots hold NaN, but for those that are written afterwards; so does scratch memory.
        let nan = |step: &Ragged| vec![f32::NAN; step.rows() * width];
        layer.store(&pages.all_slots(), &nan(&pages.all_slots()));
        let poison = layer.store(&batch, &nan(&batch));
        layer.encoder.attention(&poison, &self.shape, None, &layer.kv, LAYER, &mut out);

        let history: Vec<Range<usize>> = self.batch.iter().map(|range| 0..range.start).collect();
        let history = pages.step(&history);
        let past = rng.normals(history.rows() * width);
        layer.store(&history, &past);
        let batch = if let Some(moves) = self.moves {
            let (moved, pairs) = pages.moved();
            let (from, to): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
            let (layout, kv_type) = (self.layout(), self.kv_type);
            let bytes = match moves {
                Moves::OnDevice => {
                    layer.encoder.copy_kv_blocks(&mut layer.kv, &pairs);
                    None
                }
                Moves::ThroughHost => Some(read_blocks::<B>(&mut layer.encoder, &layer.kv, &layout, kv_type, &from)),
                Moves::FromReference => {
                    let mut oracle = Layer::new(self, &ReferenceBackend, 2 * pages.blocks, &mut Rng(20));
                    oracle.store(&history, &past);
                    let Layer { encoder, kv, .. } = &mut oracle;
                    Some(read_blocks::<ReferenceBackend>(encoder, kv, &layout, kv_type, &from))
                }
            };
            // Before blocks are written elsewhere: what is read must not depend on them any more.
            layer.store(&pages.all_slots(), &nan(&pages.all_slots()));
            if let Some(bytes) = bytes {
                layer.encoder.write_kv_blocks(&mut layer.kv, &to, &bytes).expect("blocks that can be written");
            }
            moved.step(self.batch)
        } else {
            batch
        };
        let qkv = layer.store(&batch, &rng.normals(batch.rows() * width));
        match self.reads {
            Reads::Queries => {
                let qkv = read::<B>(&mut layer.encoder, &qkv, batch.rows() * width);
                let queries = self.shape.heads * self.shape.head_dim;
                qkv.chunks_exact(width).flat_map(|row| row[..queries].to_vec()).collect()
            }
            Reads::Attention => {
                layer.encoder.attention(&qkv, &self.shape, layer.sinks.as_ref(), &layer.kv, LAYER, &mut out);
                let values = batch.rows() * self.shape.heads * self.shape.head_dim;
                read::<B>(&mut layer.encoder, &out, values)
            }
        }
    }
}

/// Sequences that bring one token each, which attention may prepare on the way: what it gives for them and for the tokens after them, which see what was
/// cached.
struct Decode<'a>(Attention<'a>);

/// Positions of those tokens.
const DECODES: [&[Range<usize>]; 3] = [&[0..1, 0..0], &[40..41, 7..7], &[31..32, 32..33, 300..301, 64..65]];

impl Case for Decode<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let Self(case) = self;
        let mut rng = Rng(21);
        let lengths: Vec<usize> = case.batch.iter().map(|range| range.end + 1).collect();
        let pages = Pages::new(case.block_tokens, &lengths, &mut rng);
        let mut layer = Layer::new(case, backend, pages.blocks, &mut rng);
        let width = layer.width;
        layer.store(&pages.all_slots(), &vec![f32::NAN; pages.all_slots().rows() * width]);
        let history: Vec<Range<usize>> = case.batch.iter().map(|range| 0..range.start).collect();
        let history = pages.step(&history);
        layer.store(&history, &rng.normals(history.rows() * width));

        let next: Vec<Range<usize>> = case.batch.iter().map(|range| range.end..range.end + 1).collect();
        let mut found = Vec::new();
        for step in [pages.step(case.batch), pages.step(&next)] {
            let (mut qkv, angles) = layer.begin(&step, &rng.normals(step.rows() * width));
            let values = case.shape.heads * case.shape.head_dim;
            let mut out = poisoned(backend, step.rows(), values);
            let Layer { encoder, kv, shape, norm, sinks, .. } = &mut layer;
            let norm = norm.as_ref().map(|[q, k]| QkNorm { q, k, eps: 1e-6 });
            encoder.rope_attention(&mut qkv, shape, norm, &angles, sinks.as_ref(), kv, LAYER, &mut out);
            found.extend(read::<B>(encoder, &out, step.rows() * values));
        }
        found
    }
}

/// The cache's layer that tests use.
const LAYER: usize = 1;

/// What one layer of a decoder owns.
struct Layer<'a, B: Backend> {
    backend: &'a B,
    encoder: B::Encoder,
    kv: B::KvCache,
    shape: AttentionShape,
    norm: Option<[B::Vector; 2]>,
    sinks: Option<B::Vector>,
    inv_freq: B::Vector,
    rotary: usize,
    /// Of a row of queries, keys and values.
    width: usize,
}

impl<'a, B: Backend> Layer<'a, B> {
    fn new(case: &Attention<'_>, backend: &'a B, blocks: usize, rng: &mut Rng) -> Self {
        let AttentionShape { heads, kv_heads, head_dim, .. } = case.shape;
        let vector = |values: &[f32]| backend.load_vector(values).expect("a vector");
        let inv_freq: Vec<f32> = (0..case.rotary / 2).map(|i| 0.8f32.powi(i as i32)).collect();
        let width = (heads + 2 * kv_heads) * head_dim;
        Self {
            backend,
            encoder: backend.encoder(&StepLimits { context: case.context, ..limits(1024, width) }).expect("an encoder"),
            kv: backend.kv_cache(&case.layout(), case.kv_type, blocks).expect("a cache"),
            shape: case.shape,
            // Some of no consequence, some that take most of the weight.
            sinks: case.sinks.then(|| vector(&rng.normals(heads).iter().map(|x| 4.0 * x).collect::<Vec<_>>())),
            norm: case.norm.then(|| [vector(&rng.normals(head_dim)), vector(&rng.normals(head_dim))]),
            inv_freq: vector(&inv_freq),
            rotary: case.rotary,
            width,
        }
    }

    /// Begins a step; gives its rows `values`, and their angles.
    fn begin(&mut self, step: &Ragged, values: &[f32]) -> (B::Buffer, B::Buffer) {
        let mut angles = poisoned(self.backend, step.rows(), self.rotary);
        self.encoder.begin(&step.step());
        self.encoder.rope_angles(&self.inv_freq, 1.0, &mut angles);
        (upload(self.backend, self.width, values), angles)
    }

    /// Begins a step, prepares its rows `values` and stores their keys and values; gives the prepared rows.
    fn store(&mut self, step: &Ragged, values: &[f32]) -> B::Buffer {
        let (mut qkv, angles) = self.begin(step, values);
        let norm = self.norm.as_ref().map(|[q, k]| QkNorm { q, k, eps: 1e-6 });
        self.encoder.rope_store_kv(&mut qkv, &self.shape, norm, &angles, &mut self.kv, LAYER);
        qkv
    }
}
