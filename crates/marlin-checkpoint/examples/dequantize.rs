//! Writes a model with every matrix decoded to f32: `cargo run --example dequantize -- MODEL OUT`.
//!
//! Other programs can then be held against this one to the bit (`scripts/oracles`).

use std::error::Error;
use std::path::Path;

use marlin_checkpoint::{Checkpoint, CheckpointWriter, PlannedTensor, Storage, WriterOptions};
use marlin_format::{PackedMatrix, Scheme};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out] = arguments.as_slice() else { return Err("usage: dequantize MODEL OUT".into()) };
    let model = Checkpoint::open(Path::new(model))?;

    let names: Vec<&str> = model.tensor_names().collect();
    let planned = names.iter().filter_map(|name| Some((name, model.info(name)?))).map(|(name, info)| {
        match (info.storage, info.shape.as_slice()) {
            (Storage::Packed(_), &[rows, cols]) => PlannedTensor::matrix(*name, rows, cols, Scheme::F32),
            (Storage::Plain(dtype), _) => PlannedTensor::raw(*name, dtype, info.shape),
            (Storage::Packed(_), _) => unreachable!("packed tensors are matrices"),
        }
    });
    let options = WriterOptions { fingerprint: model.name().to_owned(), ..WriterOptions::default() };
    let side_files = model.side_files()?;
    let mut writer =
        CheckpointWriter::create(Path::new(out), planned.collect(), model.config().clone(), side_files, &options)?;
    for name in names.into_iter().filter(|name| !writer.is_done(name)).collect::<Vec<_>>() {
        if let Ok(tensor) = model.tensor(name) {
            writer.write_raw(name, tensor.dtype, tensor.shape, &tensor.bytes)?;
            continue;
        }
        let matrix = model.matrix_any(name)?;
        let bytes: Vec<u8> = matrix.decode().iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let decoded = PackedMatrix::from_dense_bytes(Scheme::F32, matrix.rows, matrix.cols, bytes)?;
        writer.write_matrix(name, &decoded)?;
    }
    Ok(writer.finish()?)
}
