//! GGUF files that are written. Reading is tested by itself, against the Python package;
//! `scripts/oracles/check_gguf.py` has the package and llama.cpp read them too.

mod common;

use std::fs;
use std::path::Path;

use common::{assert_says, message};
use marlin_checkpoint::{Checkpoint, Dtype, ExportLayout, Gguf, GgufType, GgufWriter, MemoryTensor, PlannedTensor};
use marlin_format::{EncodeOptions, Format, Grouping, PackedMatrix, Scheme, encode};
use serde_json::{Value, json};

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn tokenizer() -> Value {
    let added = |id, content, special| {
        json!({
            "id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        })
    };
    json!({
        "version": "1.0",
        "added_tokens": [
            added(4, "<e>", true),
            added(5, "<u>", false),
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": [["a", "b"]],
        },
    })
}

/// Two heads of 16 in queries, one in keys.
fn config(class: &str) -> Value {
    json!({
        "architectures": [class], "vocab_size": 7, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": false, "bos_token_id": 0,
        "eos_token_id": [4, 0],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    })
}

/// Names and shapes of all tensors.
const TENSORS: [(&str, &[usize]); 12] = [
    ("model.embed_tokens.weight", &[7, 32]),
    ("model.layers.0.input_layernorm.weight", &[32]),
    ("model.layers.0.self_attn.q_proj.weight", &[32, 32]),
    ("model.layers.0.self_attn.k_proj.weight", &[16, 32]),
    ("model.layers.0.self_attn.v_proj.weight", &[16, 32]),
    ("model.layers.0.self_attn.o_proj.weight", &[32, 32]),
    ("model.layers.0.post_attention_layernorm.weight", &[32]),
    ("model.layers.0.mlp.gate_proj.weight", &[64, 32]),
    ("model.layers.0.mlp.up_proj.weight", &[64, 32]),
    ("model.layers.0.mlp.down_proj.weight", &[32, 64]),
    ("model.norm.weight", &[32]),
    ("lm_head.weight", &[7, 32]),
];

fn values(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 23.0 - 2.0).collect()
}

fn matrix(seed: usize, rows: usize, cols: usize, scheme: Scheme) -> PackedMatrix<'static> {
    encode(&values(seed, rows * cols), rows, cols, &scheme, &EncodeOptions::default()).unwrap()
}

fn scheme(format: Format) -> Scheme {
    ExportLayout::Gguf.scheme(format.scheme(Some(Grouping::Columns(32))).unwrap()).unwrap()
}

fn source(folder: &Path, config: &Value, tokenizer: &Value) -> Checkpoint {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("tokenizer_config.json"), json!({"eos_token": "<e>", "chat_template": "hi"}).to_string())
        .unwrap();
    common::safetensors(&folder.join("model.safetensors"), &[]);
    Checkpoint::open(folder).unwrap()
}

fn planned(scheme: Scheme) -> Vec<PlannedTensor> {
    let tensor = |(name, shape): &(&str, &[usize])| match **shape {
        [rows, cols] => PlannedTensor::matrix(*name, rows, cols, scheme),
        _ => PlannedTensor::raw(*name, Dtype::BF16, shape.to_vec()),
    };
    TENSORS.iter().map(tensor).collect()
}

