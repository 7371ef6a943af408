//! Logits against `transformers`, over tiny random checkpoints of every family, on devices in host memory.

mod common;

use common::{
    Device, Golden, argmax, assert_hidden_parity, assert_parity, each_packed_model, golden, goldens, l2_error, options,
    packed, packed_in, same_bits, schemes, sparse_schemes, top_two,
};
use marlin_format::{Element, Format, Grouping, ScaleKind, Scheme};
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;

/// Relative error allowed with keys and values in f32: a few times what the roundings of both sides come to.
const BOUND: f32 = 1e-5;
/// With keys and values rounded to f16, whose relative step is 2^-11.
const F16_KV_BOUND: f32 = 5e-3;
/// With activations rounded to int8.
const INT8_BOUND: f64 = 0.05;

#[test]
fn goldens_cover_all_families() {
    let names: Vec<_> = goldens().iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let dense = ["llama-", "qwen3-", "qwen2-", "mistral-", "phi3-", "gemma3-", "glm4-"];
    let sparse = ["mixtral-", "qwen3moe-", "glm4moe-", "glm4moelite-", "deepseekv3-", "gptoss-"];
    for family in dense.into_iter().chain(sparse) {
        assert!(names.iter().filter(|name| name.starts_with(family)).count() >= 3, "{family}: {names:?}");
    }
}

#[test]
fn logits_agree_with_transformers() {
    for folder in goldens() {
        let golden = Golden::read(&folder);
        for device in Device::exact() {
            for (kv_type, bound) in [(KvType::F32, BOUND), (KvType::F16, F16_KV_BOUND)] {
                let mut model = device.load(&folder, &options(kv_type)).unwrap();
                let logits = model.logits_of(&golden.input_ids, golden.input_ids.len());
                assert_parity(&format!("{} on {device:?}, {kv_type:?}", folder.display()), &logits, &golden, bound);
            }
        }
    }
}

#[test]
fn hidden_states_agree_with_transformers() {
    for folder in goldens() {
        let golden = Golden::read(&folder);
        for device in Device::exact() {
            let mut model = device.load(&folder, &options(KvType::F32)).unwrap();
            let hidden = model.hidden_of(&golden.input_ids, 17);
            assert_hidden_parity(&format!("{} on {device:?}", folder.display()), &folder, &hidden, &golden, BOUND);
        }
    }
}

#[test]
fn packed_models_agree_on_all_devices() {
    each_packed_model(|what, wanted, logits| {
        for device in Device::exact() {
            assert_parity(&format!("{what} on {device:?}"), &logits(device), wanted, BOUND);
        }
        // Activations of int8 cost about as much as 8-bit weights: a percent or two.
        let error = l2_error(&logits(Device::cpu(Arithmetic::Int8, 1, None)), &wanted.logits);
        assert!(error < INT8_BOUND, "{what}: relative L2 error {error}");
    });
}

/// Packed experts are what their codes decode to; of latent attention the key rows are rounded to half precision, and value rows too where
/// heads begin within tiles of scales.
#[test]
fn packed_experts_and_latents_are_what_they_decode_to() {
    let tiles = Scheme::scaled(Element::E4M3, Grouping::Block { rows: 8, cols: 8 }, ScaleKind::F32);
    let mut all = schemes([Format::Int4, Format::Fp8, Format::Nvfp4]);
    all.extend([tiles, sparse_schemes()[0]]);
    for (name, bound) in [("mixtral-top2", None), ("qwen3moe-top3-norm", None), ("glm4moelite-shared-mtp", Some(2e-3))]
    {
        let input_ids = Golden::read(&golden(name)).input_ids;
        for schemes in all.iter().map(|&scheme| vec![scheme]).chain([all.clone()]) {
            let codes = packed(&golden(name), &schemes);
            let decoded = packed(&packed_in(&codes), &[Scheme::F32]);
            let [found, wanted] = [codes, decoded].map(|model| {
                Device::Reference.load(&packed_in(&model), &options(KvType::F32)).unwrap().logits_of(&input_ids, 40)
            });
            let error = l2_error(&found, &wanted);
            match bound {
                None => assert!(same_bits(&found, &wanted), "{name} in {schemes:?}: {error}"),
                Some(bound) => assert!((1e-9..bound).contains(&error), "{name} in {schemes:?}: {error}"),
            }
        }
    }
}

