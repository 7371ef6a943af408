//! The engine with blocks on disk, on the fake model, whose tokens tell every token that it finds in the cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::engine::{ROOMY, engine, expected, finish, greedy};
use super::fake_model::Sizes;
use crate::{BlockStore, BlockStoreOptions, Engine, EngineError, EngineStats, Request, RequestId, StoreError};

/// Reports of all tests together.
static REPORTS: AtomicUsize = AtomicUsize::new(0);

fn options(folder: &Path, fingerprint: &str) -> BlockStoreOptions {
    BlockStoreOptions {
        folder: folder.to_owned(),
        max_bytes: 1 << 20,
        fingerprint: fingerprint.to_owned(),
        report: |_| {
            REPORTS.fetch_add(1, Ordering::Relaxed);
        },
    }
}

/// The engine with its blocks on disk.
pub(super) fn kept(engine: Engine, folder: &Path, fingerprint: &str) -> Engine {
    engine.with_block_store(BlockStore::open(options(folder, fingerprint)).unwrap()).unwrap()
}

const SIZES: Sizes = Sizes { context: 200, ..ROOMY };

/// A process: an engine that answers one request of 8 tokens, and what it had to do for that.
fn process(folder: &Path, fingerprint: &str, request: Request) -> (Vec<u32>, usize, EngineStats) {
    let (model, _) = engine(SIZES);
    let mut engine = kept(model, folder, fingerprint);
    let id = engine.add(request).unwrap();
    let output = finish(&mut engine).remove(&id).unwrap();
    assert_eq!(engine.used_kv_blocks(), 0);
    (output.tokens, output.cached.0, engine.stats())
}

/// Asks for a continuation; gives how many tokens need not be computed.
fn ask(folder: &Path, prompt: &[u32]) -> usize {
    let (tokens, cached, stats) = process(folder, "model", greedy(prompt, 8));
    assert_eq!(tokens, expected(prompt, 8));
    assert_eq!(stats.prompt_tokens as usize + cached, prompt.len());
    assert_eq!(stats.stored_hits as usize, cached / 4 * 4);
    cached
}

fn prompt(first: u32) -> Vec<u32> {
    (0..41).map(|i| (first + i * i) % 256).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let fans = fs::read_dir(folder).unwrap().map(|fan| fan.unwrap().path()).filter(|fan| fan.is_dir());
    let mut files: Vec<PathBuf> =
        fans.flat_map(|fan| fs::read_dir(fan).unwrap()).map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn what_was_computed_outlives_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(ask(folder.path(), &prompt(0)), 0);
    // Of 49 tokens the last was never fed back: 12 blocks of 4.
    assert_eq!(files(folder.path()).len(), 12);
    assert_eq!(ask(folder.path(), &prompt(0)), 40, "all but the last, whose logits are wanted");
    // A conversation goes on: the answer is known, too.
    let next = [prompt(0), expected(&prompt(0), 8), vec![1, 2, 3]].concat();
    assert_eq!(ask(folder.path(), &next), 48);
}

#[test]
fn what_is_equal_before_a_difference_is_used_and_nothing_after_it() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    for difference in [0, 1, 3, 4, 17, 39] {
        let mut other = prompt(0);
        other[difference] += 1;
        let (tokens, cached, stats) = process(folder.path(), "model", greedy(&other, 8));
        assert_eq!(tokens, expected(&other, 8));
        // Whole blocks come from disk.
        assert_eq!((cached, stats.stored_hits as usize), (difference / 4 * 4, difference / 4 * 4), "{difference}");
    }
}

#[test]
fn another_model_and_another_salt_find_nothing() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    let (_, cached, _) = process(folder.path(), "another model", greedy(&prompt(0), 8));
    assert_eq!(cached, 0);
    let salted = || Request { cache_salt: "tenant".to_owned(), ..greedy(&prompt(0), 8) };
    assert_eq!(process(folder.path(), "model", salted()).1, 0);
    assert_eq!(process(folder.path(), "model", salted()).1, 40, "but its own");
    let (model, _) = engine(Sizes { block_tokens: 8, ..SIZES });
    let mut engine = kept(model, folder.path(), "model");
    let id = engine.add(greedy(&prompt(0), 8)).unwrap();
    assert_eq!(finish(&mut engine)[&id].cached.0, 0, "blocks of another size");
}

