//! Tokenizers of GGUF files against llama.cpp, whose ids `scripts/goldens/make_gguf_tokenizer_goldens.py` has written down.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{assert_says, message};
use marlin_checkpoint::{Checkpoint, Gguf, Tokenizer};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf").join(name)
}

/// A file without tensors, changed.
struct Changed(Vec<u8>);

impl Changed {
    fn of(name: &str) -> Self {
        Self(fs::read(golden(name)).unwrap())
    }

    /// Where the value of a key begins.
    fn value(&self, key: &str) -> usize {
        let key = [&(key.len() as u64).to_le_bytes(), key.as_bytes()].concat();
        self.0.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4
    }

    fn string(mut self, key: &str, text: &[u8]) -> Self {
        let at = self.value(key);
        let length = u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap()) as usize;
        let value = [&(text.len() as u64).to_le_bytes(), text].concat();
        self.0.splice(at..at + 8 + length, value);
        self
    }

    fn bytes(mut self, key: &str, offset: usize, bytes: &[u8]) -> Self {
        let at = self.value(key) + offset;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Replaces a text wherever it first occurs by one of the same length.
    fn text(mut self, from: &str, to: &[u8]) -> Self {
        assert_eq!(from.len(), to.len());
        let at = self.0.windows(to.len()).position(|window| window == from.as_bytes()).unwrap();
        self.0[at..at + to.len()].copy_from_slice(to);
        self
    }

    fn tokenizer(self) -> Result<Tokenizer, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changed.gguf");
        fs::write(&path, self.0).unwrap();
        Gguf::open(&path).and_then(|gguf| gguf.tokenizer()).map_err(message)
    }

    fn error(self) -> String {
        self.tokenizer().unwrap_err()
    }
}

fn assert_ids(what: &str, tokenizer: &Tokenizer, texts: &Value, wanted: &Value) {
    let (texts, wanted) = (texts.as_array().unwrap(), wanted.as_array().unwrap());
    assert_eq!(texts.len(), wanted.len());
    for (text, ids) in texts.iter().zip(wanted) {
        let text = text.as_str().unwrap();
        let found = tokenizer.encode(text, true).unwrap();
        assert_eq!(Value::from(found), *ids, "{what}: {text:?}");
        // Whatever became bytes comes back; behind an added token SentencePiece has a space.
        if !text.contains("<|") && !text.contains("  ") {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{what}: {ids:?}");
        }
    }
}

#[test]
fn ids_are_those_of_llama_cpp() {
    let expected: Value = serde_json::from_slice(&fs::read(golden("tokens.json")).unwrap()).unwrap();
    let kinds = expected["kinds"].as_object().unwrap();
    assert_eq!(kinds.len(), 15);
    for (kind, ids) in kinds {
        let tokenizer = Changed::of("bytes.gguf").string("tokenizer.ggml.pre", kind.as_bytes()).tokenizer().unwrap();
        assert_ids(kind, &tokenizer, &expected["texts"], ids);
    }
    let tokenizer = Gguf::open(&golden("pieces.gguf")).unwrap().tokenizer().unwrap();
    assert_ids("pieces", &tokenizer, &expected["texts"], &expected["pieces"]);
    let tokenizer = Changed::of("pieces.gguf").bytes("tokenizer.ggml.add_space_prefix", 0, &[0]).tokenizer().unwrap();
    assert_ids("pieces without space", &tokenizer, &expected["texts"], &expected["pieces_without_space"]);
}

#[test]
fn kinds_of_tokens() {
    let tokenizer = Gguf::open(&golden("pieces.gguf")).unwrap().tokenizer().unwrap();
    for (token, is_special) in
        [("<unk>", true), ("<s>", true), ("<|im_start|>", true), ("  ", false), ("<0x41>", false)]
    {
        let id = tokenizer.token_id(token).unwrap();
        assert_eq!(tokenizer.is_special(id), is_special, "{token}");
    }
    let ids = tokenizer.encode("<|im_start|>hello", true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello");
    assert_eq!(tokenizer.encode("\u{7}", false).unwrap().last(), tokenizer.token_id("<0x07>").as_ref());

    // Qwen2 composes letters, as its tokenizer.json says and llama.cpp does not.
    let qwen2 = Changed::of("bytes.gguf").string("tokenizer.ggml.pre", b"qwen2").tokenizer().unwrap();
    assert_eq!(qwen2.encode("nai\u{308}ve", true).unwrap(), qwen2.encode("naïve", true).unwrap());
}

#[test]
fn a_file_has_what_a_folder_has() {
    let model = Checkpoint::open(&golden("chat.gguf")).unwrap();
    let generation = model.generation_config().unwrap();
    assert_eq!((generation.bos_token_id, generation.pad_token_id), (Some(0), Some(0)));
    assert_eq!(generation.eos_token_id, [0, 2]);
    let template = model.chat_template().unwrap().unwrap();
    assert!(template.contains("<|im_start|>{{ message['role'] }}"), "{template}");
    assert_eq!(model.special_tokens().unwrap()["eos_token"], "<|endoftext|>");

    // Written to a folder, the files mean the same.
    let files = model.side_files().unwrap();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]);
    let folder = common::folder("{}", &[]);
    for (name, bytes) in &files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let copy = Checkpoint::open(folder.path()).unwrap();
    let text = "<|im_start|>user\nHello, naïve world 123<|im_end|>";
    let ids = |model: &Checkpoint| model.tokenizer().unwrap().encode(text, true).unwrap();
    assert_eq!(ids(&copy), ids(&model));
    assert_eq!(copy.generation_config().unwrap(), generation);
    assert_eq!(copy.chat_template().unwrap().unwrap(), template);
    let config: Value = serde_json::from_slice(&copy.file("tokenizer_config.json").unwrap().unwrap()).unwrap();
    assert_eq!(config["chat_template"][1]["name"], "brief");
    assert_eq!(config["add_bos_token"], false);
}

