//! Hidden states between two layers.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use marlin_checkpoint::Checkpoint;
use marlin_kernels::Backend;
use marlin_model::LayerRunner;

use crate::{QuantizeError, Windows};

/// The hidden states of all windows before a layer.
pub(super) struct States {
    /// The layer that is next.
    pub(super) layer: usize,
    /// As the layers quantised so far leave them, `[tokens, hidden]` each.
    pub(super) windows: Vec<Vec<f32>>,
    /// As the unquantised layers leave them.
    pub(super) originals: Vec<Vec<f32>>,
    /// Those of the text that quality is measured on, both ways.
    pub(super) held_out: [Vec<Vec<f32>>; 2],
}

impl States {
    /// Those before the first layer.
    pub(super) fn new<B: Backend>(
        runner: &LayerRunner<'_, B>,
        source: &Checkpoint,
        windows: &Windows,
        held_out: Option<&Windows>,
    ) -> Result<Self, QuantizeError> {
        let embed = |windows: &Windows| -> Result<Vec<Vec<f32>>, QuantizeError> {
            windows.iter().map(|window| Ok(runner.embed(source, window)?)).collect()
        };
        let (windows, held_out) = (embed(windows)?, held_out.map(embed).transpose()?.unwrap_or_default());
        Ok(Self { layer: 0, originals: windows.clone(), windows, held_out: [held_out.clone(), held_out] })
    }

    /// Those that an earlier run kept. `None` if it kept none, or none that are whole.
    pub(super) fn read(
        file: Option<File>,
        windows: &Windows,
        held_out: Option<&Windows>,
        hidden: usize,
    ) -> Result<Option<Self>, QuantizeError> {
        let Some(file) = file else { return Ok(None) };
        let tokens = windows.tokens() + held_out.map_or(0, Windows::tokens);
        let bytes = size_of::<u64>() + 2 * tokens * hidden * size_of::<f32>();
        if file.metadata().map_err(QuantizeError::State)?.len() != bytes as u64 {
            return Ok(None);
        }
        let mut file = BufReader::new(file);
        let mut layer = [0; size_of::<u64>()];
        file.read_exact(&mut layer).map_err(QuantizeError::State)?;
        let mut read = |windows: Option<&Windows>| {
            let window = |window: &[u32]| {
                let mut states = vec![0.0; window.len() * hidden];
                file.read_exact(bytemuck::cast_slice_mut(&mut states)).map(|()| states)
            };
            let windows = windows.into_iter().flat_map(Windows::iter).map(window);
            windows.collect::<io::Result<Vec<_>>>().map_err(QuantizeError::State)
        };
        let (windows, originals) = (read(Some(windows))?, read(Some(windows))?);
        let held_out = [read(held_out)?, read(held_out)?];
        Ok(Some(Self { layer: u64::from_le_bytes(layer) as usize, windows, originals, held_out }))
    }

    /// Writes what [`States::read`] reads, on the same machine.
    pub(super) fn write(&self, file: &mut dyn Write) -> io::Result<()> {
        file.write_all(&(self.layer as u64).to_le_bytes())?;
        let all = self.windows.iter().chain(&self.originals).chain(self.held_out.iter().flatten());
        all.into_iter().try_for_each(|states| file.write_all(bytemuck::cast_slice(states)))
    }
}