#[test]
fn a_written_llama_reads_as_it_was() {
    for (format, tensor_type, file_type) in
        [(Format::Int8, GgufType::Q8_0, 7), (Format::Int4Sym, GgufType::Q4_0, 2), (Format::Mxfp4, GgufType::Mxfp4, 38)]
    {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path(), &config("LlamaForCausalLM"), &tokenizer());
        let out = folder.path().join("out.gguf");
        let mut writer = GgufWriter::create(&out, &planned(scheme(format)), &source, false).unwrap();
        assert!(!out.exists());
        for (seed, (name, shape)) in TENSORS.iter().enumerate() {
            match **shape {
                [rows, cols] => writer.write_matrix(name, &matrix(seed, rows, cols, scheme(format))).unwrap(),
                // bfloat16 1.0, in any number.
                _ => writer.write_raw(name, Dtype::BF16, shape, &[0x80, 0x3f].repeat(32)).unwrap(),
            }
        }
        writer.finish().unwrap();

        let model = Checkpoint::open(&out).unwrap();
        for (seed, (name, shape)) in TENSORS.iter().enumerate() {
            match **shape {
                [rows, cols] => {
                    assert_eq!(model.matrix_any(name).unwrap(), matrix(seed, rows, cols, scheme(format)), "{name}")
                }
                _ => assert_eq!(model.vector(name, 32).unwrap(), [1.0; 32], "{name}"),
            }
        }
        let found = model.config();
        for key in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "architectures",
        ] {
            assert_eq!(found[key], source.config()[key], "{key}");
        }
        // What the factors were made of.
        assert_eq!(found["rope_scaling"]["factor"], 8.0);
        let gguf = Gguf::open(&out).unwrap();
        assert_eq!(gguf.tensor("blk.0.attn_q.weight").unwrap().tensor_type, tensor_type);
        assert_eq!(gguf.value("general.file_type").unwrap().as_u64(), Some(file_type));
        let text = |key: &str| gguf.value(key).unwrap().as_str().map(str::to_owned);
        assert_eq!(text("tokenizer.ggml.pre").as_deref(), Some("qwen2"));
        assert_eq!(text("tokenizer.chat_template").as_deref(), Some("hi"));
        assert_eq!(gguf.value("tokenizer.ggml.eos_token_id").unwrap().as_u64(), Some(4));
        let marlin_checkpoint::GgufValue::Array(tokens) = gguf.value("tokenizer.ggml.tokens").unwrap() else {
            panic!("tokens are no array")
        };
        assert_eq!(tokens.len(), 7);
    }
}

#[test]
fn experts_become_stacks() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config("Qwen3MoeForCausalLM");
    for (key, value) in [
        ("num_experts", json!(2)),
        ("num_experts_per_tok", json!(1)),
        ("moe_intermediate_size", json!(4)),
        ("norm_topk_prob", json!(true)),
        ("rope_scaling", json!(null)),
    ] {
        config[key] = value;
    }
    let source = source(folder.path(), &config, &tokenizer());
    let q8 = scheme(Format::Int8);
    let experts: Vec<String> =
        (0..2).map(|expert| format!("model.layers.0.mlp.experts.{expert}.up_proj.weight")).collect();
    let mut planned: Vec<_> = experts.iter().map(|name| PlannedTensor::matrix(name, 4, 32, q8)).collect();
    planned.push(PlannedTensor::matrix("model.layers.0.mlp.gate.weight", 2, 32, Scheme::BF16));
    let out = folder.path().join("out.gguf");
    let mut writer = GgufWriter::create(&out, &planned, &source, false).unwrap();
    for (seed, name) in experts.iter().enumerate().rev() {
        writer.write_matrix(name, &matrix(seed, 4, 32, q8)).unwrap();
    }
    writer.write_matrix("model.layers.0.mlp.gate.weight", &matrix(7, 2, 32, Scheme::BF16)).unwrap();
    writer.finish().unwrap();
    let gguf = Gguf::open(&out).unwrap();
    let found = gguf.values("blk.0.ffn_up_exps.weight").unwrap();
    assert_eq!(found, [matrix(0, 4, 32, q8).decode(), matrix(1, 4, 32, q8).decode()].concat());
    assert_eq!(gguf.tensor("blk.0.ffn_up_exps.weight").unwrap().shape, [2, 4, 32]);
    // Routers stay floats.
    let router = gguf.tensor("blk.0.ffn_gate_inp.weight").unwrap();
    assert_eq!((router.tensor_type, router.shape.as_slice()), (GgufType::F32, &[2, 32][..]));

    let one = vec![PlannedTensor::matrix(&experts[0], 4, 32, q8)];
    let error = message(GgufWriter::create(&folder.path().join("b.gguf"), &one, &source, false).unwrap_err());
    assert_says(&error, &["`blk.0.ffn_up_exps.weight`", "2 experts, there are 1"]);
}

