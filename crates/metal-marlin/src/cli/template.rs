//! Options that turn messages into a prompt.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use marlin_checkpoint::{Checkpoint, Tokenizer};
use marlin_engine::{ChatOptions, ChatTemplate, Message};

/// How a conversation becomes a prompt.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Chat")]
pub(crate) struct TemplateOptions {
    /// Instructions that stand before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// Jinja template of the conversation [default: the model's chat_template.jinja or tokenizer_config.json]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,

    /// Ask a reasoning model to answer at once (the template's variable `enable_thinking` becomes false)
    #[arg(long)]
    no_thinking: bool,
}

/// Turns conversations of one model into prompts.
#[derive(Debug)]
pub(crate) struct Prompter {
    template: ChatTemplate,
    options: ChatOptions,
    /// What ends a turn, even if the model's generation_config.json does not list it.
    pub(crate) end_of_turn: Option<u32>,
}

impl TemplateOptions {
    /// Whether any of these options is given.
    pub(crate) fn is_given(&self) -> bool {
        self.system.is_some() || self.chat_template.is_some() || self.no_thinking
    }

    /// The model's template, or the one asked for.
    pub(crate) fn prompter(&self, checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> anyhow::Result<Prompter> {
        let source = source(self.chat_template.as_deref(), checkpoint)?;
        let Some(source) = source else {
            bail!(
                "the model {} has no chat template (neither chat_template.jinja nor `chat_template` in \
                 tokenizer_config.json); it may be a base model, made to continue texts: use `metal-marlin run`, or \
                 give a template with --chat-template FILE",
                checkpoint.name()
            );
        };
        let special_tokens = checkpoint.special_tokens()?;
        let end_of_turn = special_tokens.get("eos_token").and_then(|token| tokenizer.token_id(token));
        let mut options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
        if self.no_thinking {
            options.variables.insert("enable_thinking".to_owned(), false.into());
        }
        Ok(Prompter { template: ChatTemplate::new(&source, special_tokens)?, options, end_of_turn })
    }

    /// The beginning of every conversation.
    pub(crate) fn first_messages(&self) -> Vec<Message> {
        self.system.iter().map(|text| Message::new("system", text)).collect()
    }
}

/// The template in `file`, or the model's own if it has one.
pub(crate) fn source(file: Option<&Path>, checkpoint: &Checkpoint) -> anyhow::Result<Option<String>> {
    match file {
        Some(path) => {
            let read = fs::read_to_string(path);
            Ok(Some(read.with_context(|| format!("cannot read the chat template {}", path.display()))?))
        }
        None => Ok(checkpoint.chat_template()?),
    }
}

impl Prompter {
    /// The prompt that asks for the next message, in tokens.
    pub(crate) fn tokens(&self, messages: &[Message], tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
        let prompt = self.template.render(messages, &self.options)?;
        Ok(tokenizer.encode(&prompt, false)?)
    }
}