#[test]
fn tokenizers_that_are_not_read_say_why() {
    let bytes = || Changed::of("bytes.gguf");
    let pieces = || Changed::of("pieces.gguf");
    let says = |error: String, words: &[&str]| assert_says(&error, &[&["changed.gguf"], words].concat());
    says(
        bytes().string("tokenizer.ggml.pre", b"viking").error(),
        &["`viking`", "`tokenizer.ggml.pre`", "tokenizer.json"],
    );
    says(bytes().string("tokenizer.ggml.pre", b"").error(), &["``", "damaged"]);
    says(bytes().string("tokenizer.ggml.model", b"t5").error(), &["`t5`", "`gpt2` and `llama`"]);
    says(bytes().string("tokenizer.ggml.model", b"none").error(), &["no tokenizer"]);
    says(bytes().text("tokenizer.ggml.model", b"tokenizer.ggml.modem").error(), &["no tokenizer"]);
    says(bytes().string("tokenizer.ggml.model", b"llama").error(), &["`tokenizer.ggml.scores` is missing"]);
    says(pieces().string("tokenizer.ggml.model", b"gpt2").error(), &["`tokenizer.ggml.merges` is missing"]);
    says(
        bytes().text("tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz").error(),
        &["`tokenizer.ggml.tokens` is missing"],
    );
    // The type of elements stands first in an array, then their number.
    says(bytes().bytes("tokenizer.ggml.token_type", 0, &[6]).error(), &["token_type` is Array([F32; 330]", "I32"]);
    says(bytes().bytes("tokenizer.ggml.tokens", 12 + 8, b"\xff").error(), &["tokenizer.ggml.tokens", "not UTF-8"]);
    let key = "tokenizer.ggml.merges";
    // The first merge is of two letters with a space between.
    says(bytes().bytes(key, 12 + 8 + 1, b"_").error(), &["merge", "no pair of tokens"]);
    says(bytes().bytes(key, 12 + 8 + 2, b"\x01").error(), &["invalid", "out of vocabulary"]);
    let same = pieces().text("<0x41>", b"<0x40>").error();
    says(same, &["tokens 67 and 68", "\"<0x40>\"", "damaged"]);
    says(pieces().bytes("tokenizer.ggml.scores", 12 + 4 * 300, &f32::NAN.to_le_bytes()).error(), &["score of token"]);
    says(pieces().bytes("tokenizer.ggml.add_space_prefix", 0, &[2]).error(), &["add_space_prefix", "0 or 1"]);
}

/// As in llama.cpp.
#[test]
fn special_tokens_beyond_the_vocabulary_are_none() {
    let padding = |bytes: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changed.gguf");
        fs::write(&path, bytes).unwrap();
        let model = Checkpoint::open(&path).unwrap();
        (model.generation_config().unwrap().pad_token_id, model.config().get("pad_token_id").cloned())
    };
    let chat = Changed::of("chat.gguf");
    assert_eq!(padding(&chat.0), (Some(0), Some(0.into())));
    let changed = chat.bytes("tokenizer.ggml.padding_token_id", 0, &[0xff; 4]);
    // Without a word of it, Transformers would presume a token of its own.
    assert_eq!(padding(&changed.0), (None, Some(serde_json::Value::Null)));
}

/// Tokens that are parts of each other in as many ways as possible may not take memory without end.
#[test]
fn pieces_of_pieces_are_bounded() {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let array = |key: &str, element: u32, count: usize, values: Vec<u8>| {
        [
            string(key),
            9u32.to_le_bytes().into(),
            element.to_le_bytes().into(),
            (count as u64).to_le_bytes().into(),
            values,
        ]
        .concat()
    };
    let file = |count: usize| {
        let tokens = (1..=count).flat_map(|length| string(&"a".repeat(length))).collect();
        let scores = (0..count).flat_map(|id| (-(id as f32)).to_le_bytes()).collect();
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([0u64, 3].iter().flat_map(|count| count.to_le_bytes()));
        bytes.extend([string("tokenizer.ggml.model"), 8u32.to_le_bytes().into(), string("llama")].concat());
        bytes.extend(array("tokenizer.ggml.tokens", 8, count, tokens));
        bytes.extend(array("tokenizer.ggml.scores", 6, count, scores));
        Changed(bytes)
    };
    // Token 0, "a", stands for the space before the text as well.
    let ids = file(20).tokenizer().unwrap().encode(&"a".repeat(33), false).unwrap();
    assert_eq!(ids.iter().map(|id| id + 1).sum::<u32>(), 34, "{ids:?}");
    assert_says(&file(400).error(), &["parts of each other in too many ways"]);
}
