//! Load for a server of OpenAI's API, and what its clients see of it.

mod output;

use std::io::{BufRead, BufReader, Read};
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};
use ureq::Agent;

/// Most bytes of an error that are shown.
const MOST_ERROR: u64 = 500;

/// Words of prompts: common ones, each of which is a token or two of any model.
const WORDS: [&str; 48] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money",
    "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business",
];

/// What is asked of a server, and how often.
#[derive(Debug, Clone)]
pub struct Load {
    /// Where its API is, such as `http://127.0.0.1:8000/v1`.
    pub url: String,
    /// The model; the first that it lists if none is named.
    pub model: Option<String>,
    /// A key, if it asks for one.
    pub api_key: Option<String>,
    /// Requests.
    pub requests: usize,
    /// How they come.
    pub arrival: Arrival,
    /// Words of each prompt; most are a token.
    pub prompt_words: usize,
    /// Words that all prompts begin with.
    pub shared_words: usize,
    /// Tokens of each answer.
    pub max_tokens: usize,
    /// Let answers end where the model ends them.
    pub heed_eos: bool,
    /// Tokens that no answer has.
    pub banned: Vec<u32>,
    /// Of the prompts, and of when they come.
    pub seed: u64,
}

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrival {
    /// So many at a time: one begins when another ends.
    Concurrent(NonZeroUsize),
    /// So many a second on average, independently of each other (a Poisson process).
    PerSecond(f64),
}

/// Why a server cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be reached, or breaks off.
    #[error("cannot reach {url}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why not.
        source: Box<ureq::Error>,
    },
    /// It refuses a request.
    #[error("{url} answers {status}: {body}")]
    Refused {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
        /// The beginning of what it says.
        body: String,
    },
    /// It says something that is not of the API.
    #[error("{url} does not speak OpenAI's API: {problem}")]
    Foreign {
        /// What was asked for.
        url: String,
        /// What is wrong.
        problem: String,
    },
}

/// What a client saw of one request.
#[derive(Debug, Clone)]
pub struct Served {
    /// From the request to the first piece of text.
    pub first_token: Duration,
    /// Between two pieces.
    pub gaps: Vec<Duration>,
    /// From the request to the end.
    pub whole: Duration,
    /// Tokens of the prompt, if the server tells.
    pub prompt_tokens: Option<u64>,
    /// Those that it had cached.
    pub cached_tokens: Option<u64>,
    /// Tokens of the answer; pieces, if the server does not tell.
    pub generated_tokens: u64,
}

/// What clients saw of all.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The model.
    pub model: String,
    /// From the first request to the end of the last.
    pub wall: Duration,
    /// Of each request.
    pub served: Vec<Served>,
}

/// Puts the load on the server. `progress` is told how many requests are answered.
///
/// # Errors
/// It cannot be reached, or refuses a request: a figure of a part of the load would mean nothing.
pub fn run(load: &Load, progress: &(dyn Fn(usize) + Sync)) -> Result<Observed, LoadError> {
    let agent: Agent = Agent::config_builder().http_status_as_error(false).build().into();
    let client = Client { agent, load };
    let model = match &load.model {
        Some(model) => model.clone(),
        None => client.first_model()?,
    };
    let mut random = ChaCha8Rng::seed_from_u64(load.seed);
    let shared: String = words(&mut random, load.shared_words);
    let prompts: Vec<String> = (0..load.requests)
        .map(|_| shared.clone() + &words(&mut random, load.prompt_words.saturating_sub(load.shared_words)))
        .collect();
    let started = Instant::now();
    let starts = starts(load, &mut random);
    let results = Mutex::new(Vec::with_capacity(load.requests));
    let next = AtomicUsize::new(0);
    let clients = match load.arrival {
        Arrival::Concurrent(count) => count.get().min(load.requests),
        Arrival::PerSecond(_) => load.requests,
    };
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(prompt) = prompts.get(index) else { return };
                    if let Some(wait) = starts[index].checked_sub(started.elapsed()) {
                        thread::sleep(wait);
                    }
                    let result = client.complete(&model, prompt);
                    let is_failure = result.is_err();
                    let mut results = results.lock().expect("no client panics");
                    results.push(result);
                    if is_failure {
                        // Nothing more is worth while.
                        next.store(prompts.len(), Ordering::Relaxed);
                        return;
                    }
                    progress(results.len());
                }
            });
        }
    });
    let wall = started.elapsed();
    let served = results.into_inner().expect("no client panics").into_iter().collect::<Result<_, _>>()?;
    Ok(Observed { model, wall, served })
}

