//! Streams against the text decoded in one go.

use std::sync::LazyLock;

use marlin_checkpoint::Tokenizer;
use proptest::prelude::*;

use super::tokenizers::{byte_level, sentence_piece};
use crate::TextStream;

/// The stream's pieces and the stop string it reached.
fn stream(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32], stops: &[&str]) -> (Vec<String>, Option<String>) {
    let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
    let mut stream = TextStream::new(tokenizer, prompt, stops).unwrap();
    let mut pieces = Vec::new();
    for &token in tokens {
        let mut piece = String::new();
        let stopped = stream.push(tokenizer, token, &mut piece).unwrap().map(str::to_owned);
        pieces.push(piece);
        if stopped.is_some() {
            return (pieces, stopped);
        }
    }
    let mut piece = String::new();
    let stopped = stream.finish(tokenizer, &mut piece).unwrap().map(str::to_owned);
    pieces.push(piece);
    (pieces, stopped)
}

/// What a stream should come to: reads `text` character by character and cuts it before the first stop string to be
/// complete.
fn cut(text: &str, stops: &[&str]) -> (String, Option<String>) {
    let ends = text.char_indices().map(|(at, char)| at + char.len_utf8());
    for read in ends.map(|end| &text[..end]) {
        let longest = stops.iter().filter(|&&stop| read.ends_with(stop)).max_by_key(|stop| stop.len());
        if let Some(stop) = longest {
            return (read[..read.len() - stop.len()].to_owned(), Some(stop.to_string()));
        }
    }
    (text.to_owned(), None)
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn a_character_waits_for_its_last_byte() {
    let tokenizer = byte_level(&[], &[]);
    let (pieces, _) = stream(&tokenizer, &[], &bytes("a😀é"), &[]);
    assert_eq!(pieces, ["a", "", "", "", "😀", "", "é", ""]);
}

#[test]
fn bytes_that_end_as_no_character_are_replaced() {
    let tokenizer = byte_level(&[], &[]);
    let (pieces, _) = stream(&tokenizer, &[], &bytes("a😀")[..3], &[]);
    assert_eq!(pieces, ["a", "", "", "\u{FFFD}"]);
}

#[test]
fn a_stop_string_may_span_tokens() {
    let tokenizer = byte_level(&[b"lo wo"], &[]);
    let tokens = [bytes("hel"), vec![256], bytes("rld")].concat();
    let (pieces, stopped) = stream(&tokenizer, &[], &tokens, &["o wor"]);
    assert_eq!(pieces, ["h", "e", "l", "l", ""]);
    assert_eq!(stopped.as_deref(), Some("o wor"));
}

#[test]
fn what_only_began_like_a_stop_string_comes_after_all() {
    let tokenizer = byte_level(&[], &[]);
    let (pieces, stopped) = stream(&tokenizer, &[], &bytes("ababac"), &["abac!", "zzz"]);
    assert_eq!(pieces, ["", "", "", "ab", "", "", "abac"]);
    assert_eq!(stopped, None);
}

#[test]
fn the_stop_string_completed_first_wins() {
    let tokenizer = byte_level(&[b"a long stop"], &[]);
    let (pieces, stopped) = stream(&tokenizer, &[], &[256], &["a long stop", "ong", "long"]);
    assert_eq!((pieces.concat().as_str(), stopped.as_deref()), ("a ", Some("long")));
}

#[test]
fn the_first_space_belongs_to_a_continuation_only() {
    let tokenizer = sentence_piece(&["▁Hello", "▁world"], &["<s>"]);
    let (hello, world, bos) = (256, 257, 258);
    assert_eq!(stream(&tokenizer, &[bos], &[hello, world], &[]).0, ["Hello", " world", ""]);
    assert_eq!(stream(&tokenizer, &[bos, hello], &[world, hello], &[]).0, [" world", " Hello", ""]);
    // A special token in between is as if it were not there.
    assert_eq!(stream(&tokenizer, &[], &[hello, bos, world], &[]).0, ["Hello", "", " world", ""]);
}

#[test]
fn a_lone_space_at_the_start_is_not_forgotten() {
    let tokenizer = sentence_piece(&["▁", "▁x"], &[]);
    let (space, x) = (256, 257);
    assert_eq!(stream(&tokenizer, &[], &[space, x, space, space, x], &[]).0.concat(), " x   x");
}

#[test]
fn tokens_without_meaning_are_ignored() {
    let tokenizer = byte_level(&[], &[]);
    let tokens = [bytes("a"), vec![9999; 50], bytes("b")].concat();
    assert_eq!(stream(&tokenizer, &[], &tokens, &[]).0.concat(), "ab");
}

#[test]
fn endless_nonsense_keeps_the_window_small() {
    let tokenizer = byte_level(&[], &[]);
    let mut stream = TextStream::new(&tokenizer, &[], vec!["stop".into()]).unwrap();
    let mut text = String::new();
    for token in [0xFF, 0xE5, 9999].into_iter().cycle().take(3000) {
        stream.push(&tokenizer, token, &mut text).unwrap();
        assert!(stream.window_tokens() <= 9, "{}", stream.window_tokens());
    }
    stream.finish(&tokenizer, &mut text).unwrap();
    assert_eq!(text, "\u{FFFD}".repeat(2000));
}

/// Pieces of the byte-level tokenizer beyond the single bytes: some cut through characters.
const PIECES: [&[u8]; 7] = [b"ab", b"ba ", " 😀".as_bytes(), b"\x98\x80", b"\xF0\x9F", b"\xE5\x8F", b"a\xE5\x8F"];

/// Ids that make all sorts of trouble: letters the stop strings are made of, whole and broken characters.
fn tokens() -> impl Strategy<Value = Vec<u32>> {
    let letters = prop::sample::select(bytes("abab 😀é叫\u{FFFD}\u{7f}"));
    let any_byte = 0..256u32;
    let pieces = 256..256 + PIECES.len() as u32 + 1; // the last one is special
    prop::collection::vec(prop_oneof![4 => letters, 1 => any_byte, 3 => pieces], 0..40)
}

const STOPS: [&str; 9] = ["ab", "aba", "bab", "b", " 😀a", "😀", "\u{FFFD}a", "a ba", "叫"];

/// Pieces, a special token, and characters that fall back to bytes.
const WORDS: [&str; 8] = ["▁ab", "ab", "▁", "b", "▁▁", "<s>", "😀", "é"];

proptest! {
    #[test]
    fn byte_level_pieces_are_the_whole_text(
        tokens in tokens(),
        stops in prop::sample::subsequence(&STOPS[..], 0..4),
        prompt in "[ab é]{0,6}",
    ) {
        static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| byte_level(&PIECES, &["<|end|>"]));
        let tokenizer = &TOKENIZER;
        let said = tokens.iter().flat_map(|&token| match token as usize {
            byte @ 0..256 => vec![byte as u8],
            piece => PIECES.get(piece - 256).map_or(vec![], |piece| piece.to_vec()),
        });
        let text = String::from_utf8_lossy(&said.collect::<Vec<u8>>()).into_owned();
        let (pieces, stopped) = stream(tokenizer, &bytes(&prompt), &tokens, &stops);
        prop_assert_eq!((pieces.concat(), stopped), cut(&text, &stops));
    }

    #[test]
    fn sentence_piece_pieces_are_the_whole_text(
        words in prop::collection::vec(prop::sample::select(&WORDS[..]), 0..30),
        stops in prop::sample::subsequence(&STOPS[..], 0..4),
        prompted in any::<bool>(),
    ) {
        static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| sentence_piece(&WORDS[..5], &["<s>"]));
        let tokenizer = &TOKENIZER;
        let ids = |word: &&str| match WORDS.iter().position(|piece| piece == word) {
            Some(piece @ 0..6) => vec![256 + piece as u32],
            _ => bytes(word), // byte fallback
        };
        let tokens: Vec<u32> = words.iter().flat_map(ids).collect();
        let text = words.concat().replace("<s>", "").replace('▁', " ");
        let prompt = if prompted { vec![257] } else { vec![] };
        let text = if prompted { &text } else { text.strip_prefix(' ').unwrap_or(&text) };
        let (pieces, stopped) = stream(tokenizer, &prompt, &tokens, &stops);
        prop_assert_eq!((pieces.concat(), stopped), cut(text, &stops));
    }
}
