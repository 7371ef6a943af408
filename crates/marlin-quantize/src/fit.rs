//! The best mix of formats that a budget of memory allows.
//!
//! Formats form a [`LADDER`]: those of `docs/quality.md` that no mix of two others beats. A mix begins with the best rung that
//! fits for all matrices. What is left of the budget raises matrices rung by rung, each time the one that gains most for its bytes
//! and still fits. Gains are estimated from what was measured: the KL divergence of the rungs, and how much rounding each kind of
//! matrix and each layer adds to it (`docs/mixes.md`).

use marlin_checkpoint::Storage;
use marlin_format::{Format, Grouping, ScaleSearch, Scheme};
use marlin_model::{MemoryPlan, ModelError, Planner};

use crate::{QuantizeError, Recipe, TensorRole, layer_and_kind};

/// Formats, their groups of columns and the mean KL of a model in them, from the best to the smallest. A test holds them against
/// `docs/quality.md`.
const LADDER: [(Format, u32, f64); 8] = [
    (Format::Int8, 32, 0.00029),
    (Format::Int8, 128, 0.00044),
    (Format::Int4, 32, 0.05665),
    (Format::Int4Sym, 32, 0.06359),
    (Format::Int4, 128, 0.08762),
    (Format::Int4Sym, 128, 0.09246),
    (Format::Int3, 64, 0.29560),
    (Format::Int2, 32, 1.30037),
];

/// What rounding a module's weights to 3 bits costs, in nats a billion weights, as `docs/mixes.md` measures it. Modules that are
/// several in one cost the mean of these, and those that other families have in their place cost the same.
const MODULES: [(&str, f64); 16] = [
    ("v_proj", 51.2),
    ("kv_a_proj_with_mqa", 30.3),
    ("kv_b_proj", 30.3),
    ("o_proj", 23.6),
    ("qkv_proj", 17.7),
    ("gate_proj", 9.7),
    ("w1", 9.7),
    ("k_proj", 9.3),
    ("gate_up_proj", 9.0),
    ("up_proj", 8.4),
    ("w3", 8.4),
    ("down_proj", 7.0),
    ("w2", 7.0),
    ("q_proj", 5.1),
    ("q_a_proj", 5.1),
    ("q_b_proj", 5.1),
];

/// What rounding the first and the last layer costs, where a layer between them costs 1.
const FIRST_LAYER: f64 = 3.8;
const LAST_LAYER: f64 = 1.25;

/// What a model is to fit into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Memory for everything, in bytes.
    pub memory: u64,
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences at once.
    pub sequences: usize,
}

/// A mix of formats.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// What each matrix is to become. Its exceptions are the matrices that were raised.
    pub recipe: Recipe,
    /// What the model will take: not more than the budget.
    pub plan: MemoryPlan,
}

/// The rungs of the ladder, from the best to the smallest.
fn ladder() -> [Scheme; LADDER.len()] {
    LADDER.map(|(format, columns, _)| {
        format.scheme(Some(Grouping::Columns(columns))).expect("groups of columns suit every format of the ladder")
    })
}

/// A decoder linear.
struct Matrix {
    name: String,
    /// What the device holds of it on each rung.
    bytes: [u64; LADDER.len()],
    /// Its share in the KL of a model whose matrices are all on one rung, in a unit that all matrices share.
    share: f64,
}

impl Matrix {
    /// KL that the step from `rung` to the next better one saves for a byte; infinite if it takes no more bytes.
    fn gain(&self, rung: usize) -> Option<f64> {
        let next = rung.checked_sub(1)?;
        let saved = self.share * (LADDER[rung].2 - LADDER[next].2);
        let bytes = self.bytes[next].saturating_sub(self.bytes[rung]);
        Some(if bytes == 0 { f64::INFINITY } else { saved / bytes as f64 })
    }
}

/// The recipe that keeps most of a model's quality in this budget, by the plan of loading its output on the planner's device.
/// `embedding` and `search` are as in [`Recipe`]. Its answer depends on headers only, never on weights.
///
/// # Errors
/// [`QuantizeError::DoesNotFit`] if even the smallest format takes more; the source is quantised already or has no decoder
/// linears known here; the context is longer than the model's.
pub fn fit(
    planner: &Planner<'_>,
    budget: &Budget,
    embedding: Option<Scheme>,
    search: ScaleSearch,
) -> Result<Fit, QuantizeError> {
    let matrices = matrices(planner)?;
    let options = planner.load_options(budget.context, budget.sequences);
    let (base, plan) =
        best_rung(planner, budget, |linears| Recipe::uniform(linears, embedding, search).plan(planner, &options))?;

    let rungs = raise(&matrices, base, budget.memory - plan.total());
    let ladder = ladder();
    let raised = matrices.into_iter().zip(rungs).filter(|(_, rung)| *rung != base);
    let recipe = Recipe {
        exceptions: raised.map(|(matrix, rung)| (matrix.name, ladder[rung])).collect(),
        ..Recipe::uniform(ladder[base], embedding, search)
    };
    let plan = recipe.plan(planner, &options)?;
    Ok(Fit { recipe, plan })
}

