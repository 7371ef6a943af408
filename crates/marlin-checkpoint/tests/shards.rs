//! Weight files that are written apart from each other.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use marlin_checkpoint::{CheckpointError, CheckpointWriter, Dtype, PlannedTensor, Shards, WriterOptions};
use serde_json::json;

const TENSORS: usize = 7;
const BYTES: usize = 400;

fn plan() -> Vec<PlannedTensor> {
    (0..TENSORS).map(|tensor| PlannedTensor::raw(name(tensor), Dtype::U8, vec![BYTES])).collect()
}

fn name(tensor: usize) -> String {
    format!("t{tensor}")
}

fn bytes(tensor: usize) -> Vec<u8> {
    (0..BYTES).map(|i| (i * 3 + tensor * 17) as u8).collect()
}

/// Room for two tensors in a shard.
fn options(fingerprint: &str) -> WriterOptions {
    WriterOptions { fingerprint: fingerprint.to_owned(), max_shard_bytes: 1200, sync_bytes: 0, ..Default::default() }
}

fn writer(out: &Path, options: &WriterOptions) -> Result<CheckpointWriter, CheckpointError> {
    CheckpointWriter::create(out, plan(), json!({"model_type": "test"}), Vec::new(), options)
}

fn write_shard(out: &Path, shard: usize) {
    let shards = Shards::new(out, plan(), &options("a")).unwrap();
    let tensors: Vec<usize> = shards.tensors(shard).collect();
    let mut writer = shards.write(shard).unwrap();
    for tensor in tensors {
        writer.write_raw(&name(tensor), Dtype::U8, &[BYTES], &bytes(tensor)).unwrap();
    }
    writer.finish(format!("note {shard}").as_bytes()).unwrap();
}

/// Writes what is missing; how many tensors were not.
fn write_rest(out: &Path) -> usize {
    let mut writer = writer(out, &options("a")).unwrap();
    let resumed = writer.resumed();
    for tensor in 0..TENSORS {
        if !writer.is_done(&name(tensor)) {
            writer.write_raw(&name(tensor), Dtype::U8, &[BYTES], &bytes(tensor)).unwrap();
        }
    }
    writer.finish().unwrap();
    resumed
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// A folder to write to, and one that was written at once.
fn folders() -> (tempfile::TempDir, PathBuf, BTreeMap<String, Vec<u8>>) {
    let temporary = tempfile::tempdir().unwrap();
    let (out, whole) = (temporary.path().join("out"), temporary.path().join("whole"));
    assert_eq!(write_rest(&whole), 0);
    let whole = contents(&whole);
    assert_eq!(whole.len(), 4 + 2, "four shards, the index and config.json");
    (temporary, out, whole)
}

#[test]
fn any_shards_in_any_order_give_the_same_bytes() {
    for shards in [&[0, 1, 2, 3][..], &[3, 1, 0, 2], &[2], &[3, 0], &[1, 1]] {
        let (temporary, out, whole) = folders();
        for &shard in shards {
            write_shard(&out, shard);
        }
        let mut distinct = shards.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        // The last one has one tensor.
        let finished = distinct.iter().map(|shard| if *shard == 3 { 1 } else { 2 }).sum::<usize>();
        for shard in 0..4 {
            let of_out = Shards::new(&out, plan(), &options("a")).unwrap();
            assert_eq!(of_out.is_finished(shard).unwrap(), distinct.contains(&shard));
        }
        let notes: Vec<String> = distinct.iter().map(|shard| format!("note {shard}")).collect();
        let taken = writer(&out, &options("a")).unwrap();
        assert_eq!(taken.notes(), notes.iter().map(|note| note.as_bytes().to_vec()).collect::<Vec<_>>());
        drop(taken);
        // What was taken over, and then interrupted, still counts as finished for those who write shards.
        let of_out = Shards::new(&out, plan(), &options("a")).unwrap();
        assert!(distinct.iter().all(|shard| of_out.is_finished(*shard).unwrap()));
        assert_eq!(write_rest(&out), finished);
        assert_eq!(contents(&out), whole, "{shards:?}");
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 2, "nothing is left beside the outputs");
    }
}

