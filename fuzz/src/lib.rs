//! What the fuzz targets do with their input; the tests replay the corpora through the same functions.
//!
//! Whatever the input, nothing may panic, and nothing may be allocated that the size of the input does not justify.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, iter, str};

use marlin_checkpoint::{Checkpoint, CheckpointWriter, ExportLayout, MemoryTensor, PlannedTensor, WriterOptions};
use marlin_engine::{ChatOptions, ChatTemplate, Message};
use marlin_format::{PackedMatrix, ScaleKind, Scheme};
use marlin_kernels::reference::ReferenceBackend;
use marlin_model::{LoadOptions, Planner};
use serde::Deserialize;
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// The allocator counts for all threads, tests are several.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Opens a folder and reads everything in it.
///
/// The input is the folder as text: a line `--- NAME` begins a file. A safetensors file that begins with `{` has its
/// header in its first line and gets the header's length from here.
pub fn checkpoint(data: &[u8]) {
    let folder = folder(&files(data, "config.json"));
    within((4 << 20) + 1000 * data.len(), || match Checkpoint::open(folder.path()) {
        Ok(checkpoint) => read(&checkpoint),
        Err(error) => check_message(&error),
    });
}

/// Opens a GGUF file, which the input is, and reads everything in it.
pub fn gguf(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    fs::write(&path, data).expect("a file");
    within((4 << 20) + 1000 * data.len(), || match Checkpoint::open(&path) {
        Ok(checkpoint) => read(&checkpoint),
        Err(error) => check_message(&error),
    });
}

/// Decodes a packed matrix, and writes it to a folder in every layout that takes it and reads it from there.
///
/// The input is a line of JSON, a [`Case`], and bytes which are repeated to fill all buffers one after the other.
pub fn packed(data: &[u8]) {
    let line = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let (case, rest) = data.split_at(line);
    let Ok(case) = serde_json::from_slice::<Case>(case) else { return };
    let matrix = case.matrix(rest);
    within((8 << 20) + 1000 * data.len(), || {
        let tensors = vec![(WEIGHT.to_owned(), MemoryTensor::matrix(Arc::new(matrix)))];
        match Checkpoint::from_parts("input", json!({}), tensors) {
            Ok(checkpoint) => {
                let matrix = checkpoint.matrix_any(WEIGHT).expect("it was checked");
                decode(&matrix);
                ExportLayout::ALL.iter().for_each(|layout| write_and_read(&matrix, *layout));
            }
            Err(error) => check_message(&error),
        }
    });
}

/// Renders a conversation.
///
/// The input is files as for [`checkpoint`]: the template (what comes before the first of them), messages.json and
/// tools.json.
pub fn chat_template(data: &[u8]) {
    let files: BTreeMap<&str, &[u8]> = files(data, "template").into_iter().collect();
    let Some(Ok(template)) = files.get("template").map(|file| str::from_utf8(file)) else { return };
    let messages: Option<Vec<Message>> = files.get("messages.json").and_then(|file| serde_json::from_slice(file).ok());
    let messages = messages.unwrap_or_else(|| vec![Message::new("user", "Hello"), Message::new("assistant", "Hi")]);
    let tools: Option<Vec<Value>> = files.get("tools.json").and_then(|file| serde_json::from_slice(file).ok());
    let options = ChatOptions { tools: tools.unwrap_or_default(), add_generation_prompt: true, ..Default::default() };
    within(TEMPLATE_BYTES, || {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        match ChatTemplate::new(template, tokens).and_then(|template| template.render(&messages, &options)) {
            Ok(text) => assert!(text.len() < TEMPLATE_BYTES),
            Err(error) => check_message(&error),
        }
    });
}

/// What a template may allocate all in all, however little of it at once: its fuel pays for this much.
const TEMPLATE_BYTES: usize = 1 << 30;

const WEIGHT: &str = "m.weight";

/// A matrix but for its bytes.
#[derive(Deserialize)]
struct Case {
    scheme: Scheme,
    rows: usize,
    cols: usize,
}

impl Case {
    fn matrix(&self, bytes: &[u8]) -> PackedMatrix<'static> {
        let Self { scheme, rows, cols } = *self;
        // What a file cannot hold is left short, which must be refused.
        const MOST: usize = 1 << 16;
        let mut bytes = bytes.iter().copied().cycle();
        let mut take = |wanted: usize| bytes.by_ref().take(wanted.min(MOST)).collect::<Vec<u8>>().into();
        PackedMatrix {
            codes: take(scheme.codes_bytes(rows, cols).unwrap_or(0)),
            scales: take(scheme.scales_bytes(rows, cols).unwrap_or(0)),
            zeros: take(scheme.zeros_bytes(rows, cols).unwrap_or(0)),
            globals: take(scheme.globals_bytes(rows, cols).unwrap_or(0)),
            group_index: take(scheme.group_index_bytes(rows, cols).unwrap_or(0)),
            sparse_index: take(scheme.sparse_index_bytes(rows, cols).unwrap_or(0)),
            ..PackedMatrix::empty(scheme, rows, cols)
        }
    }
}

/// Does `work`, which may allocate so many bytes, freed ones counted.
fn within(bytes: usize, work: impl FnOnce()) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let region = Region::new(ALLOCATOR);
    work();
    let allocated = region.change().bytes_allocated;
    assert!(allocated <= bytes, "{allocated} bytes were allocated, {bytes} are justified");
}

