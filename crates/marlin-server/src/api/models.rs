//! `GET /v1/models`: what is served.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::{ApiError, ErrorResponse};
use crate::registry::{Entry, Status};
use crate::service::App;

/// The models of this server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    object: &'static str,
    data: Vec<Model>,
}

/// A model, under one of its names.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Model {
    id: String,
    /// `model`.
    object: &'static str,
    /// Seconds since 1970 when the server was started.
    created: u64,
    owned_by: &'static str,
    /// Whether it is loaded. One that is not is loaded when a request names it.
    status: ModelStatus,
    /// Most tokens of prompt and answer together; known while it is loaded.
    max_model_len: Option<usize>,
}

/// Whether a model is loaded.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ModelStatus {
    /// It answers at once.
    Loaded,
    /// It is about to.
    Loading,
    /// It is loaded when it is asked for.
    Unloaded,
}

impl Model {
    fn new(app: &App, entry: &Entry, name: &str) -> Self {
        let (status, max_model_len) = match entry.status() {
            Status::Unloaded => (ModelStatus::Unloaded, None),
            Status::Loading => (ModelStatus::Loading, None),
            Status::Loaded { context } => (ModelStatus::Loaded, Some(context)),
        };
        Self {
            id: name.to_owned(),
            object: "model",
            created: app.created,
            owned_by: "metal-marlin",
            status,
            max_model_len,
        }
    }
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = ModelList)))]
pub(crate) async fn list(State(app): State<App>) -> Json<ModelList> {
    let of_entry = |entry: &Entry| entry.names().iter().map(|name| Model::new(&app, entry, name)).collect::<Vec<_>>();
    let data = app.models.entries().iter().flat_map(|entry| of_entry(entry)).collect();
    Json(ModelList { object: "list", data })
}

/// Tells of one.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "OpenAI",
    params(("model" = String, Path, description = "Its name")),
    responses((status = 200, body = Model), (status = 404, body = ErrorResponse)),
)]
pub(crate) async fn retrieve(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Model>, ApiError> {
    let place = app.models.find(&name)?;
    Ok(Json(Model::new(&app, &app.models.entries()[place], &name)))
}
