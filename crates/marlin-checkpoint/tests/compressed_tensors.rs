//! Folders in the layout of `compressed-tensors`: those of the package, ours, and broken ones.

mod common;

use std::borrow::Cow;
use std::path::Path;

use common::{Raw, assert_says, assert_scheme, expected, folder, golden, message, open_golden, open_golden_within};
use marlin_checkpoint::{Checkpoint, CheckpointWriter, Dtype, ExportLayout, Layout, PlannedTensor, WriterOptions};
use marlin_format::{EncodeOptions, Format, Grouping, PackedMatrix, Scheme};
use serde_json::{Value, json};

/// The inverse of an arbitrary f32 is rounded.
const NVFP4_BOUND: f32 = 3e-7;

#[test]
fn a_folder_of_the_package_decodes_as_there() {
    let checkpoint = Checkpoint::open(&golden("compressed-tensors")).unwrap();
    let mut names: Vec<&str> = checkpoint.tensor_names().collect();
    names.sort_unstable();
    let expected = expected(&golden("compressed-tensors"));
    assert_eq!(names, expected.keys().map(String::as_str).collect::<Vec<_>>());
    assert!(checkpoint.notes().is_empty() && checkpoint.quantization().is_none());
    assert_eq!(checkpoint.layout(), Some(Layout::CompressedTensors));

    for (name, wanted) in &expected {
        let found = checkpoint.matrix_any(name).unwrap().decode();
        if name == "c.nvfp4.weight" {
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() * NVFP4_BOUND;
            assert!(found.len() == wanted.len() && found.iter().zip(wanted).all(close), "{name}");
        } else {
            // Equal but for the sign of zeros, of which only the package knows negative ones.
            assert_eq!(&found, wanted, "{name}");
        }
    }
    for (name, scheme) in [
        ("a.int4_sym_group.weight", "int4-sym g16 bf16 scales"),
        ("a.int4_sym_row_odd.weight", "int4-sym row"),
        ("a.int4_asym_group.weight", "int4 g32 f32 scales"),
        ("a.int3_asym_group.weight", "int3 g16"),
        ("a.int5_asym_group.weight", "int5 g16 f32 scales"),
        ("a.int6_row.weight", "int6-sym row"),
        ("a.int7_asym_row.weight", "int7 row f32 scales"),
        ("b.int8_asym_row.weight", "int8-asym row bf16 scales"),
        ("b.fp8_block.weight", "fp8 8x16"),
        ("c.nvfp4.weight", "nvfp4"),
        ("c.mxfp4.weight", "mxfp4"),
        ("c.mxfp8.weight", "mxfp8"),
    ] {
        assert_scheme(&checkpoint, name, scheme);
    }
    // Rows of whole words are not copied, odd ones must be.
    let codes = |name| checkpoint.matrix_any(name).unwrap().codes;
    assert!(matches!(codes("a.int4_sym_group.weight"), Cow::Borrowed(_)));
    assert!(matches!(codes("a.int4_sym_row_odd.weight"), Cow::Owned(_)));
}

#[test]
fn models_of_llmcompressor_decode_as_there() {
    for (name, bound, schemes) in [
        ("llama", 0.0, &[("mlp.down_proj", "int4 g16 f32 scales")][..]),
        ("qwen3", 0.0, &[("self_attn.k_proj", "fp8 row")]),
        ("qwen3moe", NVFP4_BOUND, &[("mlp.experts.3.gate_proj", "nvfp4")]),
        (
            "glm4moelite",
            0.0,
            &[
                ("self_attn.kv_a_proj_with_mqa", "fp8 16x16"),
                ("self_attn.kv_b_proj", "fp8 16x16"),
                ("mlp.experts.0.down_proj", "int4-sym g16 f32 scales"),
                ("mlp.shared_experts.up_proj", "int4-sym g16 f32 scales"),
            ],
        ),
    ] {
        let checkpoint = open_golden_within(&format!("llmcompressor/{name}"), bound);
        assert_eq!(checkpoint.layout(), Some(Layout::CompressedTensors));
        for (module, scheme) in schemes {
            assert_scheme(&checkpoint, &format!("model.layers.0.{module}.weight"), scheme);
        }
    }
}

