//! `metal-marlin run`: continue a text.

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write, stderr, stdin, stdout};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ArgGroup;
use marlin_checkpoint::{Checkpoint, GenerationConfig, Tokenizer};
use marlin_engine::{Engine, EngineStats, Finish, FinishReason, Message, Request, StopConditions};
use marlin_model::{HostExpertsInfo, LoadOptions, ModelInfo};
use serde_json::{Value, json};

use super::draft::{self, Draft};
use super::model::{self, HubOptions, QuantizeOptions};
use super::sampling::SamplingOptions;
use super::speculation::SpeculationOptions;
use super::template::TemplateOptions;
use crate::cli::progress;
use crate::device::{Device, KvFormat};
use crate::memory::MemoryOptions;
use crate::{DeviceOptions, LoadError, load};

const EXAMPLES: &str = "\
Examples:
  metal-marlin run \"Once upon a time\"
  metal-marlin run \"Once upon a time\" --seed 1 --max-tokens 50 --stop \"The End\"
  metal-marlin run path/to/model \"Once upon a time\" --temperature 0
  metal-marlin run Qwen/Qwen3-4B \"Once upon a time\" --format fp4
  metal-marlin run path/to/model - < prompt.txt > continuation.txt
  metal-marlin run \"Once upon a time\" --json
  metal-marlin run path/to/model \"Why is the sky blue?\" --chat --system \"Be brief.\"

What to generate, and how, is decided by these options, where they are silent by the model's
generation_config.json, and where that is silent too by: temperature 0.7, top-k 40, top-p 0.95,
repetition penalty 1.1 (1 at temperature 0), at most 256 tokens. A generation_config.json with
\"do_sample\": false means temperature 0.

A model runs as it is stored; with --format it is quantised first, once: the result is kept
(`metal-marlin cache`).";

/// Said of a standard output that is full or gone.
const CANNOT_WRITE: &str = "cannot write to standard output";

/// Tokens generated where neither the options nor the model say how many.
const DEFAULT_MAX_TOKENS: usize = 256;

/// Continue a text
///
/// Writes what a model makes of PROMPT to standard output as it is generated. The prompt itself is not repeated.
/// Without --chat it is continued as it stands; with it, it is a message that is answered.
#[derive(Debug, clap::Args)]
#[command(
    after_help = EXAMPLES,
    override_usage = "metal-marlin run [OPTIONS] [MODEL] <PROMPT>",
    group(ArgGroup::new("what").args(["model_or_prompt", "prompt"]).required(true).multiple(true))
)]
pub(crate) struct Args {
    /// Folder with a Hugging Face checkpoint, or one made by `quantize`, or an id on the Hub [default: the bundled model]
    // With one argument this is the prompt. clap could tell the two apart, but not with options between them.
    #[arg(value_name = "MODEL")]
    model_or_prompt: Option<OsString>,

    /// Text to continue; `-` reads it from standard input (without its last line end)
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,

    #[command(flatten)]
    sampling: SamplingOptions,

    /// Put PROMPT as a message to the model, in its chat template, and print the answer
    #[arg(long, help_heading = "Chat")]
    chat: bool,

    #[command(flatten)]
    template: TemplateOptions,

    #[command(flatten)]
    stop: StopOptions,

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

    /// Most tokens of prompt and continuation together [default: as many as needed, up to what the model and the memory
    /// allow]
    #[arg(long, value_name = "N", help_heading = "Device")]
    context: Option<NonZeroUsize>,

    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = KvFormat::F16, help_heading = "Device")]
    kv: KvFormat,

    /// Print one JSON object at the end (text, tokens, why it ended, timings) instead of text as it comes
    #[arg(long, help_heading = "Output")]
    json: bool,

    /// Report model, device and timings on standard error even if that is not a terminal
    #[arg(long, short, help_heading = "Output")]
    verbose: bool,
}

/// When to stop.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Stopping")]
struct StopOptions {
    /// Generate at most this many tokens [default: the model's own choice, or 256]
    #[arg(long, short = 'n', value_name = "N")]
    max_tokens: Option<NonZeroUsize>,

    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on past the model's end-of-sequence tokens
    #[arg(long)]
    ignore_eos: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (model, prompt) = args.model_and_prompt()?;
    refuse_model_as_prompt(model, prompt)?;
    if args.template.is_given() && !args.chat {
        bail!("--system, --chat-template and --no-thinking shape a message; add --chat to send PROMPT as one");
    }
    let prompt = read_prompt(prompt)?;
    let started = Instant::now();
    let (checkpoint, _temporary) = model::open_quantized(model, &args.hub, &args.quantize, args.device.threads)?;
    let generation = checkpoint.generation_config()?;
    let tokenizer = checkpoint.tokenizer()?;
    let mut stop = args.stop.conditions(&generation);
    let prompt = if args.chat {
        let prompter = args.template.prompter(&checkpoint, &tokenizer)?;
        stop.tokens.extend(prompter.end_of_turn.filter(|_| !stop.ignore_eos));
        let mut messages = args.template.first_messages();
        messages.push(Message::new("user", prompt));
        prompter.tokens(&messages, &tokenizer)?
    } else {
        tokens_of(&prompt, &tokenizer, &generation)?
    };
    let request = Request { prompt, sampling: args.sampling.params(&generation), stop, ..Request::default() };
    // Before a large model is loaded for nothing.
    let settings = || format!("the options, or generation_config.json of {}, are out of range", checkpoint.name());
    request.sampling.validate().with_context(settings)?;
    request.stop.validate().with_context(settings)?;

