//! The command line as a person meets it.

use std::path::Path;
use std::process::{Command, Output};

/// What a run of the program wrote and how it ended.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
    command.args(args);
    command
}

fn metal_marlin(args: &[&str]) -> Run {
    program(args).output().unwrap().into()
}

#[test]
fn help_explains_every_command_with_examples() {
    let general = metal_marlin(&["--help"]);
    assert_eq!(general.code, Some(0));
    for command in [
        "run",
        "chat",
        "quantize",
        "plan",
        "eval",
        "quality",
        "bench",
        "cache",
        "doctor",
        "verify-kernels",
        "completions",
        "man",
    ] {
        assert!(general.stdout.contains(&format!("\n  {command} ")), "{}", general.stdout);
        let help = metal_marlin(&[command, "--help"]);
        assert_eq!(help.code, Some(0), "{command}");
        assert!(help.stdout.contains("Examples:"), "{command}: {}", help.stdout);
    }
    assert!(general.stdout.contains("Examples:"));
    let run = metal_marlin(&["run", "--help"]).stdout;
    assert!(run.contains("[MODEL] <PROMPT>"), "{run}");
}

#[test]
fn the_version_is_the_crates() {
    assert_eq!(metal_marlin(&["--version"]).stdout, concat!("metal-marlin ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in
        [&["run"][..], &["run", "a", "b", "c"], &["run", "x", "--max-tokens", "0"], &["jump"], &["run", "x", "--hop"]]
    {
        let run = metal_marlin(args);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains("error:") && run.stdout.is_empty(), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn a_missing_model_is_named() {
    let run = metal_marlin(&["run", "no/such/model", "Hello"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.starts_with("error: there is no model folder or GGUF file at no/such/model"), "{}", run.stderr);
    assert!(run.stderr.contains("config.json"), "{}", run.stderr);
}

#[test]
fn a_folder_that_is_no_model_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let run = metal_marlin(&["run", path, "Hello"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains(path) && run.stderr.contains("\n  caused by: "), "{}", run.stderr);
    assert!(run.stderr.contains(Path::new(path).join("config.json").to_str().unwrap()), "{}", run.stderr);
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let run = metal_marlin(&["completions", shell]);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(run.stdout.contains("quantize") && run.stdout.contains("chat-template"), "{shell}");
    }
}

#[test]
fn the_manual_has_a_page_for_each_command() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("share/man1");
    let run = metal_marlin(&["man", pages.to_str().unwrap()]);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    for (page, text) in [("metal-marlin.1", "quantize"), ("metal-marlin-chat.1", "chat\\-template")] {
        let page = std::fs::read_to_string(pages.join(page)).unwrap();
        assert!(page.contains(".TH") && page.contains(text), "{page}");
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let run = metal_marlin(&["man", file.to_str().unwrap()]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains(file.to_str().unwrap()), "{}", run.stderr);
}

#[cfg(not(feature = "bundled-model"))]
#[test]
fn without_the_bundled_model_a_model_must_be_named() {
    let run = metal_marlin(&["run", "Hello"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("no MODEL given"), "{}", run.stderr);
}

#[cfg(feature = "bundled-model")]
mod bundled {
    use std::io::{Read, Write};
    use std::process::Stdio;

    use serde_json::Value;

    use super::*;

    /// The final JSON object of a run.
    fn json(args: &[&str]) -> Value {
        let run = metal_marlin(&[&["run", "--json"], args].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert_eq!(run.stderr, "");
        serde_json::from_str(&run.stdout).unwrap()
    }

    fn text(output: &Value) -> &str {
        output["text"].as_str().unwrap()
    }

    #[test]
    fn a_seed_repeats_a_text() {
        let args = ["run", "Once upon a time", "--max-tokens", "20", "--seed", "1"];
        let first = metal_marlin(&args);
        assert_eq!((first.code, first.stderr.as_str()), (Some(0), ""));
        assert!(first.stdout.len() > 20 && first.stdout.ends_with('\n'), "{:?}", first.stdout);
        assert_eq!(metal_marlin(&args).stdout, first.stdout);
        let threaded = metal_marlin(&[&args[..], &["--threads", "1"]].concat());
        assert_eq!(threaded.stdout, first.stdout);
        let other = metal_marlin(&["run", "Once upon a time", "--max-tokens", "20", "--seed", "2"]);
        assert_ne!(other.stdout, first.stdout);
    }

    #[test]
    fn json_says_everything() {
        let output = json(&["Once upon a time", "--max-tokens", "12", "--seed", "1", "--ignore-eos"]);
        assert_eq!(output["tokens"].as_array().unwrap().len(), 12);
        assert_eq!(output["generated_tokens"], 12);
        assert_eq!(output["finish_reason"], "length");
        assert!(output["prompt_tokens"].as_u64().unwrap() > 1);
        assert!(output["timings"]["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
        let streamed = metal_marlin(&["run", "Once upon a time", "--max-tokens", "12", "--seed", "1", "--ignore-eos"]);
        assert_eq!(streamed.stdout.strip_suffix('\n').unwrap(), text(&output));
    }

    #[test]
    fn temperature_0_needs_no_seed() {
        let args = ["The sun was", "--max-tokens", "10", "--temperature", "0"];
        let plain = json(&args);
        assert_eq!(plain["tokens"], json(&args)["tokens"]);
        assert_eq!(plain["tokens"], json(&[&args[..], &["--repetition-penalty", "1"]].concat())["tokens"]);
    }

    #[test]
    fn a_stop_string_ends_the_text() {
        let args = ["Once upon a time", "--max-tokens", "40", "--seed", "1"];
        let whole = json(&args);
        // The end of one word and the beginning of the next: no token is cut like that.
        let space = text(&whole).match_indices(' ').nth(5).unwrap().0;
        let (before, after) = text(&whole).split_at(space);
        let stop: String = before.chars().rev().take(1).chain(after.chars().take(2)).collect();
        let stopped = json(&[&args[..], &["--stop", &stop]].concat());
        assert_eq!(text(&stopped), text(&whole).split(&stop).next().unwrap());
        assert_eq!((&stopped["finish_reason"], &stopped["stopped_at"]), (&"stop_string".into(), &stop.into()));
    }

    #[test]
    fn options_may_stand_between_model_and_prompt() {
        let run = |args: &[&str]| {
            let run = metal_marlin(args);
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            run.stdout
        };
        let settings = ["--temperature", "0", "--max-tokens", "4"];
        let before = run(&[&["run"][..], &settings, &["bundled", "Once upon a time"]].concat());
        let between = run(&[&["run", "bundled"][..], &settings, &["Once upon a time"]].concat());
        assert_eq!(before, between);
        assert_eq!(metal_marlin(&["run", "--seed", "1"]).code, Some(2));
        assert_eq!(metal_marlin(&["run", "a", "b", "c"]).code, Some(2));
    }

    #[test]
    fn the_prompt_can_come_from_standard_input() {
        let mut child = program(&["run", "-", "--max-tokens", "5", "--temperature", "0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"The sun was\n").unwrap();
        let piped = Run::from(child.wait_with_output().unwrap());
        let named = metal_marlin(&["run", "The sun was", "--max-tokens", "5", "--temperature", "0"]);
        assert_eq!((piped.code, piped.stdout), (Some(0), named.stdout));
    }

    #[test]
    fn a_prompt_too_long_for_the_context_is_refused_with_the_numbers() {
        let run = metal_marlin(&["run", "one two three four five six seven eight", "--context", "4"]);
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.starts_with("error: the prompt has "), "{}", run.stderr);
        assert!(run.stderr.contains("the context of 4 tokens"), "{}", run.stderr);

        let run = metal_marlin(&["run", &"word ".repeat(3000)]);
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.contains("the context of 1024 tokens"), "{}", run.stderr);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let run = metal_marlin(&["run", "Hello", "--temperature", "-1"]);
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.contains("temperature must be a number from 0 up, found -1\n"), "{}", run.stderr);
        // The model's own settings could be at fault as well.
        assert!(run.stderr.contains("generation_config.json"), "{}", run.stderr);
        assert_eq!(metal_marlin(&["run", "Hello", "--top-p", "NaN"]).code, Some(1));
        let run = metal_marlin(&["run", "Hello", "--context", "5000"]);
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.contains("5000") && run.stderr.contains("1024"), "{}", run.stderr);
    }

    #[test]
    fn the_context_ends_the_text() {
        let output = json(&["Once upon a time", "--context", "16", "--max-tokens", "100", "--ignore-eos"]);
        let tokens = output["prompt_tokens"].as_u64().unwrap() + output["generated_tokens"].as_u64().unwrap();
        assert_eq!((tokens, &output["finish_reason"]), (16, &"context".into()));
    }

    #[test]
    fn nobody_reading_on_is_no_error() {
        let mut child = program(&["run", "Once upon a time", "--max-tokens", "500", "--seed", "1", "--ignore-eos"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        drop(child.stdout.take());
        let run = Run::from(child.wait_with_output().unwrap());
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    }

    #[test]
    fn verbose_reports_on_standard_error_only() {
        let args = ["run", "Once upon a time", "--max-tokens", "5", "--seed", "1"];
        let verbose = metal_marlin(&[&args[..], &["--verbose"]].concat());
        assert_eq!(verbose.stdout, metal_marlin(&args).stdout);
        for word in ["Qwen3ForCausalLM", "tokens/s", "load", "cpu"] {
            assert!(verbose.stderr.contains(word), "{word}: {}", verbose.stderr);
        }
    }

    #[test]
    fn exact_activations_and_f32_keys_stay_close() {
        let args = ["Once upon a time", "--max-tokens", "1", "--temperature", "0"];
        let fast = json(&args);
        let exact = json(&[&args[..], &["--exact", "--kv", "f32"]].concat());
        assert_eq!(fast["tokens"], exact["tokens"]);
    }

    /// The engine gives a GPU its next step before it has read the token of the last one.
    #[test]
    fn a_gpu_writes_what_the_processor_writes() {
        let has_gpu = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
        assert!(has_gpu || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
        if !has_gpu {
            return;
        }
        let write = |device: &str, sampling: &[&str]| {
            let args = ["run", "Once upon a time", "-n", "24", "--exact", "--kv", "f32", "--device", device];
            // Drivers have things of their own to say to standard error.
            let run = metal_marlin(&[&args[..], sampling].concat());
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            run.stdout
        };
        for sampling in [&["--temperature", "0"][..], &["--seed", "7", "--top-k", "40", "--top-p", "0.9"]] {
            let written = write("cpu", sampling);
            assert!(written.len() > 24);
            assert_eq!(write("gpu", sampling), written, "{sampling:?}");
        }
    }
}
