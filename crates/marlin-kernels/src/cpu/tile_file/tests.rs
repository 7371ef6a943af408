//! Files that are made, found, shared, stale and damaged.

use std::fs::OpenOptions;
use std::sync::Barrier;

use tempfile::TempDir;

use super::*;
use crate::conformance::matrices;
use crate::conformance::support::Rng;
use crate::cpu::{Arithmetic, CpuLinear, CpuOptions, SimdLevel};
use crate::{Activation, Backend, Encoder, Input, LinearPart, PartHeader, StepLimits};

const ROWS: usize = 19;
const COLS: usize = 300;

fn backend(arithmetic: Arithmetic, simd: SimdLevel) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(1), arithmetic, simd: Some(simd) }).unwrap()
}

fn usual() -> CpuBackend {
    backend(Arithmetic::Int8, SimdLevel::detect())
}

fn options(folder: &Path, fingerprint: &str) -> TileFileOptions {
    TileFileOptions {
        path: folder.join("tiles/model.tiles"),
        lock: folder.join("locks/model"),
        fingerprint: fingerprint.into(),
        model: "a model".into(),
        report: |error| panic!("{error}"),
    }
}

fn open(backend: &CpuBackend, folder: &Path, fingerprint: &str) -> Arc<TileFile> {
    Arc::new(TileFile::open(backend, options(folder, fingerprint)).unwrap().expect("nobody else makes it"))
}

/// A linear of two parts in one scheme, the second with other weights; the first part has a bias only if both have.
fn parts(scheme: Scheme, bias: bool, rng: &mut Rng) -> Vec<LinearPart<'static>> {
    let mut part =
        || LinearPart { weight: matrices::random(scheme, ROWS, COLS, rng), bias: bias.then(|| rng.normals(ROWS)) };
    vec![part(), part()]
}

fn headers(parts: &[LinearPart<'_>]) -> Vec<PartHeader> {
    let header = |LinearPart { weight, bias }: &LinearPart<'_>| PartHeader {
        scheme: weight.scheme,
        rows: weight.rows,
        cols: weight.cols,
        bias: bias.clone(),
    };
    parts.iter().map(header).collect()
}

/// Outputs of a linear, plain and gated.
fn outputs(backend: &CpuBackend, linear: &CpuLinear) -> Vec<f32> {
    const M: usize = 5;
    let limits = StepLimits { tokens: M, context: M, width: COLS, vocabulary: 1, logit_rows: 1 };
    let mut encoder = backend.encoder(&limits).unwrap();
    let mut x = backend.buffer(M, COLS).unwrap();
    backend.upload(&mut x, M, &Rng(9).normals(M * COLS)).unwrap();
    let (mut plain, mut gated) = (backend.buffer(M, 2 * ROWS).unwrap(), backend.buffer(M, ROWS).unwrap());
    encoder.linear(Input::Rows(&x), linear, &mut plain);
    encoder.linear_gated(Input::Rows(&x), linear, Activation::Silu, &mut gated);
    [plain.values(), gated.values()].concat()
}

/// Makes the file of a model of one linear; gives what it was made from.
fn make(backend: &CpuBackend, folder: &Path, fingerprint: &str) -> Vec<LinearPart<'static>> {
    let parts = parts(marlin_format::Format::Int4.scheme(None).unwrap(), false, &mut Rng(1));
    let file = open(backend, folder, fingerprint);
    assert!(!file.is_stored());
    backend.with_tiles(Arc::clone(&file)).load_named_linear("linear", &parts).unwrap();
    file.finish();
    parts
}

