//! `inspect` and `quantize --fit` as a person meets them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn metal_marlin(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn stdout(args: &[&str]) -> String {
    let (code, stdout, stderr) = metal_marlin(args);
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args:?}");
    stdout
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(&[args, &["--json"]].concat())).unwrap()
}

fn failure(args: &[&str]) -> String {
    let (code, stdout, stderr) = metal_marlin(args);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{args:?}: {stderr}");
    stderr
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} of {value}"))
}

/// A tiny checkpoint that is not quantised: 2 layers, tied embedding.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/qwen3-gqa2-tied");

/// Every file of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// What the tiny model takes all in one format, for 2 sequences of 32 tokens.
fn total(model: &str, memory: &str) -> Value {
    json(&["plan", model, "--memory", memory, "--context", "32", "--concurrency", "2"])
}

#[test]
fn a_mix_fits_and_is_the_same_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let formats = total(TINY, "1GiB");
    let of = |name: &str| {
        let formats = formats["formats"].as_array().unwrap();
        number(formats.iter().find(|format| format["format"] == name).unwrap(), "total_bytes")
    };
    let memory = ((of("int2") + of("int8")) / 2).to_string();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let fit = |out: &Path| {
        json(&[
            "quantize",
            TINY,
            out.to_str().unwrap(),
            "--method",
            "mse",
            "--fit",
            &memory,
            "--context",
            "32",
            "--concurrency",
            "2",
        ])
    };
    let report = fit(&first);
    let account = &report["fit"];
    assert!(account["fits"].as_bool().unwrap() && number(&report, "exceptions") > 0, "{report}");
    assert_eq!((number(account, "context"), number(account, "concurrency")), (32, 2));
    let planned = total(first.to_str().unwrap(), &memory);
    assert_eq!((&planned["fits"], &planned["total_bytes"]), (&Value::Bool(true), &account["total_bytes"]));

    fit(&second);
    assert_eq!(contents(&first), contents(&second));

    let more = folder.path().join("more");
    let text = stdout(&["quantize", TINY, more.to_str().unwrap(), "--method", "mse", "--fit", "1GiB"]);
    for wanted in ["int8 g32 in all linears", "1 x 64 tokens", "1.00 GiB  fits, ", "self_attn.v_proj"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let text = stdout(&[
        "quantize",
        TINY,
        more.to_str().unwrap(),
        "--method",
        "mse",
        "--fit",
        &memory,
        "--context",
        "32",
        "--force",
    ]);
    assert!(text.contains("and better in ") && text.contains("layers\n"), "{text}");
}

#[test]
fn what_cannot_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let quantize = |options: &[&'static str]| [&["quantize", TINY, out.to_str().unwrap()], options].concat();
    let error = failure(&quantize(&["--fit", "1MiB"]));
    for wanted in
        ["does not fit into 1.0 MiB", "int2 g32", "1 x 64 tokens", "weights ", "program ", "too large already"]
    {
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
    let error = failure(&quantize(&["--fit", "1GiB", "--context", "4096"]));
    assert!(error.contains("4096") && error.contains("64"), "{error}");
    let error = failure(&quantize(&["--fit", "1GiB", "--layout", "compressed-tensors"]));
    assert!(error.contains("compressed-tensors") && error.contains("--format"), "{error}");
    let error = failure(&quantize(&["--format", "int4", "--matrix", "w_proj=int8"]));
    assert!(error.contains("w_proj") && error.contains("mlp.down_proj, "), "{error}");
    assert!(!out.exists());

    for options in [
        &["--fit", "1GiB", "--format", "int4"][..],
        &["--fit", "1GiB", "--bits", "4"],
        &["--fit", "1GiB", "--sparse-24"],
        &["--fit", "1GiB", "--group-size", "32"],
        &["--fit", "1GiB", "--matrix", "v_proj=int8"],
        &["--fit", "much"],
        &["--fit", "1GiB", "--concurrency", "0"],
        &["--format", "int4", "--context", "32"],
        &["--format", "int4", "--matrix", "v_proj"],
    ] {
        let (code, _, stderr) = metal_marlin(&quantize(options));
        assert_eq!(code, Some(2), "{options:?}: {stderr}");
    }
}

#[test]
fn matrices_have_formats_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let report = json(&[
        "quantize",
        TINY,
        out,
        "--method",
        "mse",
        "--format",
        "int3",
        "--matrix",
        "v_proj=int8",
        "--matrix",
        "layers.1.mlp.down_proj=int4:32",
    ]);
    for matrix in report["matrices"].as_array().unwrap() {
        let wanted = match matrix["name"].as_str().unwrap() {
            "model.embed_tokens.weight" => "int8 g32",
            "model.layers.1.mlp.down_proj.weight" => "int4 g32",
            name if name.ends_with("v_proj.weight") => "int8 g128",
            _ => "int3 g64",
        };
        assert_eq!(matrix["scheme"], wanted, "{matrix}");
    }
    let inspected = json(&["inspect", out]);
    let of = |name: &str| -> Vec<(u64, &str)> {
        let tensors = inspected["tensors"].as_array().unwrap().iter().filter(|tensor| tensor["name"] == name);
        tensors.map(|tensor| (number(tensor, "count"), tensor["stored_as"].as_str().unwrap())).collect()
    };
    assert_eq!(of("mlp.down_proj"), [(1, "int3 g64"), (1, "int4 g32")]);
    assert_eq!(of("self_attn.v_proj"), [(2, "int8 g128")]);
    assert_eq!(of("model.norm"), [(1, "bf16")]);
}

