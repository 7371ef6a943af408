//! Folders in the layout of MLX: one made by the package, and broken ones.

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{Raw, assert_says, folder, message};
use marlin_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Layout, PlannedTensor, Storage, WriterOptions};
use marlin_format::Scheme;
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/mlx")
}

/// What `mlx.core.dequantize` gives in f32 (`scripts/goldens/make_mlx_goldens.py`).
fn expected() -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(golden().join("expected.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensors.iter().map(|(name, view)| (name.to_owned(), floats(view.data()))).collect()
}

#[test]
fn a_folder_of_the_package_decodes_as_there() {
    let checkpoint = Checkpoint::open(&golden()).unwrap();
    let mut names: Vec<&str> = checkpoint.tensor_names().collect();
    names.sort_unstable();
    let expected = expected();
    assert_eq!(names, expected.keys().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(checkpoint.layout(), Some(Layout::Mlx));
    assert!(checkpoint.notes().is_empty() && checkpoint.quantization().is_none());

    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for (name, wanted) in &expected {
        let matrix = checkpoint.matrix_any(name).unwrap();
        assert_eq!(bits(&matrix.decode()), bits(wanted), "{name}");
        // Nothing is copied, the matrices of stacks neither.
        assert!(matches!((&matrix.codes, &matrix.scales), (Cow::Borrowed(_), Cow::Borrowed(_))), "{name}");
    }
    for (name, scheme) in [
        ("a.u4.weight", "u4 g32 + f16 bias"),
        ("a.u4_g64.weight", "u4 g64 bf16 scales + bf16 bias"),
        ("a.u3_g128.weight", "u3 g128 f32 scales + f32 bias"),
        ("model.layers.0.mlp.experts.2.up_proj.weight", "u5 g32 bf16 scales + bf16 bias"),
        ("b.mxfp4.weight", "mxfp4"),
        ("b.mxfp8.weight", "mxfp8"),
        ("b.nvfp4.weight", "nvfp4"),
        ("model.layers.0.mlp.experts.0.down_proj.weight", "mxfp4"),
    ] {
        let Storage::Packed(found) = checkpoint.info(name).unwrap().storage else { panic!("{name} is not packed") };
        assert_eq!(found.to_string(), scheme, "{name}");
    }
    // Codes, and a scale and a bias of two bytes for 32 of them.
    assert_eq!(checkpoint.info("a.u4.weight").unwrap().bytes, 6 * (96 / 2 + 3 * 4));
}

#[test]
fn a_copy_in_our_layout_has_no_trace_of_the_other() {
    let source = Checkpoint::open(&golden()).unwrap();
    let matrix = source.matrix_any("a.u6.weight").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let planned = vec![PlannedTensor::matrix("a.u6.weight", matrix.rows, matrix.cols, matrix.scheme)];
    let config = source.config().clone();
    let mut writer = CheckpointWriter::create(&out, planned, config, Vec::new(), &WriterOptions::default()).unwrap();
    writer.write_matrix("a.u6.weight", &matrix).unwrap();
    writer.finish().unwrap();
    let copy = Checkpoint::open(&out).unwrap();
    assert_eq!(copy.layout(), Some(Layout::MetalMarlin));
    assert_eq!(copy.matrix_any("a.u6.weight").unwrap(), matrix);
    assert!(copy.config().get("quantization").is_none());
}

fn config(quantization: Value) -> String {
    json!({ "quantization": quantization }).to_string()
}

fn int4() -> String {
    config(json!({"group_size": 32, "bits": 4}))
}

const CODES: Raw = ("x.weight", Dtype::U32, &[1, 4], &[0x10; 16]);
const SCALES: Raw = ("x.scales", Dtype::F16, &[1, 1], &[0x00, 0xb8]); // -0.5
const BIASES: Raw = ("x.biases", Dtype::F16, &[1, 1], &[0x00, 0x3c]); // 1

#[test]
fn a_linear_made_by_hand() {
    let folder = folder(&int4(), &[CODES, SCALES, BIASES]);
    let found = Checkpoint::open(folder.path()).unwrap().matrix("x.weight", 1, 32).unwrap().decode();
    assert_eq!(found, [1.0, 0.5].repeat(16));
}

#[test]
fn stacks_of_plain_floats_are_taken_apart_too() {
    let stack: Raw = ("l.mlp.switch_mlp.up_proj.weight", Dtype::F32, &[2, 1, 2], &[0; 16]);
    let empty: Raw = ("l.mlp.switch_mlp.down_proj.weight", Dtype::F32, &[1 << 50, 0, 2], &[]);
    for config in ["{}", &int4()] {
        let folder = folder(config, &[stack, empty]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let mut names: Vec<&str> = checkpoint.tensor_names().collect();
        names.sort_unstable();
        let wanted = ["l.mlp.experts.0.up_proj.weight", "l.mlp.experts.1.up_proj.weight", empty.0];
        assert_eq!(names, wanted);
        assert_eq!(checkpoint.matrix(wanted[1], 1, 2).unwrap().scheme, Scheme::F32);
    }
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let open_error = |config: &str, tensors: &[Raw]| {
        let folder = folder(config, tensors);
        message(Checkpoint::open(folder.path()).unwrap_err())
    };
    for (quantization, words) in [
        (json!({"group_size": 32, "bits": 7}), &["7 bits in groups of 32", "wanted 2 to 6 or 8 bits"][..]),
        (json!({"group_size": 32, "bits": 1}), &["1 bits in groups of 32"]),
        (json!({"group_size": 48, "bits": 4}), &["groups of 48"]),
        (json!({"group_size": -1, "bits": 4}), &["-1"]),
        (json!({"group_size": 16, "bits": 4, "mode": "mxfp4"}), &["groups of 16", "wanted 4 bits in groups of 32"]),
        (json!({"group_size": 32, "bits": 4, "mode": "nf4"}), &["nf4", "affine"]),
        (json!({"group_size": 32, "bits": 4, "x": {"bits": 9}}), &["quantization of `x`", "9 bits"]),
        (json!({"group_size": 32, "bits": 4, "x": false}), &["`x` is not quantised", "`x.scales`"]),
        (json!({"group_size": 64, "bits": 4}), &["`x.weight` is U32 [1, 4]", "whole groups of 64 codes of 4 bits"]),
        (json!({"group_size": 32, "bits": 2}), &["`x.scales` is F16 [1, 1]", "wanted F16 [1, 2]", "[1, 64]"]),
        (json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}), &["`x.scales` is F16", "wanted U8"]),
    ] {
        assert_says(&open_error(&config(quantization), &[CODES, SCALES, BIASES]), words);
    }
    let tensors = |tensors: &[Raw], words: &[&str]| assert_says(&open_error(&int4(), tensors), words);
    tensors(&[CODES, SCALES], &["`x`", "lack `x.biases`"]);
    tensors(&[SCALES, BIASES], &["`x`", "lack `x.weight`"]);
    tensors(&[CODES, ("x.scales", Dtype::U8, &[1, 1], &[1]), BIASES], &["`x.scales` is U8", "wanted BF16, F16 or F32"]);
    tensors(&[CODES, SCALES, ("x.biases", Dtype::BF16, &[1, 1], &[0; 2])], &["`x.biases` is BF16", "wanted F16"]);
    tensors(&[("x.weight", Dtype::F32, &[1, 4], &[0; 16]), SCALES, BIASES], &["`x.weight` is F32", "wanted U32"]);
    tensors(&[("x.weight", Dtype::U32, &[4], &[0; 16]), SCALES, BIASES], &["`x.weight`", "a matrix [rows, words]"]);
    tensors(&[("x.weight", Dtype::U32, &[0, 4], &[]), SCALES, BIASES], &["`x.weight` is U32 [0, 4]"]);
    let global: Raw = ("x.global_scale", Dtype::F32, &[1], &[0; 4]);
    tensors(&[CODES, SCALES, BIASES, global], &["`x.global_scale`", "not read yet"]);

    let stack = |name| (name, Dtype::F32, &[1, 1, 1][..], &[0; 4][..]);
    let twice = [stack("l.mlp.switch_mlp.up_proj.weight"), stack("l.mlp.experts.0.up_proj.weight")];
    tensors(&twice, &["`l.mlp.experts.0.up_proj.weight` twice"]);
    let flat: [Raw; 3] = [
        ("l.mlp.switch_mlp.up_proj.weight", Dtype::U32, &[1, 4], &[0; 16]),
        ("l.mlp.switch_mlp.up_proj.scales", Dtype::F16, &[1, 1], &[0; 2]),
        ("l.mlp.switch_mlp.up_proj.biases", Dtype::F16, &[1, 1], &[0; 2]),
    ];
    tensors(&flat, &["switch_mlp.up_proj.weight` is U32 [1, 4]", "matrices [count, rows, words]"]);

    // Opens, but a scale that is no number must not decode.
    let folder = folder(&int4(), &[CODES, ("x.scales", Dtype::F16, &[1, 1], &[0, 0x7e]), BIASES]);
    let error = message(Checkpoint::open(folder.path()).unwrap().matrix_any("x.weight").unwrap_err());
    assert_says(&error, &["`x.weight`", "scales", "NaN"]);
}