/// The best rung that fits for all matrices, and its plan.
fn best_rung(
    planner: &Planner<'_>,
    budget: &Budget,
    plan: impl Fn(Scheme) -> Result<MemoryPlan, ModelError>,
) -> Result<(usize, MemoryPlan), QuantizeError> {
    let mut smallest: Option<(Scheme, MemoryPlan)> = None;
    for (rung, scheme) in ladder().into_iter().enumerate() {
        let plan = plan(scheme)?;
        if plan.total() <= budget.memory {
            return Ok((rung, plan));
        }
        // Where a device has no kernel for a matrix it converts it, and the last rung need not be the smallest.
        if smallest.is_none_or(|(_, smallest)| plan.total() < smallest.total()) {
            smallest = Some((scheme, plan));
        }
    }
    let (scheme, plan) = smallest.expect("the ladder has rungs");
    Err(QuantizeError::DoesNotFit {
        model: planner.checkpoint().name().to_owned(),
        memory: budget.memory,
        sequences: budget.sequences,
        scheme,
        plan: Box::new(plan),
    })
}

/// The rung of each matrix after `left` bytes are spent on raising them from `base`.
fn raise(matrices: &[Matrix], base: usize, mut left: u64) -> Vec<usize> {
    let mut rungs = vec![base; matrices.len()];
    loop {
        // Of equal gains the first, for `max_by` gives the last.
        let candidates = matrices.iter().zip(&rungs).enumerate().rev().filter_map(|(index, (matrix, &rung))| {
            let gain = matrix.gain(rung)?;
            let left = left.saturating_add(matrix.bytes[rung]).checked_sub(matrix.bytes[rung - 1])?;
            Some((gain, index, left))
        });
        let Some((_, best, rest)) = candidates.max_by(|a, b| a.0.total_cmp(&b.0)) else { return rungs };
        rungs[best] -= 1;
        left = rest;
    }
}

/// The decoder linears of the model.
fn matrices(planner: &Planner<'_>) -> Result<Vec<Matrix>, QuantizeError> {
    let (checkpoint, layers, ladder) = (planner.checkpoint(), planner.shape().layers, ladder());
    let mut matrices = Vec::new();
    for name in checkpoint.tensor_names().filter(|name| planner.is_loaded(name)) {
        let Some(info) = checkpoint.info(name) else { continue };
        if let Storage::Packed(scheme) = info.storage {
            return Err(QuantizeError::already_quantized(checkpoint, name, scheme));
        }
        let &[rows, cols] = info.shape.as_slice() else { continue };
        if TensorRole::of(name, 2) != TensorRole::DecoderLinear {
            continue;
        }
        let mut bytes = [0; LADDER.len()];
        for (bytes, scheme) in bytes.iter_mut().zip(&ladder) {
            *bytes = planner.matrix_bytes(name, rows, cols, scheme)?;
        }
        let share = rows as f64 * cols as f64 * sensitivity(name, layers);
        matrices.push(Matrix { name: name.to_owned(), bytes, share });
    }
    if matrices.is_empty() {
        return Err(QuantizeError::nothing_to_quantize(checkpoint));
    }
    Ok(matrices)
}

