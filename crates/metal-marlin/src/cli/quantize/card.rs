//! The model card of a quantised folder.

use std::fs;
use std::path::Path;

use anyhow::Context;
use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_quantize::Report;

use super::Args;
use super::measured::Measured;
use super::report::by_kind;
use super::rotate;
use crate::cli::calibration::Rounding;
use crate::hub::HubId;

const CARD_FILE: &str = "README.md";
/// Fields of the source's card that hold for a copy as well.
const LICENCE: [&str; 3] = ["license", "license_name", "license_link"];

/// The card of a folder in these formats: where it comes from, what quality it kept if that was measured, how its matrices are stored, how it is
/// run.
pub(super) fn card(
    args: &Args,
    formats: &str,
    rounding: &Rounding,
    licence: &str,
    report: &Report,
    measured: Option<&Measured>,
) -> String {
    let layout = args.layout;
    let base = (!args.model.is_dir()).then(|| HubId::parse(args.model.to_str()?)).flatten();
    let library = if layout == ExportLayout::MetalMarlin { "metal-marlin" } else { "transformers" };

    let mut text = "---\n".to_owned();
    if let Some(base) = &base {
        text += &format!("base_model: {base}\nbase_model_relation: quantized\n");
    }
    text += licence;
    text += &format!("library_name: {library}\npipeline_tag: text-generation\ntags:\n- quantized\n- {layout}\n---\n\n");

    let from = base.map_or_else(|| name_of(&args.model), |base| base.to_string());
    text += &format!(
        "# {from} in {}\n\nQuantised by metal-marlin {} in the layout {layout}. It takes {:.1} MB, \
         {:.3} bits per weight ({:.3} in the decoder's linears); the source takes {:.1} MB. {}{}{}\n\n",
        formats,
        env!("CARGO_PKG_VERSION"),
        report.after.bytes as f64 / 1e6,
        report.after.bits_per_weight(),
        report.after.linear_bits_per_weight(),
        report.before.bytes as f64 / 1e6,
        rounding.to_text(),
        report.rotation.map_or(String::new(), |blocks| format!(" {}", rotate::to_text(&blocks))),
        report.scaled_inputs.map_or(String::new(), |inputs| format!(" {}", scaled(inputs))),
    );
    text += &measured.map_or(String::new(), Measured::to_markdown);
    text += "## Storage\n\n| matrix | matrices | stored as | bits per weight | rms error | SQNR |\n";
    text += "| --- | ---: | --- | ---: | ---: | ---: |\n";
    for line in by_kind(report) {
        text += &format!(
            "| {} | {} | {} | {:.3} | {:.3} % | {:.1} dB |\n",
            line.name,
            line.count,
            line.scheme,
            line.bits,
            line.error.relative_rms() * 100.0,
            line.error.sqnr_db(),
        );
    }
    let rest = match report.rotation {
        None => "source's; all other tensors are the source's",
        Some(_) => "source's rotated likewise; all other tensors are the source's, rotated where they must be",
    };
    text += &format!("\nErrors are those of the weights, relative to the {rest}.\n");
    if measured.is_none() {
        text += "What they cost in quality is measured by `metal-marlin eval FOLDER --baseline SOURCE --text FILE`.\n";
    }
    text += "\n## Running it\n\n```sh\nmetal-marlin run FOLDER \"What is an apple?\"\n";
    if layout != ExportLayout::MetalMarlin {
        text += "vllm serve FOLDER\n";
    }
    text += "```\n";
    text
}

/// A sentence about `--scale-channels`.
pub(super) fn scaled(inputs: usize) -> String {
    format!("Channels of {inputs} inputs of linears are scaled (AWQ).")
}

/// Puts a card in the place of a folder's: beside it first, so that there always is a whole one.
pub(super) fn replace(folder: &Path, card: &str) -> anyhow::Result<()> {
    let path = folder.join(CARD_FILE);
    let beside = folder.join(format!("{CARD_FILE}.partial"));
    let written = fs::write(&beside, card).and_then(|()| fs::rename(&beside, &path));
    written.with_context(|| format!("cannot write the model card {}", path.display()))
}

/// What the card of a model says of its licence.
pub(super) fn licence_of(source: &Checkpoint) -> anyhow::Result<String> {
    Ok(licence(source.file(CARD_FILE)?.as_deref().unwrap_or_default()))
}

/// The last part of a path.
fn name_of(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    absolute.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// The lines of a card's front matter that are about its licence.
fn licence(card: &[u8]) -> String {
    let card = String::from_utf8_lossy(card);
    let mut lines = card.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return String::new();
    }
    let front = lines.take_while(|line| line.trim_end() != "---");
    let is_licence = |line: &&str| {
        line.split_once(':').is_some_and(|(key, value)| LICENCE.contains(&key) && !value.trim().is_empty())
    };
    front.filter(is_licence).map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_is_that_of_the_source() {
        let card = "---\nlicense: other\nlanguage: en\nlicense_name: x\nlicense_link:\n---\nlicense: none\n";
        assert_eq!(licence(card.as_bytes()), "license: other\nlicense_name: x\n");
        assert_eq!(licence(b"# Title\nlicense: mit\n"), "");
        assert_eq!(licence(b""), "");
    }
}
