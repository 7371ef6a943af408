//! GGUF files of the Python package `gguf`, as `scripts/goldens/make_gguf_goldens.py` writes them.

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{assert_says, message};
use marlin_checkpoint::{Checkpoint, CheckpointError, Gguf, GgufType, GgufValue, GgufValueType, Layout, Storage};
use marlin_format::Scheme;
use serde_json::{Value, json};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf")
}

fn golden() -> Gguf {
    Gguf::open(&goldens().join("types.gguf")).unwrap()
}

/// Shapes and values that the package decoded of a file.
fn expected(file: &str) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(goldens().join(file).with_extension("safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensors.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), floats(view.data())))).collect()
}

/// A changed copy of a golden file.
fn changed(file: &str, change: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    let mut bytes = fs::read(goldens().join(file)).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn assert_same_bits(name: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{name}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert_eq!(found.to_bits(), wanted.to_bits(), "{name}, value {index}: {found} is not {wanted}");
    }
}

#[test]
fn values_are_those_of_the_package_bit_for_bit() {
    let gguf = golden();
    let expected = expected("types");
    assert_eq!(gguf.tensors().len(), expected.len());
    for (name, (shape, wanted)) in &expected {
        assert_eq!(&gguf.tensor(name).unwrap().shape, shape, "{name}");
        let found = gguf.values(name).unwrap();
        assert_same_bits(name, &found, wanted);
    }
    for stored_as in GgufType::ALL {
        assert_eq!(gguf.tensor(&format!("{stored_as}.weight")).unwrap().tensor_type, stored_as);
    }
}

#[test]
fn matrices_are_packed_without_loss() {
    let gguf = golden();
    for stored_as in GgufType::ALL {
        let name = format!("{stored_as}.weight");
        let matrix = gguf.matrix(&name).unwrap();
        assert_eq!(matrix.scheme, stored_as.scheme());
        assert_eq!(vec![matrix.rows, matrix.cols], gguf.tensor(&name).unwrap().shape);
        // Equal but for the sign of zeros.
        assert_eq!(matrix.decode(), gguf.values(&name).unwrap(), "{name}");
        assert_eq!(matches!(matrix.codes, Cow::Borrowed(_)), matrix.scheme.is_dense(), "{name}");
        // Packed, a matrix takes as many bytes as in the file.
        let blocks = matrix.rows * matrix.cols / stored_as.block_weights();
        assert_eq!(matrix.bytes(), blocks * stored_as.block_bytes(), "{name}");
        gguf.release(&name);
        assert_eq!(gguf.matrix(&name).unwrap(), matrix);
    }
    for (stored_as, scheme) in [
        (GgufType::F32, "f32"),
        (GgufType::Q4_0, "int4-sym g32"),
        (GgufType::Q4_1, "u4 g32 + f16 bias"),
        (GgufType::Q8_0, "int8 g32"),
        (GgufType::Iq4Nl, "iq4_nl g32"),
        (GgufType::Mxfp4, "mxfp4"),
    ] {
        assert_eq!(stored_as.scheme().to_string(), scheme);
    }
    assert_eq!(GgufType::Mxfp4.scheme(), Scheme::MXFP4);
}

#[test]
fn metadata_of_every_type() {
    let gguf = golden();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.keys().count(), 22);
    let value = |key: &str| gguf.value(key).unwrap();
    for (key, wanted) in [
        ("general.architecture", GgufValue::String("test")),
        ("general.alignment", GgufValue::U32(64)),
        ("test.u8", GgufValue::U8(200)),
        ("test.i8", GgufValue::I8(-100)),
        ("test.u16", GgufValue::U16(60_000)),
        ("test.i16", GgufValue::I16(-30_000)),
        ("test.u32", GgufValue::U32(4_000_000_000)),
        ("test.i32", GgufValue::I32(-2_000_000_000)),
        ("test.u64", GgufValue::U64(1 << 63)),
        ("test.i64", GgufValue::I64(-(1 << 62))),
        ("test.f32", GgufValue::F32(0.1)),
        ("test.f64", GgufValue::F64(0.1)),
        ("test.true", GgufValue::Bool(true)),
        ("test.false", GgufValue::Bool(false)),
        ("test.string", GgufValue::String("Grüße, 世界\n")),
        ("test.empty", GgufValue::String("")),
    ] {
        assert_eq!(value(key), wanted, "{key}");
    }
    assert_eq!(gguf.value("test"), None);

    let array = |key: &str| value(key).as_array().unwrap();
    let strings: Vec<&str> = array("test.strings").iter().map(|value| value.as_str().unwrap()).collect();
    assert_eq!(strings, ["<s>", "", "▁the", "\u{120}a"]);
    let integers: Vec<GgufValue<'_>> = array("test.integers").iter().collect();
    assert_eq!(integers, [GgufValue::I32(3), GgufValue::I32(-1), GgufValue::I32(2_000_000_000)]);
    let floats: Vec<f64> = array("test.floats").iter().map(|value| value.as_f64().unwrap()).collect();
    assert_eq!(floats, [0.5, -0.25]);
    let bools: Vec<bool> = array("test.bools").iter().map(|value| value.as_bool().unwrap()).collect();
    assert_eq!(bools, [true, false, true]);
    let bytes: Vec<u64> = array("test.bytes").iter().map(|value| value.as_u64().unwrap()).collect();
    assert_eq!(bytes, [0, 1, 2, 3, 4]);
    let nested: Vec<usize> = array("test.nested").iter().map(|value| value.as_array().unwrap().len()).collect();
    assert_eq!(nested, [2, 1]);
    assert_eq!(
        (array("test.nested").element(), array("test.bytes").element()),
        (GgufValueType::Array, GgufValueType::U8)
    );

    assert_eq!(value("test.i8").as_u64(), None);
    assert_eq!(value("test.i8").as_f64(), None);
    assert_eq!(value("test.f32").as_f64(), Some(f64::from(0.1f32)));
}

