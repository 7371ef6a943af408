//! `quantize`, `eval` and `quality` as a person meets them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

/// What a run of the program wrote and how it ended.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn metal_marlin<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The JSON that a successful run prints.
fn json<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Value {
    let run = metal_marlin(args);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    serde_json::from_str(&run.stdout).unwrap()
}

/// The message of a run that fails.
fn failure<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let run = metal_marlin(args);
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{}", run.stderr);
    run.stderr
}

/// A file of the repository.
fn repository(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path).to_str().unwrap().to_owned()
}

/// A tiny random checkpoint without a tokenizer: 2 layers, tied embedding.
fn tiny() -> String {
    repository("crates/marlin-model/tests/goldens/qwen3-gqa2-tied")
}

/// The same with a tokenizer that knows small letters and spaces.
fn tiny_with_tokenizer(folder: &Folder) -> String {
    let copy = folder.path("source");
    fs::create_dir(&copy).unwrap();
    for file in fs::read_dir(tiny()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        fs::copy(&file, Path::new(&copy).join(file.file_name().unwrap())).unwrap();
    }
    // A space, as BPE of bytes writes it.
    let letters = ('a'..='z').chain(['Ġ']);
    let vocabulary: serde_json::Map<_, _> =
        letters.enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": bytes,
        "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    fs::write(Path::new(&copy).join("tokenizer.json"), tokenizer.to_string()).unwrap();
    copy
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }
}

#[test]
fn quantize_reports_every_matrix() {
    let folder = Folder::new();
    let out = folder.path("out");
    let report =
        json(&["quantize", &tiny(), &out, "--method", "mse", "--format", "int4", "--group-size", "32", "--json"]);
    assert_eq!((&report["scheme"], &report["embedding_scheme"]), (&"int4 g32".into(), &"int8 g32".into()));
    let matrices = report["matrices"].as_array().unwrap();
    let config: Value = serde_json::from_slice(&fs::read(Path::new(&tiny()).join("config.json")).unwrap()).unwrap();
    assert_eq!(matrices.len() as u64, 7 * config["num_hidden_layers"].as_u64().unwrap() + 1);
    for matrix in matrices {
        let error = matrix["relative_rms_error"].as_f64().unwrap();
        let bounds = if matrix["scheme"] == "int4 g32" { 0.02..0.15 } else { 0.001..0.01 };
        assert!(bounds.contains(&error), "{matrix}");
    }
    let on_disk: u64 = report["bytes_after"].as_u64().unwrap();
    let file = fs::metadata(Path::new(&out).join("model.safetensors")).unwrap().len();
    assert!((on_disk..on_disk + 16384).contains(&file), "{on_disk} {file}");

    let run = metal_marlin(&["quantize", &tiny(), &out, "--bits", "4", "--method", "rtn", "--force"]);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    for wanted in ["self_attn.q_proj", "mlp.down_proj", "fp4 g128", "in layer ", "bits per weight", &out] {
        assert!(run.stdout.contains(wanted), "{wanted}: {}", run.stdout);
    }
    let verbose =
        metal_marlin(&["quantize", &tiny(), &out, "--method", "mse", "--bits", "4", "--force", "--verbose"]).stdout;
    assert!(verbose.contains("model.layers.1.mlp.up_proj.weight"), "{verbose}");
}

