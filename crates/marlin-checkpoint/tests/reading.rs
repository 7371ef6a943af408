//! Opening checkpoint folders, whole and broken.

mod common;

use std::fs;
use std::path::Path;

use common::{assert_says, folder, message, safetensors, safetensors_by_hand};
use marlin_checkpoint::{Checkpoint, Dtype, Rotations, Storage};
use marlin_format::Scheme;

fn open_error(path: &Path) -> String {
    message(Checkpoint::open(path).unwrap_err())
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// BF16 is the upper half of an f32.
fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

#[test]
fn unquantised_tensors_are_borrowed_as_they_are() {
    let matrix = bf16_bytes(&[1.0, -2.0, 0.5, 3.0, 0.0, -0.25]);
    let norm = f32_bytes(&[1.5, -0.125]);
    let half = [0x00, 0x3c, 0x00, 0xc0]; // 1, −2 in F16
    let folder = folder(
        r#"{"model_type": "test"}"#,
        &[
            ("w.weight", Dtype::BF16, &[2, 3], &matrix),
            ("norm.weight", Dtype::F32, &[2], &norm),
            ("b.bias", Dtype::F16, &[2], &half),
        ],
    );
    let checkpoint = Checkpoint::open(folder.path()).unwrap();

    assert_eq!(checkpoint.name(), folder.path().to_str().unwrap());
    assert_eq!(checkpoint.config()["model_type"], "test");
    assert!(checkpoint.quantization().is_none() && checkpoint.layout().is_none());
    let mut names: Vec<&str> = checkpoint.tensor_names().collect();
    names.sort_unstable();
    assert_eq!(names, ["b.bias", "norm.weight", "w.weight"]);
    assert_eq!(checkpoint.weight_bytes(), 12 + 8 + 4);
    assert_eq!(checkpoint.shape("w.weight"), Some(vec![2, 3]));
    assert_eq!(checkpoint.info("w.weight").unwrap().storage, Storage::Plain(Dtype::BF16));
    assert!(checkpoint.contains("b.bias") && !checkpoint.contains("b"));

    let read = checkpoint.matrix("w.weight", 2, 3).unwrap();
    assert_eq!((read.rows, read.cols, read.scheme), (2, 3, Scheme::BF16));
    assert!(matches!(read.codes, std::borrow::Cow::Borrowed(_)));
    assert_eq!(*read.codes, *matrix);
    assert_eq!(checkpoint.vector("norm.weight", 2).unwrap(), [1.5, -0.125]);
    assert_eq!(checkpoint.vector("b.bias", 2).unwrap(), [1.0, -2.0]);
    let raw = checkpoint.tensor("b.bias").unwrap();
    assert_eq!((raw.dtype, raw.shape, &*raw.bytes), (Dtype::F16, &[2][..], &half[..]));
}

#[test]
fn wrong_shapes_types_and_values_are_named() {
    let folder = folder(
        "{}",
        &[
            ("m", Dtype::F32, &[2, 2], &f32_bytes(&[0.0; 4])),
            ("ids", Dtype::I32, &[1, 1], &[0; 4]),
            ("cube", Dtype::F32, &[1, 1, 1], &[0; 4]),
            ("nan", Dtype::F32, &[3], &f32_bytes(&[1.0, f32::NAN, 2.0])),
            ("none", Dtype::F32, &[0, 4], &[]),
        ],
    );
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = folder.path().join("model.safetensors");
    let file = file.to_str().unwrap();

    assert_says(&message(checkpoint.matrix("m", 2, 3).unwrap_err()), &[file, "`m`", "[2, 2]", "[2, 3]"]);
    assert_says(&message(checkpoint.matrix_any("cube").unwrap_err()), &[file, "`cube`", "[1, 1, 1]", "[rows, cols]"]);
    assert_says(&message(checkpoint.matrix_any("ids").unwrap_err()), &[file, "`ids`", "I32", "BF16, F16 or F32"]);
    assert_says(&message(checkpoint.matrix_any("none").unwrap_err()), &[file, "`none`", "[0, 4]"]);
    assert_says(&message(checkpoint.vector("m", 4).unwrap_err()), &[file, "`m`", "[2, 2]", "[4]"]);
    assert_says(&message(checkpoint.vector("nan", 3).unwrap_err()), &[file, "`nan`", "NaN at index 1"]);
    assert_says(&message(checkpoint.matrix_any("absent").unwrap_err()), &[checkpoint.name(), "`absent`"]);
}

#[test]
fn paths_and_files_that_are_missing() {
    let empty = tempfile::tempdir().unwrap();
    assert_says(&open_error(&empty.path().join("nowhere")), &["nowhere", "neither a folder nor a file"]);
    assert_says(&open_error(empty.path()), &["config.json is missing"]);

    fs::write(empty.path().join("config.json"), "{}").unwrap();
    assert_says(&open_error(empty.path()), &["model.safetensors is missing", "index.json"]);
    fs::write(empty.path().join("model.bin"), "").unwrap();
    assert_says(&open_error(empty.path()), &["`model.bin` is a format that is not read", "one GGUF file"]);
    fs::write(empty.path().join("model.gguf"), "").unwrap();
    assert_says(&open_error(empty.path()), &["model.gguf: the magic number"]);
}

#[test]
fn broken_config() {
    let folder = folder("{\n  \"a\": ,\n}", &[]);
    assert_says(&open_error(folder.path()), &["config.json", "line 2 column 8"]);
    fs::write(folder.path().join("config.json"), "[]").unwrap();
    assert_says(&open_error(folder.path()), &["config.json", "no JSON object"]);
}

#[test]
fn hostile_weight_files() {
    let folder = folder("{}", &[]);
    let file = folder.path().join("model.safetensors");
    let says = |words: &[&str]| assert_says(&open_error(folder.path()), &[&["model.safetensors"], words].concat());

    fs::write(&file, [1, 2, 3]).unwrap();
    says(&["3 bytes are too few"]);
    fs::write(&file, b"version https://git-lfs.github.com/spec/v1\noid sha256:00").unwrap();
    says(&["Git LFS pointer", "git lfs pull"]);
    fs::write(&file, [&1000u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
    says(&["header claims 1000 bytes", "2 more"]);
    fs::write(&file, u64::MAX.to_le_bytes()).unwrap();
    says(&["header claims 18446744073709551615 bytes"]);
    safetensors_by_hand(&file, "{not json", &[]);
    says(&["header is invalid"]);
    safetensors_by_hand(&file, r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, &[0; 3]);
    says(&["truncated", "holds 3 bytes", "describes 4"]);
    safetensors_by_hand(&file, r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, &[0; 5]);
    says(&["1 bytes follow the last tensor"]);
    safetensors_by_hand(&file, r#"{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}"#, &[0; 4]);
    says(&["header is invalid"]);
    let overlapping =
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
    safetensors_by_hand(&file, overlapping, &[0; 6]);
    says(&["header is invalid", "`b`"]);
    let huge = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
    safetensors_by_hand(&file, huge, &[]);
    says(&["header is invalid"]);
    // Eight tensors whose sizes add up to nearly 2^64: no sum may wrap.
    let size = (1u64 << 61) - 1;
    let tensors: Vec<String> = (0..8)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{},{}]}}"#, i * size, (i + 1) * size))
        .collect();
    safetensors_by_hand(&file, &format!("{{{}}}", tensors.join(",")), &[0; 16]);
    says(&["truncated"]);
}

/// Two shards with one tensor each, and the index given.
fn sharded(index: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    safetensors(&folder.path().join("1.safetensors"), &[("a", Dtype::F32, &[1], &f32_bytes(&[1.0]))]);
    safetensors(&folder.path().join("2.safetensors"), &[("b", Dtype::F32, &[1], &f32_bytes(&[2.0]))]);
    folder
}

const INDEX: &str = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;

#[test]
fn shards_are_one_model() {
    let folder = sharded(INDEX);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.vector("a", 1).unwrap(), [1.0]);
    assert_eq!(checkpoint.vector("b", 1).unwrap(), [2.0]);
}

