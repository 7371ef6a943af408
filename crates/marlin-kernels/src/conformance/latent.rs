//! Rows of latent attention (MLA): what prepares it, its cache of one wide key a token, attention over that.

use std::ops::Range;

use crate::{
    AttentionShape, Backend, Encoder, KvLayer, KvLayout, KvType, LatentShape, LinearPart, RopeLayout, StepLimits,
    Values,
};
use marlin_format::Scheme;

use super::attention::{BATCHES, TILED_BATCHES, bound};
use super::matrices::random;
use super::support::{Case, Moves, Pages, Ragged, Rng, limits, poisoned, read, read_blocks, upload};
use super::{Device, Table};

/// Heads and widths: GLM-4.7-Flash, DeepSeek-V3 with fewer heads, a small model, and what is no power of two of anything.
const SHAPES: [LatentShape; 4] =
    [shape(20, 192, 64, 512), shape(5, 128, 64, 512), shape(8, 64, 64, 128), shape(3, 24, 8, 40)];
/// The one that meets every KV type.
const SMALL: LatentShape = SHAPES[2];

const fn shape(heads: usize, nope_dim: usize, rope_dim: usize, rank: usize) -> LatentShape {
    LatentShape { heads, nope_dim, rope_dim, rank, rope: RopeLayout::HalfSplit }
}

/// Widths of keys and of values in latent attention that kernels are listed for.
pub const LATENT_DIMS: [[usize; 2]; 3] = [[576, 512], [192, 128], [48, 40]];

pub(crate) fn add_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    for latent in SHAPES {
        for rope in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
            let latent = LatentShape { rope, ..latent };
            table.add(device, format!("latent-store-kv/{}", name(&latent)), move |device| {
                let case = Latent { reads: Reads::Queries, ..Latent::new(latent, KvType::F16, 16, BATCHES[3]) };
                device.check(&case, bound(KvType::F16), "queries")
            });
        }
        table.add(device, format!("latent-attention/{}", name(&latent)), move |device| {
            // The reference takes seconds for all batches of wide ones.
            let batches = if latent.rank > 128 { &BATCHES[4..] } else { &BATCHES };
            check(device, latent, KvType::F16, batches)
        });
    }
    for kv_type in KvType::ALL {
        table.add(device, format!("latent-attention/kv-{}", kv_type.name()), move |device| {
            check(device, SMALL, kv_type, &BATCHES)
        });
        for (name, moves) in [("copy", Moves::OnDevice), ("read-write", Moves::ThroughHost)] {
            table.add(device, format!("latent-{name}-kv-blocks/kv-{}", kv_type.name()), move |device| {
                let case = Latent { moves: Some(moves), ..Latent::new(SMALL, kv_type, 16, BATCHES[3]) };
                device.check(&case, bound(kv_type), "a sequence moved to other blocks")
            });
        }
    }
    table.add(device, "latent-attention/window=33".into(), |device| {
        let case = Latent { window: Some(33), ..Latent::new(SMALL, KvType::F16, 16, BATCHES[3]) };
        device.check(&case, bound(KvType::F16), "a window")
    });
    table.add(device, "latent-attention/long".into(), |device| {
        let case = Latent { context: 1024, ..Latent::new(SHAPES[0], KvType::F16, 16, &[600..601, 3..4]) };
        device.check(&case, bound(KvType::F16), "splits of many positions")
    });
}

/// Rows in half precision, for steps that bring many tokens of a sequence.
pub(super) fn add_tiled_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    // Queries, keys and weights are rounded by up to 2^-11 of themselves.
    let rounding = 1e-6;
    // Compilers take long for wide ones where matrices are emulated.
    let wide = device.with_heavy_rows(true);
    for latent in SHAPES {
        let device = if latent.rank > 40 { &wide } else { device };
        table.add(device, format!("latent-attention-tiled/{}", name(&latent)), move |device| {
            let batches = if latent.rank > 128 { &TILED_BATCHES[1..] } else { &TILED_BATCHES };
            for batch in batches {
                let case = Latent::new(latent, KvType::F16, 16, batch);
                device.check(&case, rounding, &format!("positions {batch:?}"))?;
            }
            Ok(())
        });
    }
    for window in [None, Some(200)] {
        let window_name = window.map_or(String::new(), |window| format!(",window={window}"));
        table.add(&wide, format!("latent-attention-tiled/splits{window_name}"), move |device| {
            let case = Latent { window, ..Latent::new(SMALL, KvType::F16, 16, BATCHES[4]) };
            device.check(&case, rounding, "several splits of few tokens")
        });
    }
    table.add(&wide, "latent-attention-tiled/quantised-kv".into(), move |device| {
        for kv_type in [KvType::Fp8, KvType::Int8, KvType::Fp4] {
            let case = Latent::new(SMALL, kv_type, 16, TILED_BATCHES[0]);
            device.check(&case, bound(kv_type).max(rounding), kv_type.name())?;
        }
        Ok(())
    });
}