/// The files of a text of them; what stands before the first name is `first`.
fn files<'d>(data: &'d [u8], first: &'d str) -> Vec<(&'d str, &'d [u8])> {
    const MARK: &[u8] = b"--- ";
    let mut found: Vec<(&str, &[u8])> = Vec::new();
    let (mut name, mut begin, mut at) = (first, 0, 0);
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        if let Some(next) = line.strip_prefix(MARK).and_then(|name| str::from_utf8(name).ok()) {
            found.push((name, &data[begin..at]));
            (name, begin) = (next.trim_end(), at + line.len());
        }
        at += line.len();
    }
    found.push((name, &data[begin..]));
    found.retain(|(_, bytes)| !bytes.is_empty());
    found
}

/// A folder of these files. Names that lead out of it are left out.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let is_plain =
        |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    for (name, bytes) in files.iter().filter(|(name, _)| is_plain(name) && !name.starts_with('.') && name.len() < 64) {
        let path = folder.path().join(name);
        if name.ends_with(".safetensors") && bytes.starts_with(b"{") {
            let header = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
            let data = bytes.get(header + 1..).unwrap_or_default();
            fs::write(path, [&(header as u64).to_le_bytes(), &bytes[..header], data].concat()).expect("a file");
        } else {
            fs::write(path, bytes).expect("a file");
        }
    }
    folder
}

/// Everything of a checkpoint but its tokenizer, which is the crate `tokenizers`' own.
fn read(checkpoint: &Checkpoint) {
    for name in checkpoint.tensor_names() {
        let shape = checkpoint.shape(name).expect("a tensor has a shape");
        match checkpoint.matrix_any(name) {
            Ok(matrix) => decode(&matrix),
            Err(error) => check_message(&error),
        }
        let vector = checkpoint.vector(name, shape.first().copied().unwrap_or(0));
        let tensor = checkpoint.tensor(name);
        vector.err().iter().chain(tensor.err().iter()).for_each(|error| check_message(error));
    }
    let files = [
        checkpoint.chat_template().err(),
        checkpoint.special_tokens().err(),
        checkpoint.generation_config().err(),
        checkpoint.side_files().err(),
    ];
    files.iter().flatten().for_each(|error| check_message(error));
    let planned = Planner::new(&ReferenceBackend, checkpoint).and_then(|planner| planner.plan(&LoadOptions::default()));
    if let Err(error) = planned {
        check_message(&error);
    }
}

/// Decodes all rows, at once and in two slices.
fn decode(matrix: &PackedMatrix<'_>) {
    let mut row = vec![0.0; matrix.cols];
    (0..matrix.rows).for_each(|index| matrix.decode_row(index, &mut row));
    let middle = matrix.rows / 2;
    let (Ok(above), Ok(below)) = (matrix.slice_rows(0..middle), matrix.slice_rows(middle..matrix.rows)) else { return };
    let mut first = row.clone();
    below.decode_row(0, &mut first);
    matrix.decode_row(middle, &mut row);
    assert!(row.iter().map(|weight| weight.to_bits()).eq(first.iter().map(|weight| weight.to_bits())));
    // Parts with a scale each for the whole of them are not joined, though these two have the same.
    if let Ok(joined) = PackedMatrix::concat_rows(&[above, below]) {
        assert_eq!(&joined, matrix);
    }
}

/// Writes a folder with one matrix, unless the layout has no place for it, and compares what is read.
fn write_and_read(matrix: &PackedMatrix<'_>, layout: ExportLayout) {
    if !layout.scheme(matrix.scheme).is_ok_and(|stored| stored == matrix.scheme) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let plan = vec![PlannedTensor::matrix(WEIGHT, matrix.rows, matrix.cols, matrix.scheme)];
    let options = WriterOptions { layout, ..WriterOptions::default() };
    let mut writer = match CheckpointWriter::create(&out, plan, json!({}), Vec::new(), &options) {
        Ok(writer) => writer,
        Err(error) => return check_message(&error),
    };
    writer.write_matrix(WEIGHT, matrix).expect("the matrix is valid and planned");
    writer.finish().expect("all is written");
    read_back(&out, matrix, layout);
}

fn read_back(out: &Path, matrix: &PackedMatrix<'_>, layout: ExportLayout) {
    let checkpoint = Checkpoint::open(out).expect("a folder of ours");
    match checkpoint.matrix_any(WEIGHT) {
        Ok(read) if layout == ExportLayout::MetalMarlin => assert_eq!(&read, matrix),
        // An f32 that is stored as its inverse comes back rounded; bits that fill up bytes need not come back.
        Ok(read) if matrix.scheme.scale != ScaleKind::E4M3Global => {
            let bits = |matrix: &PackedMatrix<'_>| matrix.decode().into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(&read), bits(matrix), "{layout}");
        }
        Ok(_) => {}
        Err(error) => check_message(&error),
    }
}

/// Every error of a chain says something.
fn check_message(error: &dyn Error) {
    let chain = iter::successors(Some(error), |&error| error.source());
    for message in chain.map(ToString::to_string) {
        assert!(!message.trim().is_empty(), "an error says nothing");
    }
}
