//! What tests need of a model and a device: a context, and memory. Plans that ask for more are refused.

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_model::{LoadOptions, MemoryPlan};

use super::{BenchError, Test};
use crate::device::Device;
use crate::memory::{MemoryOptions, fitting_offload};
use crate::{LoadError, load};

/// The context that the tests need, which the model must have.
pub(super) fn context(checkpoint: &Checkpoint, tests: &[Test]) -> Result<usize, BenchError> {
    let longest = tests.iter().max_by_key(|test| test.context()).ok_or(BenchError::Nothing)?;
    match load::allowed_context(checkpoint) {
        Some(context) if longest.context() > context => Err(BenchError::Context {
            test: longest.to_string(),
            needed: longest.context(),
            model: checkpoint.name().to_owned(),
            context,
        }),
        // A config.json without it is refused, with its reasons, when the model is loaded.
        _ => Ok(longest.context()),
    }
}

/// How to load the model for the tests, and what that takes of the device's memory, which must have it.
pub(super) fn load_options(
    checkpoint: &Checkpoint,
    tests: &[Test],
    context: usize,
    kv_type: KvType,
    device: &Device,
    memory: &MemoryOptions,
) -> Result<(LoadOptions, MemoryPlan), BenchError> {
    let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
    let kv_blocks = |test: &&Test| planner.kv_blocks(test.context(), test.streams());
    let largest = tests.iter().max_by_key(kv_blocks).ok_or(BenchError::Nothing)?;
    let streams = tests.iter().map(|test| test.streams()).max().unwrap_or(1);
    let usual = LoadOptions::default();
    let options = LoadOptions {
        context: Some(context),
        step_tokens: usual.step_tokens.max(streams),
        logit_rows: streams,
        kv_blocks: Some(kv_blocks(&largest)),
        kv_type,
        ..usual
    };
    let plan = planner.plan(&options).map_err(LoadError::Model)?;
    match memory.budget(device) {
        Some(budget) if !budget.fits(&plan) => {
            let offload = fitting_offload(device, &planner, &budget, |planner| planner.plan(&options))?;
            Err(BenchError::Memory {
                model: checkpoint.name().to_owned(),
                test: largest.to_string(),
                plan: Box::new(plan),
                budget,
                offload: offload.map(Box::new),
            })
        }
        _ => Ok((options, plan)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::made;
    use super::*;

    #[test]
    fn what_exceeds_the_context_is_refused() {
        let tests = [Test::Prefill(16), Test::Decode { tokens: 64, depth: 1000, streams: 1 }];
        let error = context(&made("tiny"), &tests).unwrap_err().to_string();
        assert!(error.contains("tg64 @ d1000") && error.contains("1064") && error.contains("1024"), "{error}");
        assert_eq!(context(&made("tiny"), &tests[..1]).unwrap(), 16);
        let huge = [Test::Decode { tokens: usize::MAX, depth: usize::MAX, streams: usize::MAX }];
        assert!(matches!(context(&made("tiny"), &huge), Err(BenchError::Context { .. })));
    }
}
