//! The engine as a Python object: prompts in, events out. Threads share it: whoever waits for events steps it, for all of them.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use marlin_checkpoint::Tokenizer;
use marlin_engine::{
    ChatOptions, Constraint, EngineError, Grammar, GrammarCompiler, Message, Request, RequestId, StopConditions,
};
use metal_marlin::cli::{OpenedEngine, OpenedModel, SamplingOptions, open_engine};
use parking_lot::FairMutex;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use serde_json::{Map, Value};

use crate::commands::interruptible;
use crate::error::{any_error, runtime_error};

/// How long a thread waits for others before it looks whether Ctrl-C was pressed.
const PATIENCE: Duration = Duration::from_millis(100);

/// Characters of what is no prompt that an error shows.
const MOST_SHOWN: usize = 100;

/// A model that is loaded, and the requests that run on it.
#[pyclass(frozen, module = "metal_marlin._native")]
pub(crate) struct Engine {
    /// Threads take turns in the order in which they come, so that none of them keeps the others waiting for longer than a step.
    running: FairMutex<Option<Running>>,
    model: OpenedModel,
    tokenizer: Arc<Tokenizer>,
    info: marlin_model::ModelInfo,
    max_running: usize,
    /// What gives answers a form, or why nothing does; made when it is first asked for.
    grammars: OnceLock<Result<GrammarCompiler, String>>,
}

/// What is left of an engine when it is closed: nothing.
struct Running {
    engine: marlin_engine::Engine,
    /// Requests by their numbers.
    requests: HashMap<u64, Pending>,
    _kept: Box<dyn Any + Send>,
}

/// A request, and what has come of it that nobody has taken yet.
struct Pending {
    id: RequestId,
    began: Instant,
    events: Vec<Event>,
    /// Answers that have not ended.
    open: u32,
}

/// One of a request's answers got a token, or ended.
#[pyclass(frozen, get_all, module = "metal_marlin._native")]
#[derive(Clone)]
pub(crate) struct Event {
    request: u64,
    choice: u32,
    token: Option<u32>,
    text: String,
    /// Seconds since the request was added.
    seconds: f64,
    /// The natural logarithm of the token's probability, and the likeliest tokens with theirs, if the request asks.
    logprob: Option<f32>,
    top_logprobs: Vec<(u32, f32)>,
    finish: Option<Finish>,
}

/// How an answer ended.
#[pyclass(frozen, get_all, module = "metal_marlin._native")]
#[derive(Clone)]
pub(crate) struct Finish {
    reason: &'static str,
    /// The stop token or text that ended it.
    stop_token: Option<u32>,
    stop_text: Option<String>,
    /// What went wrong, if something did.
    error: Option<String>,
    prompt_tokens: usize,
    cached_tokens: usize,
    generated_tokens: usize,
}

/// What is to be answered.
pub(crate) enum Prompt<'py> {
    Text(String),
    Tokens(Vec<u32>),
    Messages(Vec<Bound<'py, PyDict>>),
}

impl<'py> FromPyObject<'_, 'py> for Prompt<'py> {
    type Error = PyErr;

    fn extract(prompt: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(text) = prompt.extract() {
            Ok(Self::Text(text))
        } else if let Ok(tokens) = prompt.extract() {
            Ok(Self::Tokens(tokens))
        } else if let Ok(messages) = prompt.extract() {
            Ok(Self::Messages(messages))
        } else {
            let found = prompt.repr()?.to_string();
            let found: String = found.chars().take(MOST_SHOWN).collect();
            Err(PyTypeError::new_err(format!(
                "a prompt must be a text, a list of token ids or a list of messages (dicts), found {found}"
            )))
        }
    }
}

#[pymethods]
impl Engine {
    #[new]
    fn new(py: Python<'_>, arguments: Vec<OsString>) -> PyResult<Self> {
        let opened = interruptible(py, move |interrupt| open_engine(arguments, interrupt))?;
        let OpenedEngine { engine, model, kept } = opened;
        let (tokenizer, info, max_running) = (engine.tokenizer().clone(), engine.info().clone(), engine.max_running());
        let running = Running { engine, requests: HashMap::new(), _kept: kept };
        let running = FairMutex::new(Some(running));
        Ok(Self { running, model, tokenizer, info, max_running, grammars: OnceLock::new() })
    }

