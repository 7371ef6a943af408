//! What a device offers a decoder.

use marlin_format::{PackedMatrix, Scheme};

use crate::{Hadamard, HostRoutes, KernelError, KvLayout, KvType, Routing, SampleRow, SamplingId, Step};

/// A device: it holds weights, activations and KV blocks, and hands out encoders.
///
/// Weights are put into the device's own tile order once, by [`Backend::load_linear`]; nobody else knows tile orders.
/// Activations are f32, row-major; a buffer carries its current number of rows (never more than it was made for), and an
/// operation sets the rows of what it writes.
pub trait Backend: MemoryUse + Send + Sync + Sized + 'static {
    /// Activations `[rows, width]`, f32.
    type Buffer: Send;
    /// One or several packed matrices that share their input, in tile order.
    type Linear: Send + Sync;
    /// Linears of equal shape that rows are divided among: the experts of a layer, or the heads of a projection.
    type LinearGroup: Send + Sync;
    /// A router's weights in f32, and how it chooses.
    type Router: Send + Sync;
    /// The experts of a step's tokens, and whatever memory computing with them needs.
    type Routes: Send;
    /// A small f32 vector: norm weights, rotary frequencies.
    type Vector: Send + Sync;
    /// The paged keys and values of all layers.
    type KvCache: Send;
    /// Runs or records operations.
    type Encoder: Encoder<Self> + Send;

    /// Operations run while the host goes on, and not at once when they are called.
    const OVERLAPS: bool;

    /// What this device is, for reports.
    fn info(&self) -> DeviceInfo;

    /// Repacks matrices with equal `cols` into one linear whose output is theirs side by side.
    /// What the device has no kernel for is converted, exactly where that is possible.
    fn load_linear(&self, parts: &[LinearPart<'_>]) -> Result<Self::Linear, KernelError>;

    /// [`Backend::load_linear`] of a linear that is known by a name, under which a device may keep what it makes of it for the next time.
    fn load_named_linear(&self, _name: &str, parts: &[LinearPart<'_>]) -> Result<Self::Linear, KernelError> {
        self.load_linear(parts)
    }

    /// The linear that the device kept under this name, to the bit what [`Backend::load_linear`] makes; its weights need not be read.
    fn find_linear(&self, _name: &str, _parts: &[PartHeader]) -> Option<Self::Linear> {
        None
    }

    /// Makes a group of linears, of which each has as many parts of the same sizes; schemes may differ, but none
    /// has a group index: their input is prepared once for all.
    fn group_linears(&self, linears: Vec<Self::Linear>) -> Result<Self::LinearGroup, KernelError>;

    /// Uploads a router.
    fn load_router(&self, weights: &RouterWeights<'_>) -> Result<Self::Router, KernelError>;

    /// Makes room for the routes of at most `tokens` tokens, whose experts read and write at most `width` values a row.
    fn routes(&self, routing: &Routing, tokens: usize, width: usize) -> Result<Self::Routes, KernelError>;

    /// Uploads a vector.
    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, KernelError>;

    /// Makes a buffer of at most `rows` rows of `width` values.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, KernelError>;

    /// Writes `rows` rows into a buffer (embeddings made elsewhere, test inputs) before anything that is started later; `values` is
    /// `[rows, width]`. Between operations, [`Encoder::write`] does.
    fn upload(&self, buffer: &mut Self::Buffer, rows: usize, values: &[f32]) -> Result<(), KernelError>;

    /// Makes a pool of `blocks` KV blocks for every layer of `layout`.
    fn kv_cache(&self, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<Self::KvCache, KernelError>;

    /// Makes an encoder whose steps stay within `limits`; it owns whatever scratch memory its operations need, so that a step
    /// allocates nothing.
    fn encoder(&self, limits: &StepLimits) -> Result<Self::Encoder, KernelError>;
}

/// What a device will take of its memory: what a plan is made of before anything is loaded.
pub trait MemoryUse {
    /// Bytes that [`Backend::load_linear`] will keep of a matrix `[rows, cols]` without a bias. Fails if the scheme has no such shape.
    fn linear_bytes(&self, scheme: &Scheme, rows: usize, cols: usize) -> Result<usize, KernelError>;

    /// What [`Backend::load_linear`] converts a packed matrix to, if no kernel reads its scheme.
    fn conversion(&self, _scheme: &Scheme, _cols: usize) -> Option<Scheme> {
        None
    }

    /// Bytes of scratch memory that [`Backend::encoder`] makes for these limits. What a thread needs for one tile of attention, less than
    /// a megabyte, is not counted.
    fn encoder_bytes(&self, limits: &StepLimits) -> usize;

    /// Bytes that [`Backend::load_router`] will keep of a router of rows `hidden` wide.
    fn router_bytes(&self, routing: &Routing, hidden: usize) -> usize {
        routing.experts.saturating_mul(hidden + 2).saturating_mul(size_of::<f32>())
    }

    /// Whether its memory is the host's.
    fn shares_memory(&self) -> bool {
        true
    }

    /// Bytes of memory that [`Backend::routes`] makes.
    fn routes_bytes(&self, routing: &Routing, tokens: usize, width: usize) -> usize;

    /// KV blocks that [`Backend::kv_cache`] can make at most, however much memory there is. The host's memory has no such limit.
    fn most_kv_blocks(&self, _layout: &KvLayout, _kv_type: KvType) -> usize {
        usize::MAX
    }

    /// Fails as [`Backend::kv_cache`] would with more blocks than [`MemoryUse::most_kv_blocks`].
    fn check_kv_blocks(&self, _layout: &KvLayout, _kv_type: KvType, _blocks: usize) -> Result<(), KernelError> {
        Ok(())
    }
}

/// A device in words.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// For example `cpu` or `reference`.
    pub name: String,
    /// Instruction set, threads, arithmetic mode.
    pub detail: String,
}

/// The largest step an encoder must be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens in a step.
    pub tokens: usize,
    /// Tokens a sequence may reach (its context).
    pub context: usize,
    /// The widest input (K) of any linear.
    pub width: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Rows of logits in a step.
    pub logit_rows: usize,
}

/// One matrix of a fused linear, with its bias.
#[derive(Debug, Clone)]
pub struct LinearPart<'a> {
    /// Weights `[N, K]`.
    pub weight: PackedMatrix<'a>,
    /// Added to each output row, `[N]`.
    pub bias: Option<Vec<f32>>,
}

/// A [`LinearPart`] without its weights.
#[derive(Debug, Clone)]
pub struct PartHeader {
    /// How weights are stored.
    pub scheme: Scheme,
    /// Output features, N.
    pub rows: usize,
    /// Input features, K.
    pub cols: usize,
    /// Added to each output row, `[N]`.
    pub bias: Option<Vec<f32>>,
}

/// A router as a checkpoint has it.
#[derive(Debug, Clone, Copy)]
pub struct RouterWeights<'a> {
    /// How experts are chosen by its logits.
    pub routing: Routing,
    /// `[E, hidden]`.
    pub weight: &'a [f32],
    /// Added to logits, `[E]`.
    pub bias: Option<&'a [f32]>,
    /// Added to scores where experts are chosen, `[E]`.
    pub correction: Option<&'a [f32]>,
}