/// When requests begin, at the earliest.
fn starts(load: &Load, random: &mut ChaCha8Rng) -> Vec<Duration> {
    let Arrival::PerSecond(rate) = load.arrival else { return vec![Duration::ZERO; load.requests] };
    let mut now = 0.0;
    let mut next = || {
        // In (0, 1], so that its logarithm is a number.
        let uniform = (f64::from(random.next_u32()) + 1.0) / (f64::from(u32::MAX) + 1.0);
        now -= uniform.ln() / rate;
        Duration::from_secs_f64(now)
    };
    (0..load.requests).map(|_| next()).collect()
}

fn words(random: &mut ChaCha8Rng, count: usize) -> String {
    (0..count).map(|_| WORDS[random.next_u32() as usize % WORDS.len()].to_owned() + " ").collect()
}

struct Client<'a> {
    agent: Agent,
    load: &'a Load,
}

impl Client<'_> {
    fn first_model(&self) -> Result<String, LoadError> {
        let url = format!("{}/models", self.load.url);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.load.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let unreachable = |source| LoadError::Unreachable { url: url.clone(), source: Box::new(source) };
        let mut response = request.call().map_err(unreachable)?;
        let text = response.body_mut().read_to_string().map_err(unreachable)?;
        let models: Value = serde_json::from_str(&text).unwrap_or_default();
        match models["data"][0]["id"].as_str() {
            Some(name) => Ok(name.to_owned()),
            None => Err(LoadError::Foreign { url, problem: "it lists no models".to_owned() }),
        }
    }

    /// Has a text continued, and watches how that comes.
    fn complete(&self, model: &str, prompt: &str) -> Result<Served, LoadError> {
        let url = format!("{}/completions", self.load.url);
        let mut body = json!({
            "model": model,
            "prompt": prompt,
            "max_tokens": self.load.max_tokens,
            "ignore_eos": !self.load.heed_eos,
            "temperature": 1.0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if !self.load.banned.is_empty() {
            let biases = self.load.banned.iter().map(|token| (token.to_string(), Value::from(-100)));
            body["logit_bias"] = Value::Object(biases.collect());
        }
        let mut request = self.agent.post(&url).header("Content-Type", "application/json");
        if let Some(key) = &self.load.api_key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let started = Instant::now();
        let response = request.send(body.to_string().as_bytes());
        let mut response =
            response.map_err(|source| LoadError::Unreachable { url: url.clone(), source: Box::new(source) })?;
        let status = response.status().as_u16();
        if status != 200 {
            let mut body = String::new();
            // What cannot be read of the reason is not told.
            let _ = response.body_mut().as_reader().take(MOST_ERROR).read_to_string(&mut body);
            return Err(LoadError::Refused { url, status, body });
        }
        self.watch(&url, started, BufReader::new(response.body_mut().as_reader()))
    }

    fn watch(&self, url: &str, started: Instant, lines: impl BufRead) -> Result<Served, LoadError> {
        let foreign = |problem: String| LoadError::Foreign { url: url.to_owned(), problem };
        let (mut pieces, mut usage) = (Vec::new(), Value::Null);
        for line in lines.lines() {
            let line = line.map_err(|error| foreign(format!("the stream breaks off: {error}")))?;
            let Some(data) = line.strip_prefix("data:").map(str::trim).filter(|data| *data != "[DONE]") else {
                continue;
            };
            let chunk: Value = serde_json::from_str(data).map_err(|error| foreign(format!("{error} in {data:?}")))?;
            if !chunk["error"].is_null() {
                return Err(foreign(format!("the stream ends with {}", chunk["error"])));
            }
            if chunk["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
                pieces.push(started.elapsed());
            }
            if chunk["usage"].is_object() {
                usage = chunk["usage"].clone();
            }
        }
        let (Some(&first_token), Some(&whole)) = (pieces.first(), pieces.last()) else {
            return Err(foreign("an answer has no text".to_owned()));
        };
        Ok(Served {
            first_token,
            gaps: pieces.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            whole,
            prompt_tokens: usage["prompt_tokens"].as_u64(),
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_u64(),
            generated_tokens: usage["completion_tokens"].as_u64().unwrap_or(pieces.len() as u64),
        })
    }
}

/// The values below which 50, 90 and 99 of a hundred lie, and the largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Percentiles {
    /// Half of them are below.
    pub p50: f64,
    /// Nine of ten.
    pub p90: f64,
    /// 99 of a hundred.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// Of these, in milliseconds; `None` if there are none.
    pub fn of(times: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut sorted: Vec<f64> = times.map(|time| 1e3 * time.as_secs_f64()).collect();
        sorted.sort_by(f64::total_cmp);
        let max = *sorted.last()?;
        // The nearest rank.
        let at = |share: f64| sorted[((share * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1];
        Some(Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max })
    }

    /// `{"p50": …, …}`.
    pub fn to_json(self) -> Value {
        json!({ "p50": self.p50, "p90": self.p90, "p99": self.p99, "max": self.max })
    }
}

impl Observed {
    /// Tokens of all answers, a second.
    pub fn generated_rate(&self) -> f64 {
        self.served.iter().map(|served| served.generated_tokens).sum::<u64>() as f64 / self.wall.as_secs_f64()
    }

    /// Requests a second.
    pub fn request_rate(&self) -> f64 {
        self.served.len() as f64 / self.wall.as_secs_f64()
    }

    /// Time to the first token, between tokens, and to the end, in milliseconds.
    pub fn latencies(&self) -> [(&'static str, Option<Percentiles>); 3] {
        let served = || self.served.iter();
        [
            ("first token", Percentiles::of(served().map(|served| served.first_token))),
            ("between tokens", Percentiles::of(served().flat_map(|served| served.gaps.iter().copied()))),
            ("whole answer", Percentiles::of(served().map(|served| served.whole))),
        ]
    }

    /// Tokens of prompts, those of them that were cached, and tokens of answers, of all requests; `None` for what the server does not tell.
    pub fn tokens(&self) -> (Option<u64>, Option<u64>, u64) {
        let sum = |of: fn(&Served) -> Option<u64>| self.served.iter().map(of).sum::<Option<u64>>();
        (
            sum(|served| served.prompt_tokens),
            sum(|served| served.cached_tokens),
            self.served.iter().map(|served| served.generated_tokens).sum(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let of = |millis: &[u64]| Percentiles::of(millis.iter().map(|&millis| Duration::from_millis(millis)));
        assert_eq!(of(&[]), None);
        let hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(of(&hundred), Some(Percentiles { p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 }));
        assert_eq!(of(&[7]), Some(Percentiles { p50: 7.0, p90: 7.0, p99: 7.0, max: 7.0 }));
    }

    #[test]
    fn requests_come_at_the_rate_that_is_asked_for() {
        let load = Load {
            url: String::new(),
            model: None,
            api_key: None,
            requests: 2000,
            arrival: Arrival::PerSecond(50.0),
            prompt_words: 1,
            shared_words: 0,
            max_tokens: 1,
            heed_eos: false,
            banned: Vec::new(),
            seed: 1,
        };
        let starts = starts(&load, &mut ChaCha8Rng::seed_from_u64(1));
        assert!(starts.is_sorted());
        let seconds = starts.last().unwrap().as_secs_f64();
        assert!((35.0..45.0).contains(&seconds), "{seconds}");
    }
}
