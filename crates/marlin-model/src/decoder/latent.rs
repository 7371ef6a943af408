//! Multi-head latent attention in the space of latent vectors: of each token one vector is cached, which is key and value of all heads.
//!
//! `kv_b_proj` would make a key and a value of each latent vector for each head. Since products are associative, a head's key rows are
//! multiplied with its queries before attention instead, and its value rows with what attention gives (DeepSeek-V2, section 2.1.2).
//! Folders of MLX hold the two matrices of each head by themselves.

use half::f16;
use marlin_format::{ColumnOrder, PackedMatrix, Scheme};
use marlin_kernels::{
    AttentionShape, Backend, Encoder, Input, KernelError, LatentShape, LinearPart, MemoryUse, PartHeader,
};

use super::OutputProjection;
use super::load::{Loader, weight};
use super::workspace::Workspace;
use crate::ModelError;
use crate::spec::{LatentSpec, LayerSpec};

/// Epsilon of the norms of latent vectors, whatever `rms_norm_eps` says, as in `transformers`.
const LATENT_EPS: f32 = 1e-6;

/// Latent attention. Fields are named after the checkpoint's tensors, but for the two halves of `kv_b_proj`.
pub(super) struct LatentAttention<B: Backend> {
    latent: LatentShape,
    shape: AttentionShape,
    /// Index into the decoder's ropes.
    rope: usize,
    queries: QueryProjection<B>,
    kv_a_norm: B::Vector,
    /// `[rank, nope]` of each head: brings queries into the space of latent vectors.
    keys: B::LinearGroup,
    /// `[value_dim, rank]` of each head: brings what attention gives out of it.
    values: B::LinearGroup,
    o_proj: OutputProjection<B>,
}

/// What makes queries, and latent vectors of keys and values.
enum QueryProjection<B: Backend> {
    Direct {
        q_proj: B::Linear,
        kv_a_proj: B::Linear,
    },
    /// By latent vectors of their own, which one linear makes with those of keys and values.
    Latent {
        qkv_a_proj: B::Linear,
        q_a_norm: B::Vector,
        q_b_proj: B::Linear,
    },
}

impl<B: Backend> LatentAttention<B> {
    /// Adds the attention of the normalised `hidden` to it.
    pub(super) fn encode(
        &self,
        encoder: &mut B::Encoder,
        work: &mut Workspace<B>,
        input_norm: &B::Vector,
        kv_cache: &mut B::KvCache,
        layer: usize,
        eps: f32,
    ) {
        let (latent, angles) = (&mut work.latent, &work.angles[self.rope]);
        let normed = || Input::Normed { x: &work.hidden, weight: input_norm, eps };
        match &self.queries {
            QueryProjection::Direct { q_proj, kv_a_proj } => {
                encoder.linear(normed(), q_proj, &mut latent.q);
                encoder.linear(normed(), kv_a_proj, &mut latent.kv);
            }
            QueryProjection::Latent { qkv_a_proj, q_a_norm, q_b_proj } => {
                encoder.linear(normed(), qkv_a_proj, &mut latent.kv);
                let normed = Input::Normed { x: &latent.kv, weight: q_a_norm, eps: LATENT_EPS };
                encoder.linear(normed, q_b_proj, &mut latent.q);
            }
        }
        encoder.head_linear(&latent.q, &self.keys, &mut work.queries);
        encoder.latent_store_kv(
            &latent.q,
            &latent.kv,
            &self.latent,
            &self.kv_a_norm,
            LATENT_EPS,
            angles,
            kv_cache,
            layer,
            &mut work.queries,
        );
        encoder.attention(&work.queries, &self.shape, None, kv_cache, layer, &mut work.attention);
        encoder.head_linear(&work.attention, &self.values, &mut latent.values);
        self.o_proj.encode(encoder, &latent.values, &mut work.block_output, &mut work.hidden, eps);
    }
}