impl RouterWeights<'_> {
    /// Checks that it routes, and gives the width of its rows.
    pub(crate) fn check(&self) -> Result<usize, KernelError> {
        self.routing.check()?;
        let experts = self.routing.experts;
        let of_experts = |values: Option<&[f32]>| values.is_none_or(|values| values.len() == experts);
        if !self.weight.len().is_multiple_of(experts) || !of_experts(self.bias) || !of_experts(self.correction) {
            let found = [Some(self.weight), self.bias, self.correction].map(|values| values.map_or(0, <[f32]>::len));
            let problem = format!("a router of {experts} experts has {found:?} weights, biases and corrections");
            return Err(KernelError::Device(problem));
        }
        let all = [Some(self.weight), self.bias, self.correction].into_iter().flatten().flatten();
        match all.into_iter().find(|value| !value.is_finite()) {
            Some(value) => Err(KernelError::Device(format!("a router must be finite, found {value}"))),
            None => Ok(self.weight.len() / experts),
        }
    }
}

/// Checks the parts of a fused linear, each by itself and against the others, and gives their common number of columns.
pub(crate) fn check_parts(parts: &[LinearPart<'_>]) -> Result<usize, KernelError> {
    let Some(first) = parts.first().map(|part| part.weight.cols) else {
        return Err(KernelError::Device("a linear needs at least one matrix, found none".into()));
    };
    for (index, part) in parts.iter().enumerate() {
        part.weight.validate()?;
        if part.weight.cols != first {
            return Err(KernelError::FusedWidth { first, part: index, found: part.weight.cols });
        }
        if let Some(bias) = part.bias.as_ref().filter(|bias| bias.len() != part.weight.rows) {
            return Err(KernelError::BiasLength { rows: part.weight.rows, found: bias.len() });
        }
    }
    Ok(first)
}

/// What a linear multiplies, row by row.
#[derive(Debug)]
pub enum Input<'a, B: Backend> {
    /// Rows as they are.
    Rows(&'a B::Buffer),
    /// The RMS norms of their first K values, `x / sqrt(mean(x²) + eps) · weight`: what follows them is of no account.
    Normed {
        /// `[T, K or more]`.
        x: &'a B::Buffer,
        /// `[K]`.
        weight: &'a B::Vector,
        /// Added to the mean square.
        eps: f32,
    },
}

/// How a gate and what it gates are joined in a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// gate · sigmoid(gate) · up.
    Silu,
    /// GELU(gate) · up, tanh approximation.
    GeluTanh,
    /// The clamped SwiGLU of gpt-oss: g · sigmoid(1.702 · g) · (u + 1), g = min(gate, 7), u = up within ±7.
    ClampedSwiglu,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Silu, Self::GeluTanh, Self::ClampedSwiglu];
    /// Where [`Activation::ClampedSwiglu`] clamps.
    pub const SWIGLU_LIMIT: f32 = 7.0;
    /// Its factor inside the sigmoid.
    pub const SWIGLU_ALPHA: f32 = 1.702;
}

