//! Mixtures of experts whose routed experts the host computes: logits, loads, plans, refusals.

mod common;

use std::path::{Path, PathBuf};

use common::{
    Device, Golden, Model, assert_parity, golden, goldens, has_experts, options, packed, packed_in, same_bits, schemes,
};
use marlin_checkpoint::Checkpoint;
use marlin_format::Format;
use marlin_kernels::KvType;
use marlin_kernels::cpu::{Arithmetic, CpuBackend};
use marlin_kernels::reference::ReferenceBackend;
use marlin_model::{ExpertLayers, LoadOptions, Planner};

/// Relative error allowed with keys and values in f32, as where one device computes everything.
const BOUND: f32 = 1e-5;

fn mixtures() -> Vec<PathBuf> {
    let folders: Vec<_> = goldens().into_iter().filter(|folder| has_experts(folder)).collect();
    assert!(folders.len() >= 18, "{folders:?}");
    folders
}

/// The layers of a model that have experts.
fn expert_layers(folder: &Path) -> Vec<usize> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    Planner::new(&ReferenceBackend, &checkpoint).unwrap().expert_layers()
}

fn host() -> CpuBackend {
    common::host(Arithmetic::Exact)
}

fn load(device: Device, folder: &Path, layers: &ExpertLayers) -> Model {
    device.load_offloaded(folder, &options(KvType::F32), &host(), layers).unwrap()
}

#[test]
fn logits_agree_with_transformers_whatever_layers_are_on_the_host() {
    for folder in mixtures() {
        let (golden, layers) = (Golden::read(&folder), expert_layers(&folder));
        let last = *layers.last().unwrap();
        for device in [Device::Reference, Device::cpu(Arithmetic::Exact, 1, None)] {
            for layers in [ExpertLayers::All, ExpertLayers::from_layer(last)] {
                let mut model = load(device, &folder, &layers);
                // As a prompt, in pieces, and as tokens that are decoded.
                for chunk in [golden.input_ids.len(), 7, 1] {
                    let logits = model.logits_of(&golden.input_ids, chunk);
                    let what = format!("{} on {device:?}, layers {layers}, {chunk} at a time", folder.display());
                    assert_parity(&what, &logits, &golden, BOUND);
                }
            }
        }
    }
}

/// Tokens of several sequences, some of which begin and one of which goes on.
#[test]
fn a_batch_changes_nothing() {
    for name in ["qwen3moe-top3-norm", "glm4moelite-shared-mtp", "glm4moe-fused-shared2", "gptoss-mxfp4"] {
        let folder = golden(name);
        let tokens = Golden::read(&folder).input_ids;
        let mut model = load(Device::cpu(Arithmetic::Exact, 2, None), &folder, &ExpertLayers::All);
        let whole = model.logits_of(&tokens, tokens.len());
        let vocabulary = model.model.info().vocabulary;
        let [mut first, mut second, mut third] = [(); 3].map(|()| model.sequence());
        model.extend(&mut first, &tokens[..20]);
        let parts = &mut [(&mut second, &tokens[..9]), (&mut first, &tokens[20..21]), (&mut third, &tokens[..17])];
        let found = model.step(parts);
        for (found, rows) in found.iter().zip([0..9, 20..21, 0..17]) {
            assert!(same_bits(found, &whole[rows.start * vocabulary..rows.end * vocabulary]), "{name}: {rows:?}");
        }
        [first, second, third].into_iter().for_each(|sequence| model.release(sequence));
    }
}

/// Experts in several formats, which the host puts into its own order.
#[test]
fn packed_experts_agree_with_the_reference() {
    let schemes = schemes([Format::Fp4, Format::Int4, Format::Int8, Format::Int3]);
    for name in ["mixtral-top2", "glm4moe-qknorm-mtp"] {
        let target = packed(&golden(name), &schemes);
        let input_ids = Golden::read(&golden(name)).input_ids;
        let mut reference = Device::Reference.load(&packed_in(&target), &options(KvType::F32)).unwrap();
        let wanted = Golden { logits: reference.logits_of(&input_ids, 40), input_ids };
        let mut model = load(Device::cpu(Arithmetic::Exact, 1, None), &packed_in(&target), &ExpertLayers::All);
        assert_parity(name, &model.logits_of(&wanted.input_ids, 40), &wanted, BOUND);
    }
}

#[test]
fn loads_of_experts_are_measured_on_both_devices() {
    let folder = golden("mixtral-top2");
    let tokens = Golden::read(&folder).input_ids;
    let options = LoadOptions { measure_routing: true, ..options(KvType::F32) };
    let device = Device::cpu(Arithmetic::Exact, 1, None);
    let mut alone = device.load(&folder, &options).unwrap();
    let mut shared = device.load_offloaded(&folder, &options, &host(), &"1".parse().unwrap()).unwrap();
    for model in [&mut alone, &mut shared] {
        model.logits_of(&tokens, 11);
    }
    assert_eq!(alone.model.routing().len(), 2);
    assert_eq!(alone.model.routing(), shared.model.routing());
}

#[test]
fn a_model_says_what_the_host_computes() {
    let model = load(Device::Reference, &golden("mixtral-top2"), &"0-".parse().unwrap());
    let info = model.model.info().host_experts.as_ref().unwrap();
    assert_eq!((info.layers.to_string().as_str(), info.device.name.as_str()), ("0-1", "cpu"));
    assert!(
        Device::Reference
            .load(&golden("mixtral-top2"), &options(KvType::F32))
            .unwrap()
            .model
            .info()
            .host_experts
            .is_none()
    );
}

/// What a plan says of layers that the model does not have, or that have no experts, loading says, too.
#[test]
fn layers_that_there_are_not_are_refused() {
    for (name, layers, problem) in [
        ("qwen3-gqa2-tied", "0", "the model has no experts"),
        ("mixtral-top2", "2", "there is no layer 2, the last one is 1"),
        ("mixtral-top2", "0,7-", "there is no layer 7, the last one is 1"),
        ("mixtral-top2", "1-4", "there is no layer 4, the last one is 1"),
        ("glm4moelite-shared-mtp", "0", "layer 0 has no experts; layers 1 have"),
    ] {
        let (folder, layers) = (golden(name), layers.parse().unwrap());
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let planned =
            Planner::new(&ReferenceBackend, &checkpoint).unwrap().with_offload(&host(), &layers).err().unwrap();
        let loaded = Device::Reference.load_offloaded(&folder, &options(KvType::F32), &host(), &layers).err().unwrap();
        let error = loaded.to_string();
        assert!(error.contains(problem) && error.contains("--expert-device") && error.contains(name), "{error}");
        assert_eq!(planned.to_string(), error);
    }
    // A range means those of its layers that have experts.
    let model = load(Device::Reference, &golden("glm4moelite-shared-mtp"), &"0-1".parse().unwrap());
    assert_eq!(model.model.info().host_experts.as_ref().unwrap().layers.to_string(), "1");
}