#[test]
fn sampling_takes_the_most_likely_token_of_each_row() {
    for device in [Device::Reference, Device::cpu(Arithmetic::Exact, 1, None)] {
        let folder = golden("qwen3-gqa2-tied");
        let golden = Golden::read(&folder);
        let mut model = device.load(&folder, &options(KvType::F32)).unwrap();
        let mut sequence = model.sequence();
        for (row, &token) in golden.input_ids.iter().enumerate() {
            let next = model.greedy(&mut sequence, &[token]).unwrap();
            let (wanted, gap) = top_two(&golden.logits[row * golden.vocabulary()..][..golden.vocabulary()]);
            assert!(next as usize == wanted || gap < 0.02, "row {row} on {device:?}");
        }
        model.release(sequence);
    }
}

#[test]
fn a_head_beside_a_tied_embedding_is_used_if_it_differs() {
    let folder = golden("qwen3-gqa2-tied");
    let golden = Golden::read(&folder);
    let edited = |edit: fn(&mut [u8])| {
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(folder.join("config.json"), copy.path().join("config.json")).unwrap();
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
        let mut head = embedding.data().to_vec();
        edit(&mut head);
        let head = safetensors::tensor::TensorView::new(embedding.dtype(), embedding.shape().to_vec(), &head).unwrap();
        let all = tensors.tensors().into_iter().chain([("lm_head.weight".to_owned(), head)]);
        safetensors::serialize_to_file(all, None, &copy.path().join("model.safetensors")).unwrap();
        Device::Reference.load(copy.path(), &options(KvType::F32)).unwrap().logits_of(&golden.input_ids, 40)
    };
    let tied = Device::Reference.load(&folder, &options(KvType::F32)).unwrap().logits_of(&golden.input_ids, 40);
    assert!(same_bits(&edited(|_| {}), &tied));
    // Flips the sign of every bf16 weight.
    let negated = edited(|head| head.iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= 0x80));
    assert!(same_bits(&negated, &tied.iter().map(|l| -l).collect::<Vec<_>>()));
    assert_ne!(argmax(&negated[..golden.vocabulary()]), argmax(&tied[..golden.vocabulary()]));
}

#[test]
fn a_model_without_a_head_has_other_names() {
    let folder = golden("qwen3-gqa2-tied");
    let golden = Golden::read(&folder);
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("config.json"), copy.path().join("config.json")).unwrap();
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let inner = |(name, tensor): (String, _)| (name.strip_prefix("model.").unwrap().to_owned(), tensor);
    let inner = tensors.tensors().into_iter().map(inner);
    safetensors::serialize_to_file(inner, None, &copy.path().join("model.safetensors")).unwrap();
    let [whole, inner] = [folder.as_path(), copy.path()]
        .map(|path| Device::Reference.load(path, &options(KvType::F32)).unwrap().hidden_of(&golden.input_ids, 40));
    assert!(same_bits(&whole, &inner));
}

#[test]
fn a_model_describes_itself() {
    let folder = golden("llama-mha-untied");
    let model = Device::cpu(Arithmetic::Exact, 1, None).load(&folder, &options(KvType::F16)).unwrap();
    let info = model.model.info();
    assert_eq!(
        (info.architecture.as_str(), info.vocabulary, info.context, info.layers),
        ("LlamaForCausalLM", 67, 64, 2)
    );
    assert_eq!(info.weight_bytes, 4 * (2 * 67 * 40 + 40 + 2 * (4 * 40 * 40 + 3 * 40 * 88 + 2 * 40)));
    assert_eq!(info.device.name, "cpu");
}
