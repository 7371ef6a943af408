//! Writing quantised folders, and being interrupted at it.

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{assert_says, message};
use marlin_checkpoint::{
    Checkpoint, CheckpointError, CheckpointWriter, Dtype, ExportLayout, PlannedTensor, Rotations, Storage,
    WriterOptions,
};
use marlin_format::{ColumnOrder, Element, Format, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};
use serde_json::{Value, json};

/// A matrix of any scheme whose bytes follow from `seed`; valid, because no pattern used is a non-finite scale, an
/// index out of range or a bad 2:4 pair.
fn matrix(scheme: Scheme, rows: usize, cols: usize, seed: usize) -> PackedMatrix<'static> {
    let pattern = |bytes: usize| Cow::Owned((0..bytes).map(|i| ((i * 7 + seed * 13) % 60) as u8).collect());
    PackedMatrix {
        rows,
        cols,
        scheme,
        codes: pattern(scheme.codes_bytes(rows, cols).unwrap()),
        scales: pattern(scheme.scales_bytes(rows, cols).unwrap()),
        zeros: pattern(scheme.zeros_bytes(rows, cols).unwrap()),
        globals: pattern(scheme.globals_bytes(rows, cols).unwrap()),
        group_index: vec![0; scheme.group_index_bytes(rows, cols).unwrap()].into(),
        sparse_index: vec![0x44; scheme.sparse_index_bytes(rows, cols).unwrap()].into(),
    }
}

/// Every format, and every kind of buffer that no format of ours uses yet.
fn schemes() -> Vec<Scheme> {
    let mut schemes: Vec<Scheme> = Format::ALL.iter().map(|format| format.scheme(None).unwrap()).collect();
    let fp4 = |grouping, scale| Scheme::scaled(Element::E2M1, grouping, scale);
    let tile = Grouping::Block { rows: 128, cols: 128 };
    let two_level = ScaleKind::TwoLevel { bits: 6, signed: false, super_group: 256 };
    schemes.extend([
        fp4(Grouping::Tensor, ScaleKind::F32),
        fp4(Grouping::Row, ScaleKind::Bf16),
        Scheme::scaled(Element::E4M3, tile, ScaleKind::F32),
        Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Uint(3), tile, ScaleKind::F16) },
        Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Uint(5), Grouping::Row, ScaleKind::F32) },
        Scheme { zero: ZeroKind::F32Bias, ..fp4(Grouping::Columns(32), ScaleKind::F32) },
        Scheme { zero: ZeroKind::F16Bias, ..fp4(Grouping::Columns(64), ScaleKind::F16) },
        Scheme { zero: ZeroKind::Bf16Bias, ..fp4(Grouping::Tensor, ScaleKind::Bf16) },
        Scheme { order: ColumnOrder::GroupIndex, ..fp4(Grouping::Columns(64), ScaleKind::F16) },
        Scheme { sparsity: Sparsity::TwoOfFour, ..fp4(Grouping::Columns(64), ScaleKind::F16) },
        Scheme::scaled(Element::Int(6), Grouping::Columns(16), two_level),
        // Differs from the last in a way that short names do not show.
        Scheme::scaled(
            Element::Int(6),
            Grouping::Columns(16),
            ScaleKind::TwoLevel { bits: 6, signed: true, super_group: 256 },
        ),
        Scheme {
            zero: ZeroKind::TwoLevelMin { bits: 6 },
            ..Scheme::scaled(Element::Uint(4), Grouping::Columns(32), two_level)
        },
    ]);
    schemes
}

fn config() -> Value {
    json!({ "model_type": "test", "quantization_config": { "quant_method": "stale" } })
}

fn side_files() -> Vec<(String, Vec<u8>)> {
    vec![("tokenizer.json".to_owned(), b"{}".to_vec())]
}

fn options() -> WriterOptions {
    WriterOptions { fingerprint: "test 1".to_owned(), sync_bytes: 0, ..WriterOptions::default() }
}

fn forced() -> WriterOptions {
    WriterOptions { force: true, ..options() }
}

