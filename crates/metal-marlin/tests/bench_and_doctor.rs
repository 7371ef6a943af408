//! `bench` and `doctor` as a person meets them. What they measure is never compared with a time.

use std::process::{Command, Output};

use marlin_kernels::gpu::{GpuBackend, GpuOptions};
use serde_json::Value;

fn metal_marlin(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap()
}

fn success(args: &[&str]) -> String {
    let output = metal_marlin(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn failure(args: &[&str], code: i32) -> String {
    let output = metal_marlin(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{stderr}");
    stderr
}

const TINY: [&str; 9] = ["bench", "--shape", "tiny", "--decode", "3", "--prefill", "7,600", "--repetitions", "2"];

fn tiny(more: &[&str]) -> String {
    success(&[&TINY[..], more].concat())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("a number, found {value}"))
}

fn close(found: &Value, wanted: f64) -> bool {
    (number(found) / wanted - 1.0).abs() < 1e-9
}

/// Of a token of the tiny model: two layers of 2 heads of 16 keys and 16 values in f16.
const KV_BYTES: f64 = 2.0 * 2.0 * 32.0 * 2.0;

/// Weights of the matrices of the tiny model, with each of which a token's row is multiplied.
const MATRICES: f64 = 256.0 * 64.0 + 2.0 * (2.0 * 64.0 * (64.0 + 32.0) + 3.0 * 64.0 * 128.0);

#[test]
fn json_says_everything() {
    let report: Value =
        serde_json::from_str(&tiny(&["--depths", "0,700", "--output", "json", "--threads", "2"])).unwrap();
    assert_eq!((&report["model"], &report["random_weights"]), (&"tiny".into(), &true.into()));
    assert_eq!((&report["format"], &report["embedding_format"]), (&"fp4 g128".into(), &"int8 g32".into()));
    assert_eq!((&report["threads"], &report["architecture"]), (&2.into(), &"Qwen3ForCausalLM".into()));
    // 256 · 64 of the embedding; a layer of 2 · 64 · (64 + 32) of attention and 3 · 64 · 128; norms of 64 and heads of 16.
    let weights = 256 * 64 + 2 * (2 * 64 * (64 + 32) + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64;
    assert_eq!(report["weights"], weights);
    assert!(number(&report["load_seconds"]) > 0.0);
    if cfg!(target_os = "linux") {
        assert!(number(&report["peak_memory_bytes"]) > number(&report["weight_bytes"]));
    }
    let memory = number(&report["read_bytes_per_second"]["median"]);

    let results = report["results"].as_array().unwrap();
    let names: Vec<&str> = results.iter().map(|result| result["test"].as_str().unwrap()).collect();
    assert_eq!(names, ["pp7", "pp600", "tg3", "tg3 @ d700"]);
    for result in results {
        let rate = &result["tokens_per_second"];
        assert_eq!(result["samples"].as_array().unwrap().len(), 2);
        assert!(0.0 < number(&rate["min"]) && number(&rate["min"]) <= number(&rate["median"]), "{rate}");
        assert!(number(&rate["median"]) <= number(&rate["max"]), "{rate}");
        let bytes = number(&result["bytes_per_token"]);
        assert!(close(&result["bytes_per_second"], bytes * number(&rate["median"])));
        if !result["share_of_read_bandwidth"].is_null() {
            assert!(close(&result["share_of_read_bandwidth"], bytes * number(&rate["median"]) / memory));
        }
        let multiply_adds = number(&result["multiply_adds_per_token"]);
        assert!(close(&result["multiply_adds_per_byte"], multiply_adds / bytes));
        assert!(close(&result["multiply_adds_per_second"], multiply_adds * number(&rate["median"])));
        let (weights, kv) = (number(&result["weight_bytes_per_token"]), number(&result["kv_bytes_per_token"]));
        assert_eq!(bytes, weights + kv);
        if result["kind"] == "prefill" {
            // A prompt of 600 tokens is run in two steps.
            assert!(weights < 2.0 * number(&report["weight_bytes"]) / number(&result["tokens"]), "{result}");
            continue;
        }
        // A token sees those before it and itself.
        let seen = number(&result["depth"]) + 2.0;
        assert_eq!((kv, weights), (KV_BYTES * seen, number(&report["weight_bytes"])));
        assert_eq!(multiply_adds, MATRICES + 2.0 * 4.0 * 32.0 * seen);
    }
}

#[test]
fn streams_decode_side_by_side() {
    // 33 in one step, more rows than the kernels for few of them take; a KV block ends amid the tokens that are decoded.
    let options = ["--depths", "0,30", "--streams", "33,1,2,2"];
    let report: Value = serde_json::from_str(&tiny(&[&options[..], &["--output", "json"]].concat())).unwrap();
    let results = report["results"].as_array().unwrap();
    let names: Vec<&str> = results.iter().map(|result| result["test"].as_str().unwrap()).collect();
    let decoded = ["tg3", "tg3 x2", "tg3 x33", "tg3 @ d30", "tg3 x2 @ d30", "tg3 x33 @ d30"];
    assert_eq!(names, [&["pp7", "pp600"][..], &decoded].concat());
    let memory = number(&report["read_bytes_per_second"]["median"]);
    for (result, streams) in results[2..].iter().zip([1.0, 2.0, 33.0].into_iter().cycle()) {
        assert_eq!((number(&result["streams"]), number(&result["tokens"])), (streams, 3.0));
        // Of all streams, each of which has its share of the weights and a KV cache of its own.
        let rate = number(&result["tokens_per_second"]["median"]);
        assert!(close(&result["tokens_per_second_per_stream"], rate / streams), "{result}");
        assert!(close(&result["weight_bytes_per_token"], number(&report["weight_bytes"]) / streams), "{result}");
        assert_eq!(number(&result["kv_bytes_per_token"]), KV_BYTES * (number(&result["depth"]) + 2.0));
        assert!(close(&result["bytes_per_second"], rate * number(&result["bytes_per_token"])), "{result}");
        if !result["share_of_read_bandwidth"].is_null() {
            assert!(close(&result["share_of_read_bandwidth"], number(&result["bytes_per_second"]) / memory));
        }
    }

    // The cache has blocks of 32 tokens for the largest test, which is the prompt or the streams, and one to spare.
    let cache = |streams| {
        let report = tiny(&["--depths", "30", "--streams", streams, "--output", "json"]);
        number(&serde_json::from_str::<Value>(&report).unwrap()["kv_cache_bytes"]) / KV_BYTES / 32.0
    };
    assert_eq!([cache("1"), cache("50")], [19.0 + 1.0, 50.0 * 2.0 + 1.0]);
}

#[test]
fn streams_share_the_kernels_of_a_step() {
    let found = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(found || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    if !found {
        return;
    }
    let options = ["--prefill", "0", "--decode", "2", "--depths", "30", "--streams", "1,33", "--repetitions", "1"];
    let device = ["bench", "--shape", "tiny", "--device", "gpu", "--output", "json"];
    let report: Value = serde_json::from_str(&success(&[&device[..], &options].concat())).unwrap();
    let kernels: Vec<f64> =
        report["results"].as_array().unwrap().iter().map(|result| number(&result["kernels"])).collect();
    // Many rows take a few more, but not those of one row for each of them.
    assert!(kernels[0] >= 2.0 && kernels[1] < 2.0 * kernels[0], "{kernels:?}");
    let roofline = failure(&[&device[..], &options, &["--roofline", "roofline.svg"]].concat(), 1);
    assert!(roofline.contains("measured of a CPU only") && roofline.contains("--device cpu"), "{roofline}");
}

#[test]
fn tables_tell_the_rate_of_one_of_several_streams() {
    let options = ["--depths", "4", "--streams", "1,3", "--output"];
    let csv = tiny(&[&options[..], &["csv"]].concat());
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    // From the end: the device, which comes before, has commas of its own.
    let fields = |row: &[&str], name: &str| {
        let from_end = rows[0].len() - rows[0].iter().position(|field| *field == name).unwrap();
        row[row.len() - from_end].parse::<f64>().unwrap()
    };
    let streams: Vec<f64> = rows[1..].iter().map(|row| fields(row, "streams")).collect();
    assert_eq!(streams, [1.0, 1.0, 1.0, 3.0], "{csv}");
    let row = &rows[4];
    let per_stream = fields(row, "tokens_per_second") / 3.0;
    assert!((fields(row, "tokens_per_second_per_stream") / per_stream - 1.0).abs() < 1e-9, "{csv}");

    let markdown = tiny(&[&options[..], &["markdown"]].concat());
    assert!(markdown.contains("| min to max | per stream | MB/token |"), "{markdown}");
    assert!(markdown.contains("\n| tg3 x3 @ d4 | "), "{markdown}");
    let text = tiny(&[&options[..], &["text"]].concat());
    assert!(text.contains("  per stream  ") && text.contains("\ntg3 x3 @ d4  "), "{text}");
    let alone = tiny(&["--depths", "4"]);
    assert!(!alone.contains("per stream"), "{alone}");
}

#[test]
fn a_roofline_is_drawn_of_every_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("roofline.svg");
    let path = file.to_str().unwrap();
    let options = ["--device", "cpu", "--depths", "0", "--threads", "1,2", "--roofline", path];
    let report: Value = serde_json::from_str(&tiny(&[&options[..], &["--output", "json"]].concat())).unwrap();
    let reports = report.as_array().unwrap();
    assert_eq!(reports.iter().map(|report| number(&report["threads"])).collect::<Vec<_>>(), [1.0, 2.0]);
    for report in reports {
        let [memory, peak] =
            ["read_bytes_per_second", "peak_multiply_adds_per_second"].map(|rate| number(&report[rate]["median"]));
        assert_eq!(report["peak_numbers"], "int8");
        for result in report["results"].as_array().unwrap() {
            let rate = number(&result["multiply_adds_per_second"]);
            assert!(close(&result["share_of_peak"], rate / peak), "{result}");
            let roof = peak.min(memory * number(&result["multiply_adds_per_byte"]));
            assert!(close(&result["share_of_roof"], rate / roof), "{result}");
        }
    }
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.starts_with("<svg ") && svg.contains("Roofline of tiny (random weights)"), "{svg}");
    // A marker for each test and one in the legend.
    assert_eq!((svg.matches(">pp600, ").count(), svg.matches("class=\"marker").count()), (2, 2 * (3 + 1)), "{svg}");

    let text = tiny(&["--device", "cpu", "--depths", "0", "--threads", "2,1", "--exact"]);
    let threads: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("tg3 "))
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    assert_eq!((threads, text.matches("multiply-adds/s of f32 at most").count()), (vec!["2", "1"], 2), "{text}");

    let missing = folder.path().join("none").join("roofline.svg");
    let error = failure(&[&TINY[..], &["--roofline", missing.to_str().unwrap()]].concat(), 1);
    assert!(error.contains("roofline.svg: there is no folder") && error.contains("make it first"), "{error}");
}

#[test]
fn every_output_has_a_line_for_each_test() {
    let options = ["--depths", "4", "--format", "int8", "--group-size", "row", "--embedding-format", "bf16"];
    let csv = tiny(&[&options[..], &["--output", "csv"]].concat());
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 1 + 3, "{csv}");
    assert!(
        lines[0].starts_with("version,platform,model,") && lines[0].ends_with(",max_predicted_tokens_per_second"),
        "{csv}"
    );
    assert!(
        lines[3].contains(",\"tiny\",true,\"int8 row\",\"bf16\",") && lines[3].contains(",\"tg3 @ d4\",3,4,1,2,"),
        "{csv}"
    );
    // The device is the only field with commas of its own.
    let fields = |line: &str| line.split('"').step_by(2).map(|outside| outside.matches(',').count()).sum::<usize>();
    assert!(lines.iter().all(|line| fields(line) == fields(lines[0])), "{csv}");

    let markdown = tiny(&[&options[..], &["--output", "markdown"]].concat());
    assert!(markdown.contains("\n| test | threads | tokens/s |") && markdown.contains("\n| tg3 @ d4 | "), "{markdown}");
    let text = tiny(&options);
    assert!(text.starts_with("tiny (random weights): Qwen3ForCausalLM, int8 row, embedding bf16"), "{text}");
    assert!(text.contains("\npp7 ") && text.contains("\ntg3 @ d4 "), "{text}");
    let sparse = tiny(&["--depths", "0", "--format", "int4", "--sparse-24"]);
    assert!(sparse.starts_with("tiny (random weights): Qwen3ForCausalLM, int4 g128, 2:4, embedding"), "{sparse}");
}