#[test]
fn what_is_found_is_what_was_loaded_to_the_bit() {
    for simd in SimdLevel::available() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let folder = TempDir::new().unwrap();
            let backend = backend(arithmetic, simd);
            let mut rng = Rng(0);
            let linears: Vec<_> = matrices::schemes()
                .into_iter()
                .enumerate()
                .map(|(index, (name, scheme))| (name, parts(scheme, index % 2 == 1, &mut rng)))
                .collect();

            let file = open(&backend, folder.path(), "1");
            let making = backend.with_tiles(Arc::clone(&file));
            let mut wanted = Vec::new();
            for (name, parts) in &linears {
                let packed = backend.load_linear(parts).unwrap();
                let kept = making.load_named_linear(name, parts).unwrap();
                assert_eq!(packed.0.sections(), kept.0.sections(), "{name} {simd} {arithmetic:?}");
                wanted.push(outputs(&backend, &packed));
                assert_eq!(outputs(&backend, &kept), wanted[wanted.len() - 1], "{name} {simd} {arithmetic:?}");
            }
            assert!(
                making.find_linear("fp4", &headers(&linears[0].1)).is_none(),
                "a file that is being made has nothing"
            );
            file.finish();
            drop((making, file));

            let file = open(&backend, folder.path(), "1");
            assert!(file.is_stored());
            let found = backend.with_tiles(file);
            for ((name, parts), wanted) in linears.iter().zip(&wanted) {
                let linear = found.find_linear(name, &headers(parts)).expect("it was kept");
                let packed = backend.load_linear(parts).unwrap();
                assert_eq!(packed.0.sections(), linear.0.sections(), "{name} {simd} {arithmetic:?}");
                let unpacked = [&packed, &linear].map(|linear| backend.unpack_linear(linear).unwrap());
                for (packed, found) in unpacked[0].iter().zip(&unpacked[1]) {
                    assert_eq!((&packed.weight, &packed.bias), (&found.weight, &found.bias), "{name}");
                }
                assert_eq!((packed.bytes(), packed.0.rows()), (linear.bytes(), linear.0.rows()), "{name}");
                assert_eq!(outputs(&backend, &linear), *wanted, "{name} {simd} {arithmetic:?}");
            }
        }
    }
}

#[test]
fn only_the_same_matrix_is_found() {
    let folder = TempDir::new().unwrap();
    let backend = usual();
    let parts = make(&backend, folder.path(), "1");
    let found = backend.with_tiles(open(&backend, folder.path(), "1"));
    let right = headers(&parts);
    assert!(found.find_linear("linear", &right).is_some());
    assert!(found.find_linear("other", &right).is_none());
    assert!(found.find_linear("linear", &[]).is_none());
    assert!(found.find_linear("linear", &[&right[..], &right[..1]].concat()).is_none());
    let wrong = |change: fn(&mut PartHeader)| {
        let mut wrong = right.clone();
        change(&mut wrong[1]);
        found.find_linear("linear", &wrong).is_none()
    };
    assert!(wrong(|part| part.rows += 1));
    assert!(wrong(|part| part.cols += 1));
    assert!(wrong(|part| part.scheme = marlin_format::Format::Int4Sym.scheme(None).unwrap()));
    assert!(wrong(|part| part.bias = Some(vec![0.0])));
    // What is not found is packed, and not kept in a file that is whole.
    found.load_named_linear("other", &parts).unwrap();
}

#[test]
fn stale_files_are_replaced_and_those_who_map_them_go_on() {
    let folder = TempDir::new().unwrap();
    let backend = usual();
    let parts = make(&backend, folder.path(), "1");
    let old = backend.with_tiles(open(&backend, folder.path(), "1")).find_linear("linear", &headers(&parts)).unwrap();
    let before = outputs(&backend, &old);
    make(&backend, folder.path(), "2");
    assert!(open(&backend, folder.path(), "2").is_stored());
    assert_eq!(outputs(&backend, &old), before);
    assert!(!open(&backend, folder.path(), "1").is_stored());
}

#[test]
fn nothing_is_left_of_a_file_that_is_not_finished() {
    let folder = TempDir::new().unwrap();
    let backend = usual();
    let files = || fs::read_dir(folder.path().join("tiles")).unwrap().count();
    drop(open(&backend, folder.path(), "1"));
    assert_eq!(files(), 0);
    // What a killed process left is in nobody's way.
    fs::write(folder.path().join("tiles/model.partial"), "left").unwrap();
    make(&backend, folder.path(), "1");
    assert_eq!(files(), 1);
}

