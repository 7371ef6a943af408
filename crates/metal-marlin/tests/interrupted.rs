//! `quantize` that is killed or runs out of room: nothing half-written ever looks whole, and the same command goes on to
//! the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Instant;

use libtest_mimic::{Arguments, Trial};
use marlin_checkpoint::{CheckpointWriter, Dtype, PlannedTensor, WriterOptions};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_metal-marlin");

fn main() {
    let test = |name: &str, run: fn()| {
        Trial::test(name, move || {
            run();
            Ok(())
        })
    };
    let full = test("a_full_file_system_is_an_error_and_no_loss", full_file_system);
    libtest_mimic::run(
        &Arguments::from_args(),
        vec![
            test("killed_ten_times_it_resumes_to_the_same_bytes", || killed_ten_times(&Work::new(MATRICES))),
            test("killed_ten_times_while_it_calibrates", || killed_ten_times(&Work::to_calibrate())),
            test("a_limit_on_files_is_an_error_and_no_loss", file_limit),
            test("a_target_that_cannot_be_written_is_named", unwritable),
            test("a_full_standard_output_is_an_error", full_standard_output),
            // Mounting a small file system takes a user namespace, which not every machine grants.
            full.with_ignored_flag(!can_mount()),
        ],
    )
    .exit();
}

/// A checkpoint to quantise, and where to put it.
struct Work {
    folder: TempDir,
    options: Vec<String>,
}

/// Enough that a run has several syncs behind it when it is killed.
const MATRICES: usize = 24;
const ROWS: usize = 1024;
const COLS: usize = 1024;

impl Work {
    fn new(matrices: usize) -> Self {
        let options = ["--method", "rtn"].map(str::to_owned).to_vec();
        let work = Self { folder: tempfile::tempdir().unwrap(), options };
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let name = |layer: usize| format!("model.layers.{layer}.mlp.up_proj.weight");
        let plan = (0..matrices).map(|layer| PlannedTensor::raw(name(layer), Dtype::BF16, vec![ROWS, COLS])).collect();
        let options = WriterOptions::default();
        let config = json!({"architectures": ["LlamaForCausalLM"]});
        let mut writer = CheckpointWriter::create(&work.path("model"), plan, config, Vec::new(), &options).unwrap();
        let mut bytes = vec![0; ROWS * COLS * 2];
        for layer in 0..matrices {
            random.fill_bytes(&mut bytes);
            // Exponents from 2^-8 to 2^-1: whatever else the bits say, the weight is an ordinary one.
            bytes.iter_mut().skip(1).step_by(2).for_each(|high| *high = *high & 0x83 | 0x3c);
            writer.write_raw(&name(layer), Dtype::BF16, &[ROWS, COLS], &bytes).unwrap();
        }
        writer.finish().unwrap();
        work
    }

