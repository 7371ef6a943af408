//! `metal-marlin serve`: the OpenAI API.

use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use marlin_checkpoint::Checkpoint;
use marlin_engine::{ChatTemplate, Engine, EngineError};
use marlin_model::LoadOptions;
use marlin_server::{ChatFormat, Dialect, ServedModel, Server, ServerOptions};
use metal_marlin::device::{Device, KvFormat};
use metal_marlin::memory::{self, MemoryOptions};
use metal_marlin::{DeviceOptions, LoadError, load};
use tokio::signal::unix::{SignalKind, signal};

use super::model::{self, HubOptions, QuantizeOptions};
use super::template;
use crate::progress;

const EXAMPLES: &str = "\
Examples:
  metal-marlin serve                                          the bundled model at http://127.0.0.1:8000/v1
  metal-marlin serve path/to/model --port 9000
  metal-marlin serve Qwen/Qwen3-4B --format fp4 --host 0.0.0.0 --api-key secret
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"NAME\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

NAME is what `curl http://127.0.0.1:8000/v1/models` lists. Any client of OpenAI's API works with the base URL
http://127.0.0.1:8000/v1. http://127.0.0.1:8000/openapi.json describes all endpoints, docs/server.md explains them.
Ctrl-C or SIGTERM ends the server when the answers under way are finished; a second one at once.";

/// Tokens that the KV cache holds, in contexts, where neither the options nor the memory say otherwise.
const CONTEXTS: usize = 4;

/// Serve the OpenAI API
///
/// Answers many requests at a time on one model: chats, texts to continue, tokens, perplexity. Listens on this machine only, unless told
/// otherwise.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder with a Hugging Face checkpoint, or one made by `quantize`, or an id on the Hub [default: the bundled model]
    model: Option<PathBuf>,

    /// Address to listen at; 0.0.0.0 lets other machines in
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "ADDRESS")]
    host: IpAddr,

    /// Port to listen at; 0 for any that is free
    #[arg(long, default_value_t = 8000, value_name = "PORT")]
    port: u16,

    /// Name that requests give for the model; may be given several times [default: the model's own]
    #[arg(long, value_name = "NAME")]
    served_name: Vec<String>,

    /// Jinja template of conversations [default: the model's chat_template.jinja or tokenizer_config.json]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,

    /// How the model writes reasoning and calls of tools: plain, hermes, qwen-xml, glm4, llama3, mistral or harmony [default: what
    /// its chat template spells out]
    #[arg(long, value_name = "DIALECT")]
    dialect: Option<Dialect>,

    /// Let in requests with this key only; may be given several times
    #[arg(long, value_name = "KEY", env = "METAL_MARLIN_API_KEY", hide_env_values = true, help_heading = "Safety")]
    api_key: Vec<String>,

    /// Let pages of this origin use the server from a browser; `*` for all; may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Safety")]
    cors_origin: Vec<String>,

    /// Largest body of a request
    #[arg(long, value_name = "SIZE", value_parser = memory::parse_size, default_value = "16MiB", help_heading = "Safety")]
    max_body: u64,

    /// Most answers that wait for their turn; further requests are told to come again later (429)
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Safety")]
    max_waiting: usize,

    /// Most connections at a time
    #[arg(long, value_name = "N", default_value = "1024", help_heading = "Safety")]
    max_connections: NonZeroUsize,

    /// Longest time for an answer, in seconds [default: no limit]
    #[arg(long, value_name = "SECONDS", help_heading = "Safety")]
    timeout: Option<NonZeroUsize>,

    /// Longest time for the answers under way when the server is told to end, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Safety")]
    drain: u64,

    /// Write prompts to the log
    #[arg(long, help_heading = "Safety")]
    log_prompts: bool,

    /// Most answers that are computed at a time
    #[arg(long, value_name = "N", default_value = "32", help_heading = "Device")]
    max_running: NonZeroUsize,

    /// Most tokens of prompt and answer together [default: what the model and the memory allow]
    #[arg(long, value_name = "N", help_heading = "Device")]
    context: Option<NonZeroUsize>,

    /// Tokens that the KV cache holds, for all answers together and what is kept for later [default: four contexts, or what fits]
    #[arg(long, value_name = "N", help_heading = "Device")]
    kv_tokens: Option<NonZeroUsize>,

    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = KvFormat::F16, help_heading = "Device")]
    kv: KvFormat,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    quantize: QuantizeOptions,

    #[command(flatten)]
    device: DeviceOptions,

    #[command(flatten)]
    memory: MemoryOptions,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let is_terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(is_terminal).with_target(false).init();
    let (checkpoint, _temporary) =
        model::open_quantized(args.model.as_deref(), &args.hub, &args.quantize, args.device.threads)?;
    let tokenizer = checkpoint.tokenizer()?;
    let served = args.served_model(&checkpoint)?;
    let device = args.device.open().map_err(LoadError::Device)?;
    let options = args.load_options(&checkpoint, &device)?;
    let model = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
        args.quantize.load()(&checkpoint, &device, &options)
    })?;
    let engine = Engine::new(model, tokenizer.into(), served.generation.eos_token_id.clone());
    let name = served.names.join(", ");
    let (context, running) = (engine.info().context, args.max_running);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let server = Server::bind(engine, served, args.server_options()).await?;
        let address = server.address()?;
        eprintln!(
            "Serving {name} at http://{address}/v1 ({}, context {context}, {running} answers at a time)",
            device.info().name
        );
        let shutdown = shutdown()?;
        server.run(shutdown).await;
        Ok(())
    })
}