/// A folder's files and their bytes.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn every_scheme_comes_back_bit_for_bit() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("deep/er/out/");
    // Columns that end in the middle of a group and of a byte; 2:4 needs whole quadruples.
    let shape = |scheme: &Scheme| if scheme.sparsity == Sparsity::Dense { (131, 331) } else { (131, 332) };
    let matrices: Vec<(String, PackedMatrix)> = schemes()
        .into_iter()
        .enumerate()
        .map(|(i, scheme)| (format!("m{i}.weight"), matrix(scheme, shape(&scheme).0, shape(&scheme).1, i)))
        .collect();
    let plan = matrices.iter().map(|(name, m)| PlannedTensor::matrix(name, m.rows, m.cols, m.scheme)).collect();
    let mut writer = CheckpointWriter::create(&out, plan, config(), side_files(), &options()).unwrap();
    for (name, matrix) in &matrices {
        writer.write_matrix(name, matrix).unwrap();
    }
    writer.finish().unwrap();

    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.tensor_names().count(), matrices.len());
    for (name, written) in &matrices {
        let read = checkpoint.matrix(name, written.rows, written.cols).unwrap();
        assert_eq!(&read, written, "{name} {}", written.scheme);
        let info = checkpoint.info(name).unwrap();
        assert_eq!(info.bytes, written.bytes() as u64);
        assert_eq!(matches!(info.storage, Storage::Packed(_)), !written.scheme.is_dense(), "{name} {}", written.scheme);
    }
    assert_eq!(checkpoint.config()["model_type"], "test");
    assert_eq!(checkpoint.file("tokenizer.json").unwrap().unwrap(), &b"{}"[..]);
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "nothing is left beside the output");
}

#[test]
fn bytes_on_disk_are_those_of_the_documentation() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    let scheme = Format::Int4.scheme(Some(Grouping::Columns(2))).unwrap();
    let packed = PackedMatrix {
        codes: vec![0x21, 0x03].into(),
        scales: vec![0x00, 0x3c, 0x00, 0x40].into(),
        zeros: vec![0x10].into(),
        ..matrix(scheme, 1, 3, 0)
    };
    let plan =
        vec![PlannedTensor::matrix("x.weight", 1, 3, scheme), PlannedTensor::raw("n.weight", Dtype::F32, vec![1])];
    let mut writer = CheckpointWriter::create(&out, plan, config(), vec![], &options()).unwrap();
    writer.write_matrix("x.weight", &packed).unwrap();
    writer.write_raw("n.weight", Dtype::F32, &[1], &[1, 2, 3, 4]).unwrap();
    writer.finish().unwrap();

    let file = fs::read(out.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    assert_eq!(length % 8, 0);
    let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let wanted = json!({
        "__metadata__": {"format": "pt"},
        "n.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "x.weight_scale": {"dtype": "F16", "shape": [1, 2], "data_offsets": [4, 8]},
        "x.weight": {"dtype": "U8", "shape": [1, 2], "data_offsets": [8, 10]},
        "x.weight_zero": {"dtype": "U8", "shape": [1, 1], "data_offsets": [10, 11]},
    });
    assert_eq!(header, wanted);
    assert_eq!(file[8 + length..], [1, 2, 3, 4, 0x00, 0x3c, 0x00, 0x40, 0x21, 0x03, 0x10]);

    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let scheme = json!({"element": {"uint": 4}, "grouping": {"columns": 2}, "scale": "f16", "zero": "integer"});
    let quantization = json!({
        "quant_method": "metal-marlin",
        "version": 1,
        "schemes": {"int4 g2": scheme},
        "tensors": {"x.weight": {"scheme": "int4 g2", "shape": [1, 3]}},
    });
    assert_eq!(config, json!({"model_type": "test", "quantization_config": quantization}));
}

#[test]
fn unquantised_output_has_no_quantization_config() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    let plan = vec![PlannedTensor::matrix("w", 2, 2, Scheme::F16)];
    let mut writer = CheckpointWriter::create(&out, plan, config(), vec![], &options()).unwrap();
    writer.write_matrix("w", &matrix(Scheme::F16, 2, 2, 0)).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert!(checkpoint.quantization().is_none());
    assert_eq!(checkpoint.config(), &json!({"model_type": "test"}));
}