    #[pyo3(signature = (
        prompt, *, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None, presence_penalty=None,
        frequency_penalty=None, logit_bias=None, seed=None, max_tokens=None, min_tokens=0, stop=Vec::new(),
        stop_token_ids=Vec::new(), ignore_eos=false, n=1, logprobs=None, json_schema=None, json_object=false, regex=None,
        grammar=None, special_tokens=false, tools=None, template_variables=None, priority=0, cache_salt=String::new(),
    ))]
    #[expect(clippy::too_many_arguments, reason = "Python gives them by name")]
    fn add(
        &self,
        py: Python<'_>,
        prompt: Prompt<'_>,
        temperature: Option<f64>,
        top_k: Option<u32>,
        top_p: Option<f64>,
        min_p: Option<f64>,
        repetition_penalty: Option<f64>,
        presence_penalty: Option<f64>,
        frequency_penalty: Option<f64>,
        logit_bias: Option<HashMap<u32, f64>>,
        seed: Option<u64>,
        max_tokens: Option<usize>,
        min_tokens: usize,
        stop: Vec<String>,
        stop_token_ids: Vec<u32>,
        ignore_eos: bool,
        n: u32,
        logprobs: Option<usize>,
        json_schema: Option<Bound<'_, PyAny>>,
        json_object: bool,
        regex: Option<String>,
        grammar: Option<String>,
        special_tokens: bool,
        tools: Option<Vec<Bound<'_, PyDict>>>,
        template_variables: Option<Bound<'_, PyDict>>,
        priority: i32,
        cache_salt: String,
    ) -> PyResult<u64> {
        let options = SamplingOptions {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed,
        };
        let mut sampling = options.params(&self.model.generation);
        sampling.logit_bias = biases(logit_bias.unwrap_or_default())?;
        let is_chat = matches!(prompt, Prompt::Messages(_));
        if !is_chat && (tools.is_some() || template_variables.is_some()) {
            let problem = "tools and template_variables are for chats: give the prompt as a list of messages";
            return Err(PyValueError::new_err(problem));
        }
        let prompt = match prompt {
            Prompt::Text(text) => self.prompt_tokens(py, &text)?,
            Prompt::Tokens(tokens) => tokens,
            Prompt::Messages(messages) => {
                let text = self.chat_prompt(py, messages, tools, true, template_variables)?;
                self.encode(py, &text, false)?
            }
        };
        let mut tokens = stop_token_ids;
        if is_chat && !ignore_eos {
            tokens.extend(&self.model.end_of_turn);
        }
        let max_tokens = max_tokens.unwrap_or_else(|| self.model.max_tokens());
        let forms = [
            json_schema.map(|schema| json(&schema)).transpose()?.map(Grammar::JsonSchema),
            json_object.then_some(Grammar::JsonObject),
            regex.map(Grammar::Regex),
            grammar.map(Grammar::Lark),
        ];
        let request = Request {
            prompt,
            sampling,
            stop: StopConditions { max_tokens, min_tokens, strings: stop, tokens, ignore_eos },
            choices: n,
            logprobs,
            constraint: self.constraint(py, forms.into_iter().flatten().collect())?,
            special_tokens,
            priority,
            cache_salt,
            ..Request::default()
        };
        py.detach(|| {
            let mut running = self.running.lock();
            let running = running.as_mut().ok_or(Trouble::Closed)?;
            let id = running.engine.add(request)?;
            let pending = Pending { id, began: Instant::now(), events: Vec::new(), open: n };
            running.requests.insert(id.number(), pending);
            Ok(id.number())
        })
        .map_err(Trouble::into_exception)
    }

    fn events(&self, py: Python<'_>, requests: Vec<u64>) -> PyResult<Vec<Event>> {
        loop {
            let events = py.detach(|| self.advance(&requests)).map_err(Trouble::into_exception)?;
            if !events.is_empty() {
                return Ok(events);
            }
            py.check_signals()?;
        }
    }

    fn cancel(&self, py: Python<'_>, request: u64) -> bool {
        py.detach(|| {
            let mut running = self.running.lock();
            let Some(running) = running.as_mut() else { return false };
            running.requests.remove(&request).is_some_and(|pending| running.engine.cancel(pending.id))
        })
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.running.lock().take()));
    }

    #[getter]
    fn is_closed(&self, py: Python<'_>) -> bool {
        py.detach(|| self.running.lock().is_none())
    }

    #[pyo3(signature = (text, add_special_tokens=true))]
    fn encode(&self, py: Python<'_>, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        py.detach(|| self.tokenizer.encode(text, add_special_tokens)).map_err(runtime_error)
    }

    #[pyo3(signature = (tokens, skip_special_tokens=true))]
    fn decode(&self, py: Python<'_>, tokens: Vec<u32>, skip_special_tokens: bool) -> PyResult<String> {
        py.detach(|| self.tokenizer.decode(&tokens, skip_special_tokens)).map_err(runtime_error)
    }

    #[pyo3(signature = (messages, tools=None, add_generation_prompt=true, template_variables=None))]
    fn chat_prompt(
        &self,
        py: Python<'_>,
        messages: Vec<Bound<'_, PyDict>>,
        tools: Option<Vec<Bound<'_, PyDict>>>,
        add_generation_prompt: bool,
        template_variables: Option<Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let Some(template) = &self.model.chat else {
            return Err(PyValueError::new_err(format!(
                "{} has no chat template: give the prompt as a text, or open the model with chat_template=FILE",
                self.model.name
            )));
        };
        let messages: Vec<Message> = messages.iter().map(message).collect::<PyResult<_>>()?;
        if messages.is_empty() {
            return Err(PyValueError::new_err("there are no messages; give at least one"));
        }
        let tools = tools.unwrap_or_default();
        let options = ChatOptions {
            tools: tools.iter().map(|tool| json(tool)).collect::<PyResult<_>>()?,
            add_generation_prompt,
            variables: template_variables.map_or_else(|| Ok(Map::new()), |variables| object(&variables))?,
        };
        py.detach(|| template.render(&messages, &options)).map_err(runtime_error)
    }

    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = PyDict::new(py);
        info.set_item("model", &self.model.name)?;
        info.set_item("architecture", &self.info.architecture)?;
        info.set_item("layers", self.info.layers)?;
        info.set_item("hidden_size", self.info.hidden_size)?;
        info.set_item("vocabulary", self.info.vocabulary)?;
        info.set_item("context", self.info.context)?;
        info.set_item("weight_bytes", self.info.weight_bytes)?;
        info.set_item("kv", self.info.kv_type.name())?;
        info.set_item("device", self.info.device.name.to_string())?;
        info.set_item("device_detail", &self.info.device.detail)?;
        info.set_item("max_running", self.max_running)?;
        info.set_item("has_chat_template", self.model.chat.is_some())?;
        Ok(info)
    }

    fn __repr__(&self) -> String {
        format!("Engine({:?}, {})", self.model.name, self.info.device.name)
    }
}