impl<B: Backend> Loader<'_, B> {
    pub(super) fn latent_attention(
        &self,
        block: &str,
        spec: &LatentSpec,
        layer: &LayerSpec,
        out_norm: Option<B::Vector>,
    ) -> Result<LatentAttention<B>, ModelError> {
        let (hidden, shape) = (self.spec.hidden_size, spec.latent_shape());
        let kv_a_proj = ("kv_a_proj_with_mqa", shape.key_dim());
        let queries = match spec.q_rank {
            None => QueryProjection::Direct {
                q_proj: self.linear(block, &[("q_proj", spec.q_width())], hidden, false)?,
                kv_a_proj: self.linear(block, &[kv_a_proj], hidden, spec.bias)?,
            },
            Some(rank) => QueryProjection::Latent {
                qkv_a_proj: self.linear(block, &[("q_a_proj", rank), kv_a_proj], hidden, spec.bias)?,
                q_a_norm: self.norm(&format!("{block}.q_a_layernorm"), rank)?,
                q_b_proj: self.linear(block, &[("q_b_proj", spec.q_width())], rank, false)?,
            },
        };
        let [keys, values] = match self.checkpoint.contains(&weight(&format!("{block}.embed_q.0"))) {
            true => self.separate_heads(block, spec)?,
            false => self.kv_b(&format!("{block}.kv_b_proj"), spec)?,
        };
        Ok(LatentAttention {
            latent: shape,
            shape: spec.shape(layer.window),
            rope: layer.rope,
            queries,
            kv_a_norm: self.norm(&format!("{block}.kv_a_layernorm"), spec.rank)?,
            keys,
            values,
            o_proj: OutputProjection {
                linear: self.linear(block, &[("o_proj", hidden)], spec.v_width(), spec.bias)?,
                norm: out_norm,
            },
        })
    }

    /// The key and the value rows of each head, which lie in turn in `kv_b_proj`, `[heads, nope | value_dim, rank]`.
    fn kv_b(&self, module: &str, spec: &LatentSpec) -> Result<[B::LinearGroup; 2], ModelError> {
        let (tensor, rows) = (weight(module), spec.heads * (spec.nope_dim + spec.value_dim));
        let matrix = self.matrix(&tensor, rows, spec.rank)?;
        let (mut keys, mut values) = (Vec::with_capacity(spec.heads), Vec::with_capacity(spec.heads));
        // The latent vectors, of which the matrix would make keys and values.
        self.note_input(module, || vec![tensor.clone()]);
        for head in 0..spec.heads {
            let first = head * (spec.nope_dim + spec.value_dim);
            let (name, cols) = (format!("{module}.{head}.keys"), spec.nope_dim);
            let header = PartHeader { scheme: key_scheme(&matrix.scheme), rows: spec.rank, cols, bias: None };
            keys.push(self.of_part(&name, &tensor, header, || key_rows(&matrix, first, spec))?);
            let (name, rows) = (format!("{module}.{head}.values"), spec.value_dim);
            let header = PartHeader { scheme: value_scheme(&matrix.scheme, spec), rows, cols: spec.rank, bias: None };
            values.push(self.of_part(&name, &tensor, header, || value_rows(&matrix, first + spec.nope_dim, spec))?);
        }
        self.checkpoint.release(&tensor);
        let group = |linears| self.backend.group_linears(linears).map_err(|source| self.weight_error(&tensor, source));
        Ok([group(keys)?, group(values)?])
    }

    /// The matrices of each head as MLX has them: `embed_q` are the transposed key rows, `unembed_out` the value rows.
    fn separate_heads(&self, block: &str, spec: &LatentSpec) -> Result<[B::LinearGroup; 2], ModelError> {
        let group = |name: &str, rows: usize, cols: usize| {
            let head = |head: usize| self.linear(block, &[(&format!("{name}.{head}"), rows)], cols, false);
            let linears = (0..spec.heads).map(head).collect::<Result<_, _>>()?;
            let of_stack = |source| self.weight_error(&format!("{block}.{name}"), source);
            self.backend.group_linears(linears).map_err(of_stack)
        };
        Ok([group("embed_q", spec.rank, spec.nope_dim)?, group("unembed_out", spec.value_dim, spec.rank)?])
    }

    /// A linear of one part: the device's own, if it kept one, or else as it is read.
    fn of_part<'p>(
        &self,
        name: &str,
        tensor: &str,
        header: PartHeader,
        read: impl FnOnce() -> Result<PackedMatrix<'p>, KernelError>,
    ) -> Result<B::Linear, ModelError> {
        if let Some(linear) = self.backend.find_linear(name, &[header]) {
            return Ok(linear);
        }
        let load = |weight| self.backend.load_named_linear(name, &[LinearPart { weight, bias: None }]);
        read().and_then(load).map_err(|source| self.weight_error(tensor, source))
    }
}