/// What is to be rotated is said even where nothing is packed, and by our own layout alone.
#[test]
fn rotations_are_written() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    let rotations = Rotations { hidden: Some(64), mlp: None };
    let create = |layout, plan: Vec<PlannedTensor>| {
        CheckpointWriter::create(&out, plan, config(), vec![], &WriterOptions { layout, rotations, ..options() })
    };
    let plan = || vec![PlannedTensor::matrix("w", 2, 2, Scheme::F16)];
    for layout in [ExportLayout::CompressedTensors, ExportLayout::Gptq] {
        let error = create(layout, plan()).unwrap_err().to_string();
        assert!(error.contains(layout.name()) && error.contains("rotated"), "{error}");
    }
    let mut writer = create(ExportLayout::MetalMarlin, plan()).unwrap();
    writer.write_matrix("w", &matrix(Scheme::F16, 2, 2, 0)).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!((checkpoint.rotations(), checkpoint.is_quantized()), (rotations, false));
    assert_eq!(checkpoint.config()["quantization_config"]["rotations"], json!({"hidden": 64}));
}

/// A small model over several shards.
struct Model {
    matrices: Vec<(String, PackedMatrix<'static>)>,
}

const SHARD_BYTES: u64 = 4000;

impl Model {
    fn new() -> Self {
        let formats = [Format::Fp4, Format::Int3, Format::Nvfp4, Format::Bf16, Format::Fp8, Format::Int4];
        let named = formats.iter().enumerate().map(|(i, format)| {
            let scheme = format.scheme(None).unwrap();
            (format!("layers.{i}.weight"), matrix(scheme, 7 + i, 130, i))
        });
        Self { matrices: named.collect() }
    }

    fn plan(&self) -> Vec<PlannedTensor> {
        let mut plan: Vec<_> =
            self.matrices.iter().map(|(name, m)| PlannedTensor::matrix(name, m.rows, m.cols, m.scheme)).collect();
        plan.insert(2, PlannedTensor::raw("norm.weight", Dtype::BF16, vec![3]));
        plan
    }

    fn names(&self) -> Vec<String> {
        self.plan().into_iter().map(|tensor| tensor.name).collect()
    }

    fn create(&self, out: &Path, options: WriterOptions) -> Result<CheckpointWriter, CheckpointError> {
        let options = WriterOptions { max_shard_bytes: SHARD_BYTES, ..options };
        CheckpointWriter::create(out, self.plan(), config(), side_files(), &options)
    }

    fn write(&self, writer: &mut CheckpointWriter, name: &str) {
        match self.matrices.iter().find(|(n, _)| n == name) {
            Some((_, matrix)) => writer.write_matrix(name, matrix).unwrap(),
            None => writer.write_raw(name, Dtype::BF16, &[3], &[1, 2, 3, 4, 5, 6]).unwrap(),
        }
    }

    /// Writes it without interruption.
    fn write_all(&self, out: &Path, options: WriterOptions) {
        let mut writer = self.create(out, options).unwrap();
        self.names().iter().for_each(|name| self.write(&mut writer, name));
        writer.finish().unwrap();
    }

    /// Begins it and drops the writer after the first `count` tensors. A writer keeps no bytes back and does nothing
    /// when dropped, so the folder is what a kill at that moment leaves.
    fn write_some(&self, out: &Path, options: WriterOptions, count: usize) {
        let mut writer = self.create(out, options).unwrap();
        self.names().iter().take(count).for_each(|name| self.write(&mut writer, name));
    }

    /// Writes what is not done yet, last first; returns how many were done.
    fn resume(&self, out: &Path, options: WriterOptions) -> usize {
        let mut writer = self.create(out, options).unwrap();
        let resumed = writer.resumed();
        for name in self.names().iter().rev() {
            if !writer.is_done(name) {
                self.write(&mut writer, name);
            }
        }
        writer.finish().unwrap();
        resumed
    }
}

fn partial(out: &Path) -> PathBuf {
    out.with_file_name("out.partial")
}

/// A fresh place for output, and what an uninterrupted run writes there.
fn expected(model: &Model) -> (tempfile::TempDir, PathBuf, BTreeMap<String, Vec<u8>>) {
    let temporary = tempfile::tempdir().unwrap();
    let whole = temporary.path().join("whole");
    model.write_all(&whole, options());
    let files = contents(&whole);
    let out = temporary.path().join("out");
    (temporary, out, files)
}

#[test]
fn shards_stay_below_the_limit() {
    let model = Model::new();
    let (_temporary, _, files) = expected(&model);
    let shards: Vec<&String> = files.keys().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() >= 3, "{shards:?}");
    for (i, name) in shards.iter().enumerate() {
        assert_eq!(**name, format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()));
        assert!(files[*name].len() as u64 <= SHARD_BYTES, "{name} has {} bytes", files[*name].len());
    }
    let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
    let bytes: usize = model.matrices.iter().map(|(_, matrix)| matrix.bytes()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes + 6);
    assert_eq!(index["weight_map"]["norm.weight"], *shards[0]);
}

