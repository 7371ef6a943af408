//! Models quantised while they are opened, and `cache`.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use super::{Home, ID, WEIGHTS, commit, finish, generate, golden, model, other_weights, tokens};
use crate::server::Server;

impl Home {
    pub(crate) fn list(&self) -> Value {
        let run = self.run(&["cache", "ls", "--json"]);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        serde_json::from_str(&run.stdout).unwrap()
    }

    /// A successful command's output.
    fn stdout(&self, args: &[&str]) -> String {
        let run = self.run(args);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{args:?}");
        run.stdout
    }
}

/// A model that is quantised already.
pub(crate) fn packed() -> super::Files {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("model")).unwrap();
    for (name, content) in model() {
        fs::write(path("model").join(name), content).unwrap();
    }
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
    let command =
        command.arg("quantize").arg(path("model")).arg(path("out")).args(["--method", "mse", "--format", "fp4"]);
    assert!(command.output().unwrap().status.success());
    let files = fs::read_dir(path("out")).unwrap().map(|entry| entry.unwrap());
    files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect()
}

/// The IDs in a list.
pub(crate) fn ids(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

/// The files below a folder.
pub(crate) fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn a_model_is_quantised_once() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    let quantized = home.tokens(&[ID, "--format", "int4", "--group-size", "32"]);
    let list = home.list();
    let entry = &list["quantized"][0];
    assert_eq!(list["quantized"].as_array().unwrap().len(), 1);
    assert_eq!((&entry["model"], &entry["version"]), (&ID.into(), &commit(&model()).into()));
    assert_eq!((&entry["format"], &entry["whole"]), (&"int4 g32".into(), &true.into()));
    let folder = Path::new(entry["path"].as_str().unwrap());
    let inode = || fs::metadata(folder.join(WEIGHTS)).unwrap().ino();
    let made = inode();

    // What `quantize` makes of it.
    home.stdout(&["quantize", ID, "out", "--method", "mse", "--format", "int4", "--group-size", "32"]);
    for file in ["config.json", WEIGHTS, "tokenizer.json"] {
        assert!(fs::read(home.path("out").join(file)).unwrap() == fs::read(folder.join(file)).unwrap(), "{file}");
    }
    assert_eq!(home.tokens(&["out"]), quantized);

    // Another recipe is another model.
    home.tokens(&[ID, "--bits", "8"]);
    assert_eq!(ids(&home.list()["quantized"]).len(), 2);

    // Neither the Hub nor the original is needed again.
    drop(server);
    let original = format!("{ID}@{}", commit(&model()));
    let removed = home.stdout(&["cache", "rm", &original, "--yes"]);
    assert!(removed.starts_with(&format!("removed {original}\n")), "{removed}");
    assert!(!home.repo().exists());
    assert_eq!(home.tokens(&[ID, "--format", "int4", "--group-size", "32"]), quantized);
    assert_eq!(inode(), made);
    assert!(home.failure(&["run", ID, "x", "--format", "fp4"]).contains("cannot be reached"));
}

