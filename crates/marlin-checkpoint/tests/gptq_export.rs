//! What is written in the layout of GPTQ. `scripts/oracles/check_gptq.py` has its Python package read it.

mod common;

use std::fs;

use common::{assert_says, message};
use marlin_checkpoint::{CheckpointError, CheckpointWriter, Dtype, ExportLayout, PlannedTensor, WriterOptions};
use marlin_format::{EncodeOptions, Format, Grouping, PackedMatrix, Scheme};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn scheme(format: Format, group: Option<Grouping>) -> Result<Scheme, CheckpointError> {
    ExportLayout::Gptq.scheme(format.scheme(group).unwrap())
}

/// A folder with one linear and a router, its config.json and its stored tensors.
fn written(matrix: &PackedMatrix<'_>) -> (Value, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let planned = vec![
        PlannedTensor::matrix("model.layers.0.mlp.up_proj.weight", matrix.rows, matrix.cols, matrix.scheme),
        PlannedTensor::raw("model.layers.0.mlp.gate.weight", Dtype::F32, vec![1, 1]),
    ];
    let options = WriterOptions { layout: ExportLayout::Gptq, ..WriterOptions::default() };
    let mut writer = CheckpointWriter::create(&out, planned, json!({}), Vec::new(), &options).unwrap();
    writer.write_matrix("model.layers.0.mlp.up_proj.weight", matrix).unwrap();
    writer.write_raw("model.layers.0.mlp.gate.weight", Dtype::F32, &[1, 1], &[0; 4]).unwrap();
    writer.finish().unwrap();
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    (config["quantization_config"].clone(), fs::read(out.join("model.safetensors")).unwrap())
}

/// Decodes as the layout is defined: `scales[g] · (code − zero)`, zeros in version 1 less one.
fn decoded(config: &Value, file: &[u8]) -> Vec<f32> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let part = |name: &str| tensors.tensor(&format!("model.layers.0.mlp.up_proj.{name}")).unwrap();
    let words = |name: &str| {
        let bytes = part(name).data().to_vec();
        bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    let bits = config["bits"].as_u64().unwrap() as usize;
    let rows = part("scales").shape()[1];
    let scales = part("scales").data().to_vec();
    let scales: Vec<f32> = scales.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect();
    let (codes, zeros, index) = (words("qweight"), words("qzeros"), words("g_idx"));
    let (per_word, mask) = (32 / bits, (1u32 << bits) - 1);
    let offset = if config["checkpoint_format"] == "gptq" { 1 } else { 0 };
    let weight = |row: usize, col: usize| {
        let group = index[col] as usize;
        let code = codes[col / per_word * rows + row] >> (col % per_word * bits) & mask;
        let zero = zeros[group * (rows / per_word) + row / per_word] >> (row % per_word * bits) & mask;
        scales[group * rows + row] * (code as f32 - (zero + offset) as f32)
    };
    (0..rows).flat_map(|row| (0..index.len()).map(move |col| (row, col))).map(|(row, col)| weight(row, col)).collect()
}

#[test]
fn what_is_written_means_the_same() {
    let (rows, cols) = (24, 96);
    // The first rows have positive weights only, so that their zero points are 0.
    let value = |i: usize| ((i * 37 % 101) as f32 - if i < 4 * cols { -1.0 } else { 50.0 }) / 23.0;
    let weights: Vec<f32> = (0..rows * cols).map(value).collect();
    for format in [Format::Int4, Format::Int4Sym, Format::Int8] {
        for grouping in [Grouping::Columns(32), Grouping::Row] {
            let scheme = scheme(format, Some(grouping)).unwrap();
            let matrix = marlin_format::encode(&weights, rows, cols, &scheme, &EncodeOptions::default()).unwrap();
            let (config, file) = written(&matrix);
            assert_eq!(decoded(&config, &file), matrix.decode(), "{scheme}");
            let symmetric = format != Format::Int4;
            assert_eq!(config["quant_method"], "gptq");
            assert_eq!(config["bits"], scheme.element.bits());
            assert_eq!(config["group_size"], if grouping == Grouping::Row { -1 } else { 32 });
            assert_eq!((&config["sym"], &config["desc_act"]), (&json!(symmetric), &json!(false)));
            assert_eq!(config["checkpoint_format"], if symmetric { "gptq" } else { "gptq_v2" });
            assert_eq!(config["dynamic"], json!({"-:^model\\.layers\\.0\\.mlp\\.gate$": {}}));
        }
    }
}

#[test]
fn what_the_layout_has_no_place_for_is_refused() {
    for (format, group) in [
        (Format::Fp4, None),
        (Format::Int3, None),
        (Format::Mxfp4, None),
        (Format::Fp8, None),
        (Format::Int8, Some(Grouping::Tensor)),
    ] {
        let error = message(scheme(format, group).unwrap_err());
        assert_says(&error, &["gptq has no place for", "int4, int4-sym and int8", "choose one of them"]);
    }
    let folder = tempfile::tempdir().unwrap();
    let plan = |tensors: &[(&str, usize, usize, Format)]| {
        let planned = tensors.iter().map(|&(name, rows, cols, format)| {
            PlannedTensor::matrix(name, rows, cols, scheme(format, Some(Grouping::Columns(16))).unwrap())
        });
        let options = WriterOptions { layout: ExportLayout::Gptq, ..WriterOptions::default() };
        let out = folder.path().join("o");
        message(CheckpointWriter::create(&out, planned.collect(), json!({}), vec![], &options).unwrap_err())
    };
    assert_says(&plan(&[("x.weight", 8, 24, Format::Int4)]), &["`x.weight`", "24 columns are no multiple"]);
    assert_says(&plan(&[("x.weight", 12, 16, Format::Int4)]), &["`x.weight`", "12 rows", "words of 8 codes"]);
    assert_says(&plan(&[("x.kernel", 8, 16, Format::Int4)]), &["`x.kernel`", "….weight"]);
    let mixed = [("a.weight", 8, 16, Format::Int4), ("b.weight", 8, 16, Format::Int8)];
    assert_says(&plan(&mixed), &["packs all matrices alike", "`a.weight`", "`b.weight`", "choose one format"]);
}
