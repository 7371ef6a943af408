//! What `quantize` says at its end.

use std::borrow::Cow;
use std::time::Duration;

use marlin_format::Scheme;
use marlin_quantize::{ErrorStats, MatrixReport, Recipe, Report, kind_of, layer_and_kind};
use serde_json::{Value, json};

use super::Args;
use super::bits::Bits;
use super::card;
use super::cold::Cold;
use super::measured::Measured;
use super::rotate;
use crate::cli::calibration::Rounding;
use crate::memory::Account;

/// Everything there is to say.
pub(super) struct Summary<'a> {
    pub(super) args: &'a Args,
    pub(super) recipe: Recipe,
    pub(super) rounding: Rounding,
    /// Of `--fit`.
    pub(super) account: Option<Account>,
    /// Of `--target-bpw` and `--plan`.
    pub(super) bits: Option<Bits>,
    pub(super) cold: Option<Cold>,
    pub(super) report: Report,
    /// Of `--text`.
    pub(super) measured: Option<Measured>,
    pub(super) time: Duration,
}

impl Summary<'_> {
    pub(super) fn to_json(&self) -> Value {
        let Self { args, recipe, report, .. } = self;
        let matrix = |m: &MatrixReport| {
            json!({
                "name": m.name,
                "shape": m.shape,
                "scheme": m.scheme.to_string(),
                "bits_per_weight": m.scheme.bits_per_weight(m.shape[0], m.shape[1]),
                "relative_rms_error": m.error.relative_rms(),
                "sqnr_db": m.error.sqnr_db(),
                "max_abs_error": m.error.max_abs,
            })
        };
        json!({
            "model": args.model,
            "out": args.out,
            "scheme": self.bits.as_ref().map_or_else(|| recipe.linears.to_string(), |_| "mixed".into()),
            "exceptions": recipe.exceptions.len(),
            "embedding_scheme": recipe.embedding.map(|scheme| scheme.to_string()),
            "fit": self.account.map(|account| account.to_json()),
            "plan": self.bits.as_ref().map(Bits::to_json),
            "cold_experts": self.cold.as_ref().map(Cold::to_json),
            "method": self.rounding.method(),
            "calibration_tokens": self.rounding.tokens(),
            "scaled_inputs": report.scaled_inputs,
            "rotation": report.rotation.map(|blocks| rotate::to_json(&blocks)),
            "layout": args.layout.name(),
            "bits_per_weight": report.after.bits_per_weight(),
            "decoder_bits_per_weight": report.after.linear_bits_per_weight(),
            "bytes_before": report.before.bytes,
            "bytes_after": report.after.bytes,
            "matrices": report.matrices.iter().map(matrix).collect::<Vec<_>>(),
            "kept": report.kept,
            "quality": self.measured.as_ref().map(Measured::to_json),
            "resumed_tensors": report.resumed,
            "seconds": self.time.as_secs_f64(),
        })
    }

    pub(super) fn to_text(&self) -> String {
        let Self { args, report, .. } = self;
        let mut text = table(&if args.verbose { every_matrix(report) } else { by_kind(report) });
        let (before, after) = (&report.before, &report.after);
        text += &format!(
            "\ndecoder linears {:>7.3} bits per weight {:>10.1} MB, from {:.1} MB\n",
            after.linear_bits_per_weight(),
            megabytes(after.linear_bytes),
            megabytes(before.linear_bytes),
        );
        text += &format!(
            "everything      {:>7.3} bits per weight {:>10.1} MB, from {:.1} MB\n",
            after.bits_per_weight(),
            megabytes(after.bytes),
            megabytes(before.bytes),
        );
        if self.rounding.tokens().is_some() {
            text += &format!("\n{}\n", self.rounding.to_text());
        }
        if let Some(inputs) = report.scaled_inputs {
            text += &format!("\n{}\n", card::scaled(inputs));
        }
        if let Some(blocks) = &report.rotation {
            text += &format!("\n{}\n", rotate::to_text(blocks));
        }
        if let Some(account) = &self.account {
            text += &format!("\n{}\n", account.to_text(&self.mix()));
        }
        if let Some(bits) = &self.bits {
            text += &format!("\n{}\n", bits.to_text());
        }
        if let Some(cold) = &self.cold {
            text += &format!("\n{}\n", cold.to_text());
        }
        if let Some(measured) = &self.measured {
            text += &format!("\n{}", measured.to_text());
        }
        if !report.kept.is_empty() {
            let mut kinds: Vec<_> = report.kept.iter().map(|name| kind_of(name)).collect();
            kinds.sort_unstable();
            kinds.dedup();
            text += &format!("kept as they are: {}\n", kinds.join(", "));
        }
        if report.resumed > 0 {
            text += &format!("went on after {} tensors of an interrupted run\n", report.resumed);
        }
        text += &format!("wrote {} in {:.1} s\n", args.out.display(), self.time.as_secs_f64());
        text
    }

    /// How `--fit` came to its mix.
    fn mix(&self) -> String {
        let Recipe { linears, exceptions, .. } = &self.recipe;
        match exceptions.len() {
            0 => format!("{linears} in all linears"),
            raised => format!("{linears}, and better in {raised} linears"),
        }
    }
}

