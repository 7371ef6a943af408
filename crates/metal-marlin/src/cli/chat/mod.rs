//! `metal-marlin chat`: talk with a model.

mod conversation;
mod input;

use std::io::{self, IsTerminal, Write, stderr, stdin, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;
use marlin_engine::{Engine, FinishReason, StopConditions};
use marlin_model::LoadOptions;

use self::conversation::{Answer, Conversation};
use self::input::{Input, Lines, Pipe, Terminal};
use super::draft;
use super::model::{self, HubOptions, QuantizeOptions};
use super::sampling::SamplingOptions;
use super::speculation::SpeculationOptions;
use super::template::TemplateOptions;
use crate::cli::{interrupt, progress};
use crate::device::KvFormat;
use crate::memory::MemoryOptions;
use crate::{DeviceOptions, LoadError, load};

const EXAMPLES: &str = "\
Examples:
  metal-marlin chat
  metal-marlin chat path/to/model --system \"Answer in one sentence.\"
  metal-marlin chat Qwen/Qwen3-4B --format fp4
  metal-marlin chat path/to/model --temperature 0 --history ~/.metal-marlin-history
  printf 'Hello\\n/save talk.json\\n' | metal-marlin chat path/to/model > answers.txt

Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /help lists the commands. From a pipe each line is a message
or a command, and the first error ends the chat.

A model runs as it is stored; with --format it is quantised first, once: the result is kept
(`metal-marlin cache`).";

const HELP: &str = "\
/reset         forget the conversation, but not the system message
/system TEXT   replace the system message; without TEXT, remove it
/save FILE     write the conversation as JSON
/load FILE     go on with a conversation that was saved
/exit          end the chat (Ctrl-D does too)
A line that ends with \\ goes on in the next; \"\"\" begins and ends a text of several lines. Ctrl-C stops an answer.";

/// Most tokens of a conversation unless --context says otherwise: every token of it takes memory from the start.
const DEFAULT_CONTEXT: usize = 8192;

/// Talk with a model
///
/// Keeps the conversation and puts it to the model in its own chat template. Each message is answered from the whole of
/// it, which is read again each time. The bundled model is a small base model: it takes turns but knows nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder with a Hugging Face checkpoint, or one made by `quantize`, or an id on the Hub [default: the bundled model]
    model: Option<PathBuf>,

    #[command(flatten)]
    template: TemplateOptions,

    /// Remember the lines typed in this file, for the arrow keys of the next chat
    #[arg(long, value_name = "FILE", help_heading = "Chat")]
    history: Option<PathBuf>,

    #[command(flatten)]
    sampling: SamplingOptions,

    /// Most tokens of an answer [default: the model's own choice, or what the context has room for]
    #[arg(long, short = 'n', value_name = "N", help_heading = "Stopping")]
    max_tokens: Option<NonZeroUsize>,

    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT", help_heading = "Stopping")]
    stop: Vec<String>,

    #[command(flatten)]
    speculation: SpeculationOptions,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    quantize: QuantizeOptions,

    #[command(flatten)]
    device: DeviceOptions,

    #[command(flatten)]
    memory: MemoryOptions,

    /// Most tokens of the conversation [default: what the model and the memory allow, up to 8192]
    #[arg(long, value_name = "N", help_heading = "Device")]
    context: Option<NonZeroUsize>,

    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = KvFormat::F16, help_heading = "Device")]
    kv: KvFormat,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (checkpoint, _temporary) =
        model::open_quantized(args.model.as_deref(), &args.hub, &args.quantize, args.device.threads)?;
    let generation = checkpoint.generation_config()?;
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let prompter = args.template.prompter(&checkpoint, &tokenizer)?;
    let sampling = args.sampling.params(&generation);
    let default_context = load::allowed_context(&checkpoint).map(|allowed| allowed.min(DEFAULT_CONTEXT));
    let stop = StopConditions {
        max_tokens: args.max_tokens.map(NonZeroUsize::get).or(generation.max_new_tokens).unwrap_or(usize::MAX),
        strings: args.stop,
        tokens: prompter.end_of_turn.into_iter().collect(),
        ..StopConditions::default()
    };
    // Before a large model is loaded for nothing.
    sampling.validate()?;
    stop.validate()?;

    let device = args.device.open().map_err(LoadError::Device)?;
    let draft = args.speculation.open_draft(&tokenizer, &device, 1)?;
    let options = LoadOptions {
        context: args.context.map(NonZeroUsize::get).or(default_context),
        kv_type: args.kv.into(),
        logit_rows: 1 + args.speculation.logit_rows(&device),
        prediction: args.speculation.predicts(),
        ..Default::default()
    };
    let options = match args.memory.budget(&device) {
        Some(budget) => {
            let least = if args.context.is_none() { Some(0) } else { None };
            let fitting = draft::fit_one_answer(&device, &checkpoint, options, draft.as_ref(), &budget, least)?;
            if let (Some(wanted), Some(fits)) = (options.context, fitting.context)
                && fits < wanted
            {
                eprintln!("note: the memory has room for a conversation of {fits} tokens, not of {wanted}");
            }
            fitting
        }
        None => options,
    };
    let model = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
        args.quantize.load()(&checkpoint, &device, &options)
    })?;
    let engine = Engine::new(model, tokenizer, generation.eos_token_id);
    let engine = args.speculation.apply(engine, draft, &device, args.quantize.load())?;
    let context = engine.info().context;
    let mut conversation = Conversation::new(engine, prompter, sampling, stop, args.template.first_messages());

    if !(stdin().is_terminal() && stdout().is_terminal()) {
        return Chat { conversation: &mut conversation, interrupted: &AtomicBool::new(false) }.follow(&mut Pipe);
    }
    let mut terminal = Terminal::new(args.history.as_deref())?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    interrupt::on_ctrl_c(move || flag.store(true, Ordering::Relaxed))?;
    writeln!(stdout(), "{}, context of {context} tokens. /help lists the commands.\n", checkpoint.name())?;
    Chat { conversation: &mut conversation, interrupted: &interrupted }.talk(&mut terminal)?;
    terminal.save_history()
}