/// Half of the codes and their positions are what is left; the errors tell that half of the weights is gone.
#[test]
fn quantize_prunes_two_of_four() {
    let folder = Folder::new();
    let out = folder.path("out");
    for (format, scheme, bits) in [("fp4", "fp4 g128, 2:4", 3.125), ("fp8", "fp8 row, 2:4", 5.0)] {
        let report = json(&[
            "quantize",
            &tiny(),
            &out,
            "--method",
            "mse",
            "--format",
            format,
            "--sparse-24",
            "--force",
            "--json",
        ]);
        assert_eq!((&report["scheme"], &report["embedding_scheme"]), (&scheme.into(), &"int8 g32".into()));
        let matrices = report["matrices"].as_array().unwrap();
        let linears: Vec<_> = matrices.iter().filter(|matrix| matrix["scheme"] == scheme).collect();
        assert_eq!(linears.len(), matrices.len() - 1, "all but the tied embedding");
        for matrix in linears {
            let number = |key: &str| matrix[key].as_f64().unwrap();
            // Scales of groups cut short, or one a row, add to that.
            assert!((bits..bits + 1.5).contains(&number("bits_per_weight")), "{matrix}");
            assert!((0.2..0.5).contains(&number("relative_rms_error")), "{matrix}");
        }
    }
    let config: Value = serde_json::from_slice(&fs::read(Path::new(&out).join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["schemes"]["fp8 row, 2:4"]["sparsity"], "two_of_four", "{config}");
}

#[test]
fn a_quantised_folder_has_a_model_card() {
    let folder = Folder::new();
    let out = folder.path("small");
    let layout = ["--group-size", "row", "--layout", "compressed-tensors", "--json"];
    json(&[&["quantize", &tiny(), &out, "--method", "mse", "--format", "int4"], &layout[..]].concat());
    let card = fs::read_to_string(Path::new(&out).join("README.md")).unwrap();
    for words in ["---\n", "library_name: transformers\n", " in int4 row", "| self_attn.q_proj |", "vllm serve"] {
        assert!(card.contains(words), "{words}: {card}");
    }
    assert!(!card.contains("base_model") && !card.contains("license"), "{card}");

    // The licence is that of the source's card.
    let source = tiny_with_tokenizer(&folder);
    fs::write(Path::new(&source).join("README.md"), "---\nlicense: mit\n---\n# Source\n").unwrap();
    let out = folder.path("ours");
    json(&["quantize", &source, &out, "--method", "mse", "--format", "fp4", "--json"]);
    let card = fs::read_to_string(Path::new(&out).join("README.md")).unwrap();
    assert!(card.starts_with("---\nlicense: mit\nlibrary_name: metal-marlin\n"), "{card}");
    assert!(card.contains("# source in fp4 g128\n"), "{card}");
}

#[test]
fn a_rotated_model_says_so() {
    let folder = Folder::new();
    let out = folder.path("rotated");
    let quantize = ["quantize", &tiny(), &out, "--method", "mse", "--format", "int4"];
    let report = json(&[&quantize[..], &["--rotate=hidden,values,mlp", "--json"]].concat());
    assert_eq!(report["rotation"], serde_json::json!({"hidden": 64, "values": 32, "mlp": 96}));
    let config = fs::read_to_string(Path::new(&out).join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["quantization_config"]["rotations"], serde_json::json!({"hidden": 64, "mlp": 96}));
    let sentence = "Weights are rotated in Hadamard blocks: hidden 64, values 32, mlp 96.";
    let card = fs::read_to_string(Path::new(&out).join("README.md")).unwrap();
    assert!(card.contains(sentence) && card.contains("rotated likewise"), "{card}");
    assert_eq!(json(&["inspect", &out, "--json"])["rotations"], config["quantization_config"]["rotations"]);
    let run = metal_marlin(&["inspect", &out]);
    assert!(
        run.stdout.contains("rotates       hidden states in blocks of 64, MLPs in blocks of 96\n"),
        "{}",
        run.stdout
    );

    let run = metal_marlin(&[&quantize[..], &["--force", "--rotate=values"]].concat());
    assert!(run.stdout.contains("Weights are rotated in Hadamard blocks: values 32."), "{} {}", run.stdout, run.stderr);
    let config = fs::read_to_string(Path::new(&out).join("config.json")).unwrap();
    assert!(!config.contains("rotations"), "{config}");
    let usual = json(&[&quantize[..], &["--force", "--rotate", "--json"]].concat());
    assert_eq!(usual["rotation"], serde_json::json!({"hidden": 64, "values": 32, "mlp": null}));
    let plain = json(&[&quantize[..], &["--force", "--json"]].concat());
    assert_eq!(plain["rotation"], Value::Null);

    // What cannot be rotated.
    let error = metal_marlin(&[&quantize[..], &["--force", "--rotate=norms"]].concat());
    assert!(error.code == Some(2) && error.stderr.contains("parts are hidden, values, mlp"), "{}", error.stderr);
    for layout in ["gptq", "gguf", "compressed-tensors"] {
        let error = failure(&[&quantize[..], &["--force", "--rotate", "--layout", layout]].concat());
        assert!(error.contains("--rotate is for the layout metal-marlin") && error.contains(layout), "{error}");
    }
    for command in ["run", "eval"] {
        let run = metal_marlin(&[command, "--format", "int4", "--rotate"]);
        assert!(run.code == Some(2) && run.stderr.contains("--rotate"), "{command}: {}", run.stderr);
    }
}

#[test]
fn a_model_with_scaled_channels_says_so() {
    let folder = Folder::new();
    let (source, out) = (tiny_with_tokenizer(&folder), folder.path("scaled"));
    let quantize = ["quantize", &source, &out, "--format", "int3", "--method", "mse", "--calibration-windows", "2"];
    let report = json(&[&quantize[..], &["--scale-channels", "--json"]].concat());
    let inputs = report["scaled_inputs"].as_u64().unwrap();
    // At most three in each of two layers: those of attention, of the MLP and of its last matrix.
    assert!((1..=6).contains(&inputs), "{report}");
    let card = fs::read_to_string(Path::new(&out).join("README.md")).unwrap();
    assert!(card.contains(&format!("Channels of {inputs} inputs of linears are scaled (AWQ).")), "{card}");
    let plain = json(&[&quantize[..7], &["--force", "--json"]].concat());
    assert_eq!(plain["scaled_inputs"], Value::Null);
    fs::remove_file(Path::new(&source).join("tokenizer.json")).unwrap();
    let error = failure(&[&quantize[..7], &["--force", "--scale-channels"]].concat());
    assert!(error.contains("--scale-channels needs a text in the model's tokens"), "{error}");
}

/// What calibration cannot do, it says before it begins, with what needs no calibration.
#[test]
fn calibration_needs_a_model_that_runs_and_a_text() {
    let folder = Folder::new();
    let (source, out) = (tiny_with_tokenizer(&folder), folder.path("out"));
    let quantize = |options: &[&str]| failure(&[&["quantize", &source, &out, "--format", "int4"], options].concat());
    let error = quantize(&["--method", "mse", "--calibration-windows", "2"]);
    assert!(error.contains("--method gptq") && error.contains("--cold-expert-format"), "{error}");
    let error = quantize(&["--calibration", &folder.path("none")]);
    assert!(error.contains("none") && error.contains("--method mse"), "{error}");
    let config = Path::new(&source).join("config.json");
    let known = fs::read_to_string(&config).unwrap();
    fs::write(&config, known.replace("Qwen3ForCausalLM", "UnknownForCausalLM")).unwrap();
    let error = quantize(&[]);
    assert!(error.contains("UnknownForCausalLM") && error.contains("--method mse"), "{error}");
    fs::write(&config, known).unwrap();
    fs::remove_file(Path::new(&source).join("tokenizer.json")).unwrap();
    let error = quantize(&[]);
    assert!(error.contains("tokenizer") && error.contains("--method mse"), "{error}");
    let left: Vec<_> = fs::read_dir(folder.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["source"]);
}

#[test]
fn calibration_says_what_was_kept() {
    let folder = Folder::new();
    let (source, out) = (tiny_with_tokenizer(&folder), folder.path("out"));
    let report = json(&["quantize", &source, &out, "--format", "int4", "--calibration-windows", "2", "--json"]);
    let quality = &report["quality"];
    assert_eq!(quality["text"], "bundled text that weights are not fitted to");
    // Two windows of 64 tokens.
    assert_eq!((&quality["windows"], &quality["tokens"]), (&2.into(), &126.into()), "{quality}");
    let kl = quality["mean_kl"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1.0, "{quality}");
    let card = fs::read_to_string(Path::new(&out).join("README.md")).unwrap();
    assert!(card.contains("Measured on bundled text that weights are not fitted to: 126 predicted tokens"), "{card}");
    assert!(card.contains(&format!("{kl:.5}")), "{card}");
}

/// Figures of the report and of the card are those of `eval`.
#[test]
fn quantize_measures_what_was_kept() {
    let folder = Folder::new();
    let (source, text) = (tiny_with_tokenizer(&folder), folder.path("text.txt"));
    fs::write(&text, "the quick brown fox jumps over the lazy dog ".repeat(4)).unwrap();
    let measure = ["--format", "int3", "--calibration-windows", "2", "--text", &text, "--windows", "2"];
    let ours = folder.path("ours");
    let report = json(&[&["quantize", &source, &ours, "--json"], &measure[..]].concat());
    let found = &report["quality"];
    let eval = json(&["eval", &ours, "--baseline", &source, "--text", &text, "--windows", "2", "--json"]);
    for key in ["tokens", "context", "windows", "perplexity", "mean_kl", "p99_kl", "top1_agreement"] {
        assert_eq!(found[key], eval[key], "{key}: {found}, {eval}");
    }
    let exact = json(&["eval", &source, "--text", &text, "--windows", "2", "--exact", "--json"]);
    assert_eq!(found["perplexity_before"], exact["perplexity"]);
    let card = fs::read_to_string(Path::new(&ours).join("README.md")).unwrap();
    let number = |key: &str| found[key].as_f64().unwrap();
    let row = format!("| quantised | {:.4} | {:.5} |", number("perplexity"), number("mean_kl"));
    assert!(card.contains("Weights are rounded by gptq, calibrated on 128 tokens of the bundled text."), "{card}");
    assert_eq!((&report["method"], &report["calibration_tokens"]), (&"gptq".into(), &128.into()));
    assert!(card.contains("Measured on `text.txt`: 126 predicted") && card.contains(&row), "{row}: {card}");

    // Of one file for llama.cpp, and as a person reads it.
    let file = folder.path("tiny.gguf");
    let run = metal_marlin(
        &[&["quantize", &source, &file, "--layout", "gguf", "--method", "mse", "--format", "int8"], &measure[4..]]
            .concat(),
    );
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    assert!(
        run.stdout.contains("\nquality: perplexity ") && run.stdout.contains("(126 tokens of text.txt)"),
        "{}",
        run.stdout
    );

    // What stands against measuring is said before anything is written.
    let (other, missing) = (folder.path("other"), folder.path("missing.txt"));
    let error = failure(&["quantize", &source, &other, "--method", "mse", "--format", "fp4", "--text", &missing]);
    assert!(error.contains("missing.txt") && !Path::new(&other).exists(), "{error}");
    let error = failure(&["quantize", &tiny(), &other, "--method", "mse", "--format", "fp4", "--text", &text]);
    assert!(error.contains("tokenizer.json") && !Path::new(&other).exists(), "{error}");
}

#[test]
fn quantize_writes_one_file_for_llama_cpp() {
    let folder = Folder::new();
    let (source, out) = (tiny_with_tokenizer(&folder), folder.path("tiny.gguf"));
    let error = failure(&["quantize", &source, &out, "--method", "mse", "--format", "int4", "--layout", "gguf"]);
    assert!(error.contains("gguf has no place for int4 g32") && !Path::new(&out).exists(), "{error}");

    // Without quantising, too.
    for (format, layout) in [("f16", "gguf, not quantised"), ("bf16", "gguf, not quantised"), ("int4-sym", "gguf\n")] {
        let report = json(&[
            "quantize", &source, &out, "--method", "mse", "--format", format, "--layout", "gguf", "--force", "--json",
        ]);
        let stored = |matrix: &Value| matrix["scheme"].as_str().unwrap().starts_with(format);
        assert!(report["matrices"].as_array().unwrap().iter().any(stored), "{report}");
        let inspected = metal_marlin(&["inspect", &out]).stdout;
        assert!(inspected.contains(&format!("layout        {layout}")), "{format}: {inspected}");
    }
    for layout in ["metal-marlin", "compressed-tensors", "gptq"] {
        let error = failure(&[
            "quantize",
            &source,
            &folder.path("f16"),
            "--method",
            "mse",
            "--format",
            "f16",
            "--layout",
            layout,
        ]);
        assert!(error.contains("f16 quantises nothing; formats are fp4, "), "{error}");
    }
}

#[test]
fn quantize_writes_the_layout_of_other_engines() {
    let folder = Folder::new();
    let out = folder.path("out");
    let layout = ["--layout", "compressed-tensors"];
    let quantize =
        |options: &[&str]| [&["quantize", &tiny(), &out, "--method", "mse"], &layout[..], options].concat().join(" ");
    let run = |options: &[&str]| metal_marlin(&quantize(options).split(' ').collect::<Vec<_>>());

    let report = run(&["--format", "nvfp4", "--json"]);
    assert_eq!((report.code, report.stderr.as_str()), (Some(0), ""));
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!((&report["layout"], &report["embedding_scheme"]), (&layout[1].into(), &Value::Null));
    let config: Value = serde_json::from_slice(&fs::read(Path::new(&out).join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["format"], "nvfp4-pack-quantized");
    let again = failure(&["quantize", &out, &folder.path("again"), "--method", "mse", "--format", "fp4"]);
    assert!(again.contains("quantised already") && again.contains("nvfp4"), "{again}");

    for (options, words) in [
        (&["--format", "fp4"][..], "no place for fp4 g128"),
        (&["--format", "int4", "--sparse-24"], "no place for int4 g128, 2:4"),
        (&["--format", "int4", "--group-size", "128"], "no multiple of the group of 128"),
        (&["--format", "int4", "--embedding-format", "int8"], "keeps embedding and head as they are"),
        (&["--format", "int4", "--embedding-group-size", "32"], "keeps embedding and head as they are"),
    ] {
        let run = run(&[options, &["--force"]].concat());
        assert!(run.code == Some(1) && run.stderr.contains(words), "{options:?}: {}", run.stderr);
    }
}

#[test]
fn quantize_says_what_is_wrong() {
    let folder = Folder::new();
    let out = folder.path("out");
    for args in [
        &["quantize", "model", "out"][..],
        &["quantize", "model", "out", "--method", "mse", "--format", "fp5"],
        &["quantize", "model", "out", "--method", "mse", "--bits", "9"],
        &["quantize", "model", "out", "--method", "mse", "--bits", "4", "--layout", "awq"],
        &["quantize", "model", "out", "--method", "mse", "--format", "fp4", "--group-size", "0"],
        &["quantize", "model", "out", "--method", "mse", "--format", "fp4", "--threads", "1000000"],
    ] {
        let run = metal_marlin(args);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
    }
    let error = failure(&["quantize", &tiny(), &out, "--method", "mse", "--format", "int8", "--bits", "4"]);
    assert!(error.contains("int8") && error.contains("--bits"), "{error}");
    let error = failure(&["quantize", &tiny(), &out, "--method", "mse", "--format", "mxfp4", "--group-size", "64"]);
    assert!(error.contains("mxfp4") && error.contains("32"), "{error}");
    let error = failure(&["quantize", &tiny(), &out, "--method", "mse", "--format", "int8", "--sparse-24"]);
    assert!(error.contains("int8 has no variant with 2:4 sparsity; fp4, int4, fp8 have one"), "{error}");
    let error = failure(&["quantize", "no/such/model", &out, "--method", "mse", "--format", "fp4"]);
    assert!(error.contains("no/such/model"), "{error}");
    assert!(!Path::new(&out).exists());

    metal_marlin(&["quantize", &tiny(), &out, "--method", "mse", "--format", "fp4"]);
    let error = failure(&["quantize", &tiny(), &out, "--method", "mse", "--format", "fp4"]);
    assert!(error.contains(&out) && error.contains("--force"), "{error}");
    let error = failure(&["quantize", &out, &folder.path("again"), "--method", "mse", "--format", "fp4"]);
    assert!(error.contains("quantised already"), "{error}");
    let error = failure(&["quantize", &tiny(), &tiny(), "--method", "mse", "--format", "fp4", "--force"]);
    assert!(error.contains("is the source itself"), "{error}");
    let mine = folder.path("mine");
    fs::create_dir(&mine).unwrap();
    fs::write(Path::new(&mine).join("thesis.txt"), "all there is").unwrap();
    let error = failure(&["quantize", &tiny(), &mine, "--method", "mse", "--format", "fp4", "--force"]);
    assert!(error.contains(&mine), "{error}");
    assert!(Path::new(&mine).join("thesis.txt").exists());
}

#[test]
fn eval_says_what_is_wrong() {
    let folder = Folder::new();
    let text = folder.path("text.txt");
    fs::write(&text, "Once upon a time").unwrap();
    assert_eq!(metal_marlin(&["eval", &tiny()]).code, Some(2));
    let error = failure(&["eval", "no/such/model", "--text", &text]);
    assert!(error.contains("no/such/model"), "{error}");
    let error = failure(&["eval", &tiny(), "--text", &text]);
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[cfg(feature = "bundled-model")]
mod bundled {
    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/model");

    /// What `transformers` measures on the decoded weights (`scripts/goldens/bundled_perplexity.py`).
    const BUNDLED_PERPLEXITY: f64 = 215.5853;

    fn validation() -> String {
        repository("data/text/validation.txt")
    }

    fn number(value: &Value, key: &str) -> f64 {
        value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
    }

    /// The bundled model with another tokenizer: without merges every byte is a token.
    fn bytewise(folder: &Folder) -> String {
        let copy = PathBuf::from(folder.path("bytewise"));
        fs::create_dir(&copy).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(Path::new(MODEL).join(file), copy.join(file)).unwrap();
        }
        let mut tokenizer: Value =
            serde_json::from_slice(&fs::read(Path::new(MODEL).join("tokenizer.json")).unwrap()).unwrap();
        tokenizer["model"]["merges"] = Value::Array(Vec::new());
        fs::write(copy.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        copy.to_str().unwrap().to_owned()
    }

    #[test]
    fn the_perplexity_of_the_bundled_model() {
        let args =
            ["eval", "bundled", "--text", &validation(), "--context", "32", "--windows", "4", "--exact", "--json"];
        let result = json(&args);
        assert_eq!((&result["windows"], &result["tokens"], &result["context"]), (&4.into(), &124.into(), &32.into()));
        let perplexity = number(&result, "perplexity");
        assert!((perplexity / BUNDLED_PERPLEXITY - 1.0).abs() < 1e-3, "{perplexity}");
        assert!((number(&result, "nll").exp() / perplexity - 1.0).abs() < 1e-12);
        assert!((number(&result, "bits_per_weight") - 4.754).abs() < 1e-3);
        assert_eq!(result["decoder_bits_per_weight"], 4.125);
        assert_eq!(result["mean_kl"], Value::Null);
    }

    /// The tiny model with a tokenizer, and a text for it.
    fn tiny_with_text(folder: &Folder) -> (String, String) {
        let (model, text) = (folder.path("model"), folder.path("text.txt"));
        fs::create_dir(&model).unwrap();
        for entry in fs::read_dir(tiny()).unwrap() {
            let file = entry.unwrap().path();
            fs::copy(&file, Path::new(&model).join(file.file_name().unwrap())).unwrap();
        }
        // Only the first hundred token ids exist in the tiny model: with no merges these are ASCII.
        let tokenizer = fs::read(Path::new(&bytewise(folder)).join("tokenizer.json")).unwrap();
        let mut tokenizer: Value = serde_json::from_slice(&tokenizer).unwrap();
        tokenizer["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64().unwrap() < 100);
        fs::write(Path::new(&model).join("tokenizer.json"), tokenizer.to_string()).unwrap();
        fs::write(&text, "!\"#$%&'()*+,-./0123456789:;<=>".repeat(4)).unwrap();
        (model, text)
    }

    #[test]
    fn a_model_is_the_same_in_either_layout() {
        let folder = Folder::new();
        let (model, text) = tiny_with_text(&folder);
        let (ours, theirs) = (folder.path("ours"), folder.path("theirs"));
        json(&[
            "quantize",
            &model,
            &ours,
            "--method",
            "mse",
            "--format",
            "mxfp4",
            "--embedding-format",
            "bf16",
            "--json",
        ]);
        json(&[
            "quantize",
            &model,
            &theirs,
            "--method",
            "mse",
            "--format",
            "mxfp4",
            "--layout",
            "compressed-tensors",
            "--json",
        ]);
        let result = json(&["eval", &theirs, "--baseline", &ours, "--text", &text, "--exact", "--json"]);
        assert_eq!((number(&result, "mean_kl"), number(&result, "top1_agreement")), (0.0, 1.0), "{result}");
    }

    #[test]
    fn a_sparse_model_is_evaluated() {
        let folder = Folder::new();
        let ((model, text), out) = (tiny_with_text(&folder), folder.path("out"));
        json(&["quantize", &model, &out, "--method", "mse", "--format", "fp8", "--sparse-24", "--json"]);
        let result = json(&["eval", &out, "--baseline", &model, "--text", &text, "--json"]);
        assert!(number(&result, "mean_kl") > 1e-6 && number(&result, "perplexity").is_finite(), "{result}");
        assert!(number(&result, "decoder_bits_per_weight") < 6.5, "{result}");
    }

    #[test]
    fn quality_measures_every_format() {
        let folder = Folder::new();
        let ((model, text), page) = (tiny_with_text(&folder), folder.path("quality.md"));
        let calibration = ["--calibration", &text, "--calibration-windows", "2"];
        let run = metal_marlin(
            &[&["quality", &model, "--text", &text, "--out", &page, "--device", "cpu"], &calibration[..]].concat(),
        );
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        let page = fs::read_to_string(page).unwrap();
        for row in [
            "metal-marlin quality model --text text.txt --out quality.md --device cpu --calibration text.txt --calibration-windows 2\n",
            "| top-1 | int8 KL |",
            "| unquantised |",
            "| fp4 g128 | rtn |",
            "| nvfp4 | mse |",
            "| int2 g32 | gptq |",
            "| int4 g128 | mse scaled |",
            "| int3 g64 | mse rotated |",
            "| mix of 4.8 | gptq |",
            "| int2 g32 | gptq rotated |",
            "| fp4 g128, 2:4 | gptq |",
            "| fp8 | 8.",
        ] {
            assert!(page.contains(row), "{row}: {page}");
        }
        // A heading, a rule, the original, three rows for each of 17 dense and 3 sparse variants, 7 rotated and scaled ones,
        // and 6 mixes; and a table of five KV caches.
        assert_eq!(page.lines().filter(|line| line.starts_with('|')).count(), 3 + 3 * 20 + 7 + 6 + 2 + 5);
    }

    #[test]
    fn quality_refuses_what_does_not_fit_before_it_measures() {
        let folder = Folder::new();
        let ((model, text), page) = (tiny_with_text(&folder), folder.path("quality.md"));
        let error = failure(&["quality", &model, "--text", &text, "--out", &page, "--memory", "1MiB"]);
        for words in ["needs ", "weights ", "1.0 MiB are available", "shorter --context", "smaller model"] {
            assert!(error.contains(words), "{words}: {error}");
        }
        assert!(!error.contains("metal-marlin quantize"), "no help to who measures that: {error}");
        assert!(!Path::new(&page).exists());
    }

    /// What is exact is the same on every device; what a GPU rounds is another column.
    #[test]
    fn quality_measures_on_a_gpu() {
        if !has_gpu() {
            return;
        }
        let folder = Folder::new();
        let ((model, text), page) = (tiny_with_text(&folder), folder.path("quality.md"));
        let measure = |options: &[&str]| -> Vec<Vec<String>> {
            let args = [
                "quality",
                &model,
                "--text",
                &text,
                "--out",
                &page,
                "--context",
                "16",
                "--windows",
                "1",
                "--calibration-windows",
                "1",
            ];
            let run = metal_marlin(&[&args[..], options].concat());
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            let page = fs::read_to_string(&page).unwrap();
            assert!(page.contains(&format!("--device {}", options[1])), "{page}");
            let rows = page.lines().filter(|line| line.contains("| mse |"));
            rows.map(|row| row.split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
        };
        let (exact, rounded) = (measure(&["--device", "cpu", "--exact"]), measure(&["--device", "gpu"]));
        assert_eq!((exact.len(), rounded.len()), (20, 20));
        for (exact, rounded) in exact.iter().zip(&rounded) {
            const MEAN_KL: usize = 8;
            let [on_cpu, on_gpu] = [exact, rounded].map(|row| row[MEAN_KL].parse::<f64>().unwrap());
            assert!((on_gpu - on_cpu).abs() <= 2e-5 + 1e-3 * on_cpu, "{exact:?} {rounded:?}");
        }
        // Rounding changes some of the divergences that are written in five digits, none of them by much.
        let [exact, f16] =
            [8, 11].map(|column| rounded.iter().map(|row| row[column].parse::<f64>().unwrap()).collect());
        let (exact, f16): (Vec<f64>, Vec<f64>) = (exact, f16);
        assert!(exact != f16, "{exact:?}");
        assert!(
            exact.iter().zip(&f16).all(|(exact, f16)| (exact - f16).abs() <= 1e-3 + 0.05 * exact),
            "{exact:?} {f16:?}"
        );
    }

    /// Without the column of rounded activations, and in shorter windows.
    #[test]
    fn quality_can_be_exact_throughout() {
        let folder = Folder::new();
        let ((model, text), page) = (tiny_with_text(&folder), folder.path("quality.md"));
        let options = ["--device", "cpu", "--exact", "--context", "16", "--windows", "2", "--calibration-windows", "2"];
        let run = metal_marlin(&[&["quality", &model, "--text", &text, "--out", &page], &options[..]].concat());
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains(&(options.join(" ") + "\n")) && page.contains("in 2 windows of 16"), "{page}");
        assert!(page.contains("All columns are measured with `--exact`") && !page.contains("int8 KL"), "{page}");
        let columns = |line: &str| line.matches('|').count() - 1;
        let table: Vec<&str> = page.lines().skip_while(|line| !line.starts_with('|')).collect();
        let table = table.split(|line| line.is_empty()).next().unwrap();
        assert!(table.iter().all(|line| columns(line) == 10), "{table:?}");
    }

    #[test]
    fn a_model_does_not_diverge_from_itself() {
        let text = validation();
        let args =
            ["eval", "bundled", "--text", &text, "--context", "16", "--windows", "2", "--baseline", MODEL, "--json"];
        let exact = json(&[&args[..], &["--exact"]].concat());
        assert_eq!(
            (number(&exact, "mean_kl"), number(&exact, "p99_kl"), number(&exact, "top1_agreement")),
            (0.0, 0.0, 1.0)
        );
        // Activations in int8 are another model.
        let fast = json(&args);
        assert!((1e-6..1e-2).contains(&number(&fast, "mean_kl")), "{fast}");
        assert!((number(&fast, "nll") - number(&exact, "nll")).abs() < 0.05);
    }

    #[test]
    fn text_that_cannot_be_measured_is_explained() {
        let folder = Folder::new();
        let text = folder.path("text.txt");
        let error = failure(&["eval", "bundled", "--text", &text]);
        assert!(error.contains(&text), "{error}");
        fs::write(&text, [0x66, 0xff]).unwrap();
        let error = failure(&["eval", "bundled", "--text", &text]);
        assert!(error.contains(&text) && error.contains("UTF-8"), "{error}");
        fs::write(&text, "a").unwrap();
        let error = failure(&["eval", "bundled", "--text", &text]);
        assert!(error.contains(&text) && error.contains("1 tokens"), "{error}");
        let error = failure(&["eval", "bundled", "--text", &validation(), "--context", "1"]);
        assert!(error.contains("predict nothing"), "{error}");
        let error = failure(&["eval", "bundled", "--text", &validation(), "--context", "4096"]);
        assert!(error.contains("4096") && error.contains("1024"), "{error}");
    }

    #[test]
    fn models_of_different_tokenizers_are_not_compared() {
        let folder = Folder::new();
        let other = bytewise(&folder);
        let error = failure(&["eval", "bundled", "--text", &validation(), "--baseline", &other]);
        assert!(error.contains("tokenizers") && error.contains(&other), "{error}");
    }
}

/// Whether there is a GPU, which there must be if tests are told so.
#[cfg(feature = "bundled-model")]
fn has_gpu() -> bool {
    let has_gpu = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(has_gpu || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    has_gpu
}

/// The baseline of `eval` is exact on every device, and so is the model with `--exact`.
#[cfg(feature = "bundled-model")]
#[test]
fn exact_means_exact_on_a_gpu() {
    if !has_gpu() {
        return;
    }
    let text = repository("data/text/validation.txt");
    let mean_kl = |more: &[&str]| {
        let args = ["eval", "bundled", "--text", &text, "--baseline", "bundled", "--device", "gpu", "--json"];
        // Drivers have things of their own to say to standard error.
        let run = metal_marlin(&[&args[..], &["--context", "32", "--windows", "1"], more].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        report["mean_kl"].as_f64().unwrap()
    };
    assert_eq!(mean_kl(&["--exact"]), 0.0);
    let rounded = mean_kl(&[]);
    assert!(0.0 < rounded && rounded < 1e-4, "{rounded}");
}