#[test]
fn a_folder_of_an_old_release_decodes_as_there() {
    let checkpoint = open_golden("compressed-tensors-0.10");
    for (name, scheme) in [
        ("a.int3_group.weight", "int3-sym g16"),
        ("a.int5_asym_group.weight", "int5 g16"),
        ("a.int6_asym_row.weight", "int6 row"),
        ("a.int7_row.weight", "int7-sym row"),
        ("a.int4_order.weight", "int4 g16, group index"),
        ("a.int4_unset_order.weight", "int4-sym g16"),
        ("b.f16.weight", "f16, 2:4"),
        ("b.bf16_odd.weight", "bf16, 2:4"),
        ("b.f32.weight", "f32, 2:4"),
        ("b.fp8_row.weight", "fp8 row f16 scales, 2:4"),
        ("b.int8_row.weight", "int8 row, 2:4"),
        ("c.int4_groups.weight", "int4-sym g128, 2:4"),
        ("c.int4_wide_groups.weight", "int4-sym g128, 2:4"),
        ("c.int8_row.weight", "int8 row, 2:4"),
    ] {
        assert_scheme(&checkpoint, name, scheme);
    }
}

fn weights(rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 23.0).collect()
}

/// Writes one linear beside a plain embedding.
fn write(out: &Path, matrix: &PackedMatrix<'_>) {
    let planned = vec![
        PlannedTensor::raw("model.embed_tokens.weight", Dtype::F32, vec![1, 2]),
        PlannedTensor::matrix("l.q_proj.weight", matrix.rows, matrix.cols, matrix.scheme),
    ];
    let options = WriterOptions { layout: ExportLayout::CompressedTensors, ..WriterOptions::default() };
    let mut writer = CheckpointWriter::create(out, planned, json!({}), Vec::new(), &options).unwrap();
    writer.write_raw("model.embed_tokens.weight", Dtype::F32, &[1, 2], &[0; 8]).unwrap();
    writer.write_matrix("l.q_proj.weight", matrix).unwrap();
    writer.finish().unwrap();
}

#[test]
fn what_is_written_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let tile = Grouping::Block { rows: 128, cols: 128 };
    let cases = [
        (Format::Int4, Grouping::Columns(16), "pack-quantized", "group"),
        (Format::Int4, Grouping::Row, "pack-quantized", "channel"),
        (Format::Int4Sym, Grouping::Columns(16), "pack-quantized", "group"),
        (Format::Int8, Grouping::Row, "pack-quantized", "channel"),
        (Format::Fp8, Grouping::Tensor, "float-quantized", "tensor"),
        (Format::Fp8, Grouping::Row, "float-quantized", "channel"),
        (Format::Fp8, tile, "float-quantized", "block"),
        (Format::Mxfp4, Grouping::Columns(32), "mxfp4-pack-quantized", "group"),
        (Format::Nvfp4, Grouping::Columns(16), "nvfp4-pack-quantized", "tensor_group"),
    ];
    for (index, (format, grouping, stored_as, strategy)) in cases.into_iter().enumerate() {
        let scheme = ExportLayout::CompressedTensors.scheme(format.scheme(Some(grouping)).unwrap()).unwrap();
        let (rows, cols) = (131, 160);
        let options = EncodeOptions { power_of_two_global: true, ..EncodeOptions::default() };
        let matrix = marlin_format::encode(&weights(rows, cols), rows, cols, &scheme, &options).unwrap();
        let out = folder.path().join(index.to_string());
        write(&out, &matrix);

        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.matrix("l.q_proj.weight", rows, cols).unwrap(), matrix, "{scheme}");
        assert!(checkpoint.tensor("model.embed_tokens.weight").is_ok());
        let config = &checkpoint.config()["quantization_config"];
        assert_eq!(config["format"], stored_as);
        assert_eq!(config["ignore"], json!(["model.embed_tokens", "lm_head"]));
        let weights = &config["config_groups"]["group_0"]["weights"];
        assert_eq!(weights["strategy"], strategy);
        assert_eq!(weights["symmetric"], format != Format::Int4);
        assert_eq!(weights["num_bits"], scheme.element.bits());
    }
}

