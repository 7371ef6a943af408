//! Replays the corpora of the fuzz targets: inputs that reach every part of the code, and those that once broke it.

use std::fs;
use std::path::Path;

#[path = "../../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "to the fuzz targets it is a library")]
mod fuzz;

/// Runs a target over its corpus.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() > 50, "{} inputs in {}", files.len(), folder.display());
    for file in files {
        // The last line of a failing test names the input.
        println!("{}", file.display());
        run(&fs::read(&file).unwrap());
    }
}

#[test]
fn checkpoint() {
    replay("checkpoint", fuzz::checkpoint);
}

#[test]
fn packed() {
    replay("packed", fuzz::packed);
}

#[test]
fn chat_template() {
    replay("chat_template", fuzz::chat_template);
}

#[test]
fn gguf() {
    replay("gguf", fuzz::gguf);
}