#[test]
fn a_tensor_larger_than_a_shard_gets_its_own() {
    let model = Model::new();
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    let options = WriterOptions { max_shard_bytes: 1, ..options() };
    let mut writer = CheckpointWriter::create(&out, model.plan(), config(), vec![], &options).unwrap();
    model.names().iter().for_each(|name| model.write(&mut writer, name));
    writer.finish().unwrap();
    let shards = contents(&out).into_keys().filter(|name| name.ends_with(".safetensors")).count();
    assert_eq!(shards, model.names().len());
    let checkpoint = Checkpoint::open(&out).unwrap();
    for (name, matrix) in &model.matrices {
        assert_eq!(&checkpoint.matrix_any(name).unwrap(), matrix);
    }
}

#[test]
fn a_run_killed_after_any_tensor_resumes_to_the_same_bytes() {
    let model = Model::new();
    let count = model.names().len();
    for killed_after in 0..=count {
        let (_temporary, out, files) = expected(&model);
        model.write_some(&out, options(), killed_after);
        assert!(!out.exists());
        assert_eq!(model.resume(&out, options()), killed_after);
        assert_eq!(contents(&out), files, "killed after {killed_after}");
        assert!(!partial(&out).exists());
    }
}

#[test]
fn a_run_killed_between_syncs_or_within_a_line_redoes_the_last_tensors() {
    let model = Model::new();
    let (_temporary, out, files) = expected(&model);
    // Nothing reaches the journal before the first sync.
    model.write_some(&out, WriterOptions { sync_bytes: 1 << 30, ..options() }, 4);
    model.write_some(&out, options(), 3);
    let journal = partial(&out).join("journal");
    let text = fs::read_to_string(&journal).unwrap();
    assert_eq!(text.lines().count(), 1 + 3, "{text}");
    fs::write(&journal, &text[..text.len() - 4]).unwrap();
    // The cut line counts for nothing, and the next line does not grow onto it.
    let mut writer = model.create(&out, options()).unwrap();
    assert_eq!(writer.resumed(), 2);
    model.write(&mut writer, &model.names()[5]);
    drop(writer);
    assert_eq!(model.resume(&out, options()), 3);
    assert_eq!(contents(&out), files);
}

#[test]
fn a_run_killed_before_its_journal_starts_afresh() {
    let model = Model::new();
    let (_temporary, out, files) = expected(&model);
    model.write_some(&out, options(), 2);
    let journal = partial(&out).join("journal");
    fs::write(&journal, "{\"finger").unwrap();
    assert_eq!(model.resume(&out, options()), 0);
    assert_eq!(contents(&out), files);
}

#[test]
fn unfinished_work_of_other_settings_is_not_mixed_in() {
    let model = Model::new();
    let (_temporary, out, files) = expected(&model);
    model.write_some(&out, WriterOptions { fingerprint: "test 2".to_owned(), ..options() }, 2);
    let text = message(model.create(&out, options()).unwrap_err());
    assert_says(&text, &["out.partial", "other settings", "--force"]);
    // The refusal has harmed nothing.
    let other = WriterOptions { fingerprint: "test 2".to_owned(), ..options() };
    assert_eq!(model.create(&out, other).unwrap().resumed(), 2);
    assert_eq!(model.resume(&out, forced()), 0);
    assert_eq!(contents(&out), files);

    // The same fingerprint, but another plan.
    let (_temporary, out, _) = expected(&model);
    model.write_some(&out, options(), 2);
    let fewer = model.plan().split_off(1);
    let error = CheckpointWriter::create(&out, fewer, config(), vec![], &options()).unwrap_err();
    assert_says(&message(error), &["out.partial", "another layout"]);

    fs::write(partial(&out).join("journal"), "{}\n").unwrap();
    assert_says(&message(model.create(&out, options()).unwrap_err()), &["out.partial", "damaged journal"]);
}

