//! Model folders that are spoilt in every way there is: the program ends with one clear error, never with a panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A byte of text each, enough for prompts of the letters a to e.
const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
    "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "x": 66}, "merges": []}}"#;

/// A copy of a tiny random model (2 layers, 101 tokens, a context of 64), with a tokenizer.
struct Model {
    folder: TempDir,
}

impl Model {
    fn new(golden: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(golden);
        for entry in fs::read_dir(source).unwrap() {
            let file = entry.unwrap().path();
            fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
        Self { folder }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.file(name), bytes).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).unwrap();
    }

    /// A folder where a file should be.
    fn replace_by_folder(&self, name: &str) {
        self.remove(name);
        fs::create_dir(self.file(name)).unwrap();
    }

    /// Sets a field of a JSON file; null removes it.
    fn set(&self, name: &str, field: &str, value: Value) {
        let mut json: Value = serde_json::from_slice(&fs::read(self.file(name)).unwrap_or(b"{}".into())).unwrap();
        let object = json.as_object_mut().unwrap();
        if value.is_null() {
            object.remove(field);
        } else {
            object.insert(field.to_owned(), value);
        }
        self.write(name, json.to_string());
    }

    fn config(&self, field: &str, value: Value) {
        self.set("config.json", field, value);
    }

    /// Text put in the place of a field's value in config.json: numbers that no JSON library would write.
    fn raw_config(&self, field: &str, text: &str) {
        self.config(field, json!("PLACE"));
        let config = fs::read_to_string(self.file("config.json")).unwrap();
        self.write("config.json", config.replace("\"PLACE\"", text));
    }

    /// Edits the weight file: its header as JSON, and the bytes after it.
    fn edit_weights(&self, edit: impl FnOnce(&mut Value, &mut Vec<u8>)) {
        let file = fs::read(self.file("model.safetensors")).unwrap();
        let (length, rest) = file.split_at(8);
        let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        let (mut header, mut data) = (serde_json::from_slice(header).unwrap(), data.to_vec());
        edit(&mut header, &mut data);
        let header = header.to_string().into_bytes();
        self.write("model.safetensors", [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat());
    }

    /// Changes a field of a tensor in the header.
    fn tensor(&self, name: &str, field: &str, value: Value) {
        self.edit_weights(|header, _| header[name][field] = value);
    }

    /// Cuts the weight file to so many bytes.
    fn truncate(&self, keep: impl FnOnce(usize) -> usize) {
        let file = fs::read(self.file("model.safetensors")).unwrap();
        self.write("model.safetensors", &file[..keep(file.len())]);
    }

    fn run(&self, prompt: &str, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
        command.arg("run").arg(self.folder.path()).args([prompt, "--max-tokens", "1", "--temperature", "0"]);
        command.args(options).output().unwrap()
    }
}

const TINY: &str = "qwen3-gqa2-tied";
const SHARDED: &str = "qwen3-gqa4-bias-sharded";
const UP: &str = "model.layers.0.mlp.up_proj.weight";
const NORM: &str = "model.norm.weight";

