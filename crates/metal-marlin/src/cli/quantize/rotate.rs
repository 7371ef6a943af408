//! `--rotate`: Hadamard rotations before rounding.

use marlin_checkpoint::ExportLayout;
use marlin_model::{RotationBlocks, RotationParts};
use serde_json::{Value, json};

use crate::cli::recipe::HEADING;

/// The parts of a model, as `--rotate` names them.
const PARTS: [&str; 3] = ["hidden", "values", "mlp"];

/// [`RotationParts::USUAL`].
const USUAL: &str = "hidden,values";

/// What is rotated.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct RotateOptions {
    /// Rotate the model by Hadamard matrices before it is rounded, which spreads outliers: one or more of hidden, values and mlp
    /// [default of `--rotate` alone: hidden,values]. It then runs in this program only, which rotates hidden states twice a step and
    /// inputs of down_proj (mlp) in each layer
    #[arg(
        long,
        value_name = "PARTS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = USUAL,
        value_parser = parts,
        help_heading = HEADING
    )]
    rotate: Option<RotationParts>,
}

impl RotateOptions {
    /// The parts that are asked for.
    ///
    /// # Errors
    /// There are some, and the layout cannot say what a decoder has to rotate.
    pub(super) fn parts(&self, layout: ExportLayout) -> anyhow::Result<RotationParts> {
        anyhow::ensure!(
            self.rotate.is_none() || layout.rotates(),
            "--rotate is for the layout metal-marlin: programs that read {layout} would not rotate, and compute something else"
        );
        Ok(self.rotate.unwrap_or_default())
    }
}

fn parts(text: &str) -> Result<RotationParts, String> {
    let mut parts = RotationParts::default();
    for name in text.split(',') {
        match name {
            "hidden" => parts.hidden = true,
            "values" => parts.values = true,
            "mlp" => parts.mlp = true,
            _ => return Err(format!("parts are {}", PARTS.join(", "))),
        }
    }
    Ok(parts)
}

/// The blocks by the names of their parts.
fn named(blocks: &RotationBlocks) -> impl Iterator<Item = (&'static str, Option<usize>)> {
    PARTS.into_iter().zip([blocks.hidden, blocks.values, blocks.mlp])
}

/// For `--json`.
pub(super) fn to_json(blocks: &RotationBlocks) -> Value {
    named(blocks).map(|(name, block)| (name.to_owned(), json!(block))).collect::<serde_json::Map<_, _>>().into()
}

/// A sentence.
pub(super) fn to_text(blocks: &RotationBlocks) -> String {
    let parts = named(blocks).filter_map(|(name, block)| Some(format!("{name} {}", block?)));
    format!("Weights are rotated in Hadamard blocks: {}.", parts.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named() {
        assert_eq!(parts("hidden,values,mlp"), Ok(RotationParts::ALL));
        assert_eq!(parts(USUAL), Ok(RotationParts::USUAL));
        assert_eq!(parts("values"), Ok(RotationParts { values: true, ..RotationParts::default() }));
        for text in ["", "hidden,", "all", "hidden mlp"] {
            assert_eq!(parts(text), Err("parts are hidden, values, mlp".to_owned()), "{text}");
        }
    }
}
