//! Linears that are kept in a file ([`TileFile`]).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use marlin_format::{PackedMatrix, Scheme};

#[cfg(test)]
use super::SECTIONS;
use super::{Arithmetic, ChooseKernel, Part, SimdLevel, Threads, TileBytes, TiledLinear, Tiles, tiles};
use crate::conformance::matrices;
use crate::conformance::support::Rng;
use crate::cpu::tile_file::{Kept, Key, TileFile};
use crate::{KernelError, LinearPart, PartHeader};

impl TiledLinear {
    /// [`TiledLinear::load`]; if the file is being made, the linear is kept there under this name.
    pub(crate) fn load_kept(
        file: &Arc<TileFile>,
        name: &str,
        parts: &[LinearPart<'_>],
        arithmetic: Arithmetic,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let linear = Self { _file: Some(Arc::clone(file)), ..Self::load(parts, arithmetic, simd, threads)? };
        for (index, (part, LinearPart { weight, .. })) in linear.parts.iter().zip(parts).enumerate() {
            let PackedMatrix { scheme, rows, cols, .. } = weight;
            let key = Key { linear: name, part: index, scheme, rows: *rows, cols: *cols };
            let (converted, factor, sections) = (part.converted, part.tiles.factor, part.tiles.sections());
            file.keep(&key, Kept { converted, factor, sections: sections.map(Clone::clone) });
        }
        Ok(linear)
    }

    /// The linear that was kept under this name; `None` if it was not, or is another.
    pub(crate) fn find(
        file: &Arc<TileFile>,
        name: &str,
        parts: &[PartHeader],
        arithmetic: Arithmetic,
        simd: SimdLevel,
    ) -> Option<Self> {
        let cols = parts.first()?.cols;
        let mut linear = Self { _file: Some(Arc::clone(file)), ..Self::empty(cols, simd) };
        for (index, PartHeader { scheme, rows, bias, .. }) in parts.iter().enumerate() {
            if parts[index].cols != cols || bias.as_ref().is_some_and(|bias| bias.len() != *rows) {
                return None;
            }
            let kept = file.find(&Key { linear: name, part: index, scheme, rows: *rows, cols })?;
            let scheme = if kept.converted { &Scheme::F32 } else { scheme };
            let kernel = simd.dispatch(ChooseKernel { scheme, arithmetic }).ok()?;
            let tiles = Tiles::from_sections(scheme, *rows, cols, kernel.as_ref(), kept.factor, kept.sections)?;
            linear.push(Part::new(tiles, kernel, bias.as_deref(), kept.converted));
        }
        Some(linear)
    }

    /// The bytes of each part's tiles.
    #[cfg(test)]
    pub(crate) fn sections(&self) -> Vec<[&[u8]; SECTIONS]> {
        self.parts.iter().map(|part| part.tiles.sections().map(TileBytes::bytes)).collect()
    }
}

/// Tells orders of tiles apart, by what becomes of a small matrix in every scheme: there is nothing to remember when a kernel gets another
/// order.
pub(crate) fn layout(arithmetic: Arithmetic, simd: SimdLevel) -> Result<String, KernelError> {
    const ROWS: usize = 19;
    const COLS: usize = 300;
    let (mut hasher, mut rng, threads) = (DefaultHasher::new(), Rng(0), Threads::new(1)?);
    for (name, scheme) in matrices::schemes() {
        let matrix = matrices::random(scheme, ROWS, COLS, &mut rng);
        let columns = matrix.group_order().unwrap_or_default();
        if !tiles::is_native(&matrix, &columns) {
            continue;
        }
        let kernel = simd.dispatch(ChooseKernel { scheme: &scheme, arithmetic })?;
        let tiles = Tiles::pack(&matrix, &columns, kernel.as_ref(), &threads)?;
        (name, tiles.factor.to_bits(), tiles.sections().map(TileBytes::bytes)).hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}