#[test]
fn what_llama_cpp_does_not_know_is_refused() {
    let refused = |change: &dyn Fn(&mut Value, &mut Value), words: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let (mut config, mut tokenizer) = (config("LlamaForCausalLM"), tokenizer());
        change(&mut config, &mut tokenizer);
        let source = source(folder.path(), &config, &tokenizer);
        let out = folder.path().join("out.gguf");
        let error = message(GgufWriter::create(&out, &planned(scheme(Format::Int8)), &source, false).unwrap_err());
        assert_says(&error, words);
        assert!(!out.exists() && !folder.path().join("out.gguf.partial").exists());
    };
    refused(&|config, _| config["architectures"] = json!(["XForCausalLM"]), &["XForCausalLM", "LlamaForCausalLM"]);
    refused(&|config, _| config["hidden_act"] = json!("gelu"), &["hidden_act", "gelu"]);
    refused(&|config, _| config["sliding_window"] = json!(16), &["sliding_window = 16"]);
    refused(&|config, _| config["hidden_size"] = json!(-1), &["hidden_size is -1"]);
    refused(&|config, _| config["num_attention_heads"] = json!(3), &["q_proj", "3 heads"]);
    refused(&|config, _| config["rope_scaling"]["rope_type"] = json!("yarn"), &["yarn", "llama3"]);
    refused(&|config, _| config["rope_scaling"]["factor"] = json!(0), &["factor is 0"]);
    refused(&|config, _| config["num_hidden_layers"] = json!(0), &["num_hidden_layers"]);
    refused(
        &|_, t| t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("x"),
        &["qwen2", "llama-bpe", "gpt-2"],
    );
    refused(&|_, t| t["pre_tokenizer"] = json!({"type": "Whitespace"}), &["Whitespace"]);
    refused(&|_, t| t["normalizer"] = json!({"type": "Lowercase"}), &["Lowercase"]);
    refused(&|_, t| t["model"]["ignore_merges"] = json!(true), &["ignore_merges = true", "`qwen2`"]);
    refused(&|_, t| t["model"]["byte_fallback"] = json!(true), &["BPE of bytes"]);

    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path(), &config("LlamaForCausalLM"), &tokenizer());
    let plan = |tensor: PlannedTensor, words: &[&str]| {
        let out = folder.path().join("out.gguf");
        assert_says(&message(GgufWriter::create(&out, &[tensor], &source, false).unwrap_err()), words);
    };
    let q8 = scheme(Format::Int8);
    plan(PlannedTensor::matrix("model.layers.0.mlp.x_proj.weight", 4, 32, q8), &["x_proj", "no place"]);
    plan(PlannedTensor::matrix("model.layers.1.mlp.up_proj.weight", 4, 32, q8), &["layers.1", "no place"]);
    plan(PlannedTensor::matrix("model.layers.0.mlp.up_proj.weight", 4, 40, q8), &["whole blocks of 32", "Q8_0"]);
    plan(PlannedTensor::raw("lm_head.weight", Dtype::I32, vec![4, 32]), &["lm_head", "I32"]);
    for format in [Format::Int8, Format::Int4, Format::Fp4, Format::Nvfp4] {
        let error = message(ExportLayout::Gguf.scheme(format.scheme(None).unwrap()).unwrap_err());
        assert_says(&error, &["gguf has no place for", "--group-size 32"]);
    }
    // An output that is there is replaced with `force` only, and only if it is such a file.
    let out = folder.path().join("old.gguf");
    fs::write(&out, "old").unwrap();
    let create = |out: &Path, force| GgufWriter::create(out, &planned(q8), &source, force).map(drop);
    assert_says(&message(create(&out, false).unwrap_err()), &["exists", "--force"]);
    create(&out, true).unwrap();
    assert_says(&message(create(&folder.path().join("config.json"), true).unwrap_err()), &["no *.gguf file"]);
    assert_eq!(fs::read(&out).unwrap(), b"old");
    // Without all of its tensors there is no file, and a model in memory has no tokenizer.
    let writer = GgufWriter::create(&folder.path().join("new.gguf"), &planned(q8), &source, false).unwrap();
    assert_says(&message(writer.finish().unwrap_err()), &["has not been written"]);
    let memory = [("lm_head.weight".to_owned(), MemoryTensor::vector(&[0.0]))];
    let memory = Checkpoint::from_parts("m", config("LlamaForCausalLM"), memory.into()).unwrap();
    let error = message(GgufWriter::create(&out, &planned(q8), &memory, true).unwrap_err());
    assert_says(&error, &["tokenizer.json", "holds the tokenizer"]);
}
