//! Tiles that are kept for the next start.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Map, Value, json};

use super::cache::{files_below, ids};
use super::{Home, ID, WEIGHTS, finish, generate, golden, model, tokens};
use crate::server::{Files, Server};

const EMBEDDING: &str = "model.embed_tokens.weight";
/// More than what tiles are kept of.
const BYTES: u64 = 260 << 20;

/// A model whose vocabulary is filled up with tokens that are all zeros, which take no room on disk.
fn write_large_model(folder: &Path) {
    let mut files = model();
    let (mut tensors, data) = take_weights(&mut files);
    // The embedding comes last, so that what it lacks is the end of the file.
    let mut names: Vec<String> = tensors.keys().cloned().collect();
    names.sort_by_key(|name| (name == EMBEDDING, name.clone()));
    let (mut bytes, mut end, mut vocabulary) = (Vec::new(), 0, 0);
    for name in &names {
        let tensor = &mut tensors[name];
        let offset = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let start = bytes.len() as u64;
        bytes.extend_from_slice(&data[offset(0)..offset(1)]);
        end = bytes.len() as u64;
        if name == EMBEDDING {
            let row_bytes = (end - start) / tensor["shape"][0].as_u64().unwrap();
            vocabulary = BYTES / row_bytes;
            end = start + vocabulary * row_bytes;
            tensor["shape"][0] = vocabulary.into();
        }
        tensor["data_offsets"] = json!([start, end]);
    }
    let mut config: Value = serde_json::from_slice(&files["config.json"]).unwrap();
    config["vocab_size"] = vocabulary.into();
    write_sparse(folder, files, &config, tensors, &bytes, end);
}

/// The tensors of a model, by their names, and the bytes they lie in.
fn take_weights(files: &mut Files) -> (Map<String, Value>, Vec<u8>) {
    let weights = files.remove(WEIGHTS).unwrap();
    let header_bytes = u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
    let (header, data) = weights[8..].split_at(header_bytes);
    let mut tensors: Map<String, Value> = serde_json::from_slice(header).unwrap();
    tensors.remove("__metadata__");
    (tensors, data.to_vec())
}

