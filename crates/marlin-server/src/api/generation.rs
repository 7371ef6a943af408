//! What requests for chats and for continuations have in common.

use std::collections::HashMap;

use marlin_engine::{Request, StopConditions};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::model::Served;

/// Most alternatives to a token that may be asked for.
const MOST_LOGPROBS: usize = 20;
/// Most stop strings of a request.
const MOST_STOPS: usize = 16;

/// Refuses to tell of more alternatives to a token than that.
pub(crate) fn check_logprobs(name: &'static str, count: usize) -> Result<usize, ApiError> {
    if count > MOST_LOGPROBS {
        return Err(ApiError::parameter(name, format!("{name} can be at most {MOST_LOGPROBS}, found {count}")));
    }
    Ok(count)
}

/// A text, or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a text or a list of texts")]
pub(crate) enum Texts {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Texts {
    pub(crate) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// How a streamed answer is told.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// End the stream with the numbers of tokens.
    #[serde(default)]
    pub(crate) include_usage: bool,
}

/// Declares a request with the fields that all requests for text have, besides its own.
macro_rules! generation_request {
    ($(#[$attributes:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$attributes])*
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name {
            $($own)*
            /// The model, by a name that `GET /v1/models` gives.
            pub(crate) model: String,
            /// Divides the logits; 0 takes the most likely token.
            #[schema(minimum = 0)]
            pub(crate) temperature: Option<f64>,
            /// Keep the smallest set of most likely tokens whose probability reaches this.
            #[schema(exclusive_minimum = 0, maximum = 1)]
            pub(crate) top_p: Option<f64>,
            /// Keep this many of the most likely tokens; 0 and -1 keep all.
            #[schema(minimum = -1)]
            pub(crate) top_k: Option<i32>,
            /// Drop tokens less likely than this share of the most likely one.
            #[schema(minimum = 0, maximum = 1)]
            pub(crate) min_p: Option<f64>,
            /// Divides positive and multiplies negative logits of tokens that occurred.
            #[schema(exclusive_minimum = 0)]
            pub(crate) repetition_penalty: Option<f64>,
            /// Subtracted from logits of tokens already generated.
            #[schema(minimum = -2, maximum = 2)]
            pub(crate) presence_penalty: Option<f64>,
            /// Subtracted from logits of tokens already generated, as often as they were.
            #[schema(minimum = -2, maximum = 2)]
            pub(crate) frequency_penalty: Option<f64>,
            /// Added to the logits of tokens, by their ids.
            pub(crate) logit_bias: Option<std::collections::HashMap<String, f64>>,
            /// The same seed gives the same text.
            pub(crate) seed: Option<i64>,
            /// How many answers to give.
            #[schema(minimum = 1)]
            pub(crate) n: Option<u32>,
            /// Generate at most this many tokens; as many as the context has room for if nothing is said.
            #[schema(minimum = 1)]
            pub(crate) max_tokens: Option<u32>,
            /// Generate at least this many.
            #[schema(minimum = 0)]
            pub(crate) min_tokens: Option<u32>,
            /// End before these texts.
            pub(crate) stop: Option<$crate::api::generation::Texts>,
            /// End at these tokens.
            pub(crate) stop_token_ids: Option<Vec<u32>>,
            /// Go on past the model's end-of-sequence tokens.
            pub(crate) ignore_eos: Option<bool>,
            /// Send the answer as it comes, as server-sent events.
            pub(crate) stream: Option<bool>,
            /// How.
            #[serde(default, deserialize_with = "crate::body::object")]
            pub(crate) stream_options: Option<$crate::api::generation::StreamOptions>,
            /// What the answer must look like.
            pub(crate) response_format: Option<$crate::api::format::ResponseFormat>,
            /// The lower, the sooner it is served.
            pub(crate) priority: Option<i32>,
            /// Cached prefixes are shared only among requests with the same salt.
            pub(crate) cache_salt: Option<String>,
            /// Who asks; it is not looked at.
            #[expect(dead_code, reason = "clients may tell it")]
            pub(crate) user: Option<String>,
        }

        impl $name {
            /// What is asked of the engine, but for the prompt and what only this kind of request has.
            pub(crate) fn generation(&mut self) -> $crate::api::generation::Generation {
                $crate::api::generation::Generation {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    seed: self.seed,
                    n: self.n,
                    max_tokens: self.max_tokens,
                    min_tokens: self.min_tokens,
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos,
                    stream: self.stream,
                    stream_options: self.stream_options,
                    priority: self.priority,
                    cache_salt: self.cache_salt.take(),
                }
            }
        }
    };
}
pub(crate) use generation_request;

/// The fields of [`generation_request`].
#[derive(Debug, Default)]
pub(crate) struct Generation {
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i32>,
    pub(crate) min_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) logit_bias: Option<HashMap<String, f64>>,
    pub(crate) seed: Option<i64>,
    pub(crate) n: Option<u32>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: Option<u32>,
    pub(crate) stop: Option<Texts>,
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) priority: Option<i32>,
    pub(crate) cache_salt: Option<String>,
}