/// What rounding a weight of this matrix costs, by its module and its layer.
fn sensitivity(name: &str, layers: usize) -> f64 {
    let (layer, kind) = layer_and_kind(name);
    let module = kind.rsplit('.').next().unwrap_or(kind);
    let (_, cost) = MODULES.into_iter().find(|(known, _)| *known == module).unwrap_or(MODULES[MODULES.len() - 1]);
    match layer {
        Some(0) => cost * FIRST_LAYER,
        Some(layer) if layer + 1 == layers => cost * LAST_LAYER,
        _ => cost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rung of the ladder as docs/quality.md measures it.
    #[derive(Debug, Clone, PartialEq)]
    struct Measured {
        format: String,
        bits: f64,
        kl: f64,
    }

    /// The rows with searched scales, the largest first.
    fn measured() -> Vec<Measured> {
        let page = include_str!("../../../docs/quality.md");
        let row = |line: &str| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let &["", format, "mse", _, bits, _, _, _, kl, ..] = cells.as_slice() else { return None };
            Some(Measured { format: format.to_owned(), bits: bits.parse().ok()?, kl: kl.parse().ok()? })
        };
        let mut rows: Vec<Measured> = page.lines().filter_map(row).collect();
        rows.sort_by(|a, b| b.bits.total_cmp(&a.bits));
        rows
    }

    /// KL a bit between two measurements.
    fn slope(large: &Measured, small: &Measured) -> f64 {
        (small.kl - large.kl) / (large.bits - small.bits)
    }

    /// Matrices in a mix of two formats lie on the line between them, so a format above such a line is not worth having.
    #[test]
    fn the_ladder_is_what_no_mix_of_measured_formats_beats() {
        let rows = measured();
        assert!(rows.len() >= 17, "docs/quality.md has only {} rows with searched scales", rows.len());
        let mut hull: Vec<Measured> = Vec::new();
        for row in rows {
            // Larger and worse.
            hull.retain(|other| other.kl < row.kl);
            while let [.., before, last] = hull.as_slice()
                && slope(before, last) >= slope(last, &row)
            {
                hull.pop();
            }
            hull.push(row);
        }
        let hull: Vec<(String, f64)> = hull.into_iter().map(|row| (row.format, row.kl)).collect();
        let names = ladder().map(|scheme| scheme.to_string()).into_iter();
        assert_eq!(hull, names.zip(LADDER.map(|(_, _, kl)| kl)).collect::<Vec<_>>());
    }

    #[test]
    fn matrices_differ_by_module_and_layer() {
        let of = |layer: usize, path: &str| sensitivity(&format!("model.layers.{layer}.{path}.weight"), 4);
        assert_eq!(of(1, "self_attn.v_proj"), 51.2);
        assert_eq!(of(2, "mlp.down_proj"), 7.0);
        assert!(of(0, "mlp.down_proj") > of(3, "mlp.down_proj") && of(3, "mlp.down_proj") > of(2, "mlp.down_proj"));
    }

    #[test]
    fn every_linear_has_its_cost() {
        for (module, _) in MODULES {
            let name = format!("model.layers.0.block.{module}.weight");
            assert_eq!(TensorRole::of(&name, 2), TensorRole::DecoderLinear, "{module}");
        }
        assert_eq!(MODULES.len(), crate::role::DECODER_LINEARS.len());
    }

    /// Matrices `(size, sensitivity)`, whose rungs are as far apart as those of a large matrix.
    fn matrices<const N: usize>(matrices: [(u64, f64); N]) -> [Matrix; N] {
        matrices.map(|(size, sensitivity)| Matrix {
            name: String::new(),
            bytes: [680, 650, 380, 360, 335, 330, 270, 220].map(|n| n * size),
            share: size as f64 * sensitivity,
        })
    }

    #[test]
    fn what_is_left_goes_where_it_gains_most() {
        // Two small ones, and between them a large one that is a little more sensitive.
        let three = matrices([(1, 1.0), (10, 1.1), (1, 1.0)]);
        assert_eq!(raise(&three, 7, 49), [7, 7, 7]);
        // Of equals the first.
        assert_eq!(raise(&three, 7, 50), [6, 7, 7]);
        // What does not fit is passed over.
        assert_eq!(raise(&three, 7, 499), [2, 7, 2]);
        assert_eq!(raise(&three, 7, 500), [7, 6, 7]);
        assert_eq!(raise(&three, 7, 600), [6, 6, 6]);
        // Nothing is better than the first rung.
        assert_eq!(raise(&three, 7, u64::MAX), [0, 0, 0]);

        // A very sensitive matrix gains more by going from int4 to int8 than another by going from int3 to int4.
        assert_eq!(raise(&matrices([(1, 1.0), (1, 9.0)]), 6, 380), [2, 2]);
        assert_eq!(raise(&matrices([(1, 1.0), (1, 30.0)]), 6, 380), [6, 1]);
    }

    #[test]
    fn a_better_rung_that_takes_no_more_is_free() {
        let mut converted = matrices([(1, 1.0)]);
        converted[0].bytes = [40, 39, 38, 37, 4, 3, 2, 32];
        assert_eq!(raise(&converted, 7, 0), [4]);
    }
}