/// Why a request gets nothing.
enum Trouble {
    Closed,
    Unknown(Vec<u64>),
    Engine(EngineError),
}

impl From<EngineError> for Trouble {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

impl Trouble {
    fn into_exception(self) -> PyErr {
        match self {
            Self::Closed => PyRuntimeError::new_err("the engine is closed; open the model again"),
            Self::Unknown(requests) => PyValueError::new_err(format!("no request of {requests:?} is under way")),
            Self::Engine(error) => runtime_error(error),
        }
    }
}

impl Engine {
    /// Takes what has come of requests, after a step of the engine if nothing has. Nothing comes if others have the engine for longer than
    /// patience reaches.
    fn advance(&self, requests: &[u64]) -> Result<Vec<Event>, Trouble> {
        let Some(mut running) = self.running.try_lock_for(PATIENCE) else { return Ok(Vec::new()) };
        let running = running.as_mut().ok_or(Trouble::Closed)?;
        let events = running.take(requests);
        if !events.is_empty() {
            return Ok(events);
        }
        if !requests.iter().any(|request| running.requests.contains_key(request)) {
            return Err(Trouble::Unknown(requests.to_vec()));
        }
        running.step()?;
        Ok(running.take(requests))
    }

    /// The tokens of a text to continue.
    fn prompt_tokens(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        py.detach(|| self.model.prompt(text, &self.tokenizer)).map_err(|error| any_error(&error))
    }

    /// The form of an answer, of which there is one at most.
    fn constraint(&self, py: Python<'_>, mut forms: Vec<Grammar>) -> PyResult<Option<Constraint>> {
        if forms.len() > 1 {
            let problem = "an answer has one form: give one of json_schema, json_object, regex and grammar";
            return Err(PyValueError::new_err(problem));
        }
        let Some(grammar) = forms.pop() else { return Ok(None) };
        let compiled = py.detach(|| self.grammars()?.compile(&grammar));
        compiled.map(Some).map_err(runtime_error)
    }

