//! Answers that must have a certain form.
//!
//! A [`Grammar`] is compiled, once for each request, into a [`Constraint`], which says before each token which ones may come. The crate
//! `llguidance` does both; what it would honour only in part is refused.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use marlin_checkpoint::Tokenizer;
use serde_json::{Value, json};

use crate::EngineError;

/// Stack for compiling: schemas may refer to each other as deep as they like. Only what is touched takes memory.
const STACK_BYTES: usize = 256 << 20;

/// Longest grammar, in bytes of its source.
const MOST_SOURCE: usize = 1 << 20;

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// A JSON object.
    JsonObject,
    /// An instance of this JSON schema.
    JsonSchema(Value),
    /// A text that matches this regular expression as a whole.
    Regex(String),
    /// A text of this grammar, in the dialect of Lark that `llguidance` reads.
    Lark(String),
}

/// Compiles grammars for the tokens of one model.
pub struct GrammarCompiler {
    factory: ParserFactory,
    vocabulary: usize,
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// For a model whose embedding has `vocabulary` rows; any of `eos_tokens` may end an answer. Takes a moment, in which every token is
    /// looked at.
    ///
    /// # Errors
    /// The tokenizer's tokens have no bytes of their own, or no token ends an answer.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, eos_tokens: &[u32]) -> Result<Self, EngineError> {
        let eos_tokens: Vec<u32> = eos_tokens.iter().copied().filter(|&token| (token as usize) < vocabulary).collect();
        let Some(&eos) = eos_tokens.first() else {
            return Err(grammar("the model has no end-of-sequence token, with which an answer could end"));
        };
        let mut words = tokenizer.token_bytes()?;
        for (id, word) in (0..).zip(&mut words) {
            // No text stands for a special token: what begins with this byte is no UTF-8.
            if let Some(name) = tokenizer.id_to_token(id).filter(|_| tokenizer.is_special(id)) {
                *word = [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat();
            }
        }
        words.resize(vocabulary, Vec::new());
        let trie = TokTrie::from(&TokRxInfo::new(vocabulary as u32, eos), &words).with_eos_tokens(&eos_tokens);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| grammar(format!("{error:#}")))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: 50_000,
            max_grammar_size: 200_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory, vocabulary })
    }

    /// The bytes that a token adds to a text, whole characters or not; none if it is special.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        let trie = self.factory.tok_env().tok_trie();
        if (token as usize) < trie.vocab_size() && !trie.is_special_token(token) { trie.token(token) } else { &[] }
    }

    /// Compiles a grammar.
    ///
    /// # Errors
    /// It is wrong, too large, or asks for what cannot be honoured.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, EngineError> {
        let parser = with_stack(|| self.parse(grammar))?;
        let mask = vec![0; self.vocabulary.div_ceil(32)];
        Ok(Constraint { matcher: parser, mask })
    }

    fn parse(&self, grammar: &Grammar) -> Result<Matcher, String> {
        let source = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(with_options(json!({ "type": "object" }))),
            Grammar::JsonSchema(schema) => {
                check_size(schema.to_string().len())?;
                TopLevelGrammar::from_json_schema(with_options(schema.clone()))
            }
            Grammar::Regex(regex) => {
                check_size(regex.len())?;
                TopLevelGrammar::from_regex(regex)
            }
            Grammar::Lark(lark) => {
                check_size(lark.len())?;
                TopLevelGrammar::from_lark(lark.clone())
            }
        };
        let parser = self.factory.create_parser(source).map_err(|error| format!("{error:#}"))?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(error);
        }
        match matcher.grammar_warnings() {
            warnings if warnings.is_empty() => Ok(matcher),
            warnings => Err(warnings.join("; ")),
        }
    }
}

fn check_size(bytes: usize) -> Result<(), String> {
    if bytes > MOST_SOURCE { Err(format!("it has {bytes} bytes, more than {MOST_SOURCE}")) } else { Ok(()) }
}

/// A schema with what it cannot say of itself: between its parts is at most one space, so that no model fills its context with white
/// space, and nothing is ignored.
fn with_options(schema: Value) -> Value {
    let options = json!({ "whitespace_flexible": false, "item_separator": ", ?", "key_separator": ": ?" });
    match schema {
        Value::Object(mut schema) => {
            schema.insert("x-guidance".to_owned(), options);
            Value::Object(schema)
        }
        other => other,
    }
}

/// Where an answer is in its grammar. A clone goes on by itself.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    /// The tokens that may come next, 32 to a word.
    mask: Vec<u32>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("is_finished", &self.is_finished()).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Finds out which tokens may come next.
    pub(crate) fn compute(&mut self) -> Result<(), EngineError> {
        let matcher = &mut self.matcher;
        let allowed = guarded(|| {
            matcher.compute_mask_or_eos().map_err(|error| match matcher.stop_reason() {
                StopReason::NoExtension | StopReason::NoExtensionBias => {
                    "nothing that the model can say goes on in it; is there any answer that it allows?".to_owned()
                }
                _ => format!("{error:#}"),
            })
        })?;
        let (words, count) = (allowed.as_slice(), self.mask.len());
        if words.len() < count || allowed.num_set() == 0 {
            return Err(grammar("no token can come next"));
        }
        self.mask.clear();
        self.mask.extend_from_slice(&words[..count]);
        Ok(())
    }

    /// The tokens that may come next, as the last [`Constraint::compute`] found them: token t at bit t % 32 of word t / 32.
    pub(crate) fn allowed(&self) -> &[u32] {
        &self.mask
    }

    /// Goes on behind a token.
    pub(crate) fn accept(&mut self, token: u32) -> Result<(), EngineError> {
        let matcher = &mut self.matcher;
        guarded(|| matcher.consume_token(token).map_err(|error| format!("{error:#}")))
    }

    /// Whether nothing can follow.
    pub(crate) fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }
}

fn grammar(problem: impl Into<String>) -> EngineError {
    EngineError::Grammar { problem: problem.into() }
}

/// Makes an error of a panic.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("its compiler has a bug".to_owned())).map_err(grammar)
}

/// Does `work` on a thread with enough stack.
fn with_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, EngineError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || guarded(work));
        let thread = thread.map_err(|error| grammar(format!("no thread to compile it on: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(grammar("its compiler has a bug")))
    })
}

#[cfg(test)]
mod tests;
