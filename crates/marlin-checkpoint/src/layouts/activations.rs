//! What folders say of activations and the KV cache, which is not followed: weights are read exactly, and that is all.

use safetensors::Dtype;

use super::Entry;
use crate::CheckpointError;
use crate::shard::Shard;

/// Tensors of a module that say how its input or output is to be rounded.
const OF_ACTIVATIONS: [&str; 5] =
    ["input_scale", "output_scale", "activation_scale", "activation_scale_inv", "input_scale_ub"];
/// Tensors that say how queries, keys and values are to be.
const OF_CACHE: [&str; 4] = ["q_scale", "k_scale", "v_scale", "kv_scale"];

/// Takes such tensors out. Says in a sentence each what is not followed: what they or config.json ask for.
pub(super) fn leave_out(tensors: &mut Vec<(String, Entry)>, activations: bool, cache: bool) -> Vec<String> {
    let mut is_rounded = [activations, cache];
    tensors.retain(|(name, _)| {
        let last = name.rsplit_once('.').map_or("", |(_, last)| last);
        let of = [OF_ACTIVATIONS.contains(&last), OF_CACHE.contains(&last)];
        is_rounded.iter_mut().zip(of).for_each(|(rounded, found)| *rounded |= found);
        !of.contains(&true)
    });
    let sentences = [
        "activations are not rounded as the folder asks for; weights are read exactly",
        "the KV cache is not quantised as the folder asks for",
    ];
    is_rounded.into_iter().zip(sentences).filter(|(set, _)| *set).map(|(_, note)| note.to_owned()).collect()
}

/// Refuses a weight in E4M3 that is left without a scale.
pub(super) fn refuse_unscaled(tensors: &[(String, Entry)], shards: &[Shard]) -> Result<(), CheckpointError> {
    for (name, entry) in tensors {
        if let Entry::Plain(location) = entry
            && location.dtype == Dtype::F8_E4M3
        {
            let problem = format!(
                "tensor `{name}` is F8_E4M3, but the weights lack its scale (`{name}_scale_inv` or `{name}_scale`)"
            );
            return Err(CheckpointError::malformed(&shards[location.shard].label, problem));
        }
    }
    Ok(())
}