#[test]
fn version_2_is_read_alike() {
    let (_folder, path) = changed("types.gguf", |bytes| bytes[4] = 2);
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.version(), 2);
    assert_eq!(gguf.tensors(), golden().tensors());
}

#[test]
fn files_that_are_not_read_say_why() {
    let open_error = |path: &Path| message(Gguf::open(path).unwrap_err());
    let folder = tempfile::tempdir().unwrap();
    assert_says(&open_error(&folder.path().join("none.gguf")), &["none.gguf", "missing", "*.gguf"]);
    assert_says(&open_error(folder.path()), &["no file"]);
    let path = folder.path().join("model.gguf");
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_says(&open_error(&path), &["model.gguf", "Git LFS pointer"]);
    fs::write(&path, "").unwrap();
    assert_says(&open_error(&path), &["model.gguf", "the magic number at byte 0 takes 4 bytes", "download"]);
    let (_folder, path) = changed("types.gguf", |bytes| bytes[0] = b'g');
    assert_says(&open_error(&path), &["changed.gguf", "\"gGUF\"", "wanted \"GGUF\""]);
}

#[test]
fn tensors_that_are_not_had_say_why() {
    let gguf = golden();
    let error = message(gguf.matrix("blk.0.attn_q.weight").unwrap_err());
    assert_says(&error, &["types.gguf", "none of its 17 tensors is `blk.0.attn_q.weight`"]);
    assert_says(&message(gguf.values("x").unwrap_err()), &["`x`"]);
    assert_says(&message(gguf.matrix("vector").unwrap_err()), &["`vector`", "[5]", "[rows, cols]"]);
    assert_says(&message(gguf.matrix("stack").unwrap_err()), &["`stack`", "[2, 3, 4]", "[rows, cols]"]);

    // The first f16 of Q8_0 becomes infinite, the first exponent of MXFP4 what OCP calls not a number.
    let (_folder, path) = changed("types.gguf", |bytes| {
        bytes[3072..3074].copy_from_slice(&0x7c00u16.to_le_bytes());
        bytes[8064] = 255;
    });
    let gguf = Gguf::open(&path).unwrap();
    assert_says(&message(gguf.matrix("Q8_0.weight").unwrap_err()), &["`Q8_0.weight`", "scales value 0 is inf"]);
    assert_says(&message(gguf.matrix("MXFP4.weight").unwrap_err()), &["`MXFP4.weight`", "scales value 0 is NaN"]);
    assert!(gguf.values("MXFP4.weight").unwrap().iter().all(|value| !value.is_nan()));
}

/// What config.json says of both models.
fn common_config(architecture: &str, class: &str) -> Value {
    json!({
        "architectures": [class],
        "model_type": architecture,
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "mlp_bias": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": null,
    })
}

