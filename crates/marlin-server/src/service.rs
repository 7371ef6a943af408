//! The endpoints, the engine behind them, and what is done to every request.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{DefaultBodyLimit, FromRef, MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::task::JoinHandle;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{Any, CorsLayer};
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::api::answer::now;
use crate::api::responses::ResponseStore;
use crate::api::{chat, completions, embeddings, messages, models, perplexity, responses, status, tokens, web};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::model::Loaded;
use crate::openapi;
use crate::registry::{LoadFailure, Models, Registry, RegistryOptions};
use crate::server::{PATIENCE, ServerError};

/// How requests are answered.
#[derive(Debug, Clone)]
pub struct ServiceOptions {
    /// Requests must show one of these keys; none are asked for if there are none.
    pub api_keys: Vec<String>,
    /// Largest body of a request, in bytes.
    pub max_body: usize,
    /// Most answers that wait for their turn with a model, and most requests that wait for models to be loaded.
    pub max_waiting: usize,
    /// Longest time for an answer.
    pub timeout: Option<Duration>,
    /// Models that nobody has used for so long are unloaded; none is if there is no such time.
    pub idle_unload: Option<Duration>,
    /// Pages of these origins may use it from a browser; `*` stands for all.
    pub cors_origins: Vec<String>,
    /// Write prompts to the log.
    pub log_prompts: bool,
}

impl Default for ServiceOptions {
    /// As careful as can be.
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            max_body: 16 << 20,
            max_waiting: 256,
            timeout: None,
            idle_unload: None,
            cors_origins: Vec::new(),
            log_prompts: false,
        }
    }
}

/// What all handlers share.
#[derive(Debug, Clone)]
pub(crate) struct App {
    pub(crate) models: Registry<Loaded>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) is_draining: Arc<AtomicBool>,
    /// Seconds since 1970 when the server was started.
    pub(crate) created: u64,
    /// Responses that are kept.
    pub(crate) responses: Arc<ResponseStore>,
    /// Hashes of the keys: of one length, so that comparing them tells nothing.
    keys: Arc<[[u8; 32]]>,
}

impl FromRef<App> for Registry<Loaded> {
    fn from_ref(app: &App) -> Self {
        app.models.clone()
    }
}

impl FromRef<App> for Arc<ResponseStore> {
    fn from_ref(app: &App) -> Self {
        app.responses.clone()
    }
}

/// The endpoints, and the task that looks after the models.
#[derive(Debug)]
pub struct Service {
    pub(crate) app: App,
    pub(crate) router: Router,
    manager: JoinHandle<()>,
}

impl Service {
    /// Starts to look after the models. The caller is in a Tokio runtime.
    ///
    /// # Errors
    /// An option is wrong, or there is no thread to be had.
    pub fn start(models: Models, options: &ServiceOptions) -> Result<Self, ServerError> {
        let cors = cors(&options.cors_origins)?;
        let Models { names, loader, first } = models;
        let metrics = Arc::new(Metrics::new(names.iter().map(|names| names.first().cloned().unwrap_or_default())));
        let (max_waiting, log_prompts) = (options.max_waiting, options.log_prompts);
        let start = {
            let metrics = metrics.clone();
            move |place: usize, model| Loaded::start(model, max_waiting, log_prompts, metrics.model(place).clone())
        };
        let first = first.map(|model| start(0, model)).transpose().map_err(ServerError::Thread)?;
        let load = Arc::new(move |place: usize| {
            let cannot = |error| LoadFailure::Broken(format!("there is no thread for its engine: {error}"));
            start(place, loader.load(place)?).map_err(cannot)
        });
        let registry_options =
            RegistryOptions { max_waiting, timeout: options.timeout, idle_unload: options.idle_unload };
        let (models, manager) = Registry::start(names, first, load, registry_options, metrics.clone());
        let keys = options.api_keys.iter().map(|key| Sha256::digest(key).into()).collect();
        let app = App { models, metrics, is_draining: Arc::default(), created: now(), responses: Arc::default(), keys };
        let router = router(&app, options.max_body, cors);
        Ok(Self { app, router, manager })
    }