fn name(latent: &LatentShape) -> String {
    let LatentShape { heads, nope_dim, rope_dim, rank, rope } = latent;
    let rope = if *rope == RopeLayout::Interleaved { ",interleaved" } else { "" };
    format!("heads={heads},dims={nope_dim}+{rope_dim},rank={rank}{rope}")
}

fn check<B: Backend>(
    device: &Device<B>,
    latent: LatentShape,
    kv_type: KvType,
    batches: &[&[Range<usize>]],
) -> Result<(), String> {
    for batch in batches {
        for block_tokens in [16, 5] {
            let case = Latent::new(latent, kv_type, block_tokens, batch);
            device.check(&case, bound(kv_type), &format!("positions {batch:?}, blocks of {block_tokens}"))?;
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
struct Latent<'a> {
    latent: LatentShape,
    window: Option<usize>,
    kv_type: KvType,
    block_tokens: usize,
    batch: &'a [Range<usize>],
    /// Tokens that a sequence may reach.
    context: usize,
    reads: Reads,
    /// Copies all blocks elsewhere between filling the cache and running the batch, and poisons the old ones.
    moves: Option<Moves>,
}

impl<'a> Latent<'a> {
    fn new(latent: LatentShape, kv_type: KvType, block_tokens: usize, batch: &'a [Range<usize>]) -> Self {
        Self { latent, window: None, kv_type, block_tokens, batch, context: 512, reads: Reads::Attention, moves: None }
    }

    fn attention(&self) -> AttentionShape {
        AttentionShape {
            heads: self.latent.heads,
            kv_heads: 1,
            head_dim: self.latent.key_dim(),
            values: Values::OfKeys(self.latent.rank),
            scale: ((self.latent.nope_dim + self.latent.rope_dim) as f32).powf(-0.5),
            window: self.window,
            rope: self.latent.rope,
        }
    }
}

impl Latent<'_> {
    fn layout(&self) -> KvLayout {
        let layer = KvLayer { heads: 1, key_dim: self.latent.key_dim(), value_dim: 0, window: self.window };
        KvLayout { block_tokens: self.block_tokens, layers: vec![layer; LAYER + 1] }
    }
}

impl Case for Latent<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let mut rng = Rng(40);
        let lengths: Vec<usize> = self.batch.iter().map(|range| range.end).collect();
        let pages = Pages::new(self.block_tokens, &lengths, &mut rng);
        let mut layer = Layer::new(self, backend, 2 * pages.blocks, &mut rng);
        let shape = self.attention();
        let batch = pages.step(self.batch);
        let width = shape.heads * shape.value_dim();
        let mut out = poisoned(backend, batch.rows(), width);

        // All slots hold NaN, but for those that are written afterwards; so does scratch memory.
        layer.store(&pages.all_slots(), None);
        let poison = layer.store(&batch, None);
        layer.encoder.attention(&poison, &shape, None, &layer.kv, LAYER, &mut out);

        let history: Vec<Range<usize>> = self.batch.iter().map(|range| 0..range.start).collect();
        layer.store(&pages.step(&history), Some(&mut rng));
        let batch = if let Some(moves) = self.moves {
            let (moved, pairs) = pages.moved();
            if moves == Moves::OnDevice {
                layer.encoder.copy_kv_blocks(&mut layer.kv, &pairs);
                layer.store(&pages.all_slots(), None);
            } else {
                let (from, to): (Vec<u32>, Vec<u32>) = pairs.into_iter().unzip();
                let bytes = read_blocks::<B>(&mut layer.encoder, &layer.kv, &self.layout(), self.kv_type, &from);
                layer.store(&pages.all_slots(), None);
                layer.encoder.write_kv_blocks(&mut layer.kv, &to, &bytes).expect("blocks that can be written");
            }
            moved.step(self.batch)
        } else {
            batch
        };
        let queries = layer.store(&batch, Some(&mut rng));
        match self.reads {
            Reads::Queries => read::<B>(&mut layer.encoder, &queries, batch.rows() * shape.row_width()),
            Reads::Attention => {
                layer.encoder.attention(&queries, &shape, None, &layer.kv, LAYER, &mut out);
                read::<B>(&mut layer.encoder, &out, batch.rows() * width)
            }
        }
    }
}