/// The model of `file` is that of the package, whose config.json would be `wanted`.
fn assert_model(architecture: &str, file: &str, wanted: &Value) {
    let model = Checkpoint::open(&goldens().join(file)).unwrap();
    assert_eq!(model.config(), wanted);
    assert_eq!(model.layout(), Some(Layout::Gguf));
    let expected = expected(architecture);
    let mut names: Vec<&str> = model.tensor_names().collect();
    names.sort_unstable();
    assert_eq!(names, expected.keys().map(String::as_str).collect::<Vec<_>>());
    for (name, (shape, wanted)) in &expected {
        assert_eq!(&model.shape(name).unwrap(), shape, "{name}");
        match *shape.as_slice() {
            [rows, cols] => {
                let matrix = model.matrix(name, rows, cols).unwrap();
                assert_eq!((&matrix.decode(), matrix.scheme), (wanted, GgufType::Q8_0.scheme()), "{name}");
                assert_eq!(model.info(name).unwrap().storage, Storage::Packed(matrix.scheme), "{name}");
                assert_says(&message(model.tensor(name).unwrap_err()), &[name, "int8 g32", "ordinary"]);
            }
            _ => {
                assert_same_bits(name, &model.vector(name, wanted.len()).unwrap(), wanted);
                let bytes: Vec<u8> = wanted.iter().flat_map(|value| value.to_le_bytes()).collect();
                assert_eq!(*model.tensor(name).unwrap().bytes, bytes, "{name}");
            }
        }
        model.release(name);
    }
    let error = message(model.matrix_any("model.layers.1.mlp.up_proj.weight").unwrap_err());
    assert_says(&error, &[architecture, "`model.layers.1.mlp.up_proj.weight`"]);
}

#[test]
fn a_folder_with_one_file_is_that_file() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| fs::copy(goldens().join("qwen3.gguf"), folder.path().join(name)).unwrap();
    copy("a.gguf");
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.path().unwrap(), folder.path().join("a.gguf"));
    let fingerprint = model.fingerprint().unwrap();
    assert_eq!(Checkpoint::open(model.path().unwrap()).unwrap().fingerprint().unwrap(), fingerprint);
    copy("b.gguf");
    assert_says(&message(Checkpoint::open(folder.path()).unwrap_err()), &["2 GGUF files", "a.gguf", "b.gguf"]);
    let mut bytes = fs::read(folder.path().join("b.gguf")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(folder.path().join("b.gguf"), bytes).unwrap();
    assert_ne!(Checkpoint::open(&folder.path().join("b.gguf")).unwrap().fingerprint().unwrap(), fingerprint);
}