#[test]
fn damaged_files_are_made_anew() {
    let folder = TempDir::new().unwrap();
    let backend = usual();
    make(&backend, folder.path(), "1");
    let path = folder.path().join("tiles/model.tiles");
    let whole = fs::read(&path).unwrap();
    let header = HEADER_BYTES as usize;
    let table_start = u64::from_le_bytes(*whole[16..].first_chunk().unwrap()) as usize;
    let is_stored = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        assert_eq!(TileFile::model_of(&path).is_some(), open(&backend, folder.path(), "1").is_stored());
        open(&backend, folder.path(), "1").is_stored()
    };
    assert!(is_stored(&whole));
    assert_eq!(TileFile::model_of(&path).as_deref(), Some("a model"));
    for len in [0, 1, 8, header - 1, header, table_start, whole.len() - 1] {
        assert!(!is_stored(&whole[..len]), "{len} bytes");
    }
    assert!(!is_stored(&[&whole[..], b"}"].concat()));
    for at in (0..header).chain(table_start..whole.len()) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        assert!(!is_stored(&bytes), "byte {at}");
    }
}

/// A table with the right checksum, whose sections lie elsewhere.
#[test]
fn sections_outside_the_file_are_refused() {
    let folder = TempDir::new().unwrap();
    let backend = usual();
    let parts = make(&backend, folder.path(), "1");
    let path = folder.path().join("tiles/model.tiles");
    let whole = fs::read(&path).unwrap();
    let end = u64::from_le_bytes(*whole[16..].first_chunk().unwrap());
    let with = |section: Section| {
        let file = OpenOptions::new().read(true).write(true).truncate(true).create(true).open(&path).unwrap();
        (&file).write_all(&whole[..end as usize]).unwrap();
        let mut table: Table = serde_json::from_slice(&whole[end as usize..]).unwrap();
        table.matrices[0].sections[0] = section;
        format::complete(&file, end, &table).unwrap();
        let file = open(&backend, folder.path(), "1");
        (file.is_stored(), backend.with_tiles(file).find_linear("linear", &headers(&parts)).is_some())
    };
    let right = serde_json::from_slice::<Table>(&whole[end as usize..]).unwrap().matrices[0].sections[0];
    assert_eq!(with(right), (true, true));
    for (start, bytes) in [
        (right.start + 1, right.bytes),
        (0, right.bytes),
        (end.next_multiple_of(64), right.bytes),
        (right.start, end),
        (right.start, u64::MAX),
        (u64::MAX - 63, 64),
        (u64::MAX - 63, u64::MAX),
    ] {
        assert_eq!(with(Section { start, bytes }), (false, false), "{bytes} bytes from {start}");
    }
    // Within the file, and not what the matrix needs.
    for bytes in [0, 64, right.bytes - 1] {
        assert_eq!(with(Section { bytes, ..right }), (true, false), "{bytes} bytes");
    }
}

#[test]
fn of_those_that_start_at_once_one_makes_the_file() {
    let folder = TempDir::new().unwrap();
    let parts = parts(Scheme::BF16, false, &mut Rng(3));
    let wanted = outputs(&usual(), &usual().load_linear(&parts).unwrap());
    let (start, opened) = (Barrier::new(4), Barrier::new(4));
    let made: usize = thread::scope(|scope| {
        let one = || {
            let backend = usual();
            start.wait();
            let file = TileFile::open(&backend, options(folder.path(), "1")).unwrap().map(Arc::new);
            opened.wait();
            let Some(file) = file else { return 0 };
            let linear = backend.with_tiles(Arc::clone(&file)).load_named_linear("linear", &parts).unwrap();
            file.finish();
            assert_eq!(outputs(&backend, &linear), wanted);
            1
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(made, 1);
    assert!(open(&usual(), folder.path(), "1").is_stored());
}

#[test]
fn a_layout_is_always_the_same() {
    let layout = |arithmetic, simd| backend(arithmetic, simd).tile_layout().unwrap();
    for simd in SimdLevel::available() {
        assert_eq!(layout(Arithmetic::Int8, simd), layout(Arithmetic::Int8, simd));
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_with_its_path() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("tiles"), "a file").unwrap();
    let error = TileFile::open(&usual(), options(folder.path(), "1")).unwrap_err();
    assert!(error.to_string().contains(&folder.path().join("tiles").display().to_string()), "{error}");
}
