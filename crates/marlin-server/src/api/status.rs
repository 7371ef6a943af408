//! `GET /health` and `GET /metrics`: how the server is.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::{ApiError, ErrorResponse};
use crate::service::App;

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ready`, or `draining` when it takes nothing new because it is about to end.
    status: &'static str,
    /// It answers.
    live: bool,
    /// It takes requests.
    ready: bool,
}

/// Tells whether the server is live, and ready for requests.
#[utoipa::path(
    get, path = "/health", tag = "Status",
    responses((status = 200, description = "Live and ready", body = Health), (status = 503, description = "Live, but draining", body = Health)),
)]
pub(crate) async fn health(State(app): State<App>) -> (StatusCode, Json<Health>) {
    let ready = !app.is_draining.load(Ordering::Relaxed);
    let (code, status) = if ready { (StatusCode::OK, "ready") } else { (StatusCode::SERVICE_UNAVAILABLE, "draining") };
    (code, Json(Health { status, live: true, ready }))
}

/// Tells what Prometheus wants to know.
#[utoipa::path(
    get, path = "/metrics", tag = "Status",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), (status = "5XX", body = ErrorResponse)),
)]
pub(crate) async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let text = app.metrics.encode().map_err(|error| ApiError::server(error.to_string()))?;
    let media_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, media_type)], text).into_response())
}
