//! Errors in OpenAI's shape.

use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use marlin_engine::EngineError;
use serde::Serialize;
use utoipa::ToSchema;

use crate::worker::{Refusal, with_causes};

/// Seconds after which it may be worth while to try again.
const RETRY_SECONDS: u16 = 1;

/// A request that is not answered, and why.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

/// What the client is told.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorResponse {
    /// The error.
    pub(crate) error: ErrorBody,
}

/// An error.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// What is wrong, and what to do about it.
    message: String,
    /// `invalid_request_error`, `authentication_error`, `not_found_error`, `rate_limit_error`, `timeout_error` or `server_error`.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The parameter that is wrong, if it is one.
    param: Option<String>,
    /// A name for the error, if it has one.
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, body: ErrorBody { message: message.into(), kind, param: None, code: None } }
    }

    /// The request makes no sense.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter has a value that it cannot have.
    pub(crate) fn parameter(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(message).with_param(name)
    }

    /// The body is larger than allowed.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// There is no such thing.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    /// The path takes no such method.
    pub(crate) fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// The body is not JSON.
    pub(crate) fn media_type(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// The key is missing or wrong.
    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).with_code("invalid_api_key")
    }

    /// The answer took too long.
    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message)
    }

    /// The server is at fault.
    pub(crate) fn server(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub(crate) fn with_param(mut self, name: impl Into<String>) -> Self {
        self.body.param = Some(name.into());
        self
    }

    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.body.code = Some(code);
        self
    }

    /// What the client is told, for a stream whose status is sent already.
    pub(crate) fn into_body(self) -> ErrorResponse {
        ErrorResponse { error: self.body }
    }

    /// The status, and what is said in another shape.
    pub(crate) fn into_parts(self) -> (StatusCode, ErrorBody) {
        (self.status, self.body)
    }
}

impl ErrorBody {
    pub(crate) fn into_message(self) -> String {
        self.message
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = with_causes(&error);
        match error {
            EngineError::Parameter { name, .. } => Self::parameter(name, message),
            EngineError::EmptyPrompt => Self::parameter("prompt", message),
            EngineError::Token { place, .. } => Self::parameter(place, message),
            EngineError::PromptTooLong { .. } | EngineError::CacheTooSmall { .. } => {
                Self::invalid(message).with_code("context_length_exceeded")
            }
            EngineError::Grammar { .. } => Self::parameter("response_format", message),
            EngineError::ChatTemplate { .. } => Self::parameter("messages", message),
            _ => Self::server(message),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Engine(error) => error.into(),
            Refusal::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message),
            Refusal::Late => Self::timeout(message),
            Refusal::NotLoaded(_) => Self::server(message).with_code("model_not_loaded"),
            Refusal::NoRoom(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).with_code("model_not_loaded")
            }
            Refusal::Gone => Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status;
        let body = self.into_body();
        let kept = body.error.clone();
        let mut response = (status, Json(body)).into_response();
        // Endpoints of another API have another shape for it.
        response.extensions_mut().insert(kept);
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_SECONDS));
        }
        response
    }
}