#[test]
fn what_the_layout_has_no_place_for_is_refused() {
    let scheme = |format: Format, group| ExportLayout::CompressedTensors.scheme(format.scheme(group).unwrap());
    for (format, group) in [
        (Format::Fp4, None),
        (Format::Int3, None),
        (Format::Int2, None),
        (Format::Int8, Some(Grouping::Tensor)),
        (Format::Fp8, Some(Grouping::Columns(32))),
    ] {
        let error = message(scheme(format, group).unwrap_err());
        assert_says(&error, &["compressed-tensors has no place for", "int4-sym", "choose one of them"]);
    }

    let folder = tempfile::tempdir().unwrap();
    let plan = |name: &str, cols| {
        let planned = vec![PlannedTensor::matrix(name, 4, cols, scheme(Format::Int4, None).unwrap())];
        let options = WriterOptions { layout: ExportLayout::CompressedTensors, ..WriterOptions::default() };
        message(CheckpointWriter::create(&folder.path().join("o"), planned, json!({}), vec![], &options).unwrap_err())
    };
    assert_says(&plan("x.weight", 200), &["`x.weight`", "200 columns are no multiple of the group of 128"]);
    assert_says(&plan("x.kernel", 128), &["`x.kernel`", "….weight"]);
}

/// config.json with one group of these weights.
fn config(format: &str, weights: Value) -> Value {
    let group = json!({"targets": ["Linear"], "weights": weights});
    json!({"quantization_config": {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group},
    }})
}

fn int4() -> Value {
    config("pack-quantized", json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}))
}