/// How transposed key rows are kept: dense, in a type that holds what plain floats do and what packed codes nearly come to.
fn key_scheme(stored: &Scheme) -> Scheme {
    if stored.is_dense() { *stored } else { Scheme::F16 }
}

/// How value rows are kept: as they are stored, unless heads begin within tiles of rows that share their scales, or columns have an index.
fn value_scheme(stored: &Scheme, spec: &LatentSpec) -> Scheme {
    let tile = stored.group_rows(1);
    let has_whole_tiles = spec.nope_dim.is_multiple_of(tile) && spec.value_dim.is_multiple_of(tile);
    if has_whole_tiles && stored.order == ColumnOrder::Natural { *stored } else { Scheme::F16 }
}

/// Bytes that a device keeps of `kv_b_proj` in this storage.
pub(crate) fn kv_b_bytes(device: &dyn MemoryUse, stored: &Scheme, spec: &LatentSpec) -> Result<usize, KernelError> {
    let keys = device.linear_bytes(&key_scheme(stored), spec.rank, spec.nope_dim)?;
    let values = device.linear_bytes(&value_scheme(stored, spec), spec.value_dim, spec.rank)?;
    Ok(spec.heads.saturating_mul(keys.saturating_add(values)))
}

/// Rows from `first` on, transposed: `[rank, nope]`.
fn key_rows(matrix: &PackedMatrix<'_>, first: usize, spec: &LatentSpec) -> Result<PackedMatrix<'static>, KernelError> {
    let nope = spec.nope_dim;
    let rows =
        if matrix.scheme.is_dense() { matrix.slice_rows(first..first + nope)? } else { halves(matrix, first, nope)? };
    Ok(rows.transposed_columns(0, 1)?)
}

/// Rows from `first` on: `[value_dim, rank]`.
fn value_rows<'m>(
    matrix: &'m PackedMatrix<'_>,
    first: usize,
    spec: &LatentSpec,
) -> Result<PackedMatrix<'m>, KernelError> {
    if value_scheme(&matrix.scheme, spec) == matrix.scheme {
        Ok(matrix.slice_rows(first..first + spec.value_dim)?)
    } else {
        halves(matrix, first, spec.value_dim)
    }
}

/// Some rows of a packed matrix in half precision.
fn halves(matrix: &PackedMatrix<'_>, first: usize, rows: usize) -> Result<PackedMatrix<'static>, KernelError> {
    let mut bytes = Vec::with_capacity(2 * rows * matrix.cols);
    let mut values = vec![0.0; matrix.cols];
    for row in first..first + rows {
        matrix.decode_row(row, &mut values);
        for &value in &values {
            let half = f16::from_f32(value);
            if !half.is_finite() {
                let problem = format!("row {row} holds {value}, which half precision cannot hold; keep it as bf16");
                return Err(KernelError::Device(problem));
            }
            bytes.extend(half.to_le_bytes());
        }
    }
    Ok(PackedMatrix::from_dense_bytes(Scheme::F16, rows, matrix.cols, bytes)?)
}
