//! Models by their id on the Hub, which is played by a server in this process, and the cache of quantised models.

mod cache;
mod server;
mod tiles;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use self::server::{Fault, Files, GOOD_TOKEN, POOR_TOKEN, Server, commit, etag};

const ID: &str = "tiny/model";
const WEIGHTS: &str = "model.safetensors";

/// A machine of its own: a home folder, and a Hub that may be gone.
struct Home {
    folder: TempDir,
    endpoint: String,
}

/// What a run of the program wrote and how it ended.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Home {
    fn new(server: &Server) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), endpoint: server.endpoint() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
        let temporary = self.path("tmp");
        fs::create_dir_all(&temporary).unwrap();
        command
            .args(args)
            .env_clear()
            .env("HOME", self.folder.path())
            .env("TMPDIR", temporary)
            .env("HF_HOME", self.path("hf"))
            .env("HF_ENDPOINT", &self.endpoint)
            .env("METAL_MARLIN_CACHE", self.path("cache"))
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        finish(self.command(args))
    }

    /// The tokens that a model generates.
    fn tokens(&self, args: &[&str]) -> Value {
        tokens(self.command(&generate(args)))
    }

    /// The message of a run that fails.
    fn failure(&self, args: &[&str]) -> String {
        let run = self.run(args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{}", run.stderr);
        run.stderr
    }

    /// The folder of the model in the Hub's cache.
    fn repo(&self) -> PathBuf {
        self.path("hf/hub/models--tiny--model")
    }

    fn blob(&self, content: &[u8]) -> PathBuf {
        self.repo().join("blobs").join(etag(content))
    }
}

fn finish(mut command: Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The arguments to generate a few tokens with a model.
fn generate<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let model = args[0];
    let options = ["--json", "--temperature", "0", "--max-tokens", "8", "--ignore-eos", "--exact", "--threads", "1"];
    [&["run", model, "the prompt"], &args[1..], &options].concat()
}

fn tokens(command: Command) -> Value {
    let run = finish(command);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    let output: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(output["tokens"].as_array().unwrap().len(), 8, "{output}");
    output["tokens"].clone()
}

/// A tiny random checkpoint with a tokenizer whose tokens are characters, and files that are not wanted.
fn golden(name: &str) -> Files {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name);
    let mut files = Files::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        files.insert(entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    }
    let config: Value = serde_json::from_slice(&files["config.json"]).unwrap();
    let letters = ('a'..='z').chain(" .,".chars()).chain('\u{100}'..);
    let size = usize::try_from(config["vocab_size"].as_u64().unwrap()).unwrap();
    let vocabulary: Map<String, Value> =
        letters.take(size).enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
    let model = json!({ "type": "BPE", "vocab": vocabulary, "merges": [] });
    let tokenizer =
        json!({ "version": "1.0", "added_tokens": [], "model": model, "decoder": { "type": "Fuse" } }).to_string();
    files.insert("tokenizer.json".to_owned(), tokenizer.into_bytes());
    files.insert("README.md".to_owned(), b"A model.".to_vec());
    files.insert("pytorch_model.bin".to_owned(), b"pickle".to_vec());
    files
}

fn model() -> Files {
    golden("qwen3-gqa2-tied")
}

/// The same model with other weights in its norms, which are not quantised.
fn other_weights() -> Files {
    let mut files = golden("qwen3-gqa2-tied");
    let other = golden("qwen3-gqa3-window");
    files.insert("config.json".to_owned(), other["config.json"].clone());
    files.insert(WEIGHTS.to_owned(), other[WEIGHTS].clone());
    files
}