    /// A model that runs, with a text.
    fn to_calibrate() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(crates.join("marlin-model/tests/goldens/qwen3-gqa2-tied").join(file), model.join(file)).unwrap();
        }
        let letters: serde_json::Map<_, _> =
            ('a'..='z').zip(0..).map(|(letter, id)| (letter.to_string(), id.into())).collect();
        let tokenizer =
            json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": letters, "merges": []}});
        fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let text = folder.path().join("text");
        fs::write(&text, "the quick brown fox jumps over the lazy dog ".repeat(400)).unwrap();
        let options = ["--calibration", text.to_str().unwrap()].map(str::to_owned).to_vec();
        Self { folder, options }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, out: &Path) -> Vec<String> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let options = ["--format", "int4", "--json"].map(str::to_owned);
        let command = vec!["quantize".to_owned(), text(&self.path("model")), text(out)];
        [command, options.to_vec(), self.options.clone()].concat()
    }

    fn start(&self, out: &Path) -> Child {
        let mut command = Command::new(PROGRAM);
        command.args(self.arguments(out)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs it to the end; tensors that earlier runs had finished.
    fn complete(&self, out: &Path) -> u64 {
        let output = self.start(out).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["resumed_tensors"].as_u64().unwrap()
    }
}

/// A folder's files and their bytes.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

fn killed_ten_times(work: &Work) {
    const SEED: u64 = 7;
    let whole = work.path("whole");
    let started = Instant::now();
    work.complete(&whole);
    let duration = started.elapsed();
    let expected = contents(&whole);

    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let (mut kills, mut outputs) = (0, 0);
    while kills < 10 {
        let out = work.path(&format!("out-{outputs}"));
        let mut child = work.start(&out);
        let delay = duration * (random.next_u32() % 1000) / 2000;
        thread::sleep(delay);
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        println!("seed {SEED}: kill {kills} after {delay:.1?} of {duration:.1?}, whole: {}", out.exists());
        if out.exists() {
            assert_eq!(contents(&out), expected, "a folder that exists is whole");
            outputs += 1;
        }
    }
    let out = work.path(&format!("out-{outputs}"));
    println!("the last run went on after {} tensors", work.complete(&out));
    assert_eq!(contents(&out), expected);
    assert!(!work.path(&format!("out-{outputs}.partial")).exists());
}

/// A run through a shell that prepares what it runs in.
fn in_shell(prepare: &str, arguments: &[String]) -> Output {
    let script = format!("{prepare}; exec \"$0\" \"$@\"");
    Command::new("sh").args(["-c", &script, PROGRAM]).args(arguments).output().unwrap()
}

/// The message of a run that ended in an error.
fn error(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?} {stderr}", output.status);
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{stderr}");
    stderr
}

fn file_limit() {
    let work = Work::new(3);
    let (whole, out) = (work.path("whole"), work.path("out"));
    work.complete(&whole);
    // Blocks of 512 bytes, or of 1024 to some shells: the weights need three times as much.
    let message = error(&in_shell("ulimit -f 500", &work.arguments(&out)));
    assert!(message.contains("out.partial") && message.contains("ulimit -f"), "{message}");
    assert!(!out.exists());
    work.complete(&out);
    assert_eq!(contents(&out), contents(&whole));
}

fn unwritable() {
    let work = Work::new(1);
    let message = error(&work.start(Path::new("/dev/null/out")).wait_with_output().unwrap());
    assert!(message.contains("/dev/null/out") && message.contains("ot a directory"), "{message}");
}

fn full_standard_output() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens/qwen3-gqa2-tied");
    let golden = golden.to_str().unwrap();
    for arguments in [vec!["plan", golden], vec!["doctor"], vec!["completions", "bash"]] {
        let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
        let message = error(&in_shell("exec > /dev/full", &arguments));
        assert!(message.contains("No space left"), "{arguments:?}: {message}");
    }
}

const NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--mount"];

fn can_mount() -> bool {
    let mount = "mount -t tmpfs -o size=64k tmpfs /mnt";
    Command::new("unshare").args(NAMESPACE).args(["sh", "-c", mount]).output().is_ok_and(|run| run.status.success())
}

/// The file system lives as long as the namespace, so one script fills it, makes it larger, and goes on.
fn full_file_system() {
    let work = Work::new(3);
    let (whole, copy) = (work.path("whole"), work.path("copy"));
    work.complete(&whole);
    let script = r#"
        mount -t tmpfs -o size=1m tmpfs /mnt
        "$@" >&2 && exit 3
        test -e /mnt/out && exit 4
        mount -o remount,size=16m /mnt
        "$@" && cp -r /mnt/out "$COPY""#;
    let output = Command::new("unshare")
        .args(NAMESPACE)
        .args(["sh", "-c", script, "sh", PROGRAM])
        .args(work.arguments(Path::new("/mnt/out")))
        .env("COPY", &copy)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{}: {stderr}", output.status);
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{stderr}");
    for words in ["no space left for /mnt/out.partial", "bytes are still to be written", "same command to resume"] {
        assert!(stderr.contains(words), "{stderr}");
    }
    assert_eq!(contents(&copy), contents(&whole));
}