/// What spoils a folder, and what the error must say of it.
type Row = (&'static str, fn(&Model), &'static [&'static str]);

#[test]
fn the_folder_that_is_spoilt_below_is_whole() {
    for golden in [TINY, SHARDED] {
        let output = Model::new(golden).run("abc", &[]);
        assert!(output.status.success(), "{golden}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn spoilt_folders_end_in_one_error() {
    for (what, spoil, words) in CONFIG.iter().chain(WEIGHTS).chain(SIDE_FILES) {
        let model = Model::new(TINY);
        spoil(&model);
        check(what, &model.run("abc", &[]), words);
    }
    for (what, spoil, words) in SHARDS {
        let model = Model::new(SHARDED);
        spoil(&model);
        check(what, &model.run("abc", &[]), words);
    }
}

#[test]
fn requests_that_do_not_suit_the_model_end_in_one_error() {
    let long = "a".repeat(65);
    type Request<'r> = (&'r str, &'r str, &'r [&'r str], &'r [&'r str]);
    let rows: &[Request<'_>] = &[
        ("prompt beyond the context", &long, &[], &["the prompt has 65 tokens", "context of 64 tokens", "shorten"]),
        ("prompt that fills the context", &long[1..], &[], &["the prompt has 64 tokens", "at least one more"]),
        ("prompt beyond --context", "abc", &["--context", "2"], &["the prompt has 3 tokens", "context of 2 tokens"]),
        ("context beyond the model's", "abc", &["--context", "65"], &["context = 65", "from 1 to 64"]),
        ("prompt without tokens", "zzz", &[], &["the prompt has no tokens"]),
        ("too little memory", "abc", &["--memory", "1MB"], &["needs", "976.6 KiB are available", "--memory"]),
        ("chat without a template", "abc", &["--chat"], &["chat template"]),
    ];
    for (what, prompt, options, words) in rows {
        check(what, &Model::new(TINY).run(prompt, options), words);
    }
}

/// A prompt that is too long is refused before weights are looked at.
#[test]
fn a_long_prompt_is_refused_before_loading() {
    let model = Model::new(TINY);
    model.tensor(UP, "shape", json!([64, 96]));
    check("long prompt", &model.run(&"a".repeat(65), &[]), &["the prompt has 65 tokens"]);
}

/// Exit status 1, nothing on standard output, one chain of errors that says `words`.
#[track_caller]
fn check(what: &str, output: &Output, words: &[&str]) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    println!("{what}: {stderr}");
    assert_eq!(output.status.code(), Some(1), "{what}: {stderr}");
    assert!(output.stdout.is_empty() && !stderr.contains("panicked"), "{what}: {stderr}");
    let (error, causes) = stderr.split_once('\n').unwrap();
    assert!(error.starts_with("error: ") && causes.lines().all(|line| line.starts_with("  caused by: ")), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{what}: {stderr:?} does not say {word:?}");
    }
}

const CONFIG: &[Row] = &[
    ("no config.json", |m| m.remove("config.json"), &["config.json is missing", "a model folder holds"]),
    ("empty config.json", |m| m.write("config.json", ""), &["config.json is not the JSON expected", "line 1 column 0"]),
    ("config.json cut off", |m| m.write("config.json", "{\n\"a\": 1,"), &["config.json", "EOF", "line 2 column 7"]),
    ("config.json in another encoding", |m| m.write("config.json", b"{\"a\": \"\xff\"}"), &["config.json", "line 1"]),
    ("config.json of a list", |m| m.write("config.json", "[]"), &["config.json", "no JSON object"]),
    ("config.json without end", |m| m.write("config.json", "[".repeat(1 << 20)), &["config.json", "recursion limit"]),
    ("config.json is a folder", |m| m.replace_by_folder("config.json"), &["cannot read", "config.json", "directory"]),
    (
        "no architecture",
        |m| m.config("architectures", json!(null)),
        &["architectures", "LlamaForCausalLM", "found nothing"],
    ),
    (
        "unknown architecture",
        |m| m.config("architectures", json!(["MambaForCausalLM"])),
        &["MambaForCausalLM is not supported", "Qwen3ForCausalLM"],
    ),
    ("no hidden_size", |m| m.config("hidden_size", json!(null)), &["config.json", "missing field `hidden_size`"]),
    ("0 layers", |m| m.config("num_hidden_layers", json!(0)), &["num_hidden_layers", "from 1 to 4096, found 0"]),
    ("-1 layers", |m| m.config("num_hidden_layers", json!(-1)), &["num_hidden_layers", "from 1 to 4096, found -1"]),
    ("2^12 layers", |m| m.config("num_hidden_layers", json!(4096)), &["layer_types", "num_hidden_layers = 4096"]),
    (
        "half a layer",
        |m| m.config("num_hidden_layers", json!(1.5)),
        &["num_hidden_layers", "from 1 to 4096, found 1.5"],
    ),
    (
        "2^63 heads",
        |m| m.config("num_attention_heads", json!(1u64 << 63)),
        &["num_attention_heads", "from 1 to 16777216, found 9223372036854775808"],
    ),
    ("10^400 heads", |m| m.raw_config("num_attention_heads", "1e400"), &["config.json", "number out of range"]),
    ("0 heads", |m| m.config("num_attention_heads", json!(0)), &["num_attention_heads", "found 0"]),
    ("heads that do not group", |m| m.config("num_key_value_heads", json!(3)), &["num_key_value_heads", "found 3"]),
    ("more cached heads", |m| m.config("num_key_value_heads", json!(8)), &["num_key_value_heads", "found 8"]),
    ("head_dim 0", |m| m.config("head_dim", json!(0)), &["head_dim", "found 0"]),
    ("odd head_dim", |m| m.config("head_dim", json!(31)), &["head_dim", "must be even", "found 31"]),
    ("head_dim 2^24", |m| m.config("head_dim", json!(1 << 24)), &["head_dim", "from 1 to 65536, found 16777216"]),
    ("head_dim of another model", |m| m.config("head_dim", json!(16)), &["q_proj", "[128, 64]", "[64, 64]"]),
    (
        "hidden_size of another model",
        |m| m.config("hidden_size", json!(65)),
        &["embed_tokens", "[101, 64]", "[101, 65]"],
    ),
    ("vocab_size -5", |m| m.config("vocab_size", json!(-5)), &["vocab_size", "found -5"]),
    ("vocab_size as text", |m| m.config("vocab_size", json!("101")), &["vocab_size", "whole number", "found \"101\""]),
    ("no context", |m| m.config("max_position_embeddings", json!(0)), &["max_position_embeddings", "found 0"]),
    ("negative epsilon", |m| m.config("rms_norm_eps", json!(-1e-6)), &["rms_norm_eps", "positive", "-0.000001"]),
    ("epsilon 0", |m| m.config("rms_norm_eps", json!(0)), &["rms_norm_eps", "positive", "found 0"]),
    ("rope_theta NaN", |m| m.raw_config("rope_theta", "NaN"), &["config.json is not the JSON expected", "line 1"]),
    ("rope_theta -1", |m| m.config("rope_theta", json!(-1)), &["rope_theta", "positive", "found -1"]),
    ("rope_theta 10^60", |m| m.config("rope_theta", json!(1e60)), &["rope_theta", "single precision"]),
    ("unknown rope", |m| m.config("rope_scaling", json!({"rope_type": "spiral"})), &["rope_scaling", "spiral"]),
    ("unknown activation", |m| m.config("hidden_act", json!("relu2")), &["hidden_act", "`relu2`", "`silu`"]),
    ("layers of unknown type", |m| m.config("layer_types", json!(["a", "b"])), &["layer_types[0]", "`a`"]),
    ("a layer less", |m| m.config("layer_types", json!(["full_attention"])), &["layer_types", "found 1"]),
    (
        "quantised by others",
        |m| m.config("quantization_config", json!({"quant_method": "bitsandbytes"})),
        &["`bitsandbytes`", "not read yet", "unquantised"],
    ),
    (
        "quantised by nobody",
        |m| m.config("quantization_config", json!({"bits": 4})),
        &["quantization_config lacks quant_method"],
    ),
    (
        "quantised by a later version",
        |m| m.config("quantization_config", json!({"quant_method": "metal-marlin", "version": 9})),
        &["version 9", "version 1", "update the program"],
    ),
    (
        "a pattern that explodes",
        |m| {
            let group = json!({"targets": ["re:((a{99}){99}){99}"], "weights": {"num_bits": 4, "group_size": 32}});
            let groups = json!({"group_0": group});
            let config =
                json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups});
            m.config("quantization_config", config);
        },
        &["group `group_0`", "re:((a{99}){99}){99}", "no regular expression"],
    ),
];

const WEIGHTS: &[Row] = &[
    ("no weights", |m| m.remove("model.safetensors"), &["model.safetensors is missing", "safetensors format"]),
    ("weights are a folder", |m| m.replace_by_folder("model.safetensors"), &["model.safetensors: this is no file"]),
    ("empty weights", |m| m.write("model.safetensors", ""), &["0 bytes are too few for a safetensors file"]),
    ("a Git LFS pointer", |m| m.write("model.safetensors", "version https://git-lfs.github.com"), &["git lfs pull"]),
    ("another kind of file", |m| m.write("model.safetensors", "PK\x03\x04 0123456789"), &["its header claims"]),
    ("weights cut in the header", |m| m.truncate(|_| 100), &["its header claims", "the file holds 92 more"]),
    ("weights short of a byte", |m| m.truncate(|all| all - 1), &["is truncated", "download or copy it again"]),
    (
        "a byte too many",
        |m| m.edit_weights(|_, data| data.push(0)),
        &["1 bytes follow the last tensor", "copy it again"],
    ),
    (
        "a header without end",
        |m| m.write("model.safetensors", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        &["its header claims 18446744073709551615 bytes"],
    ),
    (
        "a header that is no JSON",
        |m| m.write("model.safetensors", [&6u64.to_le_bytes()[..], b"{\"a\":]"].concat()),
        &["its safetensors header is invalid", "column 6"],
    ),
    ("overlapping tensors", |m| m.tensor(NORM, "data_offsets", json!([0, 128])), &["header is invalid"]),
    ("offsets of 2^64", |m| m.tensor(NORM, "data_offsets", json!([u64::MAX - 128, u64::MAX])), &["header is invalid"]),
    ("offsets backwards", |m| m.tensor(NORM, "data_offsets", json!([128, 0])), &["header is invalid"]),
    ("a shape of 2^96", |m| m.tensor(NORM, "shape", json!([1u64 << 48, 1u64 << 48])), &["header is invalid"]),
    ("a shape below zero", |m| m.tensor(NORM, "shape", json!([-64])), &["header is invalid"]),
    ("an unknown type", |m| m.tensor(NORM, "dtype", json!("F99")), &["header is invalid", "`F99`"]),
    ("a matrix on its side", |m| m.tensor(UP, "shape", json!([64, 96])), &[UP, "[64, 96]", "[96, 64]"]),
    ("a matrix in one row", |m| m.tensor(UP, "shape", json!([6144])), &[UP, "[6144]", "matrix"]),
    ("a matrix of integers", |m| m.tensor(UP, "dtype", json!("I16")), &[UP, "I16", "BF16, F16 or F32"]),
    ("a norm of integers", |m| m.tensor(NORM, "dtype", json!("U16")), &[NORM, "U16", "BF16, F16 or F32"]),
    (
        "a norm that is no number",
        |m| {
            m.edit_weights(|header, data| {
                let offset = header[NORM]["data_offsets"][0].as_u64().unwrap() as usize;
                data[offset..][..2].copy_from_slice(&[0xc0, 0x7f]);
            });
        },
        &[NORM, "NaN at index 0", "damaged"],
    ),
    (
        "a tensor under another name",
        |m| {
            m.edit_weights(|header, _| {
                let norm = header.as_object_mut().unwrap().remove(NORM).unwrap();
                header["model.norm.weights"] = norm;
            });
        },
        &["no tensor `model.norm.weight`", "do not belong together"],
    ),
];

const SHARDS: &[Row] = &[
    (
        "a shard is missing",
        |m| m.remove("model-00002-of-00006.safetensors"),
        &["model-00002-of-00006.safetensors is missing", "index.json names it", "fetch the missing file"],
    ),
    (
        "a shard twice",
        |m| {
            fs::copy(m.file("model-00001-of-00006.safetensors"), m.file("model-00002-of-00006.safetensors")).unwrap();
        },
        &["model-00002-of-00006.safetensors", "is also in", "model-00001-of-00006.safetensors"],
    ),
    (
        "an index of another model",
        |m| m.set("model.safetensors.index.json", "weight_map", json!({"other": "model-00001-of-00006.safetensors"})),
        &["`other` should be in", "no file has it", "different checkpoints"],
    ),
    (
        "an index that leads elsewhere",
        |m| m.set("model.safetensors.index.json", "weight_map", json!({"a": "../model.safetensors"})),
        &["`../model.safetensors`", "same folder"],
    ),
    (
        "an empty index",
        |m| m.write("model.safetensors.index.json", "{}"),
        &["model.safetensors.index.json is not the JSON expected", "weight_map"],
    ),
];

const SIDE_FILES: &[Row] = &[
    ("no tokenizer", |m| m.remove("tokenizer.json"), &["tokenizer.json is missing", "save_pretrained"]),
    ("an empty tokenizer", |m| m.write("tokenizer.json", ""), &["tokenizer.json", "invalid"]),
    ("a tokenizer of nothing", |m| m.write("tokenizer.json", "{}"), &["tokenizer.json", "invalid"]),
    (
        "a tokenizer with another vocabulary",
        |m| m.write("tokenizer.json", TOKENIZER.replace("66", "101")),
        &["tokenizer.json has 102 tokens", "vocab_size = 101", "another model"],
    ),
    (
        "a tokenizer at which the crate that reads it panics",
        |m| {
            let normalizer = r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}"#;
            m.write("tokenizer.json", TOKENIZER.replace("\"normalizer\": null", normalizer));
        },
        &["tokenizer.json", "contradicts itself"],
    ),
    (
        "merges of tokens that are not there",
        |m| m.write("tokenizer.json", TOKENIZER.replace("\"merges\": []", "\"merges\": [\"q z\"]")),
        &["tokenizer.json", "invalid", "`q`"],
    ),
    (
        "tokenizer settings that are no JSON",
        |m| m.write("tokenizer_config.json", "{'a': 1}"),
        &["tokenizer_config.json is not the JSON expected", "line 1 column 2"],
    ),
    (
        "a negative temperature",
        |m| m.write("generation_config.json", r#"{"do_sample": true, "repetition_penalty": -1}"#),
        &["generation_config.json", "repetition", "found -1"],
    ),
    (
        "an end of text as text",
        |m| m.write("generation_config.json", r#"{"eos_token_id": "</s>"}"#),
        &["generation_config.json", "a token id or a list of token ids"],
    ),
];