#[test]
fn what_cannot_be_measured_is_explained() {
    let unknown = failure(&["bench", "--shape", "qwen3-5b"], 1);
    assert!(unknown.contains("`qwen3-5b`") && unknown.contains("qwen3-4b, qwen3-8b"), "{unknown}");
    let deep = failure(&["bench", "--shape", "tiny", "--depths", "4096"], 1);
    assert!(deep.contains("tg64 @ d4096") && deep.contains("4160 tokens, tiny has 1024"), "{deep}");
    let wide = failure(&["bench", "--shape", "tiny", "--depths", "1023", "--streams", "2"], 1);
    assert!(wide.contains("tg64 x2 @ d1023") && wide.contains("1087 tokens, tiny has 1024"), "{wide}");
    // What fits one stream does not fit 500 of them.
    let large = ["--depths", "900", "--memory", "64MiB"];
    tiny(&large);
    let large = failure(&[&TINY[..], &large, &["--streams", "1,500"]].concat(), 1);
    assert!(large.contains("tiny needs ") && large.contains(" for tg3 x500 @ d900; 64.0 MiB are available"), "{large}");
    assert!(large.contains("fewer --streams"), "{large}");
    let nothing = failure(&["bench", "--shape", "tiny", "--prefill", "0", "--decode", "0"], 1);
    assert!(nothing.contains("nothing to measure"), "{nothing}");
    let clock = failure(&[&TINY[..], &["--device", "cpu", "--profile"]].concat(), 1);
    assert!(clock.contains("the CPU is none") && clock.contains("--device gpu"), "{clock}");
    let sparse = failure(&["bench", "--shape", "tiny", "--format", "int8", "--sparse-24"], 1);
    assert!(sparse.contains("int8 has no variant with 2:4 sparsity"), "{sparse}");
    let groups = failure(&["bench", "--shape", "tiny", "--format", "mxfp4", "--group-size", "64"], 1);
    assert!(groups.contains("mxfp4") && groups.contains("64"), "{groups}");
    for usage in [
        &["bench"][..],
        &["bench", "--shape", "tiny", "--threads", "1,0"],
        &["bench", "model", "--shape", "tiny"],
        &["bench", "--shape", "tiny", "--format", "fp4", "--no-cache"],
        &["bench", "--shape", "tiny", "--revision", "main"],
        &["bench", "--shape", "tiny", "--depths", "1,x"],
        &["bench", "--shape", "tiny", "--repetitions", "0"],
    ] {
        failure(usage, 2);
    }
    for streams in ["0", "1,0", "513", "-1", "two"] {
        let error = failure(&["bench", "--shape", "tiny", &format!("--streams={streams}")], 2);
        assert!(error.contains("--streams") && error.contains("must be a number from 1 to 512"), "{error}");
    }
}

