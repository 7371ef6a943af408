//! What cannot be loaded is refused with a message that says why.

mod common;

use std::error::Error;
use std::path::Path;

use common::{Device, golden, options};
use marlin_checkpoint::Checkpoint;
use marlin_kernels::gpu::{GpuBackend, GpuCaps, GpuOptions};
use marlin_kernels::reference::ReferenceBackend;
use marlin_kernels::{KernelError, KvType};
use marlin_model::{LoadOptions, ModelError, Planner, load_model};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

type Config = Map<String, Value>;

/// The error of a golden whose config.json was edited.
fn refusal(name: &str, edit: impl FnOnce(&mut Config)) -> String {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    edit_config(folder.path(), edit);
    load_error(folder.path(), &options(KvType::F16))
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Config)) {
    let path = folder.join("config.json");
    let mut config: Config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// The chain of messages, as the program shows it.
fn load_error(folder: &Path, options: &LoadOptions) -> String {
    let Err(error) = Device::Reference.load(folder, options) else { panic!("{} was loaded", folder.display()) };
    let chain = std::iter::successors(Some(&error as &dyn Error), |&error| error.source());
    chain.map(|error| error.to_string()).collect::<Vec<_>>().join(": ")
}

fn with(key: &'static str, value: Value) -> impl FnOnce(&mut Config) {
    move |config| {
        config.insert(key.into(), value);
    }
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn every_size_must_be_there_and_sane() {
    for field in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ] {
        for name in [
            "llama-gqa2-llama3-tied",
            "qwen3-gqa2-tied",
            "phi3-mha-window",
            "gemma3-mha-bias",
            "glm4moelite-shared-mtp",
        ] {
            let missing = refusal(name, |config| {
                config.shift_remove(field).unwrap();
            });
            assert_says(&missing, &["config.json", &format!("missing field `{field}`")]);
            for absurd in [json!(-1), json!(0), json!(1u64 << 62)] {
                assert_says(&refusal(name, with(field, absurd)), &[field, "from 1 to"]);
            }
            assert_says(&refusal(name, with(field, json!("many"))), &[field, "\"many\""]);
        }
    }
    assert_says(&refusal("qwen3-gqa2-tied", with("rms_norm_eps", json!(-1e-6))), &["rms_norm_eps", "positive"]);
}

#[test]
fn weights_that_config_json_has_no_place_for() {
    let fewer = refusal("qwen3-gqa2-tied", |config| {
        let layers = config["num_hidden_layers"].as_u64().unwrap();
        config.insert("num_hidden_layers".into(), json!(layers - 1));
        config.shift_remove("layer_types");
    });
    assert_says(&fewer, &["does not use", "11 tensors", "model.layers.1."]);
    let unbiased = refusal("llama-gqa4-bias-sharded", with("attention_bias", json!(false)));
    assert_says(&unbiased, &["does not use", "self_attn", ".bias"]);
}

#[test]
fn largest_sizes_allowed_end_in_an_error_too() {
    let most = 1 << 24;
    for field in ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"] {
        let message = refusal("llama-gqa2-llama3-tied", with(field, json!(most)));
        assert_says(&message, &["shape"]);
    }
    let layers = refusal("llama-gqa2-llama3-tied", with("num_hidden_layers", json!(4096)));
    assert_says(&layers, &["model.layers.2."]);
}

#[test]
fn heads_must_group_and_rotate() {
    let groups = refusal("llama-gqa2-llama3-tied", with("num_key_value_heads", json!(3)));
    assert_says(&groups, &["num_key_value_heads", "num_attention_heads = 8", "found 3"]);
    assert_says(&refusal("llama-gqa2-llama3-tied", with("num_key_value_heads", json!(0))), &["num_key_value_heads"]);
    assert_says(&refusal("qwen3-gqa2-tied", with("head_dim", json!(31))), &["head_dim", "even", "31"]);
    assert_says(&refusal("llama-mha-untied", with("hidden_size", json!(42))), &["hidden_size", "multiple", "42"]);
}