#[test]
fn a_folder_is_quantised_again_when_it_changes() {
    let server = Server::start(&[(ID, "main", packed())]);
    let home = Home::new(&server);
    // What is packed already makes no entry.
    let again = home.failure(&["run", ID, "x", "--format", "int8"]);
    assert!(again.contains("tiny/model is quantised already"), "{again}");
    assert!(ids(&home.list()["quantized"]).is_empty());

    let folder = home.path("mine");
    fs::create_dir(&folder).unwrap();
    let write = |files: super::Files| {
        for (name, content) in files {
            fs::write(folder.join(name), content).unwrap();
        }
    };
    write(model());
    let first = home.tokens(&["mine", "--format", "fp4"]);
    // However the folder is named.
    assert_eq!(home.tokens(&["./mine/", "--format", "fp4"]), first);
    assert_eq!(ids(&home.list()["quantized"]).len(), 1);
    write(other_weights());
    assert_ne!(home.tokens(&["mine", "--format", "fp4"]), first);
    let list = home.list();
    let entries = list["quantized"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    // What goes along with the weights counts as well.
    fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    home.tokens(&["mine", "--format", "fp4"]);
    assert_eq!(ids(&home.list()["quantized"]).len(), 3);
    assert!(entries.iter().all(|entry| entry["model"] == folder.canonicalize().unwrap().to_str().unwrap()), "{list}");

    let packed = entries[0]["path"].as_str().unwrap();
    let again = home.failure(&["run", packed, "x", "--format", "int8"]);
    assert!(again.contains("quantised already"), "{again}");
    for options in [&["--group-size", "32"][..], &["--method", "rtn"]] {
        assert_eq!(home.run(&[&["run", "mine", "x"], options].concat()).code, Some(2), "{options:?}");
    }
}

#[test]
fn every_command_that_runs_models_quantises() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    fs::write(home.path("text"), "the text ".repeat(20)).unwrap();
    home.stdout(&["eval", ID, "--format", "fp4", "--text", "text", "--context", "32", "--baseline", ID]);
    let bench = ["--prefill", "4", "--decode", "2", "--depths", "0", "--repetitions", "1"];
    let text = home.stdout(&[&["bench", ID, "--format", "fp4"], &bench[..]].concat());
    assert!(text.contains("tiny/model in fp4 g128"), "{text}");
    // One entry serves both.
    assert_eq!(ids(&home.list()["quantized"]).len(), 1);
    assert!(home.failure(&["bench", ID, "--group-size", "32"]).contains("name a --format"));
    assert!(home.failure(&["bench", ID, "--format", "bf16"]).contains("bf16 quantises nothing; formats are fp4,"));
}

#[test]
fn without_the_cache_nothing_is_left() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    let kept = home.tokens(&[ID, "--format", "fp4"]);
    home.stdout(&["cache", "rm", "--all", "--yes"]);
    assert_eq!(home.tokens(&[ID, "--format", "fp4", "--no-cache"]), kept);
    assert!(home.list()["quantized"].as_array().unwrap().is_empty());
    assert_eq!(files_below(&home.path("tmp")), [""; 0]);
    // Nor by a failure.
    home.failure(&["run", ID, "x", "--format", "fp4", "--no-cache", "--context", "100000"]);
    assert_eq!(files_below(&home.path("tmp")), [""; 0]);
}

#[test]
fn processes_that_want_the_same_wait_for_one() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    let start = |_| {
        let mut command = home.command(&generate(&[ID, "--format", "int4"]));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..4).map(start).collect();
    let outputs: Vec<Value> = children
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            serde_json::from_slice::<Value>(&output.stdout).unwrap()["tokens"].clone()
        })
        .collect();
    assert!(outputs.iter().all(|tokens| *tokens == outputs[0]));
    assert_eq!(ids(&home.list()["quantized"]).len(), 1);
    // Each large file came once.
    assert_eq!(super::ranges(&server).len(), 1);
}

#[test]
fn an_unfinished_model_is_listed_and_finished() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    let quantized = home.tokens(&[ID, "--format", "fp4"]);
    let entry = home.list()["quantized"][0].clone();
    let (id, folder) = (entry["id"].as_str().unwrap(), Path::new(entry["path"].as_str().unwrap()));
    // As a kill before the end leaves it.
    let partial = folder.with_extension("partial");
    fs::create_dir(&partial).unwrap();
    fs::rename(folder, partial.join("model")).unwrap();
    let text = home.stdout(&["cache", "ls"]);
    assert!(text.contains("fp4 g128 (unfinished)") && text.contains(id), "{text}");

    // Nobody removes what is being made.
    let lock = File::create(home.path("cache/locks").join(id)).unwrap();
    lock.lock().unwrap();
    let busy = home.failure(&["cache", "rm", id, "--yes"]);
    assert!(busy.contains("is being made by another process"), "{busy}");
    drop(lock);
    assert_eq!(home.tokens(&[ID, "--format", "fp4"]), quantized);
    assert!(!partial.exists());
}