/// Which dimensions of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RopeLayout {
    /// Dimension i with i + rotary / 2.
    #[default]
    HalfSplit,
    /// Dimension 2i with 2i + 1.
    Interleaved,
}

/// Where attention finds values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Values {
    /// Cached beside keys, as wide as they are.
    Cached,
    /// They are so many first values of keys: latent attention, whose layer of the cache has a `value_dim` of 0 and one head.
    OfKeys(usize),
}

/// The sizes of one layer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Where values are, and how wide.
    pub values: Values,
    /// Factor on the scores, usually `head_dim^-½`.
    pub scale: f32,
    /// A query at position p sees keys at positions > p − window; all of them if `None`.
    pub window: Option<usize>,
    /// Which dimensions are rotated together.
    pub rope: RopeLayout,
}

impl AttentionShape {
    /// Width of a value head, and of what attention gives of a head.
    pub fn value_dim(&self) -> usize {
        match self.values {
            Values::Cached => self.head_dim,
            Values::OfKeys(dim) => dim,
        }
    }

    /// Width of the rows whose first values are the queries: with keys and values behind them where those are cached, since they come from one linear.
    pub(crate) fn row_width(&self) -> usize {
        match self.values {
            Values::Cached => (self.heads + 2 * self.kv_heads) * self.head_dim,
            Values::OfKeys(_) => self.heads * self.head_dim,
        }
    }
}

/// The sizes of one layer's latent attention (DeepSeek-V2, section 2.1): keys and values of all heads are made of one latent vector, and share one
/// rotated part of the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShape {
    /// Query heads.
    pub heads: usize,
    /// Width of a head's part that is not rotated.
    pub nope_dim: usize,
    /// Width of the rotated part.
    pub rope_dim: usize,
    /// Width of the latent vector, `kv_lora_rank`.
    pub rank: usize,
    /// Which dimensions are rotated together.
    pub rope: RopeLayout,
}

impl LatentShape {
    /// Width of a cached key: the latent vector and the rotated part.
    pub fn key_dim(&self) -> usize {
        self.rank + self.rope_dim
    }
}

/// RMS norms over each head of Q and K, before rotary embedding.
#[derive(Debug)]
pub struct QkNorm<'a, B: Backend> {
    /// `[head_dim]`.
    pub q: &'a B::Vector,
    /// `[head_dim]`.
    pub k: &'a B::Vector,
    /// Added to the mean square.
    pub eps: f32,
}