    fn grammars(&self) -> Result<&GrammarCompiler, EngineError> {
        let made = self.grammars.get_or_init(|| {
            let ends = [&self.model.generation.eos_token_id[..], &self.model.end_of_turn].concat();
            GrammarCompiler::new(&self.tokenizer, self.info.vocabulary, &ends).map_err(|error| match error {
                EngineError::Grammar { problem } => problem,
                other => other.to_string(),
            })
        });
        made.as_ref().map_err(|problem| EngineError::Grammar { problem: problem.clone() })
    }
}

impl Running {
    /// Starts the next step of the engine, and files what came of the last.
    fn step(&mut self) -> Result<(), EngineError> {
        let mut events = Vec::new();
        self.engine.step(&mut events)?;
        for event in events {
            if let Some(pending) = self.requests.get_mut(&event.request.number()) {
                pending.file(event);
            }
        }
        Ok(())
    }

    /// Takes what has come of requests. Those that have ended are forgotten.
    fn take(&mut self, requests: &[u64]) -> Vec<Event> {
        let mut taken = Vec::new();
        for request in requests {
            if let Some(pending) = self.requests.get_mut(request) {
                taken.append(&mut pending.events);
                if pending.open == 0 {
                    self.requests.remove(request);
                }
            }
        }
        taken
    }
}

impl Pending {
    fn file(&mut self, event: marlin_engine::Event) {
        if event.finish.is_some() {
            self.open -= 1;
        }
        let (logprob, top_logprobs) = match event.logprobs {
            Some(logprobs) => (Some(logprobs.logprob), logprobs.top),
            None => (None, Vec::new()),
        };
        self.events.push(Event {
            request: event.request.number(),
            choice: event.choice,
            token: event.token,
            text: event.text,
            seconds: self.began.elapsed().as_secs_f64(),
            logprob,
            top_logprobs,
            finish: event.finish.map(Finish::from),
        });
    }
}

impl From<marlin_engine::Finish> for Finish {
    fn from(finish: marlin_engine::Finish) -> Self {
        let reason = finish.reason;
        Self {
            error: reason.error().map(|error| error.to_string()),
            reason: reason.name(),
            stop_token: reason.stop_token(),
            stop_text: reason.stop_string().map(str::to_owned),
            prompt_tokens: finish.prompt_tokens,
            cached_tokens: finish.cached_tokens,
            generated_tokens: finish.generated_tokens,
        }
    }
}

#[pymethods]
impl Event {
    fn __repr__(&self) -> String {
        let Self { request, choice, token, text, .. } = self;
        format!("Event(request={request}, choice={choice}, token={token:?}, text={text:?})")
    }
}

#[pymethods]
impl Finish {
    fn __repr__(&self) -> String {
        format!("Finish(reason={:?}, generated_tokens={})", self.reason, self.generated_tokens)
    }
}

/// Biases as the engine takes them.
fn biases(biases: HashMap<u32, f64>) -> PyResult<Vec<(u32, f32)>> {
    let narrow = |(token, bias): (u32, f64)| {
        let narrow = bias as f32;
        if narrow.is_finite() {
            return Ok((token, narrow));
        }
        Err(PyValueError::new_err(format!(
            "logit_bias must be a number that an f32 holds, found {bias:?} of token {token}"
        )))
    };
    let mut biases: Vec<_> = biases.into_iter().map(narrow).collect::<PyResult<_>>()?;
    biases.sort_by_key(|(token, _)| *token);
    Ok(biases)
}

/// A message of a chat. Content in parts, as Transformers writes it, becomes one text.
fn message(message: &Bound<'_, PyDict>) -> PyResult<Message> {
    let mut message = object(message)?;
    if let Some(Value::Array(parts)) = message.get("content") {
        let text = |part: &Value| match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(text))) => Ok(text.clone()),
            _ => Err(PyValueError::new_err(format!(
                "a part of a message must be {{\"type\": \"text\", \"text\": …}}, found {part}"
            ))),
        };
        let content: String = parts.iter().map(text).collect::<PyResult<_>>()?;
        message.insert("content".to_owned(), content.into());
    }
    serde_json::from_value(Value::Object(message)).map_err(|error| {
        PyValueError::new_err(format!("a message must be a dict with \"role\" and \"content\": {error}"))
    })
}

/// A Python object as JSON.
fn json(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    let text = value.py().import("json")?.call_method1("dumps", (value,))?;
    let text = text.cast::<PyString>()?.to_str()?.to_owned();
    serde_json::from_str(&text).map_err(|error| PyValueError::new_err(format!("{value} is no JSON: {error}")))
}

fn object(value: &Bound<'_, PyDict>) -> PyResult<Map<String, Value>> {
    match json(value)? {
        Value::Object(object) => Ok(object),
        other => Err(PyValueError::new_err(format!("wanted a dict, found {other}"))),
    }
}
