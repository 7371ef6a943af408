//! `GET /v1/models`: what is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::generation::check_model;
use crate::error::{ApiError, ErrorResponse};
use crate::model::Served;

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
    /// Most tokens of prompt and answer together.
    max_model_len: usize,
}

impl Model {
    fn new(served: &Served, name: &str) -> Self {
        Self {
            id: name.to_owned(),
            object: "model",
            created: served.created,
            owned_by: "metal-marlin",
            max_model_len: served.context,
        }
    }
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = ModelList)))]
pub(crate) async fn list(State(served): State<Arc<Served>>) -> Json<ModelList> {
    let data = served.model.names.iter().map(|name| Model::new(&served, name)).collect();
    Json(ModelList { object: "list", data })
}

/// Tells of one.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "OpenAI",
    params(("model" = String, Path, description = "Its name")),
    responses((status = 200, body = Model), (status = 404, body = ErrorResponse)),
)]
pub(crate) async fn retrieve(
    State(served): State<Arc<Served>>,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    check_model(&served, &name)?;
    Ok(Json(Model::new(&served, &name)))
}