#[test]
fn only_what_is_named_is_removed() {
    let server = Server::start(&[
        (ID, "main", model()),
        (ID, "other", other_weights()),
        ("tiny/second", "main", golden("llama-gqa4-bias-sharded")),
    ]);
    let home = Home::new(&server);
    home.tokens(&[ID, "--format", "fp4"]);
    home.tokens(&[ID, "--revision", "other"]);
    home.tokens(&["tiny/second"]);
    // What other programs keep there.
    let foreign = home.path("hf/hub/models--tiny--foreign/snapshots").join("0".repeat(40));
    fs::create_dir_all(&foreign).unwrap();
    fs::write(foreign.join("config.json"), "{}").unwrap();
    fs::create_dir_all(home.path("cache/quantized/notes")).unwrap();
    fs::write(home.path("cache/quantized/notes/text"), "mine").unwrap();

    let list = home.list();
    let (main, other) = (format!("{ID}@{}", commit(&model())), format!("{ID}@{}", commit(&other_weights())));
    let second = format!("tiny/second@{}", commit(&golden("llama-gqa4-bias-sharded")));
    let mut wanted = [main.clone(), other.clone(), second.clone()];
    wanted.sort_unstable();
    let mut snapshots = ids(&list["snapshots"]);
    snapshots.sort_unstable();
    assert_eq!(snapshots, wanted);
    let quantized = ids(&list["quantized"]);
    assert_eq!(quantized.len(), 1);
    let text = home.stdout(&["cache", "ls"]);
    for words in [&main, &quantized[0], "fp4 g128", "original (main)", "just now", "KiB"] {
        assert!(text.contains(words), "{words}: {text}");
    }

    let ambiguous = home.failure(&["cache", "rm", ID, "--yes"]);
    assert!(ambiguous.contains("stands for 3 things") && ambiguous.contains(&quantized[0]), "{ambiguous}");
    let unknown = home.failure(&["cache", "rm", "tiny/foreign", "--yes"]);
    assert!(unknown.contains("nothing in the caches is called tiny/foreign"), "{unknown}");
    assert!(home.failure(&["cache", "rm", "../../hf", "--yes"]).contains("nothing in the caches"));
    let unasked = home.failure(&["cache", "rm", &quantized[0]]);
    assert!(unasked.contains("pass --yes"), "{unasked}");
    assert_eq!(home.run(&["cache", "rm"]).code, Some(2));
    assert_eq!(home.list()["snapshots"].as_array().unwrap().len(), 3);

    // Contents that another snapshot has stay.
    let tokenizer = home.blob(&model()["tokenizer.json"]);
    home.stdout(&["cache", "rm", &main, "--yes"]);
    assert!(!home.blob(&model()[WEIGHTS]).exists() && tokenizer.exists());
    assert!(!home.repo().join("refs/main").exists());
    drop(server);
    home.tokens(&[ID, "--revision", "other"]);

    home.stdout(&["cache", "rm", "second", "--yes"]);
    home.stdout(&["cache", "rm", ID, "--all", "--yes"]);
    let list = home.list();
    assert!(list["snapshots"].as_array().unwrap().is_empty() && list["quantized"].as_array().unwrap().is_empty());
    assert_eq!(home.stdout(&["cache", "rm", "--all", "--yes"]), "there is nothing to remove\n");
    assert!(foreign.join("config.json").exists() && home.path("cache/quantized/notes/text").exists());
    assert!(!home.repo().exists() && !home.path("hf/hub/models--tiny--second").exists());
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    let file = home.path("file");
    fs::write(&file, "").unwrap();
    let with_cache = |args: &[&str]| {
        let mut command = home.command(args);
        command.env("METAL_MARLIN_CACHE", &file);
        command
    };
    let run = finish(with_cache(&["run", ID, "x", "--format", "fp4"]));
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains(file.to_str().unwrap()) && run.stderr.contains("METAL_MARLIN_CACHE"), "{}", run.stderr);
    // As stored, or in a temporary folder, it runs all the same.
    tokens(with_cache(&generate(&[ID])));
    tokens(with_cache(&generate(&[ID, "--format", "fp4", "--no-cache"])));

    // Drivers of GPUs write to standard error as they please.
    let doctor = home.run(&["doctor", "--json"]);
    assert_eq!(doctor.code, Some(0), "{}", doctor.stderr);
    let report: Value = serde_json::from_str(&doctor.stdout).unwrap();
    assert_eq!(report["model_folders"][0]["models"], 1);
    assert!(report["model_folders"][0]["bytes"].as_u64().unwrap() > model()[WEIGHTS].len() as u64);
}