impl Generation {
    /// Whether the numbers of tokens end a stream.
    pub(crate) fn include_usage(&self) -> Result<bool, ApiError> {
        match (self.stream, self.stream_options) {
            (None | Some(false), Some(_)) => {
                Err(ApiError::parameter("stream_options", "stream_options shape a stream: set stream to true"))
            }
            (_, options) => Ok(options.unwrap_or_default().include_usage),
        }
    }

    /// What is asked of the engine; the prompt is still to come.
    pub(crate) fn request(self, served: &Served) -> Result<Request, ApiError> {
        let n = self.n.unwrap_or(1);
        if n == 0 || n > served.most_choices {
            let message = format!("n must be between 1 and {}, found {n}", served.most_choices);
            return Err(ApiError::parameter("n", message));
        }
        let base = served.model.sampling();
        let top_k = match self.top_k {
            None => base.top_k,
            Some(-1) => 0,
            Some(k) => u32::try_from(k)
                .map_err(|_| ApiError::parameter("top_k", format!("top_k must be at least -1, found {k}")))?,
        };
        let sampling = marlin_engine::SamplingParams {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k,
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: logit_bias(self.logit_bias.unwrap_or_default())?,
            seed: self.seed.map(|seed| seed as u64),
        };
        let strings = self.stop.map(Texts::into_vec).unwrap_or_default();
        if strings.len() > MOST_STOPS {
            let message = format!("stop may hold at most {MOST_STOPS} texts, found {}", strings.len());
            return Err(ApiError::parameter("stop", message));
        }
        let stop = StopConditions {
            max_tokens: self.max_tokens.map_or(usize::MAX, |n| n as usize),
            min_tokens: self.min_tokens.unwrap_or(0) as usize,
            strings,
            tokens: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
        };
        Ok(Request {
            sampling,
            stop,
            choices: n,
            priority: self.priority.unwrap_or(0),
            cache_salt: self.cache_salt.unwrap_or_default(),
            ..Request::default()
        })
    }
}

/// Biases by token ids, which JSON spells as texts.
fn logit_bias(biases: HashMap<String, f64>) -> Result<Vec<(u32, f32)>, ApiError> {
    let parse = |(token, bias): (String, f64)| {
        let id = token.parse().map_err(|_| {
            ApiError::parameter("logit_bias", format!("logit_bias goes by token ids, and {token:?} is none"))
        })?;
        if !(-100.0..=100.0).contains(&bias) {
            return Err(ApiError::parameter(
                "logit_bias",
                format!("a bias must be between -100 and 100, found {bias}"),
            ));
        }
        Ok((id, bias as f32))
    };
    let mut biases: Vec<_> = biases.into_iter().map(parse).collect::<Result<_, _>>()?;
    biases.sort_by_key(|(token, _)| *token);
    Ok(biases)
}
