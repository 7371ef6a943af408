//! `quantize --target-bpw` and `--plan` as a person meets them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

/// The model that comes with the program is quantised; this one is small, random, and has its layers in bf16.
fn model() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens/qwen3-gqa2-tied").display().to_string()
}

fn quantize(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).arg("quantize").args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn report(args: &[&str]) -> Value {
    let (code, stdout, stderr) = quantize(&[args, &["--json"]].concat());
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn failure(args: &[&str]) -> String {
    let (code, stdout, stderr) = quantize(args);
    assert!(code != Some(0) && stdout.is_empty(), "{stdout}");
    stderr
}

/// A plan of the model, every matrix int3 g64, with made-up costs: the largest are those of v_proj.
fn plan() -> Value {
    let costs = |cost: f64| {
        let of = |format: &str, share: f64| (format.to_owned(), Value::from(cost * share));
        Value::Object([of("int2:32", 4.0), of("int3:64", 1.0), of("int8:128", 0.01)].into_iter().collect())
    };
    let header = fs::read(Path::new(&model()).join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(header[..8].try_into().unwrap()) as usize;
    let tensors: BTreeMap<String, Value> = serde_json::from_slice(&header[8..8 + length]).unwrap();
    let linears = tensors.iter().filter(|(name, _)| name.ends_with("_proj.weight"));
    let matrices = linears.map(|(name, tensor)| {
        let cost = if name.contains("v_proj") { 1.0 } else { 1e-3 };
        serde_json::json!({"name": name, "format": "int3:64", "shape": tensor["shape"], "kl": costs(cost)})
    });
    serde_json::json!({"model": "made up", "matrices": matrices.collect::<Vec<_>>()})
}

fn scheme_of<'a>(report: &'a Value, kind: &str) -> Vec<&'a str> {
    let matrices = report["matrices"].as_array().unwrap().iter();
    let of_kind = matrices.filter(|matrix| matrix["name"].as_str().unwrap().contains(kind));
    of_kind.map(|matrix| matrix["scheme"].as_str().unwrap()).collect()
}

#[test]
fn plans_are_followed_and_kept() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let file = path("plan.json");
    fs::write(&file, plan().to_string()).unwrap();
    let (out, again) = (path("out"), path("again"));

    // Formats as they are in the file.
    let followed = report(&[&model(), &out, "--plan", &file, "--method", "mse"]);
    assert_eq!(followed["scheme"], "mixed");
    assert_eq!(scheme_of(&followed, "_proj"), ["int3 g64"; 14]);
    let expected = followed["plan"]["predicted_kl"].as_f64().unwrap();
    assert!((expected - 2.012).abs() < 1e-9, "{expected}");

    // Formats chosen anew by its costs.
    let chosen = report(&[&model(), &again, "--plan", &file, "--target-bpw", "3.5", "--method", "mse"]);
    assert_eq!(scheme_of(&chosen, "v_proj"), ["int8 g128"; 2]);
    assert!(scheme_of(&chosen, "_proj").contains(&"int2 g32"), "{chosen}");
    assert_eq!(chosen["plan"]["target_bits_per_weight"], 3.5);
    let bits = chosen["decoder_bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 3.5 && (bits - chosen["plan"]["bits_per_weight"].as_f64().unwrap()).abs() < 1e-6, "{bits}");

    // The folder has the plan that it was made by, which makes the same folder again.
    let kept = Path::new(&again).join("plan.json").display().to_string();
    let third = path("third");
    report(&[&model(), &third, "--plan", &kept, "--method", "mse"]);
    for name in ["plan.json", "model.safetensors", "config.json"] {
        let read = |folder: &str| fs::read(Path::new(folder).join(name)).unwrap();
        assert!(read(&again) == read(&third), "{name} differs");
    }
    let card = fs::read_to_string(Path::new(&again).join("README.md")).unwrap();
    assert!(card.contains(" in a mix of ") && card.contains("| int2 g32 |"), "{card}");
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let out = path("out");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = plan();
        change(&mut changed);
        let file = path("changed.json");
        fs::write(&file, changed.to_string()).unwrap();
        failure(&[&model(), &out, "--plan", &file, "--method", "mse"])
    };
    let error = with(&|plan| plan["matrices"][3]["format"] = "int9".into());
    assert!(error.contains("formats are"), "{error}");
    let error = with(&|plan| plan["matrices"].as_array_mut().unwrap().truncate(3));
    assert!(error.contains("it lacks model.layers."), "{error}");
    let error = with(&|plan| plan["matrices"] = Value::Array(Vec::new()));
    assert!(error.contains("no matrices"), "{error}");
    let error = with(&|plan| plan["matrices"][0]["bits"] = 3.into());
    assert!(error.contains("unknown field `bits`"), "{error}");
    let none = path("none.json");
    let error = failure(&[&model(), &out, "--plan", &none]);
    assert!(error.contains("cannot read the plan"), "{error}");
    let file = path("plan.json");
    fs::write(&file, plan().to_string()).unwrap();
    let error = failure(&[&model(), &out, "--plan", &file, "--target-bpw", "1.5"]);
    assert!(error.contains("no mix of formats has 1.500"), "{error}");

    // This model has no tokenizer, and other layouts do not have the formats.
    let error = failure(&[&model(), &out, "--target-bpw", "3"]);
    assert!(error.contains("--target-bpw needs a text in the model's tokens"), "{error}");
    let error = failure(&[&model(), &out, "--target-bpw", "3", "--layout", "gguf"]);
    assert!(error.contains("the layout gguf does not have"), "{error}");
    for wrong in [&["--target-bpw", "3", "--format", "int4"][..], &["--plan", &file, "--fit", "1GiB"]] {
        let error = failure(&[&[model().as_str(), &out][..], wrong].concat());
        assert!(error.contains("cannot be used with"), "{error}");
    }
    assert!(!Path::new(&out).exists());
}
