//! The options that say how a model is quantised.

use clap::ArgGroup;
use marlin_checkpoint::ExportLayout;
use marlin_format::{Format, Grouping, ScaleSearch, Scheme};
use marlin_quantize::{Recipe, embedding_scheme, quantized_formats};

/// Where `--help` has them.
pub(super) const HEADING: &str = "Quantisation";

/// The options that name the number format; the others refine it.
pub(super) const NUMBER_FORMAT: &str = "number format";

/// How to quantise.
#[derive(Debug, Clone, clap::Args)]
#[command(group(ArgGroup::new(NUMBER_FORMAT).args(["format", "bits"]).multiple(true)))]
pub(super) struct RecipeOptions {
    /// Number format of the decoder's matrices: fp4, int4, int4-sym, int8, fp8, int3, int2, mxfp4 or nvfp4
    #[arg(long, short, help_heading = HEADING)]
    pub(super) format: Option<Format>,

    /// Short for a format: 4 is fp4, 8 int8, 3 int3, 2 int2
    #[arg(long, help_heading = HEADING, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=8))]
    pub(super) bits: Option<u8>,

    /// Weights that share a scale: a number of columns, `row`, `tensor`, or a tile such as 128x128 [default: the
    /// format's own, see `quantize --help`]
    #[arg(long, short, help_heading = HEADING, value_name = "SIZE", requires = NUMBER_FORMAT)]
    pub(super) group_size: Option<Grouping>,

    /// Keep only the two largest of every four weights (2:4 sparsity): fp4, int4 and fp8. Embedding and head stay dense
    #[arg(long = "sparse-24", help_heading = HEADING, requires = NUMBER_FORMAT)]
    pub(super) sparse_24: bool,

    /// How weights are rounded [default: gptq for `quantize`, mse for commands that quantise at once]
    #[arg(long, help_heading = HEADING, value_enum, requires = NUMBER_FORMAT)]
    pub(super) method: Option<Method>,

    /// Number format of embedding and output head: one of the above, bf16, f16 or f32 [default: int8; with the layout
    /// compressed-tensors they are kept]
    #[arg(long, help_heading = HEADING, value_name = "FORMAT", requires = NUMBER_FORMAT)]
    pub(super) embedding_format: Option<Format>,

    /// Weights of the embedding that share a scale [default: 32 for int8, otherwise the format's own]
    #[arg(long, help_heading = HEADING, value_name = "SIZE", requires = NUMBER_FORMAT)]
    pub(super) embedding_group_size: Option<Grouping>,
}

/// `--method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Method {
    /// Each by itself, to nearest: the largest weight of a group just fits
    Rtn,
    /// Each by itself, in groups whose scale is that of the least squared error
    Mse,
    /// So that errors make up for each other on a calibration text (GPTQ): the model is run layer by layer
    Gptq,
}

impl Method {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Rtn, Self::Mse, Self::Gptq];

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Mse => "mse",
            Self::Gptq => "gptq",
        }
    }

    /// How it chooses scales, as far as they are chosen by weights alone.
    pub(super) fn search(self) -> ScaleSearch {
        match self {
            Self::Rtn => ScaleSearch::AbsMax,
            Self::Mse | Self::Gptq => ScaleSearch::Mse,
        }
    }
}

impl RecipeOptions {
    /// The recipe; `None` if no format is named.
    pub(super) fn recipe(&self, layout: ExportLayout) -> anyhow::Result<Option<Recipe>> {
        if self.format.is_none() && self.bits.is_none() {
            return Ok(None);
        }
        let format = format(self.format, self.bits)?;
        // Files of ggml are made of models that are not quantised, too.
        anyhow::ensure!(
            !format.is_dense() || layout == ExportLayout::Gguf,
            "{format} quantises nothing; {}",
            quantized_formats()
        );
        let linears = linear_scheme(format, grouping(format, self.group_size, layout), self.sparse_24)?;
        Ok(Some(Recipe::uniform(linears, self.embedding(layout)?, self.search())))
    }

    /// How scales are chosen.
    pub(super) fn search(&self) -> ScaleSearch {
        self.method.map_or(ScaleSearch::Mse, Method::search)
    }

    /// Refuses a method that a command which quantises at once does not have.
    pub(super) fn refuse_calibration(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.method != Some(Method::Gptq),
            "--method gptq runs the model over a calibration text: `metal-marlin quantize` does that, and writes a folder to run"
        );
        Ok(())
    }

    /// What `--embedding-format` asks for, or else what suits the layout; `None` keeps embedding and head.
    pub(super) fn embedding(&self, layout: ExportLayout) -> anyhow::Result<Option<Scheme>> {
        let dense = self.format.filter(|format| format.is_dense());
        let usual = layout.packs_embeddings().then_some(dense.unwrap_or(Format::Int8));
        match (self.embedding_format.or(usual), self.embedding_group_size) {
            (Some(format), given) => Ok(Some(embedding_scheme(format, grouping(format, given, layout))?)),
            (None, None) => Ok(None),
            (None, Some(_)) => anyhow::bail!(
                "--embedding-group-size has nothing to group: the layout {layout} keeps embedding and head as they are"
            ),
        }
    }
}

/// Groups that are asked for, or else those of blocks of GGUF if the format has groups; `None` stands for what is usual for it.
fn grouping(format: Format, given: Option<Grouping>, layout: ExportLayout) -> Option<Grouping> {
    let has_blocks = layout == ExportLayout::Gguf && !format.is_dense();
    given.or(has_blocks.then_some(Grouping::Columns(32)))
}

/// Storage of the decoder's matrices.
pub(super) fn linear_scheme(format: Format, grouping: Option<Grouping>, sparse_24: bool) -> anyhow::Result<Scheme> {
    Ok(if sparse_24 { format.sparse_24(grouping)? } else { format.scheme(grouping)? })
}

/// The format that `--format` and `--bits` agree on; clap has seen to it that there is one of them.
fn format(format: Option<Format>, bits: Option<u8>) -> anyhow::Result<Format> {
    let Some(bits) = bits else { return format.ok_or_else(|| anyhow::anyhow!("name a --format")) };
    let short = match bits {
        2 => Some(Format::Int2),
        3 => Some(Format::Int3),
        4 => Some(Format::Fp4),
        8 => Some(Format::Int8),
        _ => None,
    };
    let Some(format) = format else {
        return short
            .ok_or_else(|| anyhow::anyhow!("there is no format of {bits} bits; there are some of 2, 3, 4 and 8"));
    };
    let found = format.scheme(None)?.element.bits();
    if found != u32::from(bits) {
        anyhow::bail!("--format {format} has codes of {found} bits, --bits asks for {bits}; give one of the two");
    }
    Ok(format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_stand_for_formats_and_must_agree() {
        assert_eq!(format(None, Some(4)).unwrap(), Format::Fp4);
        assert_eq!(format(None, Some(2)).unwrap(), Format::Int2);
        assert_eq!(format(Some(Format::Int4), Some(4)).unwrap(), Format::Int4);
        assert_eq!(format(Some(Format::Nvfp4), None).unwrap(), Format::Nvfp4);
        let error = format(Some(Format::Int8), Some(4)).unwrap_err().to_string();
        assert_eq!(error, "--format int8 has codes of 8 bits, --bits asks for 4; give one of the two");
        assert!(format(None, Some(5)).unwrap_err().to_string().contains("5 bits"));
    }
}
