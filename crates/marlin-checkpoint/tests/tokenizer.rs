//! Text to ids and back.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{assert_says, folder, message};
use marlin_checkpoint::{Checkpoint, Tokenizer};

/// A tokenizer of whole words; truncation is set, as in files saved after training.
const WORDS: &str = r#"{
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<s>"},
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": true,
         "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
        {"id": 5, "content": "<tool>", "special": false,
         "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}
    ],
    "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": POST, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<unk>": 1, "a": 2, "red": 3, "fox": 4}, "unk_token": "<unk>"}
}"#;

const ADDS_BOS: &str = r#"{"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}"#;

fn tokenizer(post: &str, config: &str) -> Tokenizer {
    let folder = folder("{}", &[]);
    fs::write(folder.path().join("tokenizer.json"), WORDS.replace("POST", post)).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    Checkpoint::open(folder.path()).unwrap().tokenizer().unwrap()
}

#[test]
fn words() {
    let tokenizer = tokenizer("null", "{}");
    // Neither cut to two tokens nor padded to eight.
    assert_eq!(tokenizer.encode("a red cat fox", true).unwrap(), [2, 3, 1, 4]);
    assert_eq!(tokenizer.encode("<s> a", false).unwrap(), [0, 2]);
    assert!(tokenizer.encode("", true).unwrap().is_empty());
    assert_eq!(tokenizer.decode(&[0, 2, 4, 5], false).unwrap(), "<s> a fox <tool>");
    assert_eq!(tokenizer.decode(&[0, 2, 4, 5, 1000], true).unwrap(), "a fox <tool>");
    assert_eq!((tokenizer.token_id("fox"), tokenizer.token_id("wolf")), (Some(4), None));
    assert_eq!((tokenizer.id_to_token(5).as_deref(), tokenizer.id_to_token(6)), (Some("<tool>"), None));
    assert!(tokenizer.is_special(0) && !tokenizer.is_special(5) && !tokenizer.is_special(2));
    assert_eq!(tokenizer.vocabulary_size(), 6);
}

#[test]
fn tokenizer_config_decides_about_the_first_token() {
    let encode = |post, config: &str| tokenizer(post, config).encode("a fox", true).unwrap();
    let said = |add: &str| format!(r#"{{"add_bos_token": {add}, "bos_token": "<s>"}}"#);
    assert_eq!(encode("null", &said("null")), [2, 4]);
    assert_eq!(encode("null", &said("false")), [2, 4]);
    assert_eq!(encode("null", &said("true")), [0, 2, 4]);
    assert_eq!(encode(ADDS_BOS, "{}"), [0, 2, 4]);
    assert_eq!(encode(ADDS_BOS, &said("true")), [0, 2, 4]);
    assert_eq!(encode(ADDS_BOS, &said("false")), [2, 4]);
    assert_eq!(encode("null", r#"{"add_bos_token": true, "bos_token": {"content": "<s>"}}"#), [0, 2, 4]);
    assert_eq!(encode("null", r#"{"add_bos_token": true, "bos_token": null}"#), [2, 4]);
    assert_eq!(tokenizer("null", &said("true")).encode("a", false).unwrap(), [2]);
}

#[test]
fn broken_files() {
    let folder = folder("{}", &[]);
    let read = || message(Checkpoint::open(folder.path()).unwrap().tokenizer().unwrap_err());
    assert_says(&read(), &["tokenizer.json is missing", "save_pretrained"]);
    fs::write(folder.path().join("tokenizer.json"), "{\"version\": \"1.0\"").unwrap();
    assert_says(&read(), &["tokenizer.json", "invalid", "line 1"]);
    fs::write(folder.path().join("tokenizer.json"), WORDS.replace("POST", "null")).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), "{\n").unwrap();
    assert_says(&read(), &["tokenizer_config.json", "line 2"]);
}

/// Needs the trained model that the perplexity figures are stated for; its count of tokens is part of their definition.
#[test]
fn validation_text_of_tiny_qwen3() {
    let Some(models) = std::env::var_os("METAL_MARLIN_MODELS") else {
        eprintln!("skipped: METAL_MARLIN_MODELS does not name the folder that holds tiny-qwen3");
        return;
    };
    let models = PathBuf::from(models);
    let text = fs::read_to_string(models.join("../text/validation.txt")).unwrap();
    let checkpoint = Checkpoint::open(&models.join(Path::new("tiny-qwen3"))).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let ids = tokenizer.encode(&text, false).unwrap();
    assert_eq!(ids.len(), 50_821);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(tokenizer.vocabulary_size(), 8192);
}

/// Each makes the crate `tokenizers` panic, in reading or in encoding.
#[test]
fn tokenizers_that_contradict_themselves_are_errors() {
    let normalizer = r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}"#;
    let special = r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
        "pair": [], "special_tokens": {}}"#;
    let pieces = r#""pre_tokenizer": {"type": "FixedLength", "length": 0}"#;
    for (json, words) in [
        (WORDS.replace("\"normalizer\": null", normalizer).replace("POST", "null"), "invalid: "),
        (WORDS.replace("POST", special), "cannot encode the text: "),
        (
            WORDS.replace(r#""pre_tokenizer": {"type": "Whitespace"}"#, pieces).replace("POST", "null"),
            "cannot encode the text: ",
        ),
    ] {
        let folder = folder("{}", &[]);
        fs::write(folder.path().join("tokenizer.json"), &json).unwrap();
        let tokenizer = Checkpoint::open(folder.path()).unwrap().tokenizer();
        let error = tokenizer.and_then(|tokenizer| tokenizer.encode("a red fox", true)).unwrap_err();
        assert_says(&message(error), &["tokenizer.json", words, "contradicts itself"]);
    }
}