#[test]
fn shards_that_disagree_with_the_index() {
    let missing = sharded(INDEX);
    fs::remove_file(missing.path().join("2.safetensors")).unwrap();
    assert_says(&open_error(missing.path()), &["2.safetensors is missing", "index.json names it"]);

    let absent = sharded(r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}"#);
    assert_says(&open_error(absent.path()), &["index.json", "`c`", "2.safetensors", "no file has it"]);

    let swapped = sharded(r#"{"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}"#);
    assert_says(&open_error(swapped.path()), &["`a` should be in", "it is in"]);

    let duplicate = sharded(INDEX);
    safetensors(&duplicate.path().join("2.safetensors"), &[("a", Dtype::U8, &[1], &[0]), ("b", Dtype::U8, &[1], &[0])]);
    assert_says(&open_error(duplicate.path()), &["2.safetensors", "`a` is also in", "1.safetensors"]);

    let escaping = sharded(r#"{"weight_map": {"a": "../1.safetensors"}}"#);
    assert_says(&open_error(escaping.path()), &["index.json", "`../1.safetensors`"]);
}

#[test]
fn layouts_of_others_are_named() {
    for (config, layout) in [
        (r#"{"quantization_config": {"quant_method": "bitsandbytes"}}"#, "`bitsandbytes`"),
        (r#"{"quantization_config": {"quant_method": "hqq"}}"#, "`hqq`"),
    ] {
        assert_says(&open_error(folder(config, &[]).path()), &["config.json", layout, "not read yet"]);
    }
    let nameless = folder(r#"{"quantization_config": {}}"#, &[]);
    assert_says(&open_error(nameless.path()), &["config.json", "lacks quant_method"]);
    assert!(Checkpoint::open(folder(r#"{"quantization_config": null}"#, &[]).path()).is_ok());
}

/// A folder of ours with one INT8 matrix `[1, 4]`, one f16 scale for all columns; the parts can be replaced.
fn ours(config: &str, tensors: &[common::Raw]) -> tempfile::TempDir {
    let config = format!(r#"{{"quantization_config": {{"quant_method": "metal-marlin", {config}}}}}"#);
    folder(&config, tensors)
}

const INT8: &str = r#""schemes": {"i8": {"element": {"int": 8}, "grouping": {"columns": 4}, "scale": "f16"}}"#;
const ONE: &str = r#""tensors": {"w": {"scheme": "i8", "shape": [1, 4]}}"#;

#[test]
fn quantised_folder_made_by_hand() {
    let version = r#""version": 1"#;
    let codes: common::Raw = ("w", Dtype::U8, &[1, 4], &[128, 129, 127, 255]);
    let scale: common::Raw = ("w_scale", Dtype::F16, &[1, 1], &[0x00, 0x38]); // 0.5
    let whole = ours(&format!("{version}, {INT8}, {ONE}"), &[codes, scale]);
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["w"]);
    assert_eq!(checkpoint.weight_bytes(), 6);
    let matrix = checkpoint.matrix("w", 1, 4).unwrap();
    let mut values = [0.0; 4];
    matrix.decode_row(0, &mut values);
    assert_eq!(values, [0.0, 0.5, -0.5, 63.5]);
    assert_says(&message(checkpoint.matrix("w", 4, 1).unwrap_err()), &["`w`", "[1, 4]", "[4, 1]"]);
    assert_says(&message(checkpoint.vector("w", 4).unwrap_err()), &["`w`", "packed"]);

    let says = |config: &str, tensors: &[common::Raw], words: &[&str]| {
        assert_says(&open_error(ours(config, tensors).path()), words);
    };
    says(&format!("{INT8}, {ONE}"), &[codes, scale], &["config.json", "version null", "version 1"]);
    says(&format!(r#""version": 2, {INT8}, {ONE}"#), &[codes, scale], &["config.json", "version 2", "version 1"]);
    says(&format!("{version}, {INT8}, {ONE}, \"extra\": 1"), &[codes, scale], &["config.json", "`extra`"]);
    let unknown = INT8.replace("\"grouping\"", "\"cluster\": 1, \"grouping\"");
    says(&format!("{version}, {unknown}, {ONE}"), &[codes, scale], &["config.json", "`cluster`"]);
    let other = ONE.replace("\"i8\"", "\"i9\"");
    says(&format!("{version}, {INT8}, {other}"), &[codes, scale], &["config.json", "`w`", "`i9`"]);
    let invalid = INT8.replace("\"int\": 8", "\"int\": 9");
    says(&format!("{version}, {invalid}, {ONE}"), &[codes, scale], &["config.json", "`w`", "2 to 8 bits, found 9"]);
    let zero = ONE.replace("[1, 4]", "[0, 4]");
    says(&format!("{version}, {INT8}, {zero}"), &[codes, scale], &["config.json", "`w`", "[0, 4]"]);
    let huge = ONE.replace("[1, 4]", "[4294967296, 4294967296]");
    says(&format!("{version}, {INT8}, {huge}"), &[codes, scale], &["config.json", "`w`", "too large"]);
    says(&format!("{version}, {INT8}, {ONE}"), &[codes], &["config.json", "lack `w_scale`"]);
    let wide: common::Raw = ("w_scale", Dtype::F32, &[1, 1], &[0; 4]);
    says(&format!("{version}, {INT8}, {ONE}"), &[codes, wide], &["`w_scale` is F32 [1, 1]", "wanted F16 [1, 1]"]);
    let short: common::Raw = ("w", Dtype::U8, &[1, 3], &[0; 3]);
    says(&format!("{version}, {INT8}, {ONE}"), &[short, scale], &["`w` is U8 [1, 3]", "wanted U8 [1, 4]"]);

    // Rotations that a program does not know would be left out, so none of them is passed over.
    let rotated = |rotations: &str| format!("{version}, {INT8}, {ONE}, \"rotations\": {rotations}");
    let found =
        |rotations: &str| Checkpoint::open(ours(&rotated(rotations), &[codes, scale]).path()).unwrap().rotations();
    assert_eq!(checkpoint.rotations(), Rotations::default());
    assert_eq!(found(r#"{"hidden": 512}"#), Rotations { hidden: Some(512), mlp: None });
    assert_eq!(found(r#"{"mlp": 96, "hidden": 64}"#), Rotations { hidden: Some(64), mlp: Some(96) });
    says(&rotated(r#"{"values": 64}"#), &[codes, scale], &["config.json", "`values`", "`hidden`"]);
    for absurd in ["-1", "1.5", "\"512\"", "[512]"] {
        says(&rotated(&format!("{{\"mlp\": {absurd}}}")), &[codes, scale], &["config.json", "quantization_config"]);
    }

    let infinite: common::Raw = ("w_scale", Dtype::F16, &[1, 1], &[0x00, 0x7c]);
    let folder = ours(&format!("{version}, {INT8}, {ONE}"), &[codes, infinite]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_says(&message(checkpoint.matrix_any("w").unwrap_err()), &["model.safetensors", "`w`", "inf"]);
}

#[test]
fn embedded_files() {
    static FILES: [(&str, &[u8]); 2] = [
        ("config.json", b"{\"hidden_size\": 1}"),
        (
            "model.safetensors",
            b"\x38\0\0\0\0\0\0\0{\"n\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,2]}} \x80\x3f",
        ),
    ];
    let checkpoint = Checkpoint::from_static("bundled", &FILES).unwrap();
    assert_eq!(checkpoint.name(), "bundled");
    assert_eq!(checkpoint.vector("n", 1).unwrap(), [1.0]);
    assert_eq!(checkpoint.file("config.json").unwrap().unwrap(), FILES[0].1);
    assert!(checkpoint.file("tokenizer.json").unwrap().is_none());
    assert_says(&message(checkpoint.tokenizer().unwrap_err()), &["bundled/tokenizer.json is missing"]);
    assert_says(&message(Checkpoint::from_static("bundled", &FILES[..1]).unwrap_err()), &["bundled/model.safetensors"]);
}

#[test]
fn special_tokens_are_those_of_the_tokenizer_configuration() {
    let folder = folder("{}", &[]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.special_tokens().unwrap().is_empty());
    let config =
        r#"{"bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "add_bos_token": true}"#;
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokens: Vec<_> = checkpoint.special_tokens().unwrap().into_iter().collect();
    assert_eq!(tokens, [("eos_token".into(), "</s>".into()), ("pad_token".into(), "<pad>".into())]);
}

#[test]
fn chat_templates() {
    let folder = folder("{}", &[]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let config = folder.path().join("tokenizer_config.json");
    assert_eq!(checkpoint.chat_template().unwrap(), None);
    fs::write(&config, r#"{"chat_template": null}"#).unwrap();
    assert_eq!(checkpoint.chat_template().unwrap(), None);
    fs::write(&config, r#"{"chat_template": "one"}"#).unwrap();
    assert_eq!(checkpoint.chat_template().unwrap().unwrap(), "one");
    let named = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
    fs::write(&config, named).unwrap();
    assert_eq!(checkpoint.chat_template().unwrap().unwrap(), "d");
    fs::write(&config, named.replace("default", "tools")).unwrap();
    assert_says(&message(checkpoint.chat_template().unwrap_err()), &["tokenizer_config.json", "rag", "tools"]);
    fs::write(folder.path().join("chat_template.jinja"), "{{ file }}").unwrap();
    assert_eq!(checkpoint.chat_template().unwrap().unwrap(), "{{ file }}");
}

#[test]
fn generation_settings() {
    let folder = folder(r#"{"eos_token_id": 7, "bos_token_id": null, "pad_token_id": -1}"#, &[]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = folder.path().join("generation_config.json");

    let fallback = checkpoint.generation_config().unwrap();
    assert_eq!((fallback.eos_token_id, fallback.bos_token_id, fallback.pad_token_id), (vec![7], None, None));

    let all = r#"{"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 0, "do_sample": true, "temperature": 0.5,
        "top_k": 40, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5, "max_new_tokens": 9, "other": {}}"#;
    fs::write(&file, all).unwrap();
    let read = checkpoint.generation_config().unwrap();
    assert_eq!((read.eos_token_id, read.bos_token_id, read.pad_token_id), (vec![2, 0], Some(1), Some(0)));
    assert_eq!((read.do_sample, read.temperature, read.top_k), (Some(true), Some(0.5), Some(40)));
    assert_eq!((read.top_p, read.min_p, read.repetition_penalty), (Some(0.25), Some(0.125), Some(1.5)));
    assert_eq!(read.max_new_tokens, Some(9));

    fs::write(&file, r#"{"temperature": 1}"#).unwrap();
    let read = checkpoint.generation_config().unwrap();
    assert_eq!((read.temperature, read.eos_token_id), (Some(1.0), vec![7]));
    fs::write(&file, r#"{"eos_token_id": "</s>"}"#).unwrap();
    let text = message(checkpoint.generation_config().unwrap_err());
    assert_says(&text, &["generation_config.json", "a token id or a list of token ids", "line 1"]);
}

#[test]
fn tensors_that_were_released_are_read_again() {
    let matrix = bf16_bytes(&[0.5; 6000]);
    let checkpoint_folder = folder("{}", &[("w.weight", Dtype::BF16, &[2, 3000], &matrix)]);
    let checkpoint = Checkpoint::open(checkpoint_folder.path()).unwrap();
    let read = checkpoint.matrix("w.weight", 2, 3000).unwrap();
    checkpoint.release("w.weight");
    checkpoint.release("no such tensor");
    assert_eq!(*read.codes, *matrix);
}

#[test]
fn fingerprints_tell_states_of_a_folder_apart() {
    let fingerprint = |config: &str, values: &[f32]| {
        let folder = folder(config, &[("w.weight", Dtype::F32, &[2, 2], &f32_bytes(values))]);
        let weights = fs::File::options().append(true).open(folder.path().join("model.safetensors")).unwrap();
        weights.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let of = || Checkpoint::open(folder.path()).unwrap().fingerprint().unwrap();
        let before = of();
        assert_eq!(of(), before);
        // The chat template is no weight.
        fs::write(folder.path().join("chat_template.jinja"), "x").unwrap();
        assert_eq!(of(), before);
        weights.set_modified(std::time::SystemTime::now()).unwrap();
        assert_ne!(of(), before);
        before
    };
    let first = fingerprint("{}", &[1.0; 4]);
    assert_eq!(fingerprint("{}", &[1.0; 4]), first);
    assert_ne!(fingerprint("{}", &[1.0, 1.0, 1.0, 2.0]), first);
    assert_ne!(fingerprint(r#"{"rope_theta": 1}"#, &[1.0; 4]), first);
    let memory = Checkpoint::from_parts("made", serde_json::json!({}), Vec::new()).unwrap();
    assert_eq!(memory.fingerprint(), None);
}