#[test]
fn llama_as_hugging_face_has_it() {
    let mut config = common_config("llama", "LlamaForCausalLM");
    config["rope_theta"] = json!(500_000.0);
    config["attention_bias"] = true.into();
    config["tie_word_embeddings"] = false.into();
    config["rope_scaling"] = json!({
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_model("llama", "llama.gguf", &config);
}

/// In one file, and split: by the folder, and by any of the files.
#[test]
fn qwen3_as_hugging_face_has_it() {
    let mut config = common_config("qwen3", "Qwen3ForCausalLM");
    config["rope_theta"] = json!(1e6);
    config["attention_bias"] = false.into();
    config["tie_word_embeddings"] = true.into();
    assert_model("qwen3", "qwen3.gguf", &config);
    for file in ["split", "split/qwen3-00001-of-00003.gguf", "split/qwen3-00003-of-00003.gguf"] {
        assert_model("qwen3", file, &config);
    }
}

#[test]
fn split_models_that_are_not_whole_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let part = |number: usize| path(&format!("qwen3-0000{number}-of-00003.gguf"));
    let error = |path: &Path| message(Checkpoint::open(path).unwrap_err());
    let golden = |number: usize| fs::read(goldens().join("split").join(part(number).file_name().unwrap())).unwrap();
    let restore = || (1..=3).for_each(|number| fs::write(part(number), golden(number)).unwrap());
    // Replaces the value of a key of metadata, whose type stands between them.
    let change = |number: usize, key: &str, value: u8| {
        let mut bytes = golden(number);
        let at = position(&bytes, key) + key.len() + 4;
        bytes[at] = value;
        fs::write(part(number), bytes).unwrap();
    };

    restore();
    let fingerprint = || Checkpoint::open(folder.path()).unwrap().fingerprint().unwrap();
    let whole = fingerprint();
    let mut bytes = golden(3);
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(part(3), bytes).unwrap();
    assert_ne!(fingerprint(), whole);

    restore();
    fs::remove_file(part(2)).unwrap();
    assert_says(&error(&part(1)), &["qwen3-00002-of-00003.gguf", "all 3 files of the model must lie side by side"]);
    assert_says(&error(folder.path()), &["2 GGUF files"]);
    fs::write(path("other.gguf"), golden(2)).unwrap();
    assert_says(&error(&path("other.gguf")), &["one of 3 files", "-00001-of-00003.gguf"]);
    fs::remove_file(path("other.gguf")).unwrap();

    fs::write(part(2), golden(3)).unwrap();
    assert_says(&error(&part(1)), &["00002-of-00003", "`split.no` is 2, by its name it must be 1"]);
    restore();
    change(2, "split.count", 4);
    assert_says(&error(&part(1)), &["00002-of-00003", "`split.count` is 4, by its name it must be 3"]);
    assert_says(&error(&part(2)), &["one of 4 files"]);
    restore();
    change(1, "split.tensors.count", 12);
    assert_says(&error(&part(1)), &["13 tensors, wanted 12"]);

    // The same tensor in two files.
    restore();
    let mut bytes = golden(3);
    let at = position(&bytes, "blk.0.attn_q_norm.weight");
    let name = b"blk.0.attn_output.weight";
    bytes[at..at + name.len()].copy_from_slice(name);
    fs::write(part(3), bytes).unwrap();
    assert_says(&error(&part(1)), &["00003-of-00003", "`blk.0.attn_output.weight` is in an earlier file"]);
}

/// Where a text stands in a file.
fn position(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap()
}

#[test]
fn models_that_are_not_read_say_why() {
    let error = |change: &dyn Fn(&mut Vec<u8>)| {
        let (_folder, path) = changed("llama.gguf", change);
        message(Checkpoint::open(&path).unwrap_err())
    };
    // Replaces a text by one of the same length.
    let text = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        error(&|bytes| {
            let at = position(bytes, from);
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        })
    };
    // Replaces the value of a key, whose type stands between them.
    let value = |key: &str, value: [u8; 4]| {
        error(&|bytes| {
            let at = position(bytes, key) + key.len() + 4;
            bytes[at..at + 4].copy_from_slice(&value);
        })
    };
    let integer = |key: &str, number: u32| value(key, number.to_le_bytes());

    let architecture = message(Checkpoint::open(&goldens().join("types.gguf")).unwrap_err());
    assert_says(&architecture, &["types.gguf", "architecture `test`", "llama, qwen2, qwen3"]);
    assert_says(&text("general.architecture", "general.architecturE"), &["`general.architecture` is None"]);
    assert_says(&text("llama.rope.freq_base", "llama.rope.FREQ_BASE"), &["`llama.rope.FREQ_BASE`", "not understood"]);
    assert_says(&text("llama.block_count", "Llama.block_count"), &["`llama.block_count` is missing"]);
    assert_says(&text("llama.vocab_size", "llama.expert_use"), &["`llama.expert_use`", "not understood"]);
    assert_says(&text("blk.0.attn_norm", "blk.1.attn_norm"), &["tensor `blk.1.attn_norm.weight`", "no place", "llama"]);
    assert_says(&text("blk.0.ffn_down.weight", "blk.0.ffn_down.scales"), &["`blk.0.ffn_down.scales`", "no place"]);
    assert_says(&text("blk.0.ffn_down", "blk.0.ffn_gate"), &["twice"]);
    assert_says(&text("token_embd", "tokem_embd"), &["no tensor `token_embd.weight`"]);
    assert_says(&integer("llama.attention.head_count", 4), &["`llama.rope.dimension_count` is 16, wanted 8"]);
    assert_says(&integer("llama.attention.head_count", 5), &["5 heads", "32 columns"]);
    assert_says(&integer("llama.attention.head_count_kv", 2), &["`blk.0.attn_k.weight`", "[16, 32]", "2 heads of 16"]);
    assert_says(&value("llama.rope.freq_base", 1e4f32.to_le_bytes()), &["`rope_freqs.weight`", "not those of Llama 3"]);
    assert_says(
        &value("llama.rope.freq_base", f32::NAN.to_le_bytes()),
        &["`llama.rope.freq_base` is F32(NaN)", "finite"],
    );
    let as_float = |key: &str| {
        error(&|bytes| {
            let at = position(bytes, key) + key.len();
            bytes[at] = 6;
        })
    };
    assert_says(&as_float("llama.context_length"), &["`llama.context_length` is F32", "wanted one integer"]);
    assert_says(&as_float("tokenizer.ggml.eos_token_id"), &["`tokenizer.ggml.eos_token_id` is F32", "wanted a token"]);
}

/// Whether a tensor is read, as what it is; a norm that is damaged may be infinite.
fn is_read(model: &Checkpoint, name: &str) -> bool {
    match *model.shape(name).unwrap() {
        [rows, cols] => model.matrix(name, rows, cols).is_ok(),
        [len] => !matches!(model.vector(name, len), Err(CheckpointError::Type { .. } | CheckpointError::Shape { .. })),
        _ => model.tensor(name).is_ok(),
    }
}

#[test]
fn damaged_models_are_refused_or_read() {
    let intact = fs::read(goldens().join("llama.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    // The last tensor's description ends the header.
    for at in 24..position(&intact, "blk.0.attn_output.bias") + 50 {
        let mut bytes = intact.clone();
        bytes[at] = if at % 2 == 0 { 0xff } else { intact[at] ^ 1 << (at / 2 % 8) };
        fs::write(&path, bytes).unwrap();
        match Checkpoint::open(&path) {
            Ok(model) => model.tensor_names().for_each(|name| assert!(is_read(&model, name), "{name}")),
            Err(error) => assert_says(&message(error), &["damaged.gguf"]),
        }
    }
}
