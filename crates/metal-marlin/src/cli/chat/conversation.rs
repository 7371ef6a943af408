//! What was said, and how the model answers it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;
use marlin_engine::{Engine, EngineError, FinishReason, Message, Request, RequestId, SamplingParams, StopConditions};

use crate::cli::template::Prompter;

const SYSTEM: &str = "system";

/// Messages, and the engine that adds to them.
pub(super) struct Conversation {
    engine: Engine,
    prompter: Prompter,
    sampling: SamplingParams,
    stop: StopConditions,
    messages: Vec<Message>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Finished(FinishReason),
    /// Somebody did not want to hear more.
    Interrupted,
}

impl Conversation {
    pub(super) fn new(
        engine: Engine,
        prompter: Prompter,
        sampling: SamplingParams,
        stop: StopConditions,
        messages: Vec<Message>,
    ) -> Self {
        Self { engine, prompter, sampling, stop, messages }
    }

    /// Tokens that a conversation may have.
    pub(super) fn context(&self) -> usize {
        self.engine.info().context
    }

    /// Tokens that an answer may have.
    pub(super) fn max_tokens(&self) -> usize {
        self.stop.max_tokens
    }

    /// Answers `text`, handing out the answer piece by piece until it ends or `interrupted` is set.
    ///
    /// What was said of an interrupted answer stays part of the conversation. A message without any answer does not:
    /// templates want speakers to take turns.
    pub(super) fn answer(
        &mut self,
        text: String,
        interrupted: &AtomicBool,
        write: impl FnMut(&str) -> io::Result<()>,
    ) -> anyhow::Result<Answer> {
        let before = self.messages.len();
        self.messages.push(Message::new("user", text));
        let mut said = String::new();
        let result = self.generate(interrupted, write, &mut said);
        let is_whole = matches!(result, Ok(Answer::Finished(_)));
        if is_whole || !said.is_empty() {
            self.messages.push(Message::new("assistant", said));
        } else {
            self.messages.truncate(before);
        }
        result
    }

    /// Lets the model say the next message.
    fn generate(
        &mut self,
        interrupted: &AtomicBool,
        write: impl FnMut(&str) -> io::Result<()>,
        said: &mut String,
    ) -> anyhow::Result<Answer> {
        let prompt = self.prompter.tokens(&self.messages, self.engine.tokenizer())?;
        let request =
            Request { prompt, sampling: self.sampling.clone(), stop: self.stop.clone(), ..Request::default() };
        let id = self.engine.add(request).map_err(explain)?;
        let result = self.run(id, interrupted, write, said);
        // Unless it is finished, nobody waits for the rest.
        self.engine.cancel(id);
        result
    }

    fn run(
        &mut self,
        id: RequestId,
        interrupted: &AtomicBool,
        mut write: impl FnMut(&str) -> io::Result<()>,
        said: &mut String,
    ) -> anyhow::Result<Answer> {
        let mut events = Vec::new();
        while !interrupted.load(Ordering::Relaxed) {
            self.engine.step(&mut events)?;
            for event in events.drain(..).filter(|event| event.request == id) {
                said.push_str(&event.text);
                write(&event.text)?;
                if let Some(finish) = event.finish {
                    if let Some(error) = finish.reason.error() {
                        return Err(error.into());
                    }
                    return Ok(Answer::Finished(finish.reason));
                }
            }
        }
        Ok(Answer::Interrupted)
    }

    /// Forgets all but the system message.
    pub(super) fn reset(&mut self) {
        self.messages.retain(|message| message.role == SYSTEM);
    }

    /// Replaces the system message; an empty text removes it.
    pub(super) fn set_system(&mut self, text: &str) {
        self.messages.retain(|message| message.role != SYSTEM);
        if !text.is_empty() {
            self.messages.insert(0, Message::new(SYSTEM, text));
        }
    }

    /// Writes the messages as a JSON list, beside the file first, so that what stands there is whole.
    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let mut json = serde_json::to_string_pretty(&self.messages)?;
        json.push('\n');
        let folder =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), Into::into);
        let written = tempfile::NamedTempFile::new_in(folder).and_then(|mut file| {
            file.write_all(json.as_bytes())?;
            file.persist(path)?;
            Ok(())
        });
        // The error's text alone: an `io::Error` is one of standard output, for which the chat ends.
        written.map_err(|error| anyhow!("cannot write the conversation to {}: {error}", path.display()))
    }

    /// Goes on with saved messages instead of these.
    pub(super) fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let json = fs::read(path).map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
        self.messages = serde_json::from_slice(&json).map_err(|error| {
            anyhow!(
                "{} is no saved conversation: {error}; it must be a JSON list of objects with \"role\" and \"content\"",
                path.display()
            )
        })?;
        Ok(())
    }
}

/// Says what to do about a conversation that has become too long.
fn explain(error: EngineError) -> anyhow::Error {
    match error {
        EngineError::PromptTooLong { prompt, context } => anyhow!(
            "with this message the conversation has {prompt} tokens, but the context of {context} tokens must hold it \
             and at least one of the answer; the message was dropped: send a shorter one, begin a new conversation with \
             /reset, or start the chat with a larger --context"
        ),
        error => error.into(),
    }
}

#[cfg(all(test, feature = "bundled-model"))]
mod tests {
    use crate::{DeviceOptions, load};
    use marlin_model::LoadOptions;

    use super::*;
    use crate::cli::template::TemplateOptions;

    #[test]
    fn an_interrupt_keeps_what_was_said_and_the_talk_goes_on() {
        let checkpoint = load::open_checkpoint(None).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        let prompter = TemplateOptions::default().prompter(&checkpoint, &tokenizer).unwrap();
        let model =
            load::load_model(&checkpoint, &DeviceOptions::default().open().unwrap(), &LoadOptions::default()).unwrap();
        let engine = Engine::new(model, tokenizer.into(), Vec::new());
        let stop = StopConditions { max_tokens: 20, ignore_eos: true, ..StopConditions::default() };
        let mut conversation = Conversation::new(engine, prompter, SamplingParams::greedy(), stop, Vec::new());

        // Before the first token: as if nothing had been asked.
        let answer = conversation.answer("Hello".into(), &AtomicBool::new(true), |_| Ok(())).unwrap();
        assert_eq!((answer, conversation.messages.len()), (Answer::Interrupted, 0));

        let (interrupted, mut heard) = (AtomicBool::new(false), String::new());
        let answer = conversation.answer("Hello".into(), &interrupted, |piece| {
            heard.push_str(piece);
            interrupted.store(heard.len() > 5, Ordering::Relaxed);
            Ok(())
        });
        assert_eq!(answer.unwrap(), Answer::Interrupted);
        assert_eq!(conversation.messages, [Message::new("user", "Hello"), Message::new("assistant", heard)]);
        assert_eq!(conversation.engine.used_kv_blocks(), 0);

        let answer = conversation.answer("Go on".into(), &AtomicBool::new(false), |_| Ok(())).unwrap();
        assert!(matches!(answer, Answer::Finished(_)) && conversation.messages.len() == 4, "{answer:?}");
    }
}