    let device = args.device.open().map_err(LoadError::Device)?;
    let draft = args.speculation.open_draft(&tokenizer, &device, 1)?;
    let options = args.load_options(&request, &checkpoint, draft.as_ref(), &device)?;
    let model = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
        args.quantize.load()(&checkpoint, &device, &options)
    })?;
    let engine = Engine::new(model, Arc::new(tokenizer), generation.eos_token_id);
    let mut engine = args.speculation.apply(engine, draft, &device, args.quantize.load())?;
    let load = started.elapsed();

    engine.add(request)?;
    let output = generate(&mut engine, !args.json)?;
    let timings = Timings { load, ..output.timings };
    if args.json {
        let report = output.to_json(checkpoint.name(), &timings);
        writeln!(stdout(), "{report}").context(CANNOT_WRITE)?;
    }
    if args.verbose || (stderr().is_terminal() && !args.json) {
        report(checkpoint.name(), engine.info(), &output, &timings, args.verbose);
    }
    Ok(())
}

/// `run path/to/model` lacks a prompt; without this check the path would be continued by the bundled model.
fn refuse_model_as_prompt(model: Option<&Path>, prompt: &str) -> anyhow::Result<()> {
    let path = Path::new(prompt);
    let is_folder = path.join("config.json").is_file();
    if model.is_none() && (is_folder || load::hub_id(path).is_some()) {
        let what = if is_folder { "a model folder" } else { "the id of a model" };
        bail!(
            "{prompt} is {what}, and a prompt is missing: metal-marlin run {prompt} \"Once upon a time\" (to continue this \
             very text: echo {prompt} | metal-marlin run -)"
        );
    }
    Ok(())
}

fn read_prompt(prompt: &str) -> anyhow::Result<String> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let mut text = String::new();
    stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    let end = text.strip_suffix('\n').map_or(text.len(), |text| text.strip_suffix('\r').unwrap_or(text).len());
    text.truncate(end);
    Ok(text)
}

/// Tokens that are generated at most where the options do not say how many.
pub(super) fn max_tokens(generation: &GenerationConfig) -> usize {
    generation.max_new_tokens.unwrap_or(DEFAULT_MAX_TOKENS)
}

/// The prompt's tokens; an empty prompt begins where every text of the model begins.
pub(super) fn tokens_of(
    prompt: &str,
    tokenizer: &Tokenizer,
    generation: &GenerationConfig,
) -> anyhow::Result<Vec<u32>> {
    let mut tokens = tokenizer.encode(prompt, true)?;
    if tokens.is_empty() {
        tokens.extend(generation.bos_token_id);
    }
    Ok(tokens)
}

impl Args {
    fn model_and_prompt(&self) -> anyhow::Result<(Option<&Path>, &str)> {
        let first = self.model_or_prompt.as_deref().context("name a PROMPT")?;
        match &self.prompt {
            Some(prompt) => Ok((Some(Path::new(first)), prompt)),
            None => Ok((None, first.to_str().context("PROMPT is not UTF-8")?)),
        }
    }

    /// How to load the model, if there is memory for it: with the context asked for, or with no more than this one request can use
    /// and than fits; the prompt must.
    fn load_options(
        &self,
        request: &Request,
        checkpoint: &Checkpoint,
        draft: Option<&Draft>,
        device: &Device,
    ) -> anyhow::Result<LoadOptions> {
        let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
        let shape = planner.shape();
        request.check(shape.vocabulary, self.context.map_or(shape.context, NonZeroUsize::get))?;
        let needed = request.prompt.len().saturating_add(request.stop.max_tokens);
        let usable = needed.clamp(1, shape.context);
        let context = self.context.map_or(usable, NonZeroUsize::get);
        let logit_rows = 1 + self.speculation.logit_rows(device);
        let options = LoadOptions {
            context: Some(context),
            kv_type: self.kv.into(),
            logit_rows,
            prediction: self.speculation.predicts(),
            ..LoadOptions::default()
        };
        let Some(budget) = self.memory.budget(device) else { return Ok(options) };
        let least = if self.context.is_none() { Some(request.prompt.len()) } else { None };
        draft::fit_one_answer(device, checkpoint, options, draft, &budget, least)
    }
}

impl StopOptions {
    fn conditions(&self, generation: &GenerationConfig) -> StopConditions {
        StopConditions {
            max_tokens: self.max_tokens.map_or_else(|| max_tokens(generation), NonZeroUsize::get),
            strings: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            ..StopConditions::default()
        }
    }
}

