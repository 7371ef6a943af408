//! The bytes that each token of a vocabulary stands for.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, Tokenizer};

/// Stands before a token while it is decoded: what is done to the first token of a text alone is done to it. No decoder
/// makes anything else of it.
const BEFORE: &str = "x";

/// What a token adds to a text that it does not begin, by the rules of one tokenizer's decoder.
pub(crate) enum TokenBytes<'a> {
    /// Letters stand for bytes (GPT-2).
    ByteLevel(Box<[Option<u8>; LETTERS]>),
    /// Everything else that decodes tokens one by one.
    Text { decoder: Option<&'a DecoderWrapper>, has_bytes: bool },
}

impl<'a> TokenBytes<'a> {
    /// Fails with the reason if what a token stands for depends on its neighbours.
    pub(crate) fn of(tokenizer: &'a Tokenizer) -> Result<Self, String> {
        let decoder = tokenizer.get_decoder();
        let parts = match decoder {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(decoder) => std::slice::from_ref(decoder),
            None => &[],
        };
        if let [DecoderWrapper::ByteLevel(_)] = parts {
            return Ok(Self::ByteLevel(Box::new(bytes_of_letters())));
        }
        let mut is_fused = false;
        let mut has_bytes = false;
        for part in parts {
            let name = match part {
                DecoderWrapper::Fuse(_) => {
                    is_fused = true;
                    continue;
                }
                DecoderWrapper::Strip(strip) if strip.stop == 0 => continue,
                DecoderWrapper::Metaspace(_) | DecoderWrapper::Replace(_) if !is_fused => continue,
                DecoderWrapper::ByteFallback(_) if !is_fused => {
                    has_bytes = true;
                    continue;
                }
                DecoderWrapper::Strip(_) => "Strip",
                DecoderWrapper::Metaspace(_) => "Metaspace",
                DecoderWrapper::Replace(_) => "Replace",
                DecoderWrapper::ByteFallback(_) => "ByteFallback",
                DecoderWrapper::ByteLevel(_) => "ByteLevel",
                DecoderWrapper::BPE(_) => "BPEDecoder",
                DecoderWrapper::WordPiece(_) => "WordPiece",
                DecoderWrapper::CTC(_) => "CTC",
                DecoderWrapper::Sequence(_) => "Sequence",
            };
            return Err(format!("its decoder, by {name}, makes of a token what depends on the tokens around it"));
        }
        Ok(Self::Text { decoder, has_bytes })
    }

    /// The bytes of a token as it is spelled in tokenizer.json.
    pub(crate) fn bytes(&self, token: &str) -> tokenizers::Result<Vec<u8>> {
        match self {
            Self::ByteLevel(letters) => {
                let byte = |letter: char| letters.get(letter as usize).copied().flatten();
                // Tokens with other letters, which can only be added ones, stand for themselves.
                let bytes: Option<Vec<u8>> = token.chars().map(byte).collect();
                Ok(bytes.unwrap_or_else(|| token.as_bytes().to_vec()))
            }
            Self::Text { has_bytes: true, .. } if byte_of(token).is_some() => Ok(byte_of(token).into_iter().collect()),
            Self::Text { decoder: Some(decoder), .. } => {
                let text = decoder.decode(vec![BEFORE.to_owned(), token.to_owned()])?;
                let added = text.strip_prefix(BEFORE).ok_or("its decoder changes letters")?;
                Ok(added.as_bytes().to_vec())
            }
            Self::Text { decoder: None, .. } => Ok(format!(" {token}").into_bytes()),
        }
    }
}

/// The byte of `<0xNN>`, as the crate `tokenizers` reads it.
fn byte_of(token: &str) -> Option<u8> {
    let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
    u8::from_str_radix(token.get(3..5).filter(|_| is_byte)?, 16).ok()
}

/// Letters of GPT-2's alphabet are below this.
const LETTERS: usize = 0x144;

/// The byte of each letter of GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in order, are U+0100
/// and up (`bytes_to_unicode` of GPT-2's encoder.py).
fn bytes_of_letters() -> [Option<u8>; LETTERS] {
    let mut letters = [None; LETTERS];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let is_printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let letter = if is_printable { usize::from(byte) } else { next };
        next += usize::from(!is_printable);
        letters[letter] = Some(byte);
    }
    letters
}

#[cfg(test)]
mod tests {
    use tokenizers::decoders::byte_level::ByteLevel;

    use super::*;

    #[test]
    fn the_alphabet_is_that_of_the_byte_level_decoder() {
        let letters = bytes_of_letters();
        let alphabet = ByteLevel::alphabet();
        assert_eq!(letters.iter().flatten().count(), 256);
        assert!(
            (0..LETTERS).all(|letter| {
                letters[letter].is_some() == alphabet.contains(&char::from_u32(letter as u32).unwrap())
            })
        );
        // Against the decoder itself, for the bytes that are text.
        for byte in 0..0x80 {
            let letter = letters.iter().position(|found| *found == Some(byte)).unwrap();
            let letter = char::from_u32(letter as u32).unwrap().to_string();
            assert_eq!(ByteLevel::default().decode(vec![letter]).unwrap().as_bytes(), [byte]);
        }
    }

    #[test]
    fn bytes_are_spelled_with_two_digits() {
        assert_eq!(byte_of("<0x0A>"), Some(10));
        assert_eq!(byte_of("<0xff>"), Some(255));
        for token in ["<0xA>", "<0x0AB>", "<0xGG>", "0x0A", "<0xé>", "(0x0A)"] {
            assert_eq!(byte_of(token), None, "{token}");
        }
    }
}