/// Writes a model whose tensors take `end` bytes, zeros behind the first ones.
fn write_sparse(folder: &Path, files: Files, config: &Value, tensors: Map<String, Value>, bytes: &[u8], end: u64) {
    fs::create_dir(folder).unwrap();
    for (name, content) in files {
        fs::write(folder.join(name), content).unwrap();
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let header = Value::from(tensors).to_string();
    let mut file = File::create(folder.join(WEIGHTS)).unwrap();
    file.write_all(&[&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

/// A mixture whose experts are all zeros, which take no room on disk, and as wide as it takes for tiles to be kept of them.
fn write_large_mixture(folder: &Path) {
    let mut files = golden("qwen3moe-top3-norm");
    let (mut tensors, data) = take_weights(&mut files);
    let (experts, others): (Vec<String>, Vec<String>) =
        tensors.keys().cloned().partition(|name| name.contains(".experts."));
    let mut bytes = Vec::new();
    for name in &others {
        let tensor = &mut tensors[name];
        let offset = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let (start, values) = (bytes.len(), &data[offset(0)..offset(1)]);
        bytes.extend_from_slice(values);
        tensor["data_offsets"] = json!([start, bytes.len()]);
    }
    let mut config: Value = serde_json::from_slice(&files["config.json"]).unwrap();
    let hidden = config["hidden_size"].as_u64().unwrap();
    let width = BYTES / (experts.len() as u64 * hidden * 2);
    config["moe_intermediate_size"] = width.into();
    let mut end = bytes.len() as u64;
    for name in &experts {
        let shape = if name.contains("down_proj") { [hidden, width] } else { [width, hidden] };
        let next = end + hidden * width * 2;
        tensors[name] = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [end, next] });
        end = next;
    }
    write_sparse(folder, files, &config, tensors, &bytes, end);
}

fn tile_ids(home: &Home) -> Vec<String> {
    ids(&home.list()["tiles"])
}

#[test]
fn a_large_model_is_put_into_order_once() {
    let server = Server::start(&[]);
    let home = Home::new(&server);
    write_large_model(&home.path("mine"));
    let cpu = ["mine", "--device", "cpu"];
    let wanted = home.tokens(&[&cpu[..], &["--no-cache"]].concat());
    assert!(tile_ids(&home).is_empty());

    assert_eq!(home.tokens(&cpu), wanted);
    let list = home.list();
    let tiles = &list["tiles"][0];
    assert_eq!(list["tiles"].as_array().unwrap().len(), 1);
    assert_eq!(tiles["model"], home.path("mine").canonicalize().unwrap().to_str().unwrap());
    assert!(tiles["whole"] == true && tiles["bytes"].as_u64().unwrap() >= BYTES, "{tiles}");
    let path = Path::new(tiles["path"].as_str().unwrap());
    let made = fs::metadata(path).unwrap().modified().unwrap();
    assert!(home.run(&["cache", "ls"]).stdout.contains("tiles"));

    // It is used as it is.
    let contents = fs::read(path).unwrap();
    assert_eq!(home.tokens(&cpu), wanted);
    assert!(fs::read(path).unwrap() == contents);
    assert!(fs::metadata(path).unwrap().modified().unwrap() > made, "its last use");

    // Cut short or of other weights it is made anew.
    File::options().write(true).open(path).unwrap().set_len(contents.len() as u64 / 2).unwrap();
    assert_eq!(home.tokens(&cpu), wanted);
    assert_eq!(fs::metadata(path).unwrap().len(), contents.len() as u64);
    File::options().append(true).open(home.path("mine").join(WEIGHTS)).unwrap().set_modified(made).unwrap();
    assert_eq!(home.tokens(&cpu), wanted);
    assert_eq!(tile_ids(&home).len(), 1);
    assert!(fs::read(path).unwrap() != contents, "the key is another");

    // What a killed process left is listed as such.
    let id = tile_ids(&home).remove(0);
    fs::rename(path, path.with_extension("partial")).unwrap();
    assert_eq!(home.list()["tiles"][0]["whole"], false);
    fs::rename(path.with_extension("partial"), path).unwrap();
    let removed = home.run(&["cache", "rm", &id, "--yes"]);
    assert!(removed.code == Some(0) && removed.stdout.contains(&format!("removed {id}")), "{}", removed.stdout);
    assert!(files_below(&home.path("cache/tiles")).is_empty());
}

/// Experts that a GPU leaves to the processor have tiles of their own until those of the whole model are there.
#[test]
fn experts_on_the_host_are_put_into_order_once() {
    let has_gpu = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(has_gpu || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    if !has_gpu {
        return;
    }
    let server = Server::start(&[]);
    let home = Home::new(&server);
    write_large_mixture(&home.path("mine"));
    // Drivers have things of their own to say to standard error.
    let tokens = |args: &[&str]| {
        let run = home.run(&generate(&[&["mine"], args].concat()));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(!run.stderr.contains("warning: this model"), "{}", run.stderr);
        serde_json::from_str::<Value>(&run.stdout).unwrap()["tokens"].clone()
    };
    let last_use = |id: &str| fs::metadata(home.path("cache/tiles").join(id)).unwrap().modified().unwrap();
    let split = ["--device", "gpu", "--expert-device", "cpu"];
    let wanted = tokens(&[&split[..], &["--no-cache"]].concat());
    assert!(tile_ids(&home).is_empty());
    assert_eq!(tokens(&split), wanted);
    let experts = tile_ids(&home);
    assert!(experts.len() == 1 && experts[0].starts_with("mine-experts-"), "{experts:?}");
    let made = last_use(&experts[0]);
    assert_eq!(tokens(&split), wanted);
    let used = last_use(&experts[0]);
    assert!(used > made);

    tokens(&["--device", "cpu"]);
    let all = tile_ids(&home);
    let whole = all.iter().find(|id| **id != experts[0]).unwrap();
    let made = last_use(whole);
    assert_eq!(tokens(&split), wanted);
    assert!(last_use(whole) > made && last_use(&experts[0]) == used && tile_ids(&home).len() == 2);
}

#[test]
fn small_models_and_bundled_ones_are_not_kept() {
    let server = Server::start(&[(ID, "main", model())]);
    let home = Home::new(&server);
    home.tokens(&[ID, "--device", "cpu"]);
    home.tokens(&["bundled", "--device", "cpu"]);
    assert!(tile_ids(&home).is_empty());
}

#[test]
fn processes_that_start_at_once_make_one_file() {
    let server = Server::start(&[]);
    let home = Home::new(&server);
    write_large_model(&home.path("mine"));
    let start = || {
        let mut command = home.command(&generate(&["mine", "--device", "cpu"]));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let started = [start(), start(), start()];
    let outputs = started.map(|process| process.wait_with_output().unwrap());
    let text = |output: &std::process::Output| {
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["tokens"].clone()
    };
    assert!(outputs.iter().all(|output| text(output) == text(&outputs[0])));
    assert_eq!(files_below(&home.path("cache/tiles")).len(), 1);
}

#[test]
fn a_cache_that_cannot_be_written_is_a_warning() {
    let server = Server::start(&[]);
    let home = Home::new(&server);
    write_large_model(&home.path("mine"));
    let cpu = ["mine", "--device", "cpu"];
    let wanted = home.tokens(&[&cpu[..], &["--no-cache"]].concat());
    // A folder that nobody may write to does not stop root, a file in its place does.
    fs::create_dir_all(home.path("cache")).unwrap();
    fs::write(home.path("cache/tiles"), "").unwrap();
    fs::set_permissions(home.path("cache/tiles"), fs::Permissions::from_mode(0o444)).unwrap();
    let run = finish(home.command(&generate(&cpu)));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(found["tokens"], wanted);
    assert!(run.stderr.contains("warning: ") && run.stderr.contains("cache/tiles"), "{}", run.stderr);
    assert!(run.stderr.contains("--no-cache") && run.stderr.contains("METAL_MARLIN_CACHE"), "{}", run.stderr);
    // Nothing is said where nothing is tried.
    assert_eq!(tokens(home.command(&generate(&[&cpu[..], &["--no-cache"]].concat()))), wanted);
}