/// The cache's layer that tests use.
const LAYER: usize = 1;

/// What one layer of a decoder owns.
struct Layer<'a, B: Backend> {
    backend: &'a B,
    latent: LatentShape,
    encoder: B::Encoder,
    kv: B::KvCache,
    norm: B::Vector,
    inv_freq: B::Vector,
    /// What makes queries for latent vectors of those for keys.
    absorb: B::LinearGroup,
}

impl<'a, B: Backend> Layer<'a, B> {
    fn new(case: &Latent<'_>, backend: &'a B, blocks: usize, rng: &mut Rng) -> Self {
        let latent = case.latent;
        let LatentShape { heads, nope_dim, rope_dim, rank, .. } = latent;
        let inv_freq: Vec<f32> = (0..rope_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
        let width = heads * (nope_dim + rope_dim).max(latent.key_dim());
        let linears = (0..heads).map(|_| {
            let mut weight = random(Scheme::F32, rank, nope_dim, rng);
            // Queries about as large as keys.
            let values = weight.codes.to_mut().as_chunks_mut::<4>().0;
            let scale = (nope_dim as f32).powf(-0.5);
            values.iter_mut().for_each(|bytes| *bytes = (scale * f32::from_le_bytes(*bytes)).to_le_bytes());
            backend.load_linear(&[LinearPart { weight, bias: None }]).expect("a matrix")
        });
        let linears = linears.collect();
        Self {
            backend,
            latent,
            encoder: backend.encoder(&StepLimits { context: case.context, ..limits(1024, width) }).expect("an encoder"),
            kv: backend.kv_cache(&case.layout(), case.kv_type, blocks).expect("a cache"),
            norm: backend.load_vector(&rng.normals(rank)).expect("a vector"),
            inv_freq: backend.load_vector(&inv_freq).expect("a vector"),
            absorb: backend.group_linears(linears).expect("linears of one shape"),
        }
    }

    /// Begins a step, stores its keys and gives its queries, of random rows or of NaN.
    fn store(&mut self, step: &Ragged, rng: Option<&mut Rng>) -> B::Buffer {
        let LatentShape { heads, nope_dim, rope_dim, .. } = self.latent;
        // Rows of keys begin with something else.
        let (q_width, kv_width) = (heads * (nope_dim + rope_dim), 12 + self.latent.key_dim());
        let is_poison = rng.is_none();
        let (q, kv) = match rng {
            Some(rng) => (rng.normals(step.rows() * q_width), rng.normals(step.rows() * kv_width)),
            None => (vec![f32::NAN; step.rows() * q_width], vec![f32::NAN; step.rows() * kv_width]),
        };
        let mut angles = poisoned(self.backend, step.rows(), rope_dim);
        let mut queries = poisoned(self.backend, step.rows(), heads * self.latent.key_dim());
        let (q, kv) = (upload(self.backend, q_width, &q), upload(self.backend, kv_width, &kv));
        let Self { encoder, latent, norm, inv_freq, absorb, kv: cache, .. } = self;
        encoder.begin(&step.step());
        encoder.rope_angles(inv_freq, 1.0, &mut angles);
        encoder.latent_store_kv(&q, &kv, latent, norm, 1e-6, &angles, cache, LAYER, &mut queries);
        if !is_poison {
            encoder.head_linear(&q, absorb, &mut queries);
        }
        queries
    }
}
