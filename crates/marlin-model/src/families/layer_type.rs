//! `layer_types`: which layers look back over a window only.

use serde::Deserialize;

use crate::ConfigError;

/// An entry of `layer_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LayerType {
    FullAttention,
    SlidingAttention,
}

/// The window of each layer; `needs` names the fields that a window comes from.
pub(super) fn windows(
    layer_types: &[LayerType],
    layers: usize,
    window: Option<usize>,
    needs: &str,
) -> Result<Vec<Option<usize>>, ConfigError> {
    if layer_types.len() != layers {
        let problem = format!("must have num_hidden_layers = {layers} entries, found {}", layer_types.len());
        return Err(ConfigError::new("layer_types", problem));
    }
    let layer_window = |layer_type: &LayerType| match (layer_type, window) {
        (LayerType::FullAttention, _) => Ok(None),
        (LayerType::SlidingAttention, Some(window)) => Ok(Some(window)),
        (LayerType::SlidingAttention, None) => {
            Err(ConfigError::new("layer_types", format!("sliding_attention needs {needs}")))
        }
    };
    layer_types.iter().map(layer_window).collect()
}
