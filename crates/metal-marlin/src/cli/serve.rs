//! `metal-marlin serve`: OpenAI's and Anthropic's APIs.

use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::Context;
use marlin_server::{Server, ServerOptions, ServiceOptions};
use tokio::signal::unix::{SignalKind, signal};

use super::models::{ModelsOptions, Opened};
use super::serving::ServingOptions;
use crate::memory;

const EXAMPLES: &str = "\
Examples:
  metal-marlin serve                                          the bundled model at http://127.0.0.1:8000/v1
  metal-marlin serve path/to/model --port 9000
  metal-marlin serve Qwen/Qwen3-4B --format fp4 --host 0.0.0.0 --api-key secret
  metal-marlin serve big=path/to/model small=Qwen/Qwen3-0.6B  two models, the second loaded when a request names it
  metal-marlin serve --models-dir models --idle-unload 10m    all that are in a folder, each while it is used
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"NAME\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

NAME is what `curl http://127.0.0.1:8000/v1/models` lists. Any client of OpenAI's API works with the base URL
http://127.0.0.1:8000/v1. http://127.0.0.1:8000/openapi.json describes all endpoints, docs/server.md explains them.
Ctrl-C or SIGTERM ends the server when the answers under way are finished; a second one at once.";

/// Serve OpenAI's and Anthropic's APIs
///
/// Answers many requests at a time on one or more models: chats, texts to continue, tokens, perplexity. Listens on this machine only, unless
/// told otherwise. Models are loaded beside each other as far as memory reaches (`--memory`); where it does not, the one least recently used
/// makes room.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    models: ModelsOptions,

    /// Unload a model that nobody has used for so long, such as 90s, 10m or 2h; the next request loads it again [default: never, but to
    /// make room for another]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    idle_unload: Option<Duration>,

    /// Address to listen at; 0.0.0.0 lets other machines in
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "ADDRESS")]
    host: IpAddr,

    /// Port to listen at; 0 for any that is free
    #[arg(long, default_value_t = 8000, value_name = "PORT")]
    port: u16,

    /// Let in requests with this key only; may be given several times
    #[arg(long, value_name = "KEY", env = "METAL_MARLIN_API_KEY", hide_env_values = true, help_heading = "Safety")]
    api_key: Vec<String>,

    /// Let pages of this origin use the server from a browser; `*` for all; may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Safety")]
    cors_origin: Vec<String>,

    /// Largest body of a request
    #[arg(long, value_name = "SIZE", value_parser = memory::parse_size, default_value = "16MiB", help_heading = "Safety")]
    max_body: u64,

    /// Most answers that wait for their turn with a model, and most requests that wait for one to be loaded; further requests are told to come again later (429)
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Safety")]
    max_waiting: usize,

    /// Most connections at a time
    #[arg(long, value_name = "N", default_value = "1024", help_heading = "Safety")]
    max_connections: NonZeroUsize,

    /// Longest time for an answer, with the wait for its model, in seconds [default: no limit]
    #[arg(long, value_name = "SECONDS", help_heading = "Safety")]
    timeout: Option<NonZeroUsize>,

    /// Longest time for the answers under way when the server is told to end, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Safety")]
    drain: u64,

    /// Write prompts to the log
    #[arg(long, help_heading = "Safety")]
    log_prompts: bool,

    #[command(flatten)]
    serving: ServingOptions,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let is_terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(is_terminal).with_target(false).init();
    let (running, options) = (args.serving.loading.max_running(), args.server_options());
    let Opened { models, device, context } = args.models.open(args.serving)?;
    let names = models.names.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(", ");
    let context = context.map(|context| format!(", context {context}")).unwrap_or_default();
    let each = if models.names.len() > 1 { " of each model" } else { "" };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let server = Server::bind(models, options).await?;
        let address = server.address()?;
        eprintln!("Serving {names} at http://{address}/v1 ({device}{context}, {running} answers{each} at a time)");
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
        let service = ServiceOptions {
            api_keys: self.api_key.clone(),
            max_body: usize::try_from(self.max_body).unwrap_or(usize::MAX),
            max_waiting: self.max_waiting,
            timeout: self.timeout.map(|seconds| Duration::from_secs(seconds.get() as u64)),
            idle_unload: self.idle_unload,
            cors_origins: self.cors_origin.clone(),
            log_prompts: self.log_prompts,
        };
        ServerOptions {
            max_connections: self.max_connections.get(),
            drain: Duration::from_secs(self.drain),
            service,
            ..ServerOptions::new(SocketAddr::new(self.host, self.port))
        }
    }
}

/// A time such as `90s`, `10m` or `2h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wanted = || format!("`{text}` is no time; wanted a whole number above 0 with a unit, such as 90s, 10m or 2h");
    let (number, unit) = text.split_at(text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wanted()),
    };
    let number = number.parse::<u64>().ok().filter(|&number| number > 0);
    number.and_then(|number| number.checked_mul(seconds)).map(Duration::from_secs).ok_or_else(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86_400)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "10", "m", "0s", "-1s", "1.5h", "10 m", "3w", "99999999999999999999s", "999999999999999999d"] {
            assert!(parse_duration(text).unwrap_err().contains("10m"), "{text}");
        }
    }
}
