//! Folders in the layout of AWQ: those of the package `autoawq`, and broken ones.

mod common;

use std::fs;

use common::{Raw, assert_says, assert_scheme, folder, message, open_golden};
use marlin_checkpoint::{Checkpoint, Dtype, Layout};
use serde_json::{Value, json};

#[test]
fn folders_of_the_package_decode_as_there() {
    let checkpoint = open_golden("awq/qwen3");
    assert_eq!(checkpoint.layout(), Some(Layout::Awq));
    assert_scheme(&checkpoint, "model.layers.0.mlp.down_proj.weight", "int4 g16");
    assert_scheme(&checkpoint, "model.layers.0.self_attn.o_proj.weight", "int4-sym g16");
    for (name, module) in [
        ("awq/llama", "mlp.gate_proj"),
        ("awq/qwen3moe", "mlp.experts.3.up_proj"),
        ("awq/glm4moelite", "mlp.shared_experts.down_proj"),
        ("awq/glm4moelite", "self_attn.kv_a_proj_with_mqa"),
        ("awq/glm4moelite", "self_attn.kv_b_proj"),
    ] {
        assert_scheme(&open_golden(name), &format!("model.layers.0.{module}.weight"), "int4 g16");
    }
}

/// Two columns of eight rows, 0 to 7 and 8 to 15, as one group.
const CODES: Raw = ("x.qweight", Dtype::I32, &[2, 1], &[0x20, 0x64, 0x31, 0x75, 0xa8, 0xec, 0xb9, 0xfd]);
const SCALES: Raw = (
    "x.scales",
    Dtype::BF16,
    &[1, 8],
    &[0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f],
);
/// 0 to 7.
const ZEROS: Raw = ("x.qzeros", Dtype::I32, &[1, 1], &[0x20, 0x64, 0x31, 0x75]);

fn awq(bits: i64, group_size: i64) -> Value {
    json!({"quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": true, "version": "GEMM"})
}

fn with_config(quantization: &Value, tensors: &[Raw]) -> tempfile::TempDir {
    folder(&json!({"quantization_config": quantization}).to_string(), tensors)
}

#[test]
fn a_linear_made_by_hand() {
    let old = folder("{}", &[CODES, SCALES, ZEROS]);
    let said = r#"{"zero_point": true, "q_group_size": 2, "w_bit": 4, "version": "GEMM"}"#;
    fs::write(old.path().join("quant_config.json"), said).unwrap();
    for folder in
        [old, with_config(&awq(4, 2), &[CODES, SCALES, ZEROS]), with_config(&awq(4, -1), &[CODES, SCALES, ZEROS])]
    {
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["x.weight"]);
        assert_eq!(checkpoint.matrix("x.weight", 8, 2).unwrap().decode(), [0.0, 8.0].repeat(8));
    }
}

#[test]
fn rows_of_gemv_are_filled_up() {
    let checkpoint = open_golden("awq/gemv-llama");
    assert_scheme(&checkpoint, "model.layers.0.mlp.down_proj.weight", "int4 g32");
    assert_scheme(&checkpoint, "model.layers.0.mlp.up_proj.weight", "int4 row");

    // Columns 0 to 7 and 8 to 15 in groups of eight; zero points 1 and 2, scales 1 and 2, then filling.
    let codes: Raw = ("x.qweight", Dtype::I32, &[1, 2], &[0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
    let zeros: Raw = ("x.qzeros", Dtype::I32, &[1, 1], &[0x21, 0xff, 0xff, 0xff]);
    let filled = [[0x00, 0x3c], [0x00, 0x40]].into_iter().chain([[0xff, 0x7f]; 6]).flatten().collect::<Vec<u8>>();
    let scales: Raw = ("x.scales", Dtype::F16, &[1, 8], &filled);
    let gemv = |group_size| {
        let mut quantization = awq(4, group_size);
        quantization["version"] = json!("GEMV");
        quantization
    };
    let checkpoint = Checkpoint::open(with_config(&gemv(8), &[codes, scales, zeros]).path()).unwrap();
    let wanted: Vec<f32> = (0..8).map(|q| q as f32 - 1.0).chain((8..16).map(|q| 2.0 * (q as f32 - 2.0))).collect();
    assert_eq!(checkpoint.matrix("x.weight", 1, 16).unwrap().decode(), wanted);

    let error = |quantization: &Value, tensors: &[Raw], words: &[&str]| {
        assert_says(&message(Checkpoint::open(with_config(quantization, tensors).path()).unwrap_err()), words);
    };
    let unfilled: Raw = ("x.scales", Dtype::F16, &[1, 2], &filled[..4]);
    error(&gemv(8), &[codes, unfilled, zeros], &["`x.scales` is F16 [1, 2]; wanted F16 [1, 8]"]);
    error(&gemv(1), &[codes, scales, zeros], &["`x.scales` is F16 [1, 8]; wanted F16 [1, 16]"]);
    error(&gemv(8), &[codes, scales], &["lack `x.qzeros`"]);
    error(&gemv(8), &[("x.qweight", Dtype::I32, &[2], &[0; 8]), scales, zeros], &["wanted a matrix of I32"]);
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let error = |quantization: &Value, tensors: &[Raw], words: &[&str]| {
        assert_says(&message(Checkpoint::open(with_config(quantization, tensors).path()).unwrap_err()), words);
    };
    let all = [CODES, SCALES, ZEROS];
    error(&awq(3, 2), &all, &["config.json", "bits is 3; wanted 4"]);
    error(&awq(4, 0), &all, &["group_size is 0"]);
    error(&awq(4, 1), &all, &["`x.scales` is BF16 [1, 8]; wanted BF16 [2, 8]"]);
    error(&json!({"quant_method": "awq"}), &all, &["config.json", "missing field `bits`"]);
    for version in ["gemv_fast", "marlin"] {
        let mut quantization = awq(4, 2);
        quantization["version"] = json!(version);
        error(&quantization, &all, &["awq, version", version, "not read yet"]);
    }
    error(&awq(4, 2), &[SCALES, ZEROS], &["lack `x.qweight`"]);
    error(&awq(4, 2), &[CODES, ZEROS], &["lack `x.scales`"]);
    error(&awq(4, 2), &[CODES, SCALES], &["lack `x.qzeros`"]);
    let huge: Raw = ("x.qweight", Dtype::I32, &[0, usize::MAX], &[]);
    error(&awq(4, 2), &[huge, SCALES, ZEROS], &["`x.qweight` is I32", "wanted a matrix"]);
    let floats: Raw = ("x.qweight", Dtype::F32, &[2, 1], &[0; 8]);
    error(&awq(4, 2), &[floats, SCALES, ZEROS], &["`x.qweight` is F32"]);
    let narrow: Raw = ("x.scales", Dtype::F16, &[1, 4], &[0; 8]);
    error(&awq(4, 2), &[CODES, narrow, ZEROS], &["`x.scales` is F16 [1, 4]; wanted F16 [1, 8]"]);
}