#[test]
fn a_model_is_fetched_once_and_shared() {
    let files = model();
    let server = Server::start(&[(ID, "main", files.clone())]);
    let mut home = Home::new(&server);
    let fetched = home.tokens(&[ID]);

    let log = server.take_log();
    for unwanted in ["README.md", "pytorch_model.bin", "golden.safetensors"] {
        assert!(!log.iter().any(|request| request.path.ends_with(unwanted)), "{log:?}");
    }
    // The layout of the Hub's own tools.
    let snapshot = home.repo().join("snapshots").join(commit(&files));
    assert_eq!(fs::read_to_string(home.repo().join("refs/main")).unwrap(), commit(&files));
    let mut names: Vec<_> = fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    for name in names {
        let content = &files[name.to_str().unwrap()];
        let link = Path::new("../../blobs").join(etag(content));
        assert_eq!(fs::read_link(snapshot.join(&name)).unwrap(), link);
        assert_eq!(&fs::read(snapshot.join(&name)).unwrap(), content);
    }

    // What is in the cache needs nobody.
    drop(server);
    assert_eq!(home.tokens(&[ID]), fetched);
    assert_eq!(home.tokens(&[ID, "--revision", &commit(&files)]), fetched);
    assert_eq!(home.tokens(&[snapshot.to_str().unwrap()]), fetched);
    home.endpoint = "http://nowhere.invalid".to_owned();
    let mut offline = home.command(&generate(&[ID]));
    offline.env("HF_HUB_OFFLINE", "1");
    assert_eq!(tokens(offline), fetched);
}

#[test]
fn a_folder_wins() {
    let files = model();
    let server = Server::start(&[(ID, "main", other_weights())]);
    let home = Home::new(&server);
    let folder = home.path(ID);
    fs::create_dir_all(&folder).unwrap();
    for (name, content) in &files {
        fs::write(folder.join(name), content).unwrap();
    }
    home.tokens(&[ID]);
    let error = home.failure(&["run", ID, "x", "--revision", "main"]);
    assert!(error.contains("--revision main") && error.contains("on this machine"), "{error}");
    assert!(server.take_log().is_empty());
}

