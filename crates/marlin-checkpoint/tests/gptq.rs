//! Folders in the layout of GPTQ: those of the package `gptqmodel`, and broken ones.

mod common;

use std::fs;

use common::{Raw, assert_says, assert_scheme, folder, message, open_golden};
use marlin_checkpoint::{Checkpoint, Dtype, Layout, Storage};
use serde_json::{Value, json};

#[test]
fn folders_of_the_package_decode_as_there() {
    let block = "model.layers.0";
    let checkpoint = open_golden("gptq/qwen3");
    assert_eq!(checkpoint.layout(), Some(Layout::Gptq));
    assert!(checkpoint.notes().is_empty() && checkpoint.quantization().is_none());
    // All zero points in the middle make signed codes, an index in order is none.
    for (module, scheme) in [
        ("self_attn.q_proj", "int4-sym g16, group index"),
        ("self_attn.k_proj", "int2 g16"),
        ("self_attn.v_proj", "int4 g16"),
        ("self_attn.o_proj", "int3 g16, group index"),
        ("mlp.gate_proj", "int8-asym g16"),
        ("mlp.up_proj", "int3-sym row"),
        ("mlp.down_proj", "int4-sym g16"),
    ] {
        assert_scheme(&checkpoint, &format!("{block}.{module}.weight"), scheme);
    }
    assert_scheme(&checkpoint, "lm_head.weight", "int8 g16");

    let checkpoint = open_golden("gptq/qwen3moe");
    assert_scheme(&checkpoint, &format!("{block}.mlp.experts.3.down_proj.weight"), "int4-sym g16");
    assert_scheme(&checkpoint, &format!("{block}.mlp.experts.0.gate_proj.weight"), "int8-asym g16");

    // What the package calibrated and saved.
    let checkpoint = open_golden("gptq/llama");
    assert_scheme(&checkpoint, &format!("{block}.mlp.down_proj.weight"), "int4 g16, group index");
    let checkpoint = open_golden("gptq/glm4moelite");
    for module in ["self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "mlp.experts.3.up_proj"] {
        assert_scheme(&checkpoint, &format!("{block}.{module}.weight"), "int4-sym g16");
    }
    assert_scheme(&checkpoint, &format!("{block}.self_attn.kv_b_proj.weight"), "int8 row");
    let left = checkpoint.info(&format!("{block}.self_attn.q_a_proj.weight")).unwrap();
    assert!(matches!(left.storage, Storage::Plain(Dtype::F32)));
}

fn gptq(bits: i64, group_size: i64) -> Value {
    json!({"quant_method": "gptq", "bits": bits, "group_size": group_size})
}

/// Eight columns of a row, 0 to 7, and of seven more that are 0; two groups of four.
const CODES: Raw = ("x.qweight", Dtype::I32, &[1, 8], &CODE_BYTES);
const CODE_BYTES: [u8; 32] = beginning_with([0x10, 0x32, 0x54, 0x76]);
/// 1 and 2 for the row.
const SCALES: Raw = ("x.scales", Dtype::F16, &[2, 8], &SCALE_BYTES);
const SCALE_BYTES: [u8; 32] = {
    let mut bytes = beginning_with([0x00, 0x3c, 0, 0]);
    bytes[17] = 0x40;
    bytes
};
/// 1 and 2 for the row, minus one.
const ZEROS: Raw = ("x.qzeros", Dtype::I32, &[2, 1], &[0, 0, 0, 0, 1, 0, 0, 0]);

const fn beginning_with(first: [u8; 4]) -> [u8; 32] {
    let mut bytes = [0; 32];
    let mut i = 0;
    while i < 4 {
        bytes[i] = first[i];
        i += 1;
    }
    bytes
}

fn with_config(quantization: &Value, tensors: &[Raw]) -> tempfile::TempDir {
    folder(&json!({"quantization_config": quantization}).to_string(), tensors)
}

fn row(folder: &tempfile::TempDir) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["x.weight"]);
    let matrix = checkpoint.matrix("x.weight", 8, 8).unwrap();
    matrix.decode()[..8].to_vec()
}

fn open_error(quantization: &Value, tensors: &[Raw]) -> String {
    message(Checkpoint::open(with_config(quantization, tensors).path()).unwrap_err())
}