#[test]
fn an_existing_output_is_refused_or_replaced_as_a_whole() {
    let model = Model::new();
    let (_temporary, out, files) = expected(&model);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("config.json"), "{}").unwrap();
    fs::write(out.join("old.safetensors"), "old").unwrap();

    assert_says(&message(model.create(&out, options()).unwrap_err()), &["out exists", "--force"]);
    assert!(!partial(&out).exists());

    model.write_some(&out, forced(), 3);
    assert!(out.join("old.safetensors").exists(), "the old model stays until the new one is whole");
    assert_eq!(model.resume(&out, forced()), 3);
    assert_eq!(contents(&out), files);
    assert!(!partial(&out).exists());
}

#[test]
fn what_is_no_model_is_never_replaced() {
    let model = Model::new();
    let (temporary, out, files) = expected(&model);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "years of work").unwrap();
    assert_says(&message(model.create(&out, forced()).unwrap_err()), &["not a model folder"]);
    assert_eq!(fs::read_to_string(out.join("thesis.txt")).unwrap(), "years of work");

    let file = temporary.path().join("file");
    fs::write(&file, "text").unwrap();
    assert_says(&message(model.create(&file, forced()).unwrap_err()), &["file", "not a model folder"]);

    let link = temporary.path().join("link");
    std::os::unix::fs::symlink(temporary.path().join("whole"), &link).unwrap();
    assert_says(&message(model.create(&link, forced()).unwrap_err()), &["link", "not a model folder"]);

    let empty = temporary.path().join("empty");
    fs::create_dir(&empty).unwrap();
    model.write_all(&empty, forced());
    assert_eq!(contents(&empty), files);

    // A folder that only happens to have the name of the work folder.
    let other = temporary.path().join("other");
    fs::create_dir(temporary.path().join("other.partial")).unwrap();
    fs::write(temporary.path().join("other.partial/notes.txt"), "mine").unwrap();
    assert_says(&message(model.create(&other, forced()).unwrap_err()), &["other.partial", "`notes.txt`"]);
    assert_eq!(fs::read_to_string(temporary.path().join("other.partial/notes.txt")).unwrap(), "mine");
}

#[test]
fn an_output_that_appears_meanwhile_is_kept() {
    let model = Model::new();
    let (_temporary, out, files) = expected(&model);
    let mut writer = model.create(&out, options()).unwrap();
    model.names().iter().for_each(|name| model.write(&mut writer, name));
    fs::create_dir(&out).unwrap();
    assert_says(&message(writer.finish().unwrap_err()), &["out exists"]);
    fs::remove_dir(&out).unwrap();
    assert_eq!(model.resume(&out, options()), model.names().len());
    assert_eq!(contents(&out), files);
}

#[test]
fn a_replacement_cut_short_is_undone_or_finished() {
    let model = Model::new();
    let (temporary, out, files) = expected(&model);
    let old = || {
        let folder = temporary.path().join("old");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("config.json"), "old").unwrap();
        folder
    };

    // Killed between the two renames: the old model is back.
    model.write_some(&out, options(), 2);
    fs::rename(old(), partial(&out).join("replaced")).unwrap();
    assert_says(&message(model.create(&out, options()).unwrap_err()), &["out exists"]);
    assert_eq!(fs::read_to_string(out.join("config.json")).unwrap(), "old");
    assert_eq!(model.resume(&out, forced()), 2);
    assert_eq!(contents(&out), files);

    // Killed after both: what is left of the old one goes, the new one stays.
    fs::create_dir(partial(&out)).unwrap();
    fs::rename(old(), partial(&out).join("replaced")).unwrap();
    drop(model.create(&out, forced()).unwrap());
    assert!(!partial(&out).join("replaced").exists());
    assert_eq!(contents(&out), files);
}