/// One of many ways to damage a folder of blocks.
fn damage(folder: &Path, rng: &mut ChaCha8Rng) -> String {
    let files = files(folder);
    let below = |rng: &mut ChaCha8Rng, limit: usize| (rng.next_u64() % limit as u64) as usize;
    let (target, other) = (&files[below(rng, files.len())], &files[below(rng, files.len())]);
    let mut bytes = fs::read(target).unwrap();
    if bytes.is_empty() {
        return "nothing was left".to_owned();
    }
    let at = below(rng, bytes.len());
    let kind = match below(rng, 8) {
        0 | 1 => {
            bytes[at] ^= 1 << below(rng, 8);
            "a bit flipped"
        }
        2 => {
            bytes.truncate(at);
            "cut"
        }
        3 => {
            let end = (at + 1 + below(rng, 40)).min(bytes.len());
            bytes[at..end].fill(0);
            "zeros"
        }
        4 => {
            bytes.extend((0..=at).map(|i| i as u8));
            "longer"
        }
        5 => {
            bytes = fs::read(other).unwrap();
            "another block's file"
        }
        6 => {
            let taken = fs::read(other).unwrap();
            bytes.splice(at.., taken.into_iter().skip(at));
            "the end of another"
        }
        _ => {
            bytes.drain(at..(at + 1 + below(rng, 8)).min(bytes.len()));
            "bytes lost"
        }
    };
    fs::write(target, bytes).unwrap();
    format!("{kind} at {at} of {}", target.display())
}

#[test]
fn a_thousand_damaged_folders_give_no_wrong_answer() {
    let whole = tempfile::tempdir().unwrap();
    ask(whole.path(), &prompt(0));
    let wanted = expected(&prompt(0), 8);
    let kept: Vec<(PathBuf, Vec<u8>)> =
        files(whole.path()).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut damaged = 0;
    for round in 0..1000 {
        kept.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
        let done: Vec<String> = (0..1 + round % 3).map(|_| damage(whole.path(), &mut rng)).collect();
        let (tokens, cached, stats) = process(whole.path(), "model", greedy(&prompt(0), 8));
        assert_eq!(tokens, wanted, "{done:?}");
        assert!(cached.is_multiple_of(4) && cached <= 40);
        damaged += stats.store.damaged;
    }
    // Many are behind a damaged one, in an answer's blocks, or put back what was there.
    assert!(damaged > 500, "{damaged} were met");
    // What was removed is there again.
    ask(whole.path(), &prompt(0));
    assert_eq!(ask(whole.path(), &prompt(0)), 40);
}

#[test]
fn the_folder_stays_within_its_size_and_keeps_what_was_used_last() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    let bytes = fs::metadata(&files(folder.path())[0]).unwrap().len();
    let small = || BlockStoreOptions { max_bytes: 12 * bytes + bytes / 2, ..options(folder.path(), "model") };
    for first in [50, 100, 150] {
        let (model, _) = engine(SIZES);
        let mut engine = model.with_block_store(BlockStore::open(small()).unwrap()).unwrap();
        engine.add(greedy(&prompt(first), 8)).unwrap();
        finish(&mut engine);
        drop(engine);
        assert_eq!(files(folder.path()).len(), 12);
    }
    // One block too many was asked for: the last block of the oldest went first, then those before it.
    assert_eq!((ask(folder.path(), &prompt(150)), ask(folder.path(), &prompt(0))), (40, 0));
    let tiny = BlockStoreOptions { max_bytes: bytes - 1, ..options(folder.path(), "model") };
    let refused = engine(SIZES).0.with_block_store(BlockStore::open(tiny).unwrap()).unwrap_err();
    assert!(matches!(refused, EngineError::Store(StoreError::TooSmall { block_bytes, .. }) if block_bytes == bytes));
    assert_eq!(files(folder.path()).len(), 0, "a smaller size is kept from the start");
}

#[test]
fn a_pool_that_is_too_small_takes_what_fits() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    ask(folder.path(), &prompt(50));
    for overlaps in [false, true] {
        let (model, _) = engine(Sizes { blocks: 13, overlaps, ..SIZES });
        let mut engine = kept(model, folder.path(), "model");
        let ids: Vec<RequestId> = [0, 50, 0, 50].map(|first| engine.add(greedy(&prompt(first), 8)).unwrap()).to_vec();
        let outputs = finish(&mut engine);
        for (id, first) in ids.iter().zip([0, 50, 0, 50]) {
            assert_eq!(outputs[id].tokens, expected(&prompt(first), 8));
        }
        assert!(engine.stats().stored_hits >= 40, "{:?}", engine.stats());
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

#[test]
fn several_engines_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut engines: Vec<Engine> = (0..3).map(|_| kept(engine(SIZES).0, folder.path(), "model")).collect();
    for round in 0..4 {
        for engine in &mut engines {
            let id = engine.add(greedy(&prompt(10 * round), 8)).unwrap();
            assert_eq!(finish(engine)[&id].tokens, expected(&prompt(10 * round), 8));
        }
    }
    drop(engines);
    assert_eq!(files(folder.path()).len(), 4 * 12, "each block once, and nothing unfinished");
    assert_eq!(ask(folder.path(), &prompt(30)), 40);
}