/// The operations of a decoder step. A CPU runs them at once; a GPU records them until [`Encoder::submit`], so that an upload
/// between two operations needs one before it.
///
/// Shapes are fixed by the model at load, so operations do not return errors: a shape that does not fit is a bug in the caller and
/// panics. `T` is the number of tokens of the step, `L` of its logit rows.
pub trait Encoder<B: Backend> {
    /// Starts a step: takes over its tokens, positions and block tables. `step` has been validated against `limits`.
    fn begin(&mut self, step: &Step<'_>);

    /// `out[t] = table[token t] · scale`; table rows decode to f32. Sets `out` to T rows.
    fn embed(&mut self, table: &B::Linear, scale: f32, out: &mut B::Buffer);

    /// Cosines and sines of the step's positions: `out[t] = [cos(p·f_i)·scaling … | sin(p·f_i)·scaling …]`, width 2·len(inv_freq).
    /// The angle p·f_i is rounded to f32, as models are trained with.
    fn rope_angles(&mut self, inv_freq: &B::Vector, scaling: f32, out: &mut B::Buffer);

    /// `out = x / sqrt(mean(x²) + eps) · weight`, row by row.
    fn rms_norm(&mut self, x: &B::Buffer, weight: &B::Vector, eps: f32, out: &mut B::Buffer);

    /// `out += x / sqrt(mean(x²) + eps) · weight`, row by row: a normalised block's output goes into the residual stream.
    fn rms_norm_add(&mut self, x: &B::Buffer, weight: &B::Vector, eps: f32, out: &mut B::Buffer);

    /// `out = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · weight + bias`, row by row; without a bias it is 0.
    fn layer_norm(
        &mut self,
        x: &B::Buffer,
        weight: &B::Vector,
        bias: Option<&B::Vector>,
        eps: f32,
        out: &mut B::Buffer,
    );

    /// Rotates each block of a row by a Hadamard matrix, which spreads outliers. A second time undoes it. The width is a multiple of
    /// the block.
    fn hadamard(&mut self, x: &mut B::Buffer, rotation: &Hadamard);

    /// `x = cap · tanh(x / cap)`: squeezes values into ± `cap`, which is positive.
    fn soft_cap(&mut self, x: &mut B::Buffer, cap: f32);

    /// `out = x · Wᵀ + bias`.
    fn linear(&mut self, x: Input<'_, B>, linear: &B::Linear, out: &mut B::Buffer);

    /// `out += x · Wᵀ + bias`: a projection back into the residual stream.
    fn linear_add(&mut self, x: &B::Buffer, linear: &B::Linear, out: &mut B::Buffer);

    /// `gate_up` has two parts of equal N: `out = activation(x · Gᵀ, x · Uᵀ)`, width N.
    fn linear_gated(&mut self, x: Input<'_, B>, gate_up: &B::Linear, activation: Activation, out: &mut B::Buffer);

    /// Chooses the experts of each row of `x` by the logits `x · Wᵀ + bias`, which are summed in f32, and sorts rows by expert.
    fn route(&mut self, x: Input<'_, B>, router: &B::Router, routes: &mut B::Routes);

    /// [`Encoder::linear_gated`] of each row by each of its experts: `gate_up` has a linear of two parts for each expert. `out` gets `T · slots` rows, those of
    /// the first expert first, of one expert in the order of tokens: as [`Encoder::expert_combine`] reads them. An expert's weights are read once.
    fn expert_gated(
        &mut self,
        x: Input<'_, B>,
        routes: &mut B::Routes,
        gate_up: &B::LinearGroup,
        activation: Activation,
        out: &mut B::Buffer,
    );

    /// `out[t] += Σ weight · (x[row of t and expert] · Wᵀ + bias)` over the experts of token t; `down` has a linear of one part for each expert.
    fn expert_combine(&mut self, x: &B::Buffer, routes: &mut B::Routes, down: &B::LinearGroup, out: &mut B::Buffer);

    /// A linear for each head: rows of `x` and of `out` are divided into as many stretches as `heads` has linears of one part, `[N, K]`, and the first N
    /// values of each stretch of `out` become the product of the first K values of that of `x`. What follows them stays as it is.
    fn head_linear(&mut self, x: &B::Buffer, heads: &B::LinearGroup, out: &mut B::Buffer);

    /// Prepares attention: on rows `[q heads | k heads | v heads]` normalises each Q and K head if asked, rotates Q and K in the shape's
    /// layout (`rotary` = width of `angles` first dimensions, even; the rest passes through), leaves Q in
    /// place, and writes K and V of each token to its slot in the layer's cache. The shape's values are cached.
    fn rope_store_kv(
        &mut self,
        qkv: &mut B::Buffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, B>>,
        angles: &B::Buffer,
        kv: &mut B::KvCache,
        layer: usize,
    );

    /// Prepares latent attention. Of rows `[… | latent | rotated part]` of `kv`, `[T, rank + rope_dim or more]`, which end in them, the latent vector is
    /// normalised (RMS, `norm`, `eps`) and the rotated part rotated; both are written as the key of each token to its slot in the layer's cache, which has one head and no values. Of rows
    /// `[heads, nope | rope]` of `q` the rotated parts are rotated, and written behind the first `rank` values of each head of `queries`,
    /// `[T, heads, rank + rope_dim]`: those are [`Encoder::head_linear`]'s to fill.
    #[expect(clippy::too_many_arguments, reason = "what is prepared, how, and where it goes")]
    fn latent_store_kv(
        &mut self,
        q: &B::Buffer,
        kv: &B::Buffer,
        shape: &LatentShape,
        norm: &B::Vector,
        eps: f32,
        angles: &B::Buffer,
        cache: &mut B::KvCache,
        layer: usize,
        queries: &mut B::Buffer,
    );

    /// Causal attention of each token's Q (the first values of a row of `qkv`; nothing else is in it where values are [`Values::OfKeys`]) over its sequence's cached
    /// keys up to its own position. `out` is `[T, heads · value_dim]`. `sinks`, if the model has them, are a score of each head, `[heads]`, that joins the softmax's
    /// denominator and nothing else (Xiao et al. 2023; learnt, as in gpt-oss).
    fn attention(
        &mut self,
        qkv: &B::Buffer,
        shape: &AttentionShape,
        sinks: Option<&B::Vector>,
        kv: &B::KvCache,
        layer: usize,
        out: &mut B::Buffer,
    );

    /// [`Encoder::rope_store_kv`], then [`Encoder::attention`]. A device may do both at once; then rows of `qkv` stay as they are.
    #[expect(clippy::too_many_arguments, reason = "those of both")]
    fn rope_attention(
        &mut self,
        qkv: &mut B::Buffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, B>>,
        angles: &B::Buffer,
        sinks: Option<&B::Vector>,
        kv: &mut B::KvCache,
        layer: usize,
        out: &mut B::Buffer,
    ) {
        self.rope_store_kv(qkv, shape, norm, angles, kv, layer);
        self.attention(qkv, shape, sinks, kv, layer, out);
    }

    /// `out[l] = x[logit row l]`; sets `out` to L rows.
    fn select_logit_rows(&mut self, x: &B::Buffer, out: &mut B::Buffer);

    /// Starts whatever is recorded and the choice of one token per row of `logits` (see [`SampleRow`]); the logits are consumed. The
    /// tokens stay on the device: the next step may take them ([`Step::SAMPLED`]) before [`Encoder::sampled`] reads them.
    /// `rows` and the rows of `logits` are as many.
    fn sample(&mut self, logits: &mut B::Buffer, rows: &[SampleRow<'_>]) -> SamplingId;

    /// Waits for a sampling, one of the last two, and reads its tokens or [`SampleRow::NOT_FINITE`]; `tokens` are as many as its rows.
    ///
    /// # Errors
    /// The device failed, or the sampling is too old.
    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), KernelError>;

    /// Copies KV blocks `(from, to)` in every layer (copy on write), one pair after the other.
    fn copy_kv_blocks(&mut self, kv: &mut B::KvCache, pairs: &[(u32, u32)]);

    /// Runs whatever is recorded and reads blocks of all layers into `out`, one block after the other, each of
    /// [`KvLayout::pool_bytes`] of one block: layer by layer its keys, then its values, of each the numbers or codes `[heads, tokens, width]`
    /// and behind them the scales `[heads, tokens, scales]`, little endian. The order is the same on all devices.
    ///
    /// # Errors
    /// The device failed, or cannot take blocks of such a size apart.
    fn read_kv_blocks(&mut self, kv: &B::KvCache, blocks: &[u32], out: &mut [u8]) -> Result<(), KernelError>;

    /// Writes blocks of all layers, as [`Encoder::read_kv_blocks`] reads them, as one operation among others: those before it see what
    /// the blocks held, those after it `bytes`. Starts whatever is recorded.
    ///
    /// # Errors
    /// The device failed before, or cannot take blocks of such a size apart.
    fn write_kv_blocks(&mut self, kv: &mut B::KvCache, blocks: &[u32], bytes: &[u8]) -> Result<(), KernelError>;

    /// Runs whatever is recorded and reads the routes of the last [`Encoder::route`] that wrote them; vectors are resized.
    ///
    /// # Errors
    /// The device failed.
    fn read_routes(&mut self, routes: &mut B::Routes, out: &mut HostRoutes) -> Result<(), KernelError>;

    /// Starts whatever is recorded, without waiting for it.
    ///
    /// # Errors
    /// The device failed before.
    fn start(&mut self) -> Result<(), KernelError>;

    /// Runs whatever is recorded and waits for it.
    fn submit(&mut self) -> Result<(), KernelError>;

    /// Runs whatever is recorded and reads the rows of a buffer; `out` has rows × width values.
    fn read(&mut self, buffer: &B::Buffer, out: &mut [f32]) -> Result<(), KernelError>;

    /// Writes `rows` rows into a buffer as one operation among others: those before it see what the buffer held, those after it
    /// `values`, `[rows, width]`. Starts whatever is recorded.
    ///
    /// # Errors
    /// There are not as many values, the buffer has no room for them, or the device failed before.
    fn write(&mut self, buffer: &mut B::Buffer, rows: usize, values: &[f32]) -> Result<(), KernelError>;
}