#[test]
fn inspect_tells_what_config_and_headers_say() {
    let config: Value = serde_json::from_slice(&fs::read(Path::new(TINY).join("config.json")).unwrap()).unwrap();
    let inspected = json(&["inspect", TINY, "--context", "32", "--context", "64"]);
    assert_eq!((&inspected["architecture"], &inspected["layout"]), (&"Qwen3ForCausalLM".into(), &"plain".into()));
    for (ours, theirs) in [
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("vocabulary", "vocab_size"),
        ("context", "max_position_embeddings"),
    ] {
        assert_eq!(inspected["shape"][ours], config[theirs], "{ours}");
    }
    // Two layers of 2 heads, keys and values, 32 wide, 2 bytes each.
    assert_eq!(number(&inspected["kv_bytes_per_token"], "f16"), 512);
    assert_eq!(number(&inspected["kv_bytes_per_token"], "f32"), 1024);
    for (memory, context) in inspected["memory"].as_array().unwrap().iter().zip(["32", "64"]) {
        let plan = json(&["plan", TINY, "--memory", "1GiB", "--context", context]);
        assert_eq!(memory["context"].to_string(), context);
        assert_eq!(memory["total_bytes"], plan["total_bytes"]);
    }

    let sum = |inspected: &Value, key: &str| -> u64 {
        inspected["tensors"].as_array().unwrap().iter().map(|tensor| number(tensor, key)).sum()
    };
    let each = json(&["inspect", TINY, "--tensors"]);
    let file = fs::read(Path::new(TINY).join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
    for listing in [&inspected, &each] {
        assert_eq!(number(listing, "bytes"), file.len() as u64 - header);
        assert_eq!(sum(listing, "bytes"), number(listing, "bytes"));
    }
    assert_eq!(sum(&inspected, "count"), sum(&each, "count"));
    assert!(stdout(&["inspect", TINY, "--tensors"]).contains("model.layers.1.mlp.up_proj.weight "));

    let text = stdout(&["inspect", TINY]);
    for wanted in ["Qwen3ForCausalLM", "self_attn.q_proj ", "[128, 64]", "bf16", "16.000", "not quantised"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

#[test]
fn inspect_tells_of_experts_and_latent_vectors() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/glm4moelite-shared-mtp");
    let inspected = json(&["inspect", model]);
    let experts = serde_json::json!({"layers": 1, "routed": 8, "top_k": 3, "width": 16, "shared_width": 16});
    assert_eq!((&inspected["shape"]["experts"], &inspected["shape"]["kv_rank"]), (&experts, &32.into()));
    // Two layers of one latent vector of 32 and 8 rotated values, 2 bytes each.
    assert_eq!(number(&inspected["kv_bytes_per_token"], "f16"), 160);
    let text = stdout(&["inspect", model]);
    for wanted in [
        "8 in 1 layers, 3 a token, 16 wide, shared ones 16 wide",
        "4 over one latent vector of 32 and 8 rotated values a token",
        "mlp.experts.N.up_proj ",
        // The layer that predicts further tokens.
        "eh_proj ",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

#[test]
fn inspect_reads_headers_only_and_every_folder_that_opens() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(TINY).unwrap() {
        let file = entry.unwrap().path();
        fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
    }
    let path = model.to_str().unwrap();
    let before = stdout(&["inspect", path]);

    // Weights that no command could load change nothing.
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].fill(0xff);
    fs::write(&weights, bytes).unwrap();
    assert_eq!(stdout(&["inspect", path]), before);

    // A family that cannot be run still has tensors.
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    fs::write(model.join("config.json"), config.replace("Qwen3ForCausalLM", "OtherForCausalLM")).unwrap();
    let text = stdout(&["inspect", path]);
    assert!(text.contains("OtherForCausalLM is not supported") && text.contains("mlp.up_proj"), "{text}");
    assert!(json(&["inspect", path])["unsupported"].as_str().unwrap().contains("OtherForCausalLM"));
    let error = failure(&["inspect", path, "--context", "16"]);
    assert!(error.contains("OtherForCausalLM"), "{error}");

    let error = failure(&["inspect", TINY, "--context", "65"]);
    assert!(error.contains("65") && error.contains("64"), "{error}");
    assert!(failure(&["inspect", "no/such/model"]).contains("no/such/model"));
}