/// A line of the table.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) count: usize,
    pub(super) scheme: Scheme,
    pub(super) bits: f64,
    pub(super) error: ErrorStats,
    /// Relative error of the worst matrix and where it is, if there are several.
    worst: String,
    /// The layers, where those of a kind differ in their scheme.
    layers: String,
}

fn table(lines: &[Line]) -> String {
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    let stored = lines.iter().map(|line| line.scheme.to_string().len()).max().unwrap_or(0).max(13);
    let layers = if lines.iter().any(|line| !line.layers.is_empty()) { "layers" } else { "" };
    let row = |cells: [&str; 9]| {
        let [name, count, scheme, bits, rms, sqnr, max, worst, layers] = cells;
        let line = format!(
            "{name:width$} {count:>8}  {scheme:<stored$} {bits:>6}  {rms:>9} {sqnr:>8} {max:>10}  {worst:<18}  {layers}"
        );
        line.trim_end().to_owned() + "\n"
    };
    let mut text = row(["matrix", "matrices", "stored as", "bits", "rms error", "SQNR", "max error", "worst", layers]);
    for line in lines {
        text += &row([
            &line.name,
            &line.count.to_string(),
            &line.scheme.to_string(),
            &format!("{:.3}", line.bits),
            &format!("{:.3}%", line.error.relative_rms() * 100.0),
            &format!("{:.1} dB", line.error.sqnr_db()),
            &format!("{:.2e}", line.error.max_abs),
            &line.worst,
            &line.layers,
        ]);
    }
    text
}

fn every_matrix(report: &Report) -> Vec<Line> {
    let line = |m: &MatrixReport| Line {
        name: m.name.clone(),
        count: 1,
        scheme: m.scheme,
        bits: m.scheme.bits_per_weight(m.shape[0], m.shape[1]),
        error: m.error,
        worst: String::new(),
        layers: String::new(),
    };
    report.matrices.iter().map(line).collect()
}

/// What matrices of a line have in common.
type Kind<'a> = (Cow<'a, str>, Scheme);

/// One line for the matrices that differ only in their layer or expert.
pub(super) fn by_kind(report: &Report) -> Vec<Line> {
    let mut kinds: Vec<(Kind<'_>, Vec<&MatrixReport>)> = Vec::new();
    for matrix in &report.matrices {
        let kind = (kind_of(&matrix.name), matrix.scheme);
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, matrices)) => matrices.push(matrix),
            None => kinds.push((kind, vec![matrix])),
        }
    }
    // Those of one kind together, in the order in which kinds appear.
    let first = |name: &str| report.matrices.iter().position(|m| kind_of(&m.name) == name);
    kinds.sort_by_key(|((name, _), _)| first(name));
    let is_split = |name: &str| kinds.iter().filter(|((other, _), _)| *other == name).count() > 1;
    let line = |((kind, scheme), matrices): &(Kind<'_>, Vec<&MatrixReport>)| {
        let worst = matrices.iter().max_by(|a, b| a.error.relative_rms().total_cmp(&b.error.relative_rms()));
        let worst = worst.and_then(|m| Some((layer_and_kind(&m.name).0?, m.error.relative_rms() * 100.0)));
        let weights: f64 = matrices.iter().map(|m| (m.shape[0] * m.shape[1]) as f64).sum();
        let bits =
            |m: &&MatrixReport| m.scheme.bits_per_weight(m.shape[0], m.shape[1]) * (m.shape[0] * m.shape[1]) as f64;
        let layers = matrices.iter().filter_map(|m| layer_and_kind(&m.name).0);
        Line {
            name: kind.to_string(),
            count: matrices.len(),
            scheme: *scheme,
            bits: matrices.iter().map(bits).sum::<f64>() / weights,
            error: matrices.iter().map(|m| m.error).fold(ErrorStats::default(), ErrorStats::merge),
            worst: worst.map_or(String::new(), |(layer, error)| format!("{error:.3}% in layer {layer}")),
            layers: if is_split(kind) { ranges(layers.collect()) } else { String::new() },
        }
    };
    kinds.iter().map(line).collect()
}

/// `0-2,5`
fn ranges(mut layers: Vec<usize>) -> String {
    layers.sort_unstable();
    layers.dedup();
    let runs = layers.chunk_by(|a, b| a + 1 == *b);
    let run = |run: &[usize]| match run {
        [first, .., last] => format!("{first}-{last}"),
        _ => run[0].to_string(),
    };
    runs.map(run).collect::<Vec<_>>().join(",")
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_listed_as_ranges() {
        assert_eq!(ranges(vec![7, 0, 1, 2, 4]), "0-2,4,7");
        assert_eq!(ranges(Vec::new()), "");
    }
}
