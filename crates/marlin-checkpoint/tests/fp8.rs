//! FP8 folders that `transformers` decodes, those of `nvidia-modelopt`, which has NVFP4 beside it, and broken ones.

mod common;

use common::{Raw, assert_says, assert_scheme, folder, message, open_golden};
use marlin_checkpoint::{Checkpoint, Dtype, Layout};
use serde_json::{Value, json};

#[test]
fn folders_decode_as_in_transformers() {
    let block = "model.layers.0";
    let tiles = open_golden("fp8/qwen3moe");
    assert_eq!(tiles.layout(), Some(Layout::Fp8));
    assert_scheme(&tiles, &format!("{block}.mlp.experts.2.down_proj.weight"), "fp8 16x16");
    let [note] = tiles.notes() else { panic!("{:?}", tiles.notes()) };
    assert_says(note, &["activations are not rounded", "weights are read exactly"]);

    assert_scheme(&open_golden("fp8/llama"), &format!("{block}.self_attn.o_proj.weight"), "fp8 16x16");
    // Tiles that are partial at the last rows, and at both ends.
    let latent = open_golden("fp8/glm4moelite");
    assert_eq!(latent.shape(&format!("{block}.self_attn.kv_a_proj_with_mqa.weight")), Some(vec![40, 32]));
    assert_scheme(&latent, &format!("{block}.self_attn.kv_a_proj_with_mqa.weight"), "fp8 16x16");
    let partial = open_golden("fp8/partial");
    assert_scheme(&partial, &format!("{block}.self_attn.kv_a_proj_with_mqa.weight"), "fp8 128x128");
    assert_scheme(&partial, &format!("{block}.self_attn.q_b_proj.weight"), "fp8 128x128 bf16 scales");

    let rows = open_golden("fp8/qwen3");
    assert_scheme(&rows, &format!("{block}.self_attn.o_proj.weight"), "fp8 tensor");
    assert_scheme(&rows, &format!("{block}.self_attn.k_proj.weight"), "fp8 row");
}

#[test]
fn folders_of_modelopt_decode_as_there() {
    let block = "model.layers.0";
    let nvfp4 = open_golden("modelopt/nvfp4-qwen3moe");
    assert_eq!(nvfp4.layout(), Some(Layout::ModelOpt));
    assert_scheme(&nvfp4, &format!("{block}.mlp.experts.0.gate_proj.weight"), "nvfp4");
    let [activations, cache] = nvfp4.notes() else { panic!("{:?}", nvfp4.notes()) };
    assert_says(activations, &["activations are not rounded"]);
    assert_says(cache, &["KV cache is not quantised"]);
    for (name, module, scheme) in [
        ("nvfp4-llama", "self_attn.v_proj", "nvfp4"),
        ("nvfp4-qwen3", "mlp.down_proj", "nvfp4"),
        ("nvfp4-glm4moelite", "self_attn.kv_b_proj", "nvfp4"),
        ("fp8-qwen3", "mlp.up_proj", "fp8 tensor"),
        ("fp8-glm4moelite", "mlp.shared_experts.up_proj", "fp8 tensor"),
    ] {
        assert_scheme(&open_golden(&format!("modelopt/{name}")), &format!("{block}.{module}.weight"), scheme);
    }
}

const ONE: [u8; 4] = 1f32.to_le_bytes();
const CODES: Raw = ("x.weight", Dtype::F8_E4M3, &[1, 2], &[0x38, 0x40]);
const SCALE: Raw = ("x.weight_scale_inv", Dtype::F32, &[1, 1], &ONE);

fn open(quantization: &Value, tensors: &[Raw]) -> Result<Checkpoint, String> {
    let folder = folder(&json!({"quantization_config": quantization}).to_string(), tensors);
    Checkpoint::open(folder.path()).map_err(message)
}