#[test]
fn architectures_that_are_not_known_are_named() {
    let unknown = refusal("qwen3-gqa2-tied", with("architectures", json!(["MambaForCausalLM"])));
    assert_says(&unknown, &["MambaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]);
    for nothing in [json!(null), json!([]), json!("LlamaForCausalLM"), json!([7])] {
        let message = refusal("qwen3-gqa2-tied", with("architectures", nothing));
        assert_says(&message, &["architectures", "LlamaForCausalLM, MistralForCausalLM", "found"]);
    }
}

#[test]
fn settings_that_are_not_supported_are_named() {
    let act = refusal("llama-mha-untied", with("hidden_act", json!("relu2")));
    assert_says(&act, &["hidden_act", "relu2", "silu"]);
    let dynamic = json!({"rope_type": "dynamic", "factor": 4.0});
    assert_says(&refusal("llama-mha-untied", with("rope_scaling", dynamic)), &["rope_scaling", "dynamic", "llama3"]);
    let flat = refusal("qwen2-gqa2-yarn-sharded", with("rope_theta", json!(1.0)));
    assert_says(&flat, &["rope_theta", "above 1", "yarn"]);
    for longrope in ["longrope", "su", "yarn"] {
        let scaling = json!({"type": longrope, "short_factor": [1.0], "long_factor": [2.0]});
        assert_says(&refusal("phi3-mha-window", with("rope_scaling", scaling)), &[longrope, "not supported"]);
    }
    let part = refusal("phi3-gqa3-partial-sharded", with("partial_rotary_factor", json!(1.5)));
    assert_says(&part, &["partial_rotary_factor", "head_dim = 16", "1.5"]);
    let scores = refusal("gemma3-mha-bias", with("attn_logit_softcapping", json!(50.0)));
    assert_says(&scores, &["attn_logit_softcapping", "null"]);
    let embedder = refusal("gemma3-mha-bias", with("use_bidirectional_attention", json!(true)));
    assert_says(&embedder, &["use_bidirectional_attention", "false"]);
    let rope = json!({"full_attention": {"rope_type": "default"}, "chunked_attention": {}});
    assert_says(&refusal("gemma3-gqa4-tied", with("rope_parameters", rope)), &["rope_parameters", "chunked_attention"]);
    let local = refusal("gemma3-gqa4-tied", with("sliding_window", json!(null)));
    assert_says(&local, &["layer_types", "sliding_attention needs sliding_window"]);
    let groups = refusal("mistral-gqa4-window", with("num_key_value_heads", json!(null)));
    assert_says(&groups, &["missing field `num_key_value_heads`"]);
    let partial = refusal("qwen3-gqa2-tied", with("partial_rotary_factor", json!(0.25)));
    assert_says(&partial, &["partial_rotary_factor", "0.25"]);

    let layers = |types: &[&str]| with("layer_types", json!(types));
    let mamba = refusal("qwen3-gqa2-tied", layers(&["full_attention", "mamba"]));
    assert_says(&mamba, &["layer_types[1]", "mamba", "sliding_attention"]);
    let count = refusal("qwen3-gqa2-tied", layers(&["full_attention"]));
    assert_says(&count, &["layer_types", "num_hidden_layers = 2", "found 1"]);
    let window = refusal("qwen3-gqa2-tied", layers(&["full_attention", "sliding_attention"]));
    assert_says(&window, &["layer_types", "use_sliding_window"]);
    let unbounded = refusal("qwen3-gqa3-window", |config| {
        config.shift_remove("max_window_layers").unwrap();
    });
    assert_says(&unbounded, &["max_window_layers"]);
    assert_says(&refusal("qwen3-gqa3-window", with("sliding_window", json!(0))), &["sliding_window", "found 0"]);
}

#[test]
fn tensors_must_match_the_config() {
    let wider = refusal("llama-gqa2-llama3-tied", with("intermediate_size", json!(97)));
    assert_says(&wider, &["model.layers.0.mlp.gate_proj.weight", "97"]);
    let biased = refusal("llama-gqa2-llama3-tied", with("attention_bias", json!(true)));
    assert_says(&biased, &["model.layers.0.self_attn.q_proj.bias"]);
    let untied = refusal("qwen3-gqa2-tied", with("tie_word_embeddings", json!(false)));
    assert_says(&untied, &["lm_head.weight"]);
    let halves = refusal("phi3-mha-window", with("intermediate_size", json!(89)));
    assert_says(&halves, &["model.layers.0.mlp.gate_up_proj.weight", "178"]);
}

/// The error of a golden in one file whose tensors were edited: name and bytes in, whether to keep it out.
fn refusal_of_tensors(name: &str, edit: impl Fn(&str, &mut Vec<u8>) -> bool) -> String {
    let source = golden(name);
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut kept = Vec::new();
    for (tensor, view) in tensors.tensors() {
        let mut bytes = view.data().to_vec();
        if edit(&tensor, &mut bytes) {
            kept.push((tensor, view.dtype(), view.shape().to_vec(), bytes));
        }
    }
    let views = kept.iter().map(|(tensor, dtype, shape, bytes)| {
        (tensor.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    load_error(folder.path(), &options(KvType::F16))
}

#[test]
fn a_missing_tensor_is_named() {
    for (name, missing) in [
        ("qwen3-gqa2-tied", "model.embed_tokens.weight"),
        ("qwen3-gqa2-tied", "model.layers.1.self_attn.k_norm.weight"),
        ("qwen3-gqa2-tied", "model.norm.weight"),
        ("qwen3moe-top3-norm", "model.layers.0.mlp.experts.5.down_proj.weight"),
        ("qwen3moe-top3-norm", "model.layers.1.mlp.gate.weight"),
        ("qwen3moe-window-yarn-fused", "model.layers.1.mlp.experts.down_proj"),
        ("mixtral-top2", "model.layers.1.block_sparse_moe.experts.3.w3.weight"),
        ("mixtral-top2", "model.layers.0.block_sparse_moe.gate.weight"),
        ("glm4moelite-shared-mtp", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("glm4moelite-shared-mtp", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("glm4moelite-shared-mtp", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("gptoss-mxfp4", "model.layers.0.mlp.experts.down_proj_scales"),
        ("gptoss-mxfp4", "model.layers.1.mlp.experts.gate_up_proj_bias"),
        ("gptoss-mxfp4", "model.layers.1.self_attn.sinks"),
    ] {
        assert_says(&refusal_of_tensors(name, |tensor, _| tensor != missing), &[missing]);
    }
}

/// A router's NaN would send every token to the first experts.
#[test]
fn a_router_must_be_finite() {
    let with_nan = |name: &str, damaged: &str, value: &[u8]| {
        refusal_of_tensors(name, |tensor, bytes| {
            if tensor == damaged {
                bytes[value.len()..2 * value.len()].copy_from_slice(value);
            }
            true
        })
    };
    let (bf16, f32) = (&[0xc0, 0x7f][..], &f32::NAN.to_le_bytes()[..]);
    let router = "model.layers.1.mlp.gate.weight";
    assert_says(&with_nan("qwen3moe-top3-norm", router, bf16), &[router, "a router must be finite", "NaN"]);
    let correction = "model.layers.1.mlp.gate.e_score_correction_bias";
    assert_says(&with_nan("glm4moelite-shared-mtp", correction, f32), &[correction, "NaN", "index 1"]);
    let bias = "model.layers.0.mlp.experts.down_proj_bias";
    assert_says(&with_nan("gptoss-mxfp4", bias, bf16), &[bias, "NaN", "index 1"]);
    let scales = "model.layers.0.mlp.experts.down_proj";
    assert_says(&with_nan("gptoss-mxfp4", &format!("{scales}_scales"), &[0xff]), &[scales, "scales", "NaN"]);
}

#[test]
fn a_token_must_find_its_experts() {
    let refusals = [
        ("qwen3moe-top3-norm", "num_experts_per_tok", json!(9), "at most num_experts = 8, found 9"),
        ("mixtral-top2", "num_experts_per_tok", json!(5), "at most num_local_experts = 4, found 5"),
        ("mixtral-top2", "num_experts_per_tok", json!(0), "from 1 to"),
        ("gptoss-mxfp4", "num_experts_per_tok", json!(5), "at most num_local_experts = 4, found 5"),
        ("glm4moelite-groups-direct", "n_group", json!(5), "divide n_routed_experts = 12"),
        ("glm4moelite-groups-direct", "topk_group", json!(5), "at most n_group = 4, found 5"),
        ("glm4moelite-groups-direct", "num_experts_per_tok", json!(7), "the 6 of n_routed_experts = 12"),
        ("glm4moe-groups-sharded", "n_group", json!(4), "divide n_routed_experts = 6"),
        ("deepseekv3-groups-yarn", "scoring_func", json!("softmax"), "must be sigmoid"),
        ("deepseekv3-groups-yarn", "topk_method", json!("greedy"), "must be noaux_tc"),
        ("glm4moelite-groups-direct", "mlp_layer_types", json!(["sparse"]), "num_hidden_layers = 3 entries, found 1"),
        ("glm4moelite-groups-direct", "mlp_layer_types", json!(["sparse", "thick", "dense"]), "`thick`"),
        ("gptoss-mxfp4", "swiglu_limit", json!(6.0), "must be 7"),
    ];
    for (name, field, value, problem) in refusals {
        assert_says(&refusal(name, with(field, value)), &["config.json", field, problem]);
    }
    let wider = refusal("qwen3moe-top3-norm", with("moe_intermediate_size", json!(17)));
    assert_says(&wider, &["model.layers.0.mlp.experts.0.gate_proj.weight", "[17, 32]"]);
    let stacked = refusal("qwen3moe-window-yarn-fused", with("moe_intermediate_size", json!(9)));
    assert_says(&stacked, &["model.layers.0.mlp.experts.gate_up_proj", "[6, 18, 32]"]);
    let packed = refusal("gptoss-mxfp4", with("intermediate_size", json!(64)));
    assert_says(&packed, &["model.layers.0.mlp.experts.gate_up_proj_blocks", "[4, 128, 2, 16]"]);
    let fewer = refusal("qwen3moe-top3-norm", with("num_experts", json!(7)));
    assert_says(&fewer, &["model.layers.0.mlp.gate.weight", "[7, 32]"]);
}

#[test]
fn latent_attention_must_fit_together() {
    let name = "glm4moelite-shared-mtp";
    let grouped = refusal(name, with("num_key_value_heads", json!(2)));
    assert_says(&grouped, &["num_key_value_heads", "num_attention_heads = 4", "found 2"]);
    assert_says(&refusal(name, with("qk_rope_head_dim", json!(7))), &["qk_rope_head_dim", "even", "7"]);
    assert_says(&refusal(name, with("kv_lora_rank", json!(0))), &["kv_lora_rank", "from 1 to"]);
    let ranks = refusal(name, with("kv_lora_rank", json!(16)));
    assert_says(&ranks, &["model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "[24, 32]"]);
    let direct = refusal(name, with("q_lora_rank", json!(null)));
    assert_says(&direct, &["model.layers.0.self_attn.q_proj.weight"]);
    let unsaid = refusal(name, |config| {
        config.shift_remove("q_lora_rank").unwrap();
    });
    assert_says(&unsaid, &["missing field `q_lora_rank`"]);
}

/// Layers that predict further tokens are there for speculation, as many as config.json says.
#[test]
fn prediction_layers_are_counted() {
    let name = "glm4moelite-shared-mtp";
    let none = refusal(name, with("num_nextn_predict_layers", json!(0)));
    assert_says(&none, &["does not use", "model.layers.2."]);
    for absurd in [json!(-1), json!(4097), json!("one")] {
        assert_says(
            &refusal(name, with("num_nextn_predict_layers", absurd)),
            &["num_nextn_predict_layers", "from 0 to"],
        );
    }
}

/// Who asks for such a layer is told if there is none, by loading and by the plan.
#[test]
fn a_prediction_layer_must_be_there() {
    let options = LoadOptions { prediction: true, ..options(KvType::F16) };
    let refused = |folder: &Path| {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let planner = Planner::new(&ReferenceBackend, &checkpoint).unwrap();
        let error = load_error(folder, &options);
        assert!(!planner.has_prediction_layer());
        assert_eq!(planner.plan(&options).unwrap_err().to_string(), error);
        error
    };
    let none = refused(&golden("qwen3-gqa2-tied"));
    assert_says(&none, &["no layer that predicts", "--speculate mtp", "num_nextn_predict_layers"]);
    // config.json speaks of it, as transformers leaves it when it saves a model without.
    let folder = tempfile::tempdir().unwrap();
    let source = golden("glm4moe-qknorm-mtp");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let kept = tensors.tensors().into_iter().filter(|(name, _)| !name.starts_with("model.layers.2."));
    safetensors::serialize_to_file(kept, None, &folder.path().join("model.safetensors")).unwrap();
    assert_says(&refused(folder.path()), &["lacks the tensor model.layers.2.eh_proj.weight"]);
}

#[test]
fn rotations_must_suit_the_model() {
    let rotated = |name: &str, rotations: Value| {
        let said =
            json!({"quant_method": "metal-marlin", "version": 1, "schemes": {}, "tensors": {}, "rotations": rotations});
        refusal(name, with("quantization_config", said))
    };
    let name = "qwen3-gqa2-tied";
    let hidden = "quantization_config.rotations.hidden";
    assert_says(&rotated(name, json!({"hidden": 128})), &[hidden, "must divide hidden_size = 64, found 128"]);
    assert_says(&rotated(name, json!({"hidden": 48})), &[hidden, "must divide"]);
    assert_says(&rotated(name, json!({"hidden": 0})), &[hidden, "power of two", "found 0"]);
    let mlp = "quantization_config.rotations.mlp";
    assert_says(
        &rotated(name, json!({"hidden": 64, "mlp": 64})),
        &[mlp, "must divide intermediate_size = 96, found 64"],
    );
    assert_says(&rotated(name, json!({"mlp": 52})), &[mlp, "12, 20, 28 or 36", "found 52"]);
    assert_says(&rotated("gemma3-mha-bias", json!({"hidden": 40})), &[hidden, "normalises"]);
    assert_says(&rotated("mixtral-top2", json!({"mlp": 48})), &[mlp, "experts"]);
}

#[test]
fn options_must_suit_the_model() {
    let error = |options: LoadOptions| load_error(&golden("qwen3-gqa2-tied"), &options);
    let default = LoadOptions::default();
    let context = error(LoadOptions { context: Some(65), ..default });
    assert_says(&context, &["context = 65", "from 1 to 64", "qwen3-gqa2-tied"]);
    assert_says(&error(LoadOptions { context: Some(0), ..default }), &["context = 0"]);
    assert_says(&error(LoadOptions { step_tokens: 0, ..default }), &["step_tokens = 0"]);
    assert_says(&error(LoadOptions { logit_rows: 0, ..default }), &["logit_rows = 0"]);
    assert_says(&error(LoadOptions { kv_blocks: Some(0), ..default }), &["kv_blocks = 0"]);
    assert_says(&error(LoadOptions { kv_blocks: Some(usize::MAX), ..default }), &["kv_blocks"]);
}

/// A device that binds too little for a layer's keys refuses before weights are loaded, and its plans count with that.
#[test]
fn a_kv_cache_beyond_a_binding_is_refused_by_the_plan() {
    let checkpoint = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let device = |max_binding| {
        let caps = GpuCaps { max_binding, ..GpuCaps::apple() };
        GpuBackend::imaginary(caps, GpuOptions::default()).unwrap()
    };
    let roomy = device(GpuCaps::apple().max_binding);
    let planner = Planner::new(&roomy, &checkpoint).unwrap();
    let options = planner.load_options(64, 4);
    let plan = planner.plan(&options).unwrap();
    planner.check_kv_cache(&options).unwrap();

    // Keys of all the blocks, and as much less as makes a block too many.
    let shape = planner.shape();
    let keys = (planner.kv_blocks(64, 4) * plan.block_tokens * shape.kv_heads * shape.head_dim * 2) as u64;
    Planner::new(&device(keys), &checkpoint).unwrap().check_kv_cache(&options).unwrap();
    let tight = device(keys - 16);
    let planner = Planner::new(&tight, &checkpoint).unwrap();
    let error = planner.check_kv_cache(&options).unwrap_err();
    assert!(matches!(error, ModelError::Kernel(KernelError::Binding(_))), "{error}");
    assert_says(&error.to_string(), &["(keys of ", "in f16) needs ", "binds no more than ", "--context", "--kv"]);
    assert_eq!(load_model(&tight, &checkpoint, &options).err().unwrap().to_string(), error.to_string());

    // Fewer sequences, a shorter context and fewer bits do; so plans say.
    let memory = plan.total() * 2;
    let plan = planner.plan(&options).unwrap();
    assert_eq!(plan.most_sequences(memory), Some(3));
    let longest = plan.longest_context(memory, 4).unwrap();
    assert!(longest < 64, "{longest}");
    planner.check_kv_cache(&planner.load_options(longest, 4)).unwrap();
    assert!(planner.check_kv_cache(&planner.load_options(longest + 1, 4)).is_err());
    planner.check_kv_cache(&planner.load_options(64, 3)).unwrap();
    planner.check_kv_cache(&LoadOptions { kv_type: KvType::Int8, ..options }).unwrap();
    assert_eq!(tight.memory_taken(), 0);
}