/// What came of a request.
struct Output {
    text: String,
    tokens: Vec<u32>,
    finish: Finish,
    timings: Timings,
    /// Tokens that were guessed, and those that were right.
    drafted_tokens: u64,
    accepted_tokens: u64,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
struct Timings {
    load: Duration,
    /// Until the first token.
    prefill: Duration,
    /// From the first token to the last.
    decode: Duration,
}

/// Runs the engine's one request to its end, writing its text as it comes if `stream`.
fn generate(engine: &mut Engine, stream: bool) -> anyhow::Result<Output> {
    let mut out = stdout().lock();
    let (mut text, mut tokens, mut events) = (String::new(), Vec::new(), Vec::new());
    let started = Instant::now();
    let mut first = None;
    loop {
        engine.step(&mut events)?;
        for event in events.drain(..) {
            first.get_or_insert_with(|| started.elapsed());
            tokens.extend(event.token);
            text.push_str(&event.text);
            if stream && !event.text.is_empty() {
                out.write_all(event.text.as_bytes()).and_then(|()| out.flush()).context(CANNOT_WRITE)?;
            }
            if let Some(finish) = event.finish {
                if stream {
                    writeln!(out).context(CANNOT_WRITE)?;
                }
                if let Some(error) = finish.reason.error() {
                    return Err(error.into());
                }
                let prefill = first.unwrap_or_default();
                let timings = Timings { prefill, decode: started.elapsed() - prefill, ..Timings::default() };
                let EngineStats { drafted_tokens, accepted_tokens, .. } = engine.stats();
                return Ok(Output { text, tokens, finish, timings, drafted_tokens, accepted_tokens });
            }
        }
    }
}

impl Output {
    fn to_json(&self, model: &str, timings: &Timings) -> Value {
        let Finish { reason, prompt_tokens, generated_tokens, .. } = &self.finish;
        let stopped_at = reason.stop_token().map(Value::from).or(reason.stop_string().map(Value::from));
        json!({
            "model": model,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": reason.name(),
            "stopped_at": stopped_at,
            "prompt_tokens": prompt_tokens,
            "generated_tokens": generated_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "timings": {
                "load_seconds": timings.load.as_secs_f64(),
                "prefill_seconds": timings.prefill.as_secs_f64(),
                "decode_seconds": timings.decode.as_secs_f64(),
                "prefill_tokens_per_second": timings.prefill_rate(*prompt_tokens),
                "decode_tokens_per_second": timings.decode_rate(*generated_tokens),
            },
        })
    }
}

impl Timings {
    fn prefill_rate(&self, prompt_tokens: usize) -> f64 {
        prompt_tokens as f64 / self.prefill.as_secs_f64()
    }

    /// Tokens a second after the first; `None` if there was only one.
    fn decode_rate(&self, generated_tokens: usize) -> Option<f64> {
        (generated_tokens > 1).then(|| (generated_tokens - 1) as f64 / self.decode.as_secs_f64())
    }
}

/// Says on standard error what ran and how fast.
fn report(name: &str, model: &ModelInfo, output: &Output, timings: &Timings, verbose: bool) {
    let Output { finish, drafted_tokens, accepted_tokens, .. } = output;
    let mut lines = String::from("\n");
    if verbose {
        lines += &format!(
            "model    {name}: {}, {} layers, {:.1} MB\ncontext  {} tokens\ndevice   {} ({})\n",
            model.architecture,
            model.layers,
            model.weight_bytes as f64 / 1e6,
            model.context,
            model.device.name,
            model.device.detail,
        );
        if let Some(HostExpertsInfo { layers, device }) = &model.host_experts {
            lines += &format!("experts  of layers {layers}: {} ({})\n", device.name, device.detail);
        }
        lines += &format!("load     {:.2} s\n", timings.load.as_secs_f64());
    }
    lines += &format!(
        "prompt   {} tokens in {:.2} s ({:.1} tokens/s)\n",
        finish.prompt_tokens,
        timings.prefill.as_secs_f64(),
        timings.prefill_rate(finish.prompt_tokens),
    );
    lines += &format!("output   {} tokens in {:.2} s", finish.generated_tokens, timings.decode.as_secs_f64());
    if let Some(rate) = timings.decode_rate(finish.generated_tokens) {
        lines += &format!(" ({rate:.1} tokens/s)");
    }
    if *drafted_tokens > 0 {
        lines += &format!(", {accepted_tokens} of {drafted_tokens} guesses right");
    }
    let ended = match &finish.reason {
        FinishReason::StopToken(_) => "the model ended its text".to_owned(),
        FinishReason::StopString(text) => format!("reached the stop string {text:?}"),
        FinishReason::Complete => "the text is complete".to_owned(),
        FinishReason::Length => "reached --max-tokens".to_owned(),
        FinishReason::Context => format!("filled the context of {} tokens", model.context),
        FinishReason::NotFinite | FinishReason::Grammar(_) | FinishReason::Failed(_) => "the model failed".to_owned(),
    };
    // Nobody is helped by an error about a report that cannot be written.
    let _ = writeln!(stderr(), "{lines}; {ended}");
}