/// A conversation and who may interrupt it.
struct Chat<'a> {
    conversation: &'a mut Conversation,
    /// Set by Ctrl-C.
    interrupted: &'a AtomicBool,
}

/// Whether the chat goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    Exit,
}

impl Chat<'_> {
    /// Does what a script says, up to the first error: nobody is there to mend it.
    fn follow(&mut self, lines: &mut dyn Lines) -> anyhow::Result<()> {
        while self.turn(input::read(lines)?)? == Next::GoOn {}
        Ok(())
    }

    /// Talks with a person, to whom errors are told.
    fn talk(&mut self, lines: &mut dyn Lines) -> anyhow::Result<()> {
        loop {
            let input = input::read(lines)?;
            // Ctrl-C pressed while there was no answer to stop.
            self.interrupted.store(false, Ordering::Relaxed);
            let said = matches!(input, Input::Message(_));
            match self.turn(input) {
                Ok(Next::Exit) => return Ok(()),
                Ok(Next::GoOn) if said => writeln!(stdout())?,
                Ok(Next::GoOn) => {}
                Err(error) if error.is::<io::Error>() => return Err(error),
                Err(error) => writeln!(stderr(), "error: {error:#}\n")?,
            }
        }
    }

    fn turn(&mut self, input: Input) -> anyhow::Result<Next> {
        match input {
            Input::Message(text) => self.answer(text)?,
            Input::Command { name, argument } => return self.command(&name, &argument),
            Input::Interrupted => writeln!(stderr(), "(/exit or Ctrl-D ends the chat)")?,
            Input::End => return Ok(Next::Exit),
        }
        Ok(Next::GoOn)
    }

    /// Puts a message to the model and writes the answer as it comes.
    fn answer(&mut self, text: String) -> anyhow::Result<()> {
        let mut out = stdout().lock();
        let answer = self.conversation.answer(text, self.interrupted, |piece| {
            out.write_all(piece.as_bytes())?;
            out.flush()
        })?;
        writeln!(out)?;
        match answer {
            Answer::Finished(FinishReason::Context) => {
                let context = self.conversation.context();
                writeln!(
                    stderr(),
                    "[cut off: the conversation fills the context of {context} tokens; /reset begins a new one]"
                )?;
            }
            Answer::Finished(FinishReason::Length) => {
                writeln!(stderr(), "[cut off after {} tokens: --max-tokens]", self.conversation.max_tokens())?;
            }
            Answer::Finished(_) => {}
            Answer::Interrupted => writeln!(stderr(), "[stopped]")?,
        }
        Ok(())
    }

    fn command(&mut self, name: &str, argument: &str) -> anyhow::Result<Next> {
        let conversation = &mut *self.conversation;
        let file = || match argument {
            "" => bail!("/{name} needs the name of a file: /{name} FILE"),
            file => Ok(std::path::Path::new(file)),
        };
        match name {
            "reset" => conversation.reset(),
            "system" => conversation.set_system(argument),
            "save" => conversation.save(file()?)?,
            "load" => conversation.load(file()?)?,
            "help" => writeln!(stdout(), "{HELP}")?,
            "exit" => return Ok(Next::Exit),
            _ => bail!(
                "there is no command /{name}; /help lists them, and \"\"\" before and after a message lets it begin with /"
            ),
        }
        Ok(Next::GoOn)
    }
}