/// Whether there is a GPU with a clock; there must be one where a GPU is asked for.
fn has_clocked_gpu() -> bool {
    let clock = GpuBackend::new(GpuOptions::default()).map(|gpu| gpu.caps().timestamps);
    let is_required = std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_some();
    assert!(!is_required || matches!(clock, Ok(true)), "a GPU with a clock is required: {clock:?}");
    clock.unwrap_or(false)
}

#[test]
fn a_profile_tells_what_a_step_is_made_of() {
    if !has_clocked_gpu() {
        return;
    }
    let args = ["bench", "--shape", "tiny", "--device", "gpu", "--depths", "0", "--repetitions", "1", "--profile"];
    let profiled = |more: &[&str]| success(&[&args[..], more].concat());
    let json = profiled(&["--prefill", "20", "--decode", "3", "--streams", "1,2", "--output", "json"]);
    let report: Value = serde_json::from_str(&json).unwrap();
    let profiles = report["profiles"].as_array().unwrap();
    let results = report["results"].as_array().unwrap();
    assert_eq!((profiles.len(), results.len()), (3, 3));
    for (profile, result) in profiles.iter().zip(results) {
        assert_eq!(profile["test"], result["test"]);
        let kernels = profile["kernels"].as_array().unwrap();
        // As many kernels as were counted when none was timed.
        let dispatches: f64 = kernels.iter().map(|kernel| number(&kernel["dispatches"])).sum();
        assert_eq!(dispatches, number(&result["kernels"]), "{profile:#}");
        let busy: f64 = kernels.iter().map(|kernel| number(&kernel["seconds"])).sum();
        assert!(0.0 < busy && number(&profile["idle_seconds"]) >= 0.0, "{profile:#}");
    }
    // Decoding: the head, and gate and up of both layers.
    let linears = profiles[1]["kernels"].as_array().unwrap().iter().filter(|kernel| kernel["kernel"] == "linear_rows");
    let matrices: Vec<(&Value, f64)> = linears.map(|it| (&it["matrix"], number(&it["dispatches"]))).collect();
    assert!(matrices.contains(&(&serde_json::json!([256, 64]), 3.0)), "{matrices:?}");

    let text = profiled(&["--prefill", "7", "--decode", "1"]);
    for wanted in ["\npp7: a prompt takes ", "\ntg1: a token takes ", "\nlinear_rows ", "\nbetween kernels "] {
        assert!(text.contains(wanted), "{wanted:?}: {text}");
    }
    let markdown = profiled(&["--prefill", "0", "--decode", "1", "--streams", "2", "--output", "markdown"]);
    assert!(markdown.contains("\ntg1 x2: a token of each stream takes "), "{markdown}");
    assert!(markdown.contains("\n| between kernels | "), "{markdown}");
    let csv = failure(&[&args[..], &["--output", "csv"]].concat(), 1);
    assert!(csv.contains("--output csv has no place for a profile"), "{csv}");
}

