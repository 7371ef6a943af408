//! Rows of the operations on activations alone: norms, angles, selection.

use crate::{Backend, Encoder, Hadamard};

use super::support::{Case, Ragged, Rng, limits, poisoned, read, upload};
use super::{Device, Table};

pub(crate) fn add_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    for width in [1, 7, 8, 9, 15, 16, 17, 33, 576, 2048] {
        table.add(device, format!("rms-norm/width={width}"), move |device| rms_norm(device, width, false));
        table.add(device, format!("rms-norm-add/width={width}"), move |device| rms_norm(device, width, true));
    }
    for width in [1, 7, 33, 576, 2048, 5000] {
        table.add(device, format!("layer-norm/width={width}"), move |device| layer_norm(device, width));
    }
    // Blocks in a row and within a tile, tiles that the last row does not fill, one block a row, blocks beyond a tile: powers of two, and
    // each other factor with runs below a vector's lanes, whole vectors, and widths of models.
    for (width, block) in [
        (1, 1),
        (6, 2),
        (96, 32),
        (1152, 128),
        (5120, 1024),
        (2560, 512),
        (4096, 4096),
        (16384, 8192),
        (12, 12),
        (72, 24),
        (96, 96),
        (768, 384),
        (768, 768),
        (3072, 3072),
        (18432, 6144),
        (98304, 98304),
        (20, 20),
        (160, 80),
        (480, 160),
        (2560, 2560),
        (10240, 5120),
        (28, 28),
        (112, 56),
        (2240, 448),
        (3584, 3584),
        (7168, 7168),
        (36, 36),
        (288, 144),
        (3456, 1152),
        (2304, 2304),
        (9216, 9216),
    ] {
        table
            .add(device, format!("hadamard/width={width},block={block}"), move |device| hadamard(device, width, block));
    }
    for (frequencies, scaling) in [(1, 1.0), (16, 1.0), (33, 0.5), (64, 1.2)] {
        table.add(device, format!("rope-angles/{frequencies}"), move |device| angles(device, frequencies, scaling));
    }
    table.add(device, "select-logit-rows".into(), select);
    table.add(device, "write".into(), write);
    for width in [1, 67, 5000] {
        table.add(device, format!("soft-cap/width={width}"), move |device| soft_cap(device, width));
    }
}

fn rms_norm<B: Backend>(device: &Device<B>, width: usize, adds: bool) -> Result<(), String> {
    let mut rng = Rng(10);
    for rows in [1, 3, 4, 5, 9] {
        for (what, magnitude, outlier) in [("", 1.0, None), (" with outliers", 1.0, Some(1e5)), (" tiny", 1e-18, None)]
        {
            let mut x: Vec<f32> = rng.normals(rows * width).iter().map(|x| x * magnitude).collect();
            if let Some(outlier) = outlier {
                x.iter_mut().skip(rng.below(width)).step_by(width).for_each(|x| *x = outlier);
            }
            let residual = adds.then(|| rng.normals(rows * width));
            let case = RmsNorm { x, weight: rng.normals(width), eps: 1e-6, residual };
            device.check(&case, 1e-12, &format!("{rows} rows{what}"))?;
        }
    }
    Ok(())
}

struct RmsNorm {
    x: Vec<f32>,
    weight: Vec<f32>,
    eps: f32,
    /// What the norm is added to; `None` writes it to a poisoned buffer.
    residual: Option<Vec<f32>>,
}

impl Case for RmsNorm {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let width = self.weight.len();
        let rows = self.x.len() / width;
        let weight = backend.load_vector(&self.weight).expect("a vector");
        let mut encoder = backend.encoder(&limits(rows, width)).expect("an encoder");
        let x = upload(backend, width, &self.x);
        let out = match &self.residual {
            None => {
                let mut out = poisoned(backend, rows, width);
                encoder.rms_norm(&x, &weight, self.eps, &mut out);
                out
            }
            Some(residual) => {
                let mut out = upload(backend, width, residual);
                encoder.rms_norm_add(&x, &weight, self.eps, &mut out);
                out
            }
        };
        read::<B>(&mut encoder, &out, self.x.len())
    }
}

fn layer_norm<B: Backend>(device: &Device<B>, width: usize) -> Result<(), String> {
    let mut rng = Rng(13);
    for rows in [1, 3, 5] {
        // Values, their mean, and one that is larger than the others.
        for (what, magnitude, mean, outlier) in [
            ("", 1.0, 0.0, None),
            (" with outliers", 1.0, 0.0, Some(1e5)),
            (" tiny", 1e-18, 0.0, None),
            (" far from 0", 1.0, 1000.0, None),
        ] {
            let mut x: Vec<f32> = rng.normals(rows * width).iter().map(|x| x * magnitude + mean).collect();
            if let Some(outlier) = outlier {
                x.iter_mut().skip(rng.below(width)).step_by(width).for_each(|x| *x = outlier);
            }
            for bias in [None, Some(rng.normals(width))] {
                let case = LayerNorm { x: x.clone(), weight: rng.normals(width), bias, eps: 1e-6 };
                device.check(&case, 1e-12, &format!("{rows} rows{what}"))?;
            }
        }
    }
    Ok(())
}

struct LayerNorm {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
}

impl Case for LayerNorm {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let width = self.weight.len();
        let rows = self.x.len() / width;
        let weight = backend.load_vector(&self.weight).expect("a vector");
        let bias = self.bias.as_ref().map(|bias| backend.load_vector(bias).expect("a vector"));
        let mut encoder = backend.encoder(&limits(rows, width)).expect("an encoder");
        let x = upload(backend, width, &self.x);
        let mut out = poisoned(backend, rows, width);
        encoder.layer_norm(&x, &weight, bias.as_ref(), self.eps, &mut out);
        read::<B>(&mut encoder, &out, self.x.len())
    }
}

