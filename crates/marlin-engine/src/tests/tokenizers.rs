//! Small tokenizers of the usual kinds.

use marlin_checkpoint::{Checkpoint, Tokenizer};
use serde_json::{Map, Value, json};

/// A byte-level BPE tokenizer whose ids 0..256 are the bytes, followed by `pieces`, of which the special ones are
/// special tokens.
pub(crate) fn byte_level(pieces: &[&[u8]], special: &[&str]) -> Tokenizer {
    let mut vocabulary = Vec::new();
    vocabulary.extend((0..=255).map(|byte| spell(&[byte])));
    vocabulary.extend(pieces.iter().map(|piece| spell(piece)));
    let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    tokenizer(&vocabulary, special, json!({ "type": "BPE", "merges": [] }), decoder)
}

/// A tokenizer in the manner of SentencePiece: ids 0..256 are `<0xNN>`, followed by `pieces` with `▁` for a space;
/// the first space of a text is dropped.
pub(crate) fn sentence_piece(pieces: &[&str], special: &[&str]) -> Tokenizer {
    let mut vocabulary: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    vocabulary.extend(pieces.iter().map(|&piece| piece.to_owned()));
    let decoder = json!({ "type": "Sequence", "decoders": [
        { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
        { "type": "ByteFallback" },
        { "type": "Fuse" },
        { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
    ]});
    tokenizer(&vocabulary, special, json!({ "type": "BPE", "merges": [], "byte_fallback": true }), decoder)
}

fn tokenizer(vocabulary: &[String], special: &[&str], mut model: Value, decoder: Value) -> Tokenizer {
    let entries: Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    model["vocab"] = entries.into();
    let added: Vec<Value> = (special.iter().enumerate())
        .map(|(i, content)| {
            json!({
                "id": vocabulary.len() + i, "content": content, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let tokenizer = json!({ "version": "1.0", "added_tokens": added, "model": model, "decoder": decoder });

    // An embedded model without weights.
    let files: Vec<(&'static str, &'static [u8])> = vec![
        ("config.json", b"{}"),
        ("tokenizer.json", tokenizer.to_string().into_bytes().leak()),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
    ];
    Checkpoint::from_static("test", files.leak()).unwrap().tokenizer().unwrap()
}

/// Bytes in the alphabet of GPT-2: printable Latin-1 stands for itself, the rest for U+0100 and up, in order.
fn spell(bytes: &[u8]) -> String {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let letter = |byte: u8| {
        let others_before = (0..byte).filter(|&other| !is_printable(other)).count() as u32;
        if is_printable(byte) { char::from(byte) } else { char::from_u32(0x100 + others_before).unwrap() }
    };
    bytes.iter().map(|&byte| letter(byte)).collect()
}