#[cfg(feature = "bundled-model")]
#[test]
fn a_model_is_measured_as_it_is() {
    let args = ["bench", "bundled", "-p", "0", "-n", "2", "-d", "0", "-r", "1", "--output", "json"];
    let report: Value = serde_json::from_str(&success(&args)).unwrap();
    assert_eq!(report["random_weights"], false);
    assert_eq!(report["results"].as_array().unwrap().len(), 1);
    let deep = failure(&["bench", "bundled", "-d", "1000"], 1);
    assert!(deep.contains("1024"), "{deep}");
}

#[test]
fn the_doctor_finds_nothing_broken() {
    let report: Value = serde_json::from_str(&success(&["doctor", "--json"])).unwrap();
    assert_eq!(report["ok"], true);
    assert!(report["compiler"].as_str().unwrap().starts_with("rustc "), "{report}");
    let simd = report["simd_available"].as_array().unwrap();
    assert!(simd.contains(&report["simd"]) && simd.contains(&"portable".into()), "{report}");
    let devices = report["devices"].as_array().unwrap().iter().map(|device| device.as_str().unwrap());
    let gpus = devices.filter(|device| device.starts_with("gpu:") && !device.contains("cannot be used")).count();
    // Two arithmetics a SIMD level and a GPU, and the bundled model.
    assert_eq!(report["checks"].as_array().unwrap().len(), 2 * (simd.len() + gpus) + 1, "{report}");
    for bandwidth in report["read_bandwidth"].as_array().unwrap() {
        assert!(number(&bandwidth["bytes_per_second"]["median"]) > 0.0, "{report}");
    }
    assert_eq!(report["read_bandwidth"][0]["threads"], 1);
}