fn hadamard<B: Backend>(device: &Device<B>, width: usize, block: usize) -> Result<(), String> {
    let mut rng = Rng(14);
    for rows in [1, 2] {
        let mut x = rng.normals(rows * width);
        // What the transform is for.
        x[rng.below(width)] = 1e3;
        device.check(&Rotation { x, width, block }, 1e-12, &format!("{rows} rows"))?;
    }
    Ok(())
}

struct Rotation {
    x: Vec<f32>,
    width: usize,
    block: usize,
}

impl Case for Rotation {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let mut encoder = backend.encoder(&limits(self.x.len() / self.width, self.width)).expect("an encoder");
        let mut x = upload(backend, self.width, &self.x);
        encoder.hadamard(&mut x, &Hadamard::new(self.block).expect("a block that there is"));
        read::<B>(&mut encoder, &x, self.x.len())
    }
}

fn soft_cap<B: Backend>(device: &Device<B>, width: usize) -> Result<(), String> {
    let mut rng = Rng(12);
    for (rows, cap) in [(1, 30.0), (5, 0.5)] {
        let mut x: Vec<f32> = rng.normals(rows * width).iter().map(|x| x * cap).collect();
        // Far beyond the cap, and far within.
        x[0] = -1e5;
        *x.last_mut().expect("a value") *= 1e-6;
        device.check(&SoftCap { x, width, cap }, 1e-13, &format!("{rows} rows, cap {cap}"))?;
    }
    Ok(())
}

struct SoftCap {
    x: Vec<f32>,
    width: usize,
    cap: f32,
}

impl Case for SoftCap {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let mut encoder = backend.encoder(&limits(self.x.len() / self.width, self.width)).expect("an encoder");
        let mut x = upload(backend, self.width, &self.x);
        encoder.soft_cap(&mut x, self.cap);
        read::<B>(&mut encoder, &x, self.x.len())
    }
}

fn angles<B: Backend>(device: &Device<B>, frequencies: usize, scaling: f32) -> Result<(), String> {
    for (first, tokens) in [(0, 1), (0, 9), (1000, 5), (131_000, 4)] {
        let inv_freq = (0..frequencies).map(|i| 1e6f32.powf(-(i as f32) / frequencies as f32)).collect();
        let case = Angles { first, tokens, inv_freq, scaling };
        device.check(&case, 1e-13, &format!("positions {first}.."))?;
    }
    Ok(())
}

struct Angles {
    first: usize,
    tokens: usize,
    inv_freq: Vec<f32>,
    scaling: f32,
}

impl Case for Angles {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let width = 2 * self.inv_freq.len();
        let step = Ragged::of_tokens(vec![0; self.tokens], self.first);
        let inv_freq = backend.load_vector(&self.inv_freq).expect("a vector");
        let mut encoder = backend.encoder(&limits(self.tokens, width)).expect("an encoder");
        let mut out = poisoned(backend, self.tokens, width);
        encoder.begin(&step.step());
        encoder.rope_angles(&inv_freq, self.scaling, &mut out);
        read::<B>(&mut encoder, &out, self.tokens * width)
    }
}

fn write<B: Backend>(device: &Device<B>) -> Result<(), String> {
    let mut rng = Rng(14);
    for rows in [[1, 1, 1], [2, 9, 5], [9, 1, 9]] {
        let written = rows.map(|rows| rng.normals(rows * 33));
        device.check(&Write { written, weight: rng.normals(33) }, 1e-12, &format!("{rows:?} rows"))?;
    }
    Ok(())
}

/// A buffer that the host writes between operations: each of them sees what was written last.
struct Write {
    /// `[rows, 33]` of each time.
    written: [Vec<f32>; 3],
    weight: Vec<f32>,
}

impl Case for Write {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let weight = backend.load_vector(&self.weight).expect("a vector");
        let mut encoder = backend.encoder(&limits(9, 33)).expect("an encoder");
        let mut x = poisoned(backend, 9, 33);
        let mut outs = [(); 3].map(|()| poisoned(backend, 9, 33));
        for (values, out) in self.written.iter().zip(&mut outs) {
            encoder.write(&mut x, values.len() / 33, values).expect("rows that fit");
            encoder.rms_norm(&x, &weight, 1e-6, out);
        }
        let outs = outs.iter().zip(&self.written);
        outs.flat_map(|(out, values)| read::<B>(&mut encoder, out, values.len())).collect()
    }
}

fn select<B: Backend>(device: &Device<B>) -> Result<(), String> {
    for rows in [vec![], vec![0], vec![8], vec![0, 3, 8], (0..9).collect()] {
        let what = format!("rows {rows:?}");
        device.check(&Select { x: Rng(11).normals(9 * 33), rows }, 0.0, &what)?;
    }
    Ok(())
}

struct Select {
    /// `[9, 33]`.
    x: Vec<f32>,
    rows: Vec<u32>,
}

impl Case for Select {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let mut step = Ragged::of_tokens(vec![0; 9], 0);
        step.logit_rows.clone_from(&self.rows);
        let mut encoder = backend.encoder(&limits(9, 33)).expect("an encoder");
        let mut out = poisoned(backend, 9, 33);
        encoder.begin(&step.step());
        encoder.select_logit_rows(&upload(backend, 33, &self.x), &mut out);
        read::<B>(&mut encoder, &out, self.rows.len() * 33)
    }
}
