//! `metal-marlin batch`: a file of requests, answered.

use std::path::PathBuf;

use anyhow::{bail, ensure};
use futures_util::StreamExt;
use futures_util::stream;
use marlin_server::{Service, ServiceOptions};

use super::models::{ModelsOptions, Opened};
use super::serving::ServingOptions;
use crate::batch::{BatchAnswers, BatchRequest, read_requests};
use crate::cli::progress::Bar;

const EXAMPLES: &str = "\
Examples:
  metal-marlin batch requests.jsonl answers.jsonl
  metal-marlin batch requests.jsonl answers.jsonl path/to/model --max-running 64
  metal-marlin batch requests.jsonl answers.jsonl --models-dir models

A line of IN is a request in OpenAI's batch format:
  {\"custom_id\": \"1\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}}
url may be /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages or /v1/perplexity; docs/server.md says what they take. A body without a
model is for the first one. A line of OUT is an answer, in the order in which they were ready:
  {\"id\": …, \"custom_id\": \"1\", \"response\": {\"status_code\": 200, \"request_id\": …, \"body\": {…}}, \"error\": null}
If OUT has answers of an earlier run, the others are added.";

/// Answer a file of requests
///
/// Computes many at a time, without a server. A run that was interrupted, however that came about, goes on where it was when it is started
/// again. Every line is looked at before the first request is answered.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Requests, a line each
    #[arg(value_name = "IN.jsonl")]
    requests: PathBuf,

    /// Where their answers go
    #[arg(value_name = "OUT.jsonl")]
    answers: PathBuf,

    #[command(flatten)]
    models: ModelsOptions,

    #[command(flatten)]
    serving: ServingOptions,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let requests = read_requests(&args.requests)?;
    let mut answers = BatchAnswers::open(&args.answers, &requests)?;
    let before = answers.len();
    let mut left: Vec<&BatchRequest> = requests.iter().filter(|request| !answers.has(&request.custom_id)).collect();
    if !left.is_empty() {
        // Enough wait that no step is less full than it could be.
        let at_a_time = args.serving.loading.max_running().saturating_mul(2);
        let Opened { models, .. } = args.models.open(args.serving)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let options = ServiceOptions { max_waiting: usize::MAX, max_body: usize::MAX, ..ServiceOptions::default() };
        let name = models.names[0][0].clone();
        // One model after the other, so that each is loaded once.
        left.sort_by_key(|request| place(&models.names, request));
        runtime.block_on(async {
            let service = Service::start(models, &options)?;
            let mut bar = Bar::counting("Answering", "requests");
            let calls = left.into_iter().map(|request| call(&service, request, &name));
            let mut answered = stream::iter(calls).buffer_unordered(at_a_time);
            loop {
                let next = tokio::select! {
                    next = answered.next() => next,
                    interrupted = tokio::signal::ctrl_c() => {
                        interrupted?;
                        let (done, all) = (answers.len(), requests.len());
                        bail!("interrupted after {done} of {all} requests; the same command goes on from there");
                    }
                };
                let Some((request, status, body)) = next else { break };
                answers.write(&request.custom_id, status, &body)?;
                bar.set(answers.len() as u64, requests.len() as u64);
            }
            drop(answered);
            service.stop().await;
            Ok(())
        })?;
    }
    let (all, refused) = (answers.len(), answers.refused());
    answers.finish()?;
    let path = args.answers.display();
    eprintln!("{path}: answers to {all} requests, {before} of them from before");
    ensure!(refused == 0, "{refused} of {all} requests were refused; response.status_code and the body say why");
    Ok(())
}

/// The place of a request's model among the names; the first one's if it names none, or one that is not there.
fn place(names: &[Vec<String>], request: &BatchRequest) -> usize {
    let name = request.body.get("model").and_then(|name| name.as_str());
    names.iter().position(|names| names.iter().any(|known| Some(known.as_str()) == name)).unwrap_or(0)
}

/// Sends a request to its model, or the one named here.
async fn call<'a>(service: &Service, request: &'a BatchRequest, model: &str) -> (&'a BatchRequest, u16, Vec<u8>) {
    let mut body = request.body.clone();
    body.entry("model").or_insert_with(|| model.into());
    let body = serde_json::Value::Object(body).to_string().into_bytes();
    let (status, answer) = service.call("POST", &request.url, body).await;
    (request, status, answer.to_vec())
}