    /// Answers a request that came by no connection, with the status and the body of the answer: JSON, but for streams.
    pub async fn call(&self, method: &str, path: &str, body: Vec<u8>) -> (u16, Bytes) {
        let request = Request::builder().method(method).uri(path).header(CONTENT_TYPE, "application/json");
        let response = match request.body(Body::from(body)) {
            Ok(request) => match TowerToHyperService::new(self.router.clone()).call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            },
            Err(error) => ApiError::invalid(error.to_string()).into_response(),
        };
        let status = response.status();
        match to_bytes(response.into_body(), usize::MAX).await {
            Ok(body) => (status.as_u16(), body),
            Err(_) => (StatusCode::INTERNAL_SERVER_ERROR.as_u16(), Bytes::new()),
        }
    }

    /// Ends when the answers under way are finished.
    pub async fn stop(self) {
        self.app.models.stop();
        let _ = self.manager.await;
    }
}

/// Browsers are let in from these origins only.
fn cors(origins: &[String]) -> Result<Option<CorsLayer>, ServerError> {
    if origins.is_empty() {
        return Ok(None);
    }
    let layer = CorsLayer::new().allow_methods([Method::GET, Method::POST, Method::DELETE]).allow_headers(Any);
    if origins.iter().any(|origin| origin == "*") {
        return Ok(Some(layer.allow_origin(Any)));
    }
    let parse = |origin: &String| {
        let value = HeaderValue::from_str(origin).ok().filter(|_| origin.contains("://") && !origin.ends_with('/'));
        value.ok_or_else(|| ServerError::Origin { origin: origin.clone() })
    };
    let origins: Vec<HeaderValue> = origins.iter().map(parse).collect::<Result<_, _>>()?;
    Ok(Some(layer.allow_origin(origins)))
}

fn router(app: &App, max_body: usize, cors: Option<CorsLayer>) -> Router {
    let anthropic = Router::new()
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route_layer(from_fn_with_state(app.clone(), authorize))
        .layer(from_fn(messages::reshape_errors));
    let router = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{model}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{response_id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/perplexity", post(perplexity::perplexity))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/metrics", get(status::metrics))
        .route("/openapi.json", get(describe))
        .route_layer(from_fn_with_state(app.clone(), authorize))
        .route("/health", get(status::health))
        .route("/", get(web::page))
        .merge(anthropic)
        .fallback(|method: Method, uri: Uri| async move {
            ApiError::not_found(format!(
                "there is nothing at {method} {}; /openapi.json lists what there is",
                uri.path()
            ))
        })
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            ApiError::method_not_allowed(format!(
                "{} does not take {method}; /openapi.json lists what it takes",
                uri.path()
            ))
        })
        .layer(DefaultBodyLimit::max(max_body))
        .layer(RequestBodyTimeoutLayer::new(PATIENCE))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::server("a bug in the server (its log says more)").into_response()
        }));
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(from_fn_with_state(app.clone(), log)).with_state(app.clone())
}

/// Describes the server.
async fn describe(State(models): State<Registry<Loaded>>) -> Json<serde_json::Value> {
    Json(openapi::document(&models.names()))
}

/// Lets nobody in without a key, if there are any.
async fn authorize(State(app): State<App>, request: Request, next: Next) -> Response {
    if app.keys.is_empty() {
        return next.run(request).await;
    }
    let Some(shown) = shown_key(request.headers()).map(|key| <[u8; 32]>::from(Sha256::digest(key.trim()))) else {
        return ApiError::unauthorized("this server wants a key: send the header Authorization: Bearer KEY")
            .into_response();
    };
    let is_known = app.keys.iter().fold(false, |known, key| known | bool::from(key.ct_eq(&shown)));
    if is_known { next.run(request).await } else { ApiError::unauthorized("the key is wrong").into_response() }
}

/// The key that a request shows: as OpenAI's clients do, or in the header that Anthropic's have for it.
fn shown_key(headers: &HeaderMap) -> Option<&str> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = header(AUTHORIZATION.as_str())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    bearer.map(|(_, key)| key).or_else(|| header("x-api-key"))
}

/// Writes a line of the access log, without anything that was said.
async fn log(State(app): State<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    app.metrics.answered(&path, status);
    tracing::info!(target: "access", %method, path, status, ms = started.elapsed().as_millis() as u64);
    response
}
