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
}

impl States {
    /// Those before the first layer.
    pub(super) fn new<B: Backend>(
        runner: &LayerRunner<'_, B>,
        source: &Checkpoint,
        windows: &Windows,
    ) -> Result<Self, QuantizeError> {
        let windows: Vec<_> = windows.iter().map(|window| runner.embed(source, window)).collect::<Result<_, _>>()?;
        Ok(Self { layer: 0, originals: windows.clone(), windows })
    }

    /// Those that an earlier run kept. `None` if it kept none, or none that are whole.
    pub(super) fn read(file: Option<File>, windows: &Windows, hidden: usize) -> Result<Option<Self>, QuantizeError> {
        let Some(file) = file else { return Ok(None) };
        let bytes = size_of::<u64>() + 2 * windows.tokens() * hidden * size_of::<f32>();
        if file.metadata().map_err(QuantizeError::State)?.len() != bytes as u64 {
            return Ok(None);
        }
        let mut file = BufReader::new(file);
        let mut layer = [0; size_of::<u64>()];
        file.read_exact(&mut layer).map_err(QuantizeError::State)?;
        let mut read = || {
            let window = |window: &[u32]| {
                let mut states = vec![0.0; window.len() * hidden];
                file.read_exact(bytemuck::cast_slice_mut(&mut states)).map(|()| states)
            };
            windows.iter().map(window).collect::<io::Result<_>>().map_err(QuantizeError::State)
        };
        let (windows, originals) = (read()?, read()?);
        Ok(Some(Self { layer: u64::from_le_bytes(layer) as usize, windows, originals }))
    }

    /// Writes what [`States::read`] reads, on the same machine.
    pub(super) fn write(&self, file: &mut dyn Write) -> io::Result<()> {
        file.write_all(&(self.layer as u64).to_le_bytes())?;
        self.windows.iter().chain(&self.originals).try_for_each(|states| file.write_all(bytemuck::cast_slice(states)))
    }
}