#[test]
fn a_linear_made_by_hand() {
    let natural = [-1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    assert_eq!(row(&with_config(&gptq(4, 4), &[CODES, SCALES, ZEROS])), natural);
    let mut second = gptq(4, 4);
    second["checkpoint_format"] = json!("gptq_v2");
    let stored = [0.0, 1.0, 2.0, 3.0, 6.0, 8.0, 10.0, 12.0];
    assert_eq!(row(&with_config(&second, &[CODES, SCALES, ZEROS])), stored);

    // The groups of the first and the last column change places.
    let index: Vec<u8> = [1i32, 0, 0, 0, 1, 1, 1, 0].iter().flat_map(|group| group.to_le_bytes()).collect();
    let order: Raw = ("x.g_idx", Dtype::I32, &[8], &index);
    let found = row(&with_config(&gptq(4, 4), &[CODES, SCALES, ZEROS, order]));
    assert_eq!(found, [-4.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 6.0]);

    // Before config.json said so, a file beside it did.
    let old = folder("{}", &[CODES, SCALES, ZEROS]);
    fs::write(old.path().join("quantize_config.json"), r#"{"bits": 4, "group_size": 4, "desc_act": false}"#).unwrap();
    assert_eq!(row(&old), natural);
    fs::write(old.path().join("quantize_config.json"), r#"{"bits": 5, "group_size": 4}"#).unwrap();
    assert_says(&message(Checkpoint::open(old.path()).unwrap_err()), &["quantize_config.json", "bits is 5"]);
}

#[test]
fn rules_of_dynamic_are_tried_in_order() {
    let folder = |dynamic: Value| {
        let mut quantization = gptq(8, 128);
        quantization["dynamic"] = dynamic;
        with_config(&quantization, &[CODES, SCALES, ZEROS])
    };
    let decodes = [-1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    assert_eq!(row(&folder(json!({"+:x": {"bits": 4, "group_size": 4}, "-:.*": {}}))), decodes);
    assert_eq!(row(&folder(json!({"+:y": {"bits": 2}, "x$": {"bits": 4, "group_size": 4}}))), decodes);
    let error = |dynamic| message(Checkpoint::open(folder(dynamic).path()).unwrap_err());
    assert_says(&error(json!({"-:x": {}})), &["`x` is stored quantised", "`-:`"]);
    assert_says(&error(json!({"+:(": {"bits": 4}})), &["dynamic `+:(`", "no regular expression"]);
    assert_says(&error(json!({"+:x": {"bits": 7}})), &["dynamic `+:x`", "bits is 7"]);
    assert_says(&error(json!({"+:x": {"bits": "4"}})), &["dynamic `+:x`", "\"4\""]);
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let all = [CODES, SCALES, ZEROS];
    let config = |quantization: Value, words: &[&str]| assert_says(&open_error(&quantization, &all), words);
    config(gptq(5, 4), &["config.json", "bits is 5; wanted 2, 3, 4 or 8"]);
    config(gptq(4, 0), &["group_size is 0"]);
    config(gptq(4, -2), &["group_size is -2"]);
    config(gptq(4, 1 << 40), &["group_size is 1099511627776"]);
    config(json!({"quant_method": "gptq", "bits": 4}), &["group_size"]);
    for (field, value) in [("checkpoint_format", json!("marlin")), ("is_marlin_format", json!(true))] {
        let mut quantization = gptq(4, 4);
        quantization[field] = value;
        config(quantization, &["gptq", "marlin", "not read yet"]);
    }
    // Other groups than the tensors have.
    config(gptq(4, 2), &["`x.scales` is F16 [2, 8]; wanted F16 [4, 8]"]);
    config(gptq(4, 128), &["`x.scales` is F16 [2, 8]; wanted F16 [1, 8]"]);
    config(gptq(8, 4), &["`x.scales` is F16 [2, 8]; wanted F16 [1, 8]"]);
    config(gptq(3, 4), &["1 words of 3-bit codes"]);

    let tensors = |tensors: &[Raw], words: &[&str]| assert_says(&open_error(&gptq(4, 4), tensors), words);
    tensors(&[SCALES, ZEROS], &["`x` is stored quantised", "lack `x.qweight`"]);
    tensors(&[CODES, ZEROS], &["lack `x.scales`"]);
    tensors(&[CODES, SCALES], &["`x.weight`", "lack `x.qzeros`"]);
    let plain: Raw = ("x.weight", Dtype::U8, &[1], &[0]);
    tensors(&[CODES, SCALES, ZEROS, plain], &["`x` is stored both quantised and as `x.weight`"]);
    let bytes: Raw = ("x.qweight", Dtype::U8, &[4, 8], &CODE_BYTES);
    tensors(&[bytes, SCALES, ZEROS], &["`x.qweight` is U8 [4, 8]"]);
    let flat: Raw = ("x.qweight", Dtype::I32, &[8], &CODE_BYTES);
    tensors(&[flat, SCALES, ZEROS], &["`x.qweight` is I32 [8]; wanted a matrix"]);
    let empty: Raw = ("x.qweight", Dtype::I32, &[usize::MAX, 0], &[]);
    tensors(&[empty, SCALES, ZEROS], &["neither `g_idx`"]);
    let empty: Raw = ("x.qweight", Dtype::I32, &[1, 0], &[]);
    tensors(&[empty, SCALES, ZEROS], &["`x.weight`", "[0, 8]"]);
    let scales: Raw = ("x.scales", Dtype::I32, &[2, 4], &SCALE_BYTES);
    tensors(&[CODES, scales, ZEROS], &["`x.scales` is I32", "F16"]);
    let zeros: Raw = ("x.qzeros", Dtype::I32, &[2, 2], &[0; 16]);
    tensors(&[CODES, SCALES, zeros], &["`x.qzeros` is I32 [2, 2]; wanted I32 [2, 1]"]);

    let index = |groups: [i32; 8], words: &[&str]| {
        let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
        tensors(&[CODES, SCALES, ZEROS, ("x.g_idx", Dtype::I32, &[8], &bytes)], words);
    };
    index([0, 0, 0, 0, 1, 1, 1, 2], &["`x.g_idx`", "column 7 into group 2 of 2"]);
    index([0, -1, 0, 0, 1, 1, 1, 1], &["`x.g_idx`", "column 1 into group -1 of 2"]);
    let long: Raw = ("x.g_idx", Dtype::I32, &[9], &[0; 36]);
    tensors(&[CODES, SCALES, ZEROS, long], &["`x.qweight` is I32 [1, 8]; wanted I32 [2, 8]"]);
    let floats: Raw = ("x.g_idx", Dtype::F32, &[8], &[0; 32]);
    tensors(&[CODES, SCALES, ZEROS, floats], &["`x.g_idx` is F32"]);
    let square: Raw = ("x.g_idx", Dtype::I32, &[2, 4], &[0; 32]);
    tensors(&[CODES, SCALES, ZEROS, square], &["neither `g_idx`"]);
}