#[test]
fn what_is_not_whole_does_not_count() {
    let (_temporary, out, whole) = folders();
    // One was dropped, one killed, and one killed between its weights and its note.
    let mut dropped = Shards::new(&out, plan(), &options("a")).unwrap().write(0).unwrap();
    dropped.write_raw("t0", Dtype::U8, &[BYTES], &bytes(0)).unwrap();
    drop(dropped);
    let mut killed = Shards::new(&out, plan(), &options("a")).unwrap().write(1).unwrap();
    killed.write_raw("t2", Dtype::U8, &[BYTES], &[0; BYTES]).unwrap();
    std::mem::forget(killed);
    write_shard(&out, 2);
    let shards = only_folder(&partial(&out).join("shards"));
    fs::remove_file(shards.join("model-00003-of-00004.note")).unwrap();
    // The file is of another length, whatever its note says.
    write_shard(&out, 3);
    fs::write(shards.join("model-00004-of-00004.safetensors"), b"cut off").unwrap();

    let of_out = Shards::new(&out, plan(), &options("a")).unwrap();
    assert!((0..4).all(|shard| !of_out.is_finished(shard).unwrap()));
    assert_eq!(fs::read_dir(&shards).unwrap().count(), 4, "what was dropped is removed");
    assert_eq!(write_rest(&out), 0);
    assert_eq!(contents(&out), whole);
}

#[test]
fn a_shard_lacks_nothing_and_holds_nothing_else() {
    let (_temporary, out, _) = folders();
    let mut shard = Shards::new(&out, plan(), &options("a")).unwrap().write(1).unwrap();
    let other = shard.write_raw("t0", Dtype::U8, &[BYTES], &bytes(0)).unwrap_err().to_string();
    assert!(other.contains("`t0`") && other.contains("model-00001-of-00004.safetensors"), "{other}");
    shard.write_raw("t2", Dtype::U8, &[BYTES], &bytes(2)).unwrap();
    let missing = shard.finish(b"").unwrap_err().to_string();
    assert!(missing.contains("`t3`"), "{missing}");
}

#[test]
fn shards_of_other_settings_are_not_mixed_in() {
    let (_temporary, out, whole) = folders();
    write_shard(&out, 0);
    let other = Shards::new(&out, plan(), &options("b")).unwrap_err();
    assert!(matches!(other, CheckpointError::OtherUnfinished { .. }), "{other}");
    let other = writer(&out, &options("b")).unwrap_err();
    assert!(matches!(other, CheckpointError::OtherUnfinished { .. }), "{other}");
    // Nor are those of an ordinary run.
    fs::remove_dir_all(partial(&out)).unwrap();
    drop(writer(&out, &options("b")).unwrap());
    let other = Shards::new(&out, plan(), &options("a")).unwrap_err();
    assert!(matches!(other, CheckpointError::OtherUnfinished { .. }), "{other}");

    // With force they are discarded, those of the same settings are not.
    let forced = |fingerprint| WriterOptions { force: true, ..options(fingerprint) };
    let shards = Shards::new(&out, plan(), &forced("b")).unwrap();
    let tensors: Vec<usize> = shards.tensors(0).collect();
    let mut shard = shards.write(0).unwrap();
    for tensor in tensors {
        shard.write_raw(&name(tensor), Dtype::U8, &[BYTES], &[0; BYTES]).unwrap();
    }
    shard.finish(b"").unwrap();
    let resumed = writer(&out, &forced("b")).unwrap().resumed();
    assert_eq!(resumed, 2);
    let resumed = writer(&out, &forced("a")).unwrap().resumed();
    assert_eq!(resumed, 0);
    write_rest(&out);
    assert_eq!(contents(&out), whole);

    let exists = Shards::new(&out, plan(), &options("a")).unwrap_err();
    assert!(matches!(exists, CheckpointError::OutputExists { .. }), "{exists}");
}

/// The one folder in a folder.
fn only_folder(parent: &Path) -> PathBuf {
    let mut entries = fs::read_dir(parent).unwrap();
    entries.next().unwrap().unwrap().path()
}

/// Where unfinished work for an output lies.
fn partial(out: &Path) -> PathBuf {
    PathBuf::from(format!("{}.partial", out.display()))
}
