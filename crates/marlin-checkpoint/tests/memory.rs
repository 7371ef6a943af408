//! Models made in memory.

use std::sync::Arc;

use marlin_checkpoint::{Checkpoint, CheckpointError, Dtype, Layout, MemoryTensor, Storage};
use marlin_format::{EncodeOptions, Format, PackedMatrix, ScaleSearch, Scheme, encode};
use serde_json::json;

fn packed() -> PackedMatrix<'static> {
    let weights: Vec<f32> = (0..2 * 128).map(|i| (i as f32).sin()).collect();
    let scheme = Format::Fp4.scheme(None).unwrap();
    encode(&weights, 2, 128, &scheme, &EncodeOptions { search: ScaleSearch::AbsMax, ..Default::default() }).unwrap()
}

fn dense() -> PackedMatrix<'static> {
    PackedMatrix::from_dense_bytes(Scheme::BF16, 2, 1, vec![0, 0, 0x80, 0x3f]).unwrap()
}

#[test]
fn tensors_come_back_as_they_were_given() {
    let shared = Arc::new(packed());
    let tensors = vec![
        ("a.weight".to_owned(), MemoryTensor::matrix(shared.clone())),
        ("b.weight".to_owned(), MemoryTensor::matrix(shared.clone())),
        ("c.weight".to_owned(), MemoryTensor::matrix(Arc::new(dense()))),
        ("norm.weight".to_owned(), MemoryTensor::vector(&[1.0, -2.5])),
    ];
    let checkpoint = Checkpoint::from_parts("made", json!({"vocab_size": 2}), tensors).unwrap();
    assert_eq!((checkpoint.name(), &checkpoint.config()["vocab_size"]), ("made", &json!(2)));
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["a.weight", "b.weight", "c.weight", "norm.weight"]);
    assert_eq!(checkpoint.matrix("b.weight", 2, 128).unwrap(), *shared);
    assert_eq!(checkpoint.matrix_any("c.weight").unwrap(), dense());
    assert_eq!(checkpoint.vector("norm.weight", 2).unwrap(), [1.0, -2.5]);

    let info = checkpoint.info("a.weight").unwrap();
    assert_eq!((info.shape.as_slice(), info.storage), ([2, 128].as_slice(), Storage::Packed(shared.scheme)));
    assert_eq!(checkpoint.info("norm.weight").unwrap().storage, Storage::Plain(Dtype::F32));
    assert_eq!(*checkpoint.tensor("c.weight").unwrap().bytes, [0, 0, 0x80, 0x3f]);
    assert_eq!(checkpoint.weight_bytes(), 2 * shared.bytes() as u64 + 4 + 8);
    assert_eq!(checkpoint.quantization().unwrap().tensors.len(), 2);
    assert_eq!(checkpoint.layout(), Some(Layout::MetalMarlin));
    assert!(checkpoint.side_files().unwrap().is_empty());
}

#[test]
fn what_does_not_fit_is_refused() {
    let tensors = vec![
        ("a.weight".to_owned(), MemoryTensor::matrix(Arc::new(packed()))),
        ("norm.weight".to_owned(), MemoryTensor::vector(&[1.0, f32::NAN])),
    ];
    let made = |tensors| Checkpoint::from_parts("made", json!({}), tensors);
    let checkpoint = made(tensors.clone()).unwrap();
    let error = |result: Result<_, CheckpointError>| result.map(|_: ()| ()).unwrap_err().to_string();
    let shape = error(checkpoint.matrix("a.weight", 2, 64).map(drop));
    assert!(shape.contains("a.weight") && shape.contains("[2, 128]") && shape.contains("[2, 64]"), "{shape}");
    assert!(error(checkpoint.matrix_any("norm.weight").map(drop)).contains("a matrix"));
    assert!(error(checkpoint.vector("norm.weight", 2).map(drop)).contains("NaN"));
    assert!(error(checkpoint.vector("a.weight", 2).map(drop)).contains("fp4"));
    assert!(error(checkpoint.tensor("a.weight").map(drop)).contains("fp4"));
    assert!(error(checkpoint.tokenizer().map(drop)).contains("made/tokenizer.json"));

    assert!(error(made(vec![tensors[0].clone(), tensors[0].clone()]).map(drop)).contains("`a.weight` is there twice"));
    assert!(error(Checkpoint::from_parts("made", json!([]), Vec::new()).map(drop)).contains("no JSON object"));
    let broken = PackedMatrix { cols: 64, ..packed() };
    let broken = vec![("a.weight".to_owned(), MemoryTensor::matrix(Arc::new(broken)))];
    assert!(error(made(broken).map(drop)).contains("a.weight"));
}