#[test]
fn a_request_that_leaves_while_blocks_come_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    let mut engine = kept(engine(SIZES).0, folder.path(), "model");
    for patience in 0..6 {
        let id = engine.add(greedy(&prompt(0), 8)).unwrap();
        let other = engine.add(greedy(&prompt(100 + patience), 3)).unwrap();
        let mut events = Vec::new();
        (0..patience).for_each(|_| engine.step(&mut events).unwrap());
        engine.cancel(id);
        let before = events.len();
        while !engine.is_idle() {
            engine.step(&mut events).unwrap();
        }
        assert!(events[before..].iter().all(|event| event.request != id));
        assert_eq!(super::engine::gather(&events)[&other].tokens, expected(&prompt(100 + patience), 3));
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

#[test]
fn a_device_that_fails_is_heard_of_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    let (model, wire) = engine(SIZES);
    let mut engine = kept(model, folder.path(), "model");
    let id = engine.add(greedy(&prompt(0), 8)).unwrap();
    wire.lock().unwrap().fail_blocks = true;
    let (mut events, mut failures) = (Vec::new(), 0);
    while !engine.is_idle() {
        failures += usize::from(engine.step(&mut events).is_err());
    }
    assert_eq!((failures, engine.used_kv_blocks()), (1, 0));
    assert_eq!(super::engine::gather(&events)[&id].tokens, expected(&prompt(0), 8));
}

#[test]
fn what_came_of_a_failure_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (model, wire) = engine(SIZES);
    let mut engine = kept(model, folder.path(), "model");
    wire.lock().unwrap().poison = Some(prompt(0)[3]);
    let id = engine.add(greedy(&prompt(0), 8)).unwrap();
    assert_eq!(finish(&mut engine)[&id].reason, Some(crate::FinishReason::NotFinite));
    drop(engine);
    assert_eq!(files(folder.path()).len(), 0);
}

#[test]
fn a_folder_that_cannot_be_used_is_an_error_and_a_disk_that_fails_later_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let error = BlockStore::open(options(&file, "model")).unwrap_err().to_string();
    assert!(error.contains("file") && error.contains("may write to"), "{error}");

    let kept_in = folder.path().join("kept/here");
    let mut engine = kept(engine(SIZES).0, &kept_in, "model");
    fs::remove_dir_all(folder.path().join("kept")).unwrap();
    fs::write(folder.path().join("kept"), "in its place").unwrap();
    let before = REPORTS.load(Ordering::Relaxed);
    let id = engine.add(greedy(&prompt(0), 8)).unwrap();
    assert_eq!(finish(&mut engine)[&id].tokens, expected(&prompt(0), 8));
    assert_eq!(engine.stats().store.dropped, 12);
    assert!(REPORTS.load(Ordering::Relaxed) > before, "somebody was told");
}

#[cfg(unix)]
#[test]
fn only_the_owner_may_read() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("kept");
    ask(&kept, &prompt(0));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let file = files(&kept).remove(0);
    assert_eq!((mode(&kept), mode(file.parent().unwrap()), mode(&file)), (0o700, 0o700, 0o600));
}

/// A pipe in the place of a block: reading it waits for somebody to write.
#[cfg(unix)]
#[test]
fn a_disk_that_does_not_answer_is_not_waited_for_long() {
    let folder = tempfile::tempdir().unwrap();
    ask(folder.path(), &prompt(0));
    let mut engine = kept(engine(SIZES).0, folder.path(), "model");
    let pipes = files(folder.path());
    for path in &pipes {
        fs::remove_file(path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    }
    let (slow, other) = (engine.add(greedy(&prompt(0), 8)).unwrap(), engine.add(greedy(&prompt(90), 8)).unwrap());
    let mut events = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut events).unwrap();
    }
    let last_of = |id| events.iter().rposition(|event| event.request == id).unwrap();
    let first_of = |id| events.iter().position(|event| event.request == id).unwrap();
    assert!(last_of(other) < first_of(slow), "others go on");
    assert_eq!(super::engine::gather(&events)[&slow].tokens, expected(&prompt(0), 8));
    assert_eq!(engine.stats().stored_hits, 0);
    // Lets the reader go.
    pipes.iter().for_each(|path| drop(File::options().write(true).read(true).open(path)));
}