#[test]
fn a_scale_for_each_row_of_fbgemm() {
    let codes: Raw = ("x.weight", Dtype::F8_E4M3, &[2, 1], &[0x38, 0x40]);
    let scales = [1f32, 0.5].map(f32::to_le_bytes).concat();
    let tensors =
        [codes, ("x.weight_scale", Dtype::F32, &[2, 1], &scales), ("x.input_scale_ub", Dtype::F32, &[1], &ONE)];
    let checkpoint = open(&json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}), &tensors).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["x.weight"]);
    assert_eq!(checkpoint.matrix("x.weight", 2, 1).unwrap().decode(), [1.0, 1.0]);
    assert_says(&checkpoint.notes()[0], &["activations"]);
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let tiled = |tile: Value| json!({"quant_method": "fp8", "weight_block_size": tile});
    let error = |quantization: &Value, tensors: &[Raw], words: &[&str]| {
        assert_says(&open(quantization, tensors).unwrap_err(), words);
    };
    let all = [CODES, SCALE];
    error(&tiled(json!([0, 128])), &all, &["config.json", "weight_block_size is [0, 128]"]);
    error(&tiled(json!([-1, 128])), &all, &["config.json", "-1"]);
    error(&tiled(json!([1, 1])), &all, &["`x.weight_scale_inv` is F32 [1, 1]; wanted F32 [1, 2]"]);
    error(&json!({"quant_method": "fp8", "fmt": "e5m2"}), &all, &["fp8, fmt e5m2", "not read yet"]);
    let tiles = tiled(json!([128, 128]));
    error(&tiles, &[CODES], &["`x.weight` is F8_E4M3", "lack its scale"]);
    error(&tiles, &[SCALE], &["lack `x.weight`"]);
    error(&tiles, &[("x.weight", Dtype::I8, &[1, 2], &[0; 2]), SCALE], &["`x.weight` is I8"]);
    error(&tiles, &[("x.weight", Dtype::F8_E4M3, &[2], &[0; 2]), SCALE], &["wanted a matrix of F8_E4M3"]);
    error(&tiles, &[("x.weight", Dtype::F8_E4M3, &[0, 9], &[]), SCALE], &["`x.weight`", "[0, 9]"]);
    error(&tiles, &[CODES, ("x.weight_scale_inv", Dtype::U8, &[1], &[0])], &["`x.weight_scale_inv` is U8"]);
    let three: Raw = ("x.weight_scale", Dtype::F32, &[3], &[0; 12]);
    error(&json!({"quant_method": "fp8"}), &[CODES, three], &["`x.weight_scale` is F32 [3]", "one for each of 1 rows"]);
}

#[test]
fn broken_folders_of_modelopt_say_what_is_wrong() {
    let modelopt = |algorithm: &str| json!({"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16});
    let codes: Raw = ("x.weight", Dtype::U8, &[1, 8], &[0x21; 8]);
    let scale: Raw = ("x.weight_scale", Dtype::F8_E4M3, &[1, 1], &[0x38]);
    let global: Raw = ("x.weight_scale_2", Dtype::F32, &[], &ONE);
    let error = |algorithm: &str, tensors: &[Raw], words: &[&str]| {
        assert_says(&open(&modelopt(algorithm), tensors).unwrap_err(), words);
    };
    let checkpoint = open(&modelopt("W4A16_NVFP4"), &[codes, scale, global]).unwrap();
    assert_eq!(checkpoint.matrix("x.weight", 1, 16).unwrap().decode(), [0.5, 1.0].repeat(8));
    assert!(checkpoint.notes().is_empty());

    error("NVFP4_AWQ", &[codes, scale, global], &["modelopt, quant_algo NVFP4_AWQ", "not read yet"]);
    let scaled: Raw = ("x.pre_quant_scale", Dtype::F32, &[1], &ONE);
    error("NVFP4", &[codes, scale, global, scaled], &["`x.pre_quant_scale`", "not read yet"]);
    error("NVFP4", &[codes, scale], &["lack `x.weight_scale_2`"]);
    error("NVFP4", &[codes, global], &["lack `x.weight_scale`"]);
    error("NVFP4", &[scale, global], &["lack `x.weight`"]);
    error("NVFP4", &[("x.weight", Dtype::I8, &[1, 8], &[0; 8]), scale, global], &["`x.weight` is I8", "U8 (NVFP4)"]);
    error("NVFP4", &[("x.weight", Dtype::U8, &[0, usize::MAX], &[]), scale, global], &["`x.weight`"]);
    let wide: Raw = ("x.weight_scale", Dtype::F8_E4M3, &[1, 2], &[0x38; 2]);
    error("NVFP4", &[codes, wide, global], &["`x.weight_scale` is F8_E4M3 [1, 2]; wanted F8_E4M3 [1, 1]"]);
    let mut quantization = modelopt("NVFP4");
    quantization["group_size"] = json!(32);
    assert_says(&open(&quantization, &[codes, scale, global]).unwrap_err(), &["group_size is 32"]);
    assert_says(&open(&json!({"quant_method": "modelopt"}), &[]).unwrap_err(), &["missing field `quant_algo`"]);
}