#[test]
fn one_writer_at_a_time() {
    let model = Model::new();
    let (_temporary, out, _) = expected(&model);
    let first = model.create(&out, options()).unwrap();
    assert_says(&message(model.create(&out, forced()).unwrap_err()), &["another process is writing", "out.partial"]);
    drop(first);
    model.resume(&out, options());
}

#[test]
fn calls_that_do_not_fit_the_plan() {
    let model = Model::new();
    let (_temporary, out, _) = expected(&model);
    let mut writer = model.create(&out, options()).unwrap();
    let (name, fp4) = &model.matrices[0];

    assert_says(&message(writer.write_matrix("other", fp4).unwrap_err()), &["`other` is not planned"]);
    let narrow = matrix(fp4.scheme, fp4.rows, 128, 0);
    assert_says(&message(writer.write_matrix(name, &narrow).unwrap_err()), &["[7, 128] as fp4", "[7, 130] as fp4"]);
    let int8 = matrix(Format::Int8.scheme(None).unwrap(), fp4.rows, fp4.cols, 0);
    assert_says(&message(writer.write_matrix(name, &int8).unwrap_err()), &["int8", "planned is [7, 130] as fp4"]);
    let short = PackedMatrix { codes: vec![0].into(), ..fp4.clone() };
    assert_says(&message(writer.write_matrix(name, &short).unwrap_err()), &[name, "codes has 1 bytes"]);
    assert_says(&message(writer.write_raw(name, Dtype::U8, &[1], &[0]).unwrap_err()), &["U8 [1]", "fp4"]);
    let raw = |writer: &mut CheckpointWriter, shape: &[usize], bytes: &[u8]| {
        message(writer.write_raw("norm.weight", Dtype::BF16, shape, bytes).unwrap_err())
    };
    assert_says(&raw(&mut writer, &[4], &[0; 8]), &["BF16 [4]", "planned is BF16 [3]"]);
    assert_says(&raw(&mut writer, &[3], &[0; 5]), &["of 5 bytes"]);

    model.write(&mut writer, name);
    assert_says(&message(writer.write_matrix(name, fp4).unwrap_err()), &["already written"]);
    assert_says(&message(writer.finish().unwrap_err()), &["`layers.1.weight` has not been written"]);
    assert_eq!(model.create(&out, options()).unwrap().resumed(), 1);
}

#[test]
fn impossible_plans() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    let fp4 = Format::Fp4.scheme(None).unwrap();
    let refused = |plan: Vec<PlannedTensor>, files: &[&str], words: &[&str]| {
        let files = files.iter().map(|name| (name.to_string(), vec![])).collect();
        let error = CheckpointWriter::create(&out, plan, json!({}), files, &options()).unwrap_err();
        assert_says(&message(error), words);
        assert!(!partial(&out).exists());
    };
    let raw = |name: &str, shape: &[usize]| PlannedTensor::raw(name, Dtype::F32, shape.to_vec());
    refused(vec![raw("a", &[1]), raw("a", &[1])], &[], &["two tensors would be stored as `a`"]);
    let part = raw("w_scale", &[1]);
    refused(vec![PlannedTensor::matrix("w", 1, 1, fp4), part], &[], &["stored as `w_scale`"]);
    refused(vec![raw("__metadata__", &[1])], &[], &["`__metadata__`"]);
    refused(vec![raw("a", &[usize::MAX, 2])], &[], &["`a`", "shape"]);
    refused(vec![PlannedTensor::matrix("w", 0, 1, fp4)], &[], &["`w`", "[0, 1]"]);
    refused(vec![], &["config.json"], &["`config.json` cannot be copied"]);
    refused(vec![], &["../x"], &["`../x` cannot be copied"]);
}

#[test]
fn targets_that_cannot_be_written() {
    let model = Model::new();
    let temporary = tempfile::tempdir().unwrap();
    let file = temporary.path().join("file");
    fs::write(&file, "").unwrap();
    let text = message(model.create(&file.join("out"), options()).unwrap_err());
    assert_says(&text, &["cannot", file.to_str().unwrap(), "directory"]);
    assert_says(&message(model.create(Path::new("/"), options()).unwrap_err()), &["folder name"]);
}