const CODES: Raw = ("x.weight_packed", Dtype::I32, &[1, 1], &[0x89, 0x67, 0x45, 0x23]);
const SCALE: Raw = ("x.weight_scale", Dtype::BF16, &[1, 1], &[0x00, 0x3f]); // 0.5
const SHAPE: Raw = ("x.weight_shape", Dtype::I64, &[2], &[1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);

fn open_error(config: &Value, tensors: &[Raw]) -> String {
    let folder = folder(&config.to_string(), tensors);
    message(Checkpoint::open(folder.path()).unwrap_err())
}

#[test]
fn a_linear_made_by_hand() {
    let folder = folder(&int4().to_string(), &[CODES, SCALE, SHAPE]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let found = checkpoint.matrix("x.weight", 1, 8).unwrap().decode();
    assert_eq!(found, [0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0]);
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["x.weight"]);
}

#[test]
fn activations_and_the_kv_cache_are_noted() {
    let mut config = int4();
    let quantization = &mut config["quantization_config"];
    quantization["kv_cache_scheme"] = json!({"num_bits": 8, "type": "float"});
    quantization["config_groups"]["group_0"]["input_activations"] = json!({"num_bits": 8, "dynamic": true});
    let input: Raw = ("x.input_scale", Dtype::F32, &[1], &[0; 4]);
    let keys: Raw = ("a.k_scale", Dtype::F32, &[1], &[0; 4]);
    let folder = folder(&config.to_string(), &[CODES, SCALE, SHAPE, input, keys]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["x.weight"]);
    let [kv, activations] = checkpoint.notes() else { panic!("{:?}", checkpoint.notes()) };
    assert_says(kv, &["kv_cache_scheme"]);
    assert_says(activations, &["input_activations", "weights are read exactly"]);
}

#[test]
fn layouts_within_the_layout_that_are_not_read() {
    for format in ["sparse-24-bitmask", "sparse-bitmask", "mxfp6-pack-quantized", "made-up"] {
        let error = open_error(&config(format, json!({"num_bits": 4})), &[CODES, SCALE, SHAPE]);
        assert_says(&error, &["config.json", format, "not read yet"]);
    }
    let mut sparse = int4();
    sparse["quantization_config"]["sparsity_config"] = json!({"format": "sparse-bitmask"});
    assert_says(&open_error(&sparse, &[CODES, SCALE, SHAPE]), &["sparse-bitmask", "not read yet"]);
    let mut rotated = int4();
    rotated["quantization_config"]["transform_config"] = json!({"config_groups": {"R1": {}}});
    assert_says(&open_error(&rotated, &[CODES, SCALE, SHAPE]), &["transform_config", "not read yet"]);
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let weights = |weights: Value, words: &[&str]| {
        let error = open_error(&config("pack-quantized", weights), &[CODES, SCALE, SHAPE]);
        assert_says(&error, &[&["config.json", "group_0"], words].concat());
    };
    weights(json!({"num_bits": 4, "strategy": "group"}), &["group_size is None"]);
    weights(json!({"num_bits": 4, "strategy": "group", "group_size": -8}), &["group_size is Some(-8)"]);
    weights(json!({"num_bits": 4, "strategy": "block"}), &["block_structure"]);
    weights(json!({"num_bits": 4, "strategy": "token"}), &["`token`"]);
    weights(json!({"num_bits": 4, "symmetric": false}), &["one scale for the tensor"]);
    weights(json!({"num_bits": 9}), &["9 bits"]);
    weights(json!({"num_bits": -4}), &["-4"]);
    weights(json!({"num_bits": 8, "type": "float"}), &["float and 8 bits"]);

    let tensors = |tensors: &[Raw], words: &[&str]| assert_says(&open_error(&int4(), tensors), words);
    tensors(&[CODES, SHAPE], &["`x`", "lack `x.weight_scale`"]);
    tensors(&[SCALE, SHAPE], &["`x.weight`", "lack `x.weight_packed`"]);
    tensors(&[CODES, SCALE], &["`x`", "lack `x.weight_shape`"]);
    let negative: Raw = ("x.weight_shape", Dtype::I64, &[2], &[0xff; 16]);
    tensors(&[CODES, SCALE, negative], &["`x.weight_shape`", "wanted I64 [2] with two sizes"]);
    let huge: Raw = ("x.weight_shape", Dtype::I64, &[2], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f].repeat(2));
    tensors(&[CODES, SCALE, huge], &["`x.weight`", "too large"]);
    let wide: Raw = ("x.weight_shape", Dtype::I64, &[2], &[1, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
    tensors(&[CODES, SCALE, wide], &["`x.weight_packed` is I32 [1, 1]", "wanted I32 [1, 2]"]);
    let odd: Raw = ("x.weight_shape", Dtype::I64, &[2], &[1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    tensors(&[CODES, SCALE, odd], &["7 columns are no multiple of the group of 8"]);
    let bytes: Raw = ("x.weight_scale", Dtype::U8, &[1, 1], &[1]);
    tensors(&[CODES, bytes, SHAPE], &["`x.weight_scale` is U8"]);
    let zero: Raw = ("x.weight_zero_point", Dtype::I8, &[1, 1], &[3]);
    tensors(&[CODES, SCALE, SHAPE, zero], &["`x.weight` is symmetric"]);

    let mut pattern = int4();
    pattern["quantization_config"]["config_groups"]["group_0"]["targets"] = json!(["re:("]);
    assert_says(&open_error(&pattern, &[CODES, SCALE, SHAPE]), &["`(` is no regular expression"]);
    let mut nobody = int4();
    let group = json!({"targets": ["y"], "weights": {"num_bits": 4}});
    nobody["quantization_config"]["config_groups"] = json!({"a": group, "b": group});
    assert_says(&open_error(&nobody, &[CODES, SCALE, SHAPE]), &["`x`", "no group", "[\"a\", \"b\"]"]);
    let mut empty = int4();
    empty["quantization_config"]["config_groups"] = json!({});
    assert_says(&open_error(&empty, &[CODES, SCALE, SHAPE]), &["`x`", "no group"]);

    // Opens, but an infinite inverse must not decode.
    let fp4 = json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16});
    let nvfp4: [Raw; 3] = [
        ("x.weight_packed", Dtype::U8, &[1, 8], &[0x11; 8]),
        ("x.weight_scale", Dtype::F8_E4M3, &[1, 1], &[0x38]),
        ("x.weight_global_scale", Dtype::F32, &[1], &[0; 4]),
    ];
    let folder = folder(&config("nvfp4-pack-quantized", fp4).to_string(), &nvfp4);
    let error = message(Checkpoint::open(folder.path()).unwrap().matrix_any("x.weight").unwrap_err());
    assert_says(&error, &["`x.weight`", "globals", "inf"]);
}

#[test]
fn broken_folders_of_old_releases_say_what_is_wrong() {
    // Eleven 3-bit codes take two words either way; they are read as they are written today.
    let three = config("pack-quantized", json!({"num_bits": 3, "type": "int", "strategy": "channel"}));
    let shape = |cols: u8| [[1, 0, 0, 0, 0, 0, 0, 0], [cols, 0, 0, 0, 0, 0, 0, 0]].concat();
    let (eleven, many) = (shape(11), shape(64));
    let codes: Raw = ("x.weight_packed", Dtype::I32, &[1, 2], &[0, 0, 0, 0xc0, 1, 0, 0, 0]);
    let tensors = [codes, SCALE, ("x.weight_shape", Dtype::I64, &[2], &eleven)];
    let opened = folder(&three.to_string(), &tensors);
    let found = Checkpoint::open(opened.path()).unwrap().matrix_any("x.weight").unwrap().decode();
    assert_eq!((found[9], found[10]), (-2.0, 1.5));
    let error = open_error(&three, &[codes, SCALE, ("x.weight_shape", Dtype::I64, &[2], &many)]);
    assert_says(&error, &["`x.weight_packed` is I32 [1, 2]", "wanted I32 [1, 6]"]);

    let order = |dtype, groups: &[u8]| {
        open_error(&int4(), &[CODES, SCALE, SHAPE, ("x.weight_g_idx", dtype, &[groups.len() / 4], groups)])
    };
    assert_says(&order(Dtype::I32, &[1, 0, 0, 0].repeat(8)), &["`x.weight_g_idx`", "column 0 into group 1 of 1"]);
    assert_says(&order(Dtype::I32, &[0; 28]), &["`x.weight_g_idx` is I32 [7]; wanted I32 [8]"]);
    assert_says(&order(Dtype::F32, &[0; 32]), &["`x.weight_g_idx` is F32 [8]; wanted I32 [8]"]);

    let sparse = json!({"quantization_config": {
        "quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"},
    }});
    let kept: Raw = ("x.compressed", Dtype::BF16, &[1, 2], &[0x80, 0x3f, 0x00, 0x40]);
    let mask: Raw = ("x.bitmask", Dtype::U8, &[1, 1], &[0b1010]);
    let four = shape(4);
    let sizes: Raw = ("x.shape", Dtype::I64, &[2, 1], &four);
    let opened = folder(&sparse.to_string(), &[kept, mask, sizes]);
    let checkpoint = Checkpoint::open(opened.path()).unwrap();
    assert_eq!(checkpoint.matrix("x.weight", 1, 4).unwrap().decode(), [0.0, 1.0, 0.0, 2.0]);
    let error = |tensors: &[Raw], words: &[&str]| assert_says(&open_error(&sparse, tensors), words);
    error(&[kept, sizes], &["`x.weight`", "lack `x.bitmask`"]);
    error(&[kept, mask], &["lack `x.shape`"]);
    error(&[kept, mask, ("x.shape", Dtype::I64, &[2, 1], &eleven)], &["`x.weight`", "11"]);
    error(&[("x.compressed", Dtype::U8, &[1, 2], &[0; 2]), mask, sizes], &["`x.compressed` is U8", "BF16, F16 or F32"]);
    error(&[kept, mask, ("x.shape", Dtype::I64, &[2, 1], &many)], &["`x.compressed` is BF16 [1, 2]"]);
    let three_kept: Raw = ("x.bitmask", Dtype::U8, &[1, 1], &[0b1110]);
    let opened = folder(&sparse.to_string(), &[kept, three_kept, sizes]);
    let refused = Checkpoint::open(opened.path()).unwrap().matrix_any("x.weight").map(|_| ()).unwrap_err();
    assert_says(&message(refused), &["`x.weight` is malformed"]);

    let int4 = config("pack-quantized", json!({"num_bits": 4, "strategy": "channel"}));
    let error = open_error(&int4, &[kept, mask, sizes, SCALE]);
    assert_says(&error, &["sparse-24-bitmask of other weights", "`x`", "not read yet"]);

    let marlin = |weights| config("marlin-24", weights);
    let rows = marlin(json!({"num_bits": 4, "strategy": "channel"}));
    let tile: Raw = ("x.weight_packed", Dtype::I32, &[1, 8], &[0; 32]);
    assert_says(&open_error(&rows, &[tile]), &["`x.weight_packed` is I32 [1, 8]", "N a multiple of 64"]);
    let tiles: Raw = ("x.weight_packed", Dtype::I32, &[1, 128], &[0; 512]);
    assert_says(&open_error(&rows, &[tiles]), &["`x.weight`", "lack `x.scale_packed`"]);
    let wide: Raw = ("x.weight_packed", Dtype::I32, &[usize::MAX, 0], &[]);
    assert_says(&open_error(&rows, &[wide]), &["`x.weight_packed` is I32", "N a multiple of 64"]);
    let groups = marlin(json!({"num_bits": 4, "strategy": "group", "group_size": 64}));
    assert_says(&open_error(&groups, &[tiles]), &["rows or 128 columns, not 64"]);
    assert_says(&open_error(&marlin(json!({"num_bits": 3})), &[tiles]), &["3 bits"]);
}

#[test]
fn a_folder_may_say_that_nothing_is_quantised() {
    let folder =
        folder(&config("dense", json!({"num_bits": 4})).to_string(), &[("x.weight", Dtype::F32, &[1, 1], &[0; 4])]);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().matrix_any("x.weight").unwrap().scheme, Scheme::F32);
}