/// Waits for Ctrl-C or SIGTERM. The second one ends the program.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    let cannot = "cannot handle signals";
    let mut interrupts = signal(SignalKind::interrupt()).context(cannot)?;
    let mut terminations = signal(SignalKind::terminate()).context(cannot)?;
    let mut wait = async move || {
        tokio::select! {
            _ = interrupts.recv() => 130,
            _ = terminations.recv() => 143,
        }
    };
    Ok(async move {
        wait().await;
        tokio::spawn(async move { std::process::exit(wait().await) });
    })
}

impl Args {
    fn server_options(&self) -> ServerOptions {
        ServerOptions {
            api_keys: self.api_key.clone(),
            max_body: usize::try_from(self.max_body).unwrap_or(usize::MAX),
            max_waiting: self.max_waiting,
            max_connections: self.max_connections.get(),
            timeout: self.timeout.map(|seconds| Duration::from_secs(seconds.get() as u64)),
            drain: Duration::from_secs(self.drain),
            cors_origins: self.cors_origin.clone(),
            log_prompts: self.log_prompts,
            ..ServerOptions::new(SocketAddr::new(self.host, self.port))
        }
    }

    fn served_model(&self, checkpoint: &Checkpoint) -> anyhow::Result<ServedModel> {
        let special_tokens = checkpoint.special_tokens()?;
        let tokenizer = checkpoint.tokenizer()?;
        let source = template::source(self.chat_template.as_deref(), checkpoint)?;
        let end_of_turn = special_tokens.get("eos_token").and_then(|token| tokenizer.token_id(token));
        let chat = source.map(|source| {
            let template = ChatTemplate::new(&source, special_tokens)?;
            let dialect = self.dialect.unwrap_or_else(|| Dialect::detect(&source));
            Ok::<_, EngineError>(ChatFormat { template, source, dialect })
        });
        let chat = chat.transpose()?;
        if chat.is_none() {
            eprintln!("note: {} has no chat template; it continues texts only", checkpoint.name());
        }
        Ok(ServedModel {
            names: if self.served_name.is_empty() { vec![self.default_name()] } else { self.served_name.clone() },
            generation: checkpoint.generation_config()?,
            chat,
            end_of_turn: end_of_turn.into_iter().collect(),
        })
    }

    /// What the model is called where nobody says: by its id on the Hub, or as its folder or file is.
    fn default_name(&self) -> String {
        let Some(model) = &self.model else { return "bundled".to_owned() };
        if load::hub_id(model).is_some() {
            return model.display().to_string();
        }
        let name = if model.is_file() { model.file_stem() } else { model.file_name() };
        name.map_or_else(|| model.display().to_string(), |name| name.to_string_lossy().into_owned())
    }

    /// How to load the model: with the largest context and KV cache that the options, the model and the memory allow.
    fn load_options(&self, checkpoint: &Checkpoint, device: &Device) -> anyhow::Result<LoadOptions> {
        let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
        let allowed = planner.shape().context;
        let context = self.context.map_or(allowed, NonZeroUsize::get);
        let defaults = LoadOptions::default();
        let options = LoadOptions {
            context: Some(context),
            kv_type: self.kv.into(),
            logit_rows: self.max_running.get(),
            step_tokens: defaults.step_tokens.max(self.max_running.get()),
            ..defaults
        };
        let plan = planner.plan(&options).map_err(LoadError::Model)?;
        let blocks_of = |tokens: usize| tokens.div_ceil(plan.block_tokens) + 1;
        let wanted = blocks_of(self.kv_tokens.map_or(context.saturating_mul(CONTEXTS), NonZeroUsize::get));
        let Some(budget) = self.memory.budget(device) else {
            return Ok(LoadOptions { kv_blocks: Some(wanted), ..options });
        };
        let left = budget.device.saturating_sub(plan.total() - plan.kv_cache);
        let fit = usize::try_from((left / plan.block_bytes.max(1)).min(plan.most_blocks)).unwrap_or(usize::MAX);
        let blocks = if self.kv_tokens.is_some() { wanted } else { wanted.min(fit) };
        // One that nobody asked for is as long as the cache has room for.
        let room = (blocks.max(2) - 1) * plan.block_tokens;
        let context = if self.context.is_some() { context } else { context.min(room) };
        let options = LoadOptions { context: Some(context), kv_blocks: Some(blocks.max(2)), ..options };
        memory::require_fit(device, checkpoint, &options, &budget)?;
        Ok(options)
    }
}