#[test]
fn all_shards_are_fetched_and_other_commands_know_ids() {
    let files = golden("llama-gqa4-bias-sharded");
    let server = Server::start(&[(ID, "main", files.clone())]);
    let home = Home::new(&server);
    home.tokens(&[ID]);
    for (name, content) in files.iter().filter(|(name, _)| name.starts_with("model-")) {
        assert_eq!(&fs::read(home.blob(content)).unwrap(), content, "{name}");
    }
    fs::write(home.path("text"), "the text ".repeat(20)).unwrap();
    for args in [
        &["eval", ID, "--text", "text", "--context", "32", "--baseline", ID][..],
        &["bench", ID, "--prefill", "4", "--decode", "2", "--depths", "0", "--repetitions", "1"],
        &["quantize", ID, "out", "--method", "mse", "--format", "int4"],
    ] {
        let run = home.run(args);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
    assert!(home.path("out/config.json").is_file());
    let run = home.run(&["chat", ID]);
    assert!(run.stderr.contains("chat template"), "{}", run.stderr);
}

#[test]
fn planning_needs_no_weights() {
    for name in ["qwen3-gqa2-tied", "llama-gqa4-bias-sharded"] {
        let files = golden(name);
        let server = Server::start(&[(ID, "main", files.clone())]);
        let home = Home::new(&server);
        let plan = || {
            let run = home.run(&["plan", ID, "--memory", "1GiB", "--json"]);
            assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
            serde_json::from_str::<Value>(&run.stdout).unwrap()
        };
        let planned = plan();
        assert_eq!(planned["model"], ID);
        let inspected = home.run(&["inspect", ID]);
        assert_eq!((inspected.code, inspected.stderr.as_str()), (Some(0), ""));
        assert!(files.values().all(|content| content.len() < 16_384 || !home.blob(content).exists()));
        assert_eq!(fs::read_dir(home.path("tmp")).unwrap().count(), 0);
        // The plan of the whole model.
        home.tokens(&[ID]);
        drop(server);
        assert_eq!(plan(), planned);
    }
}

#[test]
fn a_packed_model_is_planned_too() {
    let server = Server::start(&[(ID, "main", cache::packed())]);
    let home = Home::new(&server);
    let run = home.run(&["plan", ID, "--memory", "1GiB", "--json"]);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    drop(server);
    home.tokens(&[ID]);
}

#[test]
fn tokens_go_to_the_hub_and_nowhere_else() {
    let server = Server::start(&[("tiny/gated", "main", model())]);
    let home = Home::new(&server);
    let gated = home.failure(&["run", "tiny/gated", "x"]);
    assert!(gated.contains("tiny/gated is gated: accept its terms at http"), "{gated}");
    assert!(gated.contains("set HF_TOKEN"), "{gated}");
    let with_token = |token: &str| {
        let mut command = home.command(&generate(&["tiny/gated"]));
        command.env("HF_TOKEN", token);
        command
    };
    let refused = finish(with_token(POOR_TOKEN)).stderr;
    assert!(refused.contains("is gated") && refused.contains("the account of HF_TOKEN"), "{refused}");
    let wrong = finish(with_token("hf_wrong")).stderr;
    assert!(wrong.contains("refuses the token: Invalid credentials") && wrong.contains("/settings/tokens"), "{wrong}");
    assert!(!wrong.contains("hf_wrong"), "{wrong}");

    server.take_log();
    let fetched = tokens(with_token(GOOD_TOKEN));
    let log = server.take_log();
    assert!(log.iter().any(|request| request.path.starts_with("/cdn/")));
    for request in log {
        let sent = request.headers.get("authorization");
        assert_eq!(sent.is_some(), !request.path.starts_with("/cdn/"), "{request:?}");
    }

    // A token saved by logging in.
    let other = Home::new(&server);
    fs::create_dir(other.path("hf")).unwrap();
    fs::write(other.path("hf/token"), format!("{GOOD_TOKEN}\n")).unwrap();
    assert_eq!(other.tokens(&["tiny/gated"]), fetched);
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let files = model();
    let server = Server::start(&[(ID, "main", files.clone())]);
    let home = Home::new(&server);
    server.set_fault(Fault::Cut(100_000));
    home.tokens(&[ID]);
    assert_eq!(ranges(&server), [None, Some("bytes=100000-".to_owned())]);
    assert_eq!(fs::read(home.blob(&files[WEIGHTS])).unwrap(), files[WEIGHTS]);
}

#[test]
fn a_killed_download_goes_on() {
    let files = model();
    let server = Server::start(&[(ID, "main", files.clone())]);
    let home = Home::new(&server);
    server.set_fault(Fault::Stall(120_000));
    let mut child = home.command(&generate(&[ID])).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let part = home.blob(&files[WEIGHTS]).with_extension("incomplete");
    while fs::metadata(&part).map_or(0, |part| part.len()) < 120_000 {
        assert!(child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    server.set_fault(Fault::None);
    server.take_log();
    // Half a model is none.
    let mut offline = home.command(&["run", ID, "x"]);
    offline.env("HF_HUB_OFFLINE", "1");
    assert!(finish(offline).stderr.contains("is not in the cache"));

    home.tokens(&[ID]);
    assert_eq!(ranges(&server), [Some("bytes=120000-".to_owned())]);
    assert_eq!(fs::read(home.blob(&files[WEIGHTS])).unwrap(), files[WEIGHTS]);
    assert!(!part.exists());

    // Killed when everything had arrived.
    fs::rename(home.blob(&files[WEIGHTS]), &part).unwrap();
    home.tokens(&[ID]);
    assert!(ranges(&server).is_empty());
}

/// The ranges in which large files were asked for.
fn ranges(server: &Server) -> Vec<Option<String>> {
    let large = server.take_log().into_iter().filter(|request| request.path.starts_with("/cdn/"));
    large.map(|mut request| request.headers.remove("range")).collect()
}

#[test]
fn damage_is_noticed() {
    let files = model();
    let server = Server::start(&[(ID, "main", files.clone())]);
    let home = Home::new(&server);
    server.set_fault(Fault::Flip);
    let error = home.failure(&["run", ID, "x"]);
    assert!(error.contains("arrived damaged") && error.contains(&etag(&files[WEIGHTS])), "{error}");
    let weights = home.blob(&files[WEIGHTS]);
    assert!(!weights.exists() && !weights.with_extension("incomplete").exists());
    server.set_fault(Fault::None);
    home.tokens(&[ID]);

    // A part that is not the beginning of this file.
    fs::remove_dir_all(home.repo()).unwrap();
    fs::create_dir_all(weights.parent().unwrap()).unwrap();
    fs::write(weights.with_extension("incomplete"), vec![7; 1000]).unwrap();
    assert!(home.failure(&["run", ID, "x"]).contains("arrived damaged"));
    home.tokens(&[ID]);
}

#[test]
fn revisions_are_kept_apart_and_share_what_is_equal() {
    let (first, second) = (model(), other_weights());
    let mut renamed = first.clone();
    renamed.insert("generation_config.json".to_owned(), b"{\"top_k\": 3}".to_vec());
    let server = Server::start(&[
        (ID, "main", first.clone()),
        (ID, "other", second.clone()),
        (ID, "refs/pr/1", renamed.clone()),
    ]);
    let home = Home::new(&server);
    let main = home.tokens(&[ID]);
    let other = home.tokens(&[ID, "--revision", "other"]);
    assert_ne!(main, other);
    assert_eq!(home.tokens(&[ID, "--revision", &commit(&second)]), other);
    server.take_log();
    assert_eq!(home.tokens(&[ID, "--revision", "refs/pr/1"]), main);
    let log = server.take_log();
    let fetched: Vec<&str> = log.iter().filter_map(|request| request.path.split("/resolve/").nth(1)).collect();
    assert_eq!(fetched, [format!("{}/generation_config.json", commit(&renamed))]);
    assert_eq!(fs::read_to_string(home.repo().join("refs/refs/pr/1")).unwrap(), commit(&renamed));
}

#[test]
fn what_cannot_be_fetched_is_explained() {
    let mut pickled = model();
    pickled.remove(WEIGHTS);
    let mut without_config = model();
    without_config.remove("config.json");
    let mut without_tokenizer = model();
    without_tokenizer.remove("tokenizer.json");
    let server = Server::start(&[
        (ID, "main", model()),
        ("tiny/pickled", "main", pickled),
        ("tiny/empty", "main", without_config),
        ("tiny/mute", "main", without_tokenizer),
    ]);
    let mut home = Home::new(&server);
    for (args, words) in [
        (&["tiny/none"][..], "there is no model tiny/none at http"),
        (&["tiny/none"], "nor a folder tiny/none here"),
        (&[ID, "--revision", "v9"], "tiny/model has no revision v9"),
        (&[ID, "--revision", "../../x"], "`../../x` is no revision"),
        (&["tiny/pickled"], "neither model.safetensors nor its index, only golden.safetensors, pytorch_model.bin"),
        (&["tiny/empty"], "tiny/empty has no config.json"),
        (&["tiny/mute"], "tiny/mute has no tokenizer.json"),
        (&["a/b/c"], "there is no model folder or GGUF file at a/b/c"),
        (&["a/b/c"], "such as Qwen/Qwen3-4B"),
        (&["gpt2"], "there is no model folder or GGUF file at gpt2"),
    ] {
        let error = home.failure(&[&["run", args[0], "x"], &args[1..]].concat());
        assert!(error.contains(words), "{args:?}: {error}");
    }
    let lonely = home.failure(&["run", "Qwen/Qwen3-4B"]);
    assert!(lonely.contains("a prompt is missing"), "{lonely}");

    let mut offline = home.command(&["run", ID, "x"]);
    offline.env("HF_HUB_OFFLINE", "1");
    let error = finish(offline).stderr;
    assert!(error.contains("HF_HUB_OFFLINE") && error.contains("name the folder"), "{error}");
    drop(server);
    let error = home.failure(&["run", ID, "x"]);
    assert!(error.contains(&format!("cannot fetch {ID}: {} cannot be reached", home.endpoint)), "{error}");
    assert!(error.contains("caused by: ") && error.contains("refused"), "{error}");
    home.endpoint = "nonsense".to_owned();
    assert!(home.failure(&["run", ID, "x"]).contains("nonsense"));
}

#[test]
fn a_server_that_is_no_hub_is_told_apart() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let answers = ["<html>", "{\"sha\": \"../..\", \"siblings\": []}", "{\"siblings\": []}"];
    let server = thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
            let text =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}", answer.len());
            std::io::Write::write_all(&mut stream, text.as_bytes()).unwrap();
        }
    });
    let home = Home { folder: tempfile::tempdir().unwrap(), endpoint };
    for _ in answers {
        let error = home.failure(&["run", ID, "x"]);
        assert!(error.contains("is HF_ENDPOINT a Hub?"), "{error}");
    }
    server.join().unwrap();
}
