//! A backend that tells what its linears are given.

use marlin_format::Scheme;
use marlin_kernels::{
    Backend, DeviceInfo, HostRoutes, KernelError, KvLayout, KvType, LinearPart, MemoryUse, RouterWeights, Routing,
    StepLimits,
};

use super::Watch;
use super::encoder::ObservedEncoder;

/// Computes what `B` computes, and tells a [`Watch`] the inputs of linears.
pub(crate) struct Observed<B> {
    inner: B,
    watch: Watch,
}

impl<B> Observed<B> {
    pub(crate) fn new(inner: B) -> Self {
        Self { inner, watch: Watch::default() }
    }

    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }
}

/// Activations whose width is known.
#[derive(Debug)]
pub(crate) struct Rows<T> {
    pub(super) inner: T,
    pub(super) width: usize,
}

/// A linear with its name, which is empty if it has none, and the width of its inputs.
pub(crate) struct NamedLinear<T> {
    pub(super) inner: T,
    pub(super) name: String,
    pub(super) cols: usize,
}

/// Linears with their names, and the width of their inputs.
pub(crate) struct NamedGroup<T> {
    pub(super) inner: T,
    pub(super) names: Vec<String>,
    pub(super) cols: usize,
}

/// A vector of which the host has its own copy.
pub(crate) struct KnownVector<T> {
    pub(super) inner: T,
    pub(super) values: Vec<f32>,
}

/// Routes, read back.
pub(crate) struct KnownRoutes<T> {
    pub(super) inner: T,
    pub(super) routing: Routing,
    /// Of the last step.
    pub(super) host: HostRoutes,
}

impl<B: Backend> Backend for Observed<B> {
    type Buffer = Rows<B::Buffer>;
    type Linear = NamedLinear<B::Linear>;
    type LinearGroup = NamedGroup<B::LinearGroup>;
    type Router = B::Router;
    type Routes = KnownRoutes<B::Routes>;
    type Vector = KnownVector<B::Vector>;
    type KvCache = B::KvCache;
    type Encoder = ObservedEncoder<B>;

    const OVERLAPS: bool = B::OVERLAPS;

    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }

    fn load_linear(&self, parts: &[LinearPart<'_>]) -> Result<Self::Linear, KernelError> {
        self.load_named_linear("", parts)
    }

    fn load_named_linear(&self, name: &str, parts: &[LinearPart<'_>]) -> Result<Self::Linear, KernelError> {
        // A device must not keep the weights of a moment under their name.
        let inner = self.inner.load_linear(parts)?;
        Ok(NamedLinear { inner, name: name.to_owned(), cols: parts.first().map_or(0, |part| part.weight.cols) })
    }

    fn group_linears(&self, linears: Vec<Self::Linear>) -> Result<Self::LinearGroup, KernelError> {
        let cols = linears.first().map_or(0, |linear| linear.cols);
        let (linears, names) = linears.into_iter().map(|linear| (linear.inner, linear.name)).unzip();
        Ok(NamedGroup { inner: self.inner.group_linears(linears)?, names, cols })
    }

    fn load_router(&self, weights: &RouterWeights<'_>) -> Result<Self::Router, KernelError> {
        self.inner.load_router(weights)
    }

    fn routes(&self, routing: &Routing, tokens: usize, width: usize) -> Result<Self::Routes, KernelError> {
        let inner = self.inner.routes(routing, tokens, width)?;
        Ok(KnownRoutes { inner, routing: *routing, host: HostRoutes::default() })
    }

    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, KernelError> {
        Ok(KnownVector { inner: self.inner.load_vector(values)?, values: values.to_vec() })
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, KernelError> {
        Ok(Rows { inner: self.inner.buffer(rows, width)?, width })
    }

    fn upload(&self, buffer: &mut Self::Buffer, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        self.inner.upload(&mut buffer.inner, rows, values)
    }

    fn kv_cache(&self, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<Self::KvCache, KernelError> {
        self.inner.kv_cache(layout, kv_type, blocks)
    }

    fn encoder(&self, limits: &StepLimits) -> Result<Self::Encoder, KernelError> {
        Ok(ObservedEncoder::new(self.inner.encoder(limits)?, self.watch.clone()))
    }
}

impl<B: Backend> MemoryUse for Observed<B> {
    fn linear_bytes(&self, scheme: &Scheme, rows: usize, cols: usize) -> Result<usize, KernelError> {
        self.inner.linear_bytes(scheme, rows, cols)
    }

    fn conversion(&self, scheme: &Scheme, cols: usize) -> Option<Scheme> {
        self.inner.conversion(scheme, cols)
    }

    fn encoder_bytes(&self, limits: &StepLimits) -> usize {
        self.inner.encoder_bytes(limits)
    }

    fn router_bytes(&self, routing: &Routing, hidden: usize) -> usize {
        self.inner.router_bytes(routing, hidden)
    }

    fn shares_memory(&self) -> bool {
        self.inner.shares_memory()
    }

    fn routes_bytes(&self, routing: &Routing, tokens: usize, width: usize) -> usize {
        self.inner.routes_bytes(routing, tokens, width)
    }

    fn most_kv_blocks(&self, layout: &KvLayout, kv_type: KvType) -> usize {
        self.inner.most_kv_blocks(layout, kv_type)
    }

    fn check_kv_blocks(&self, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<(), KernelError> {
        self.inner.check_kv_blocks(layout, kv_type, blocks)
    }
}
