//! The experts of a layer.

use marlin_kernels::cpu::{Assigned, CpuLinearGroup};
use marlin_kernels::{Activation, Backend, KernelError, LinearPart};
use numpy::{PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{runtime_error, value_error};
use crate::floats::{Floats, FloatsMut, map_rows};
use crate::linear::check_shapes;
use crate::matrix::Matrix;
use crate::runtime::{Runtime, Work};

/// The gated MLPs of a layer's experts: `down(activation(gate(x)) * up(x))`.
#[pyclass(frozen, module = "metal_marlin._native")]
pub(crate) struct Experts {
    runtime: Runtime,
    gate_up: CpuLinearGroup,
    down: CpuLinearGroup,
    activation: Activation,
    hidden: usize,
    count: usize,
}

/// `[experts, features]`.
type Bias<'py> = PyReadonlyArray2<'py, f32>;

#[pymethods]
impl Experts {
    /// One of each for every expert; `activation`: "silu", "gelu_tanh" or "clamped_swiglu". Biases: `[experts, features]` of gate, up, down.
    #[new]
    #[pyo3(signature = (runtime, gate, up, down, activation, biases=None))]
    fn new(
        py: Python<'_>,
        runtime: &Runtime,
        gate: Vec<PyRef<'_, Matrix>>,
        up: Vec<PyRef<'_, Matrix>>,
        down: Vec<PyRef<'_, Matrix>>,
        activation: &str,
        biases: Option<[Bias<'_>; 3]>,
    ) -> PyResult<Self> {
        let activation = match activation {
            "silu" => Activation::Silu,
            "gelu_tanh" => Activation::GeluTanh,
            "clamped_swiglu" => Activation::ClampedSwiglu,
            _ => {
                let problem =
                    format!("activation must be \"silu\", \"gelu_tanh\" or \"clamped_swiglu\", found {activation:?}");
                return Err(PyValueError::new_err(problem));
            }
        };
        let count = gate.len();
        if count == 0 || up.len() != count || down.len() != count {
            let found = [count, up.len(), down.len()];
            return Err(PyValueError::new_err(format!("as many gates as ups and downs are needed, found {found:?}")));
        }
        let hidden = gate[0].0.cols;
        let shapes = |matrices: &[PyRef<'_, Matrix>], rows: usize, cols: usize| {
            matrices.iter().position(|matrix| (matrix.0.rows, matrix.0.cols) != (rows, cols))
        };
        let width = gate[0].0.rows;
        for (name, matrices, rows, cols) in
            [("gate", &gate, width, hidden), ("up", &up, width, hidden), ("down", &down, hidden, width)]
        {
            if let Some(expert) = shapes(matrices, rows, cols) {
                let found = (matrices[expert].0.rows, matrices[expert].0.cols);
                let problem =
                    format!("{name} of expert {expert} must be [{rows}, {cols}] as its fellows, found {found:?}");
                return Err(PyValueError::new_err(problem));
            }
        }
        let matrices =
            |matrices: Vec<PyRef<'_, Matrix>>| matrices.iter().map(|matrix| (*matrix).clone()).collect::<Vec<_>>();
        let [gate, up, down] = [gate, up, down].map(matrices);
        let biases = biases.map(|biases| biases.map(|bias| rows_of(&bias, count)));
        let [of_gate, of_up, of_down] = match biases {
            Some([gate, up, down]) => [Some(gate?), Some(up?), Some(down?)],
            None => [None, None, None],
        };
        let backend = runtime.backend();
        let loaded = py.detach(|| {
            let gate_up =
                (0..count).map(|i| backend.load_linear(&[part(&gate[i], &of_gate, i), part(&up[i], &of_up, i)]));
            let gate_up = backend.group_linears(gate_up.collect::<Result<_, _>>()?)?;
            let down = (0..count).map(|i| backend.load_linear(&[part(&down[i], &of_down, i)]));
            Ok((gate_up, backend.group_linears(down.collect::<Result<_, _>>()?)?))
        });
        let (gate_up, down) = loaded.map_err(|error: KernelError| value_error(error))?;
        Ok(Self { runtime: runtime.clone(), gate_up, down, activation, hidden, count })
    }

    /// `out[t] = Σ weight · expert(x[t])` for x and out `[tokens, hidden]`, experts and weights `[tokens, top_k]`. Releases the GIL.
    ///
    /// Raises ValueError if an expert is not among them.
    fn forward(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        experts: PyReadonlyArray2<'_, i64>,
        weights: PyReadonlyArray2<'_, f32>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (x, mut out) = (Floats::of(x, "x")?, FloatsMut::of(out, "out")?);
        let tokens = check_shapes(x.shape(), self.hidden, out.shape(), self.hidden)?;
        let slots = experts.shape()[1];
        if experts.shape()[0] != tokens || weights.shape() != experts.shape() {
            let found = [x.shape(), experts.shape(), weights.shape()];
            let problem = format!("x must be [tokens, hidden], experts and weights [tokens, top_k], found {found:?}");
            return Err(PyValueError::new_err(problem));
        }
        let experts = experts.as_array().iter().map(|&expert| self.number(expert)).collect::<PyResult<Vec<u32>>>()?;
        let weights: Vec<f32> = weights.as_array().iter().copied().collect();
        let (x, out) = (x.slice("x")?, out.slice("out")?);
        let done = py.detach(|| {
            let Work { layers, scratch } = &mut *self.runtime.work();
            map_rows(scratch, (x, self.hidden), (out, self.hidden), tokens, |step, x, out| {
                let pairs = step.start * slots..step.end * slots;
                let assigned = Assigned { experts: &experts[pairs.clone()], weights: &weights[pairs], slots };
                layers.experts(x, assigned, &self.gate_up, self.activation, &self.down, out)
            })
        });
        done.map_err(runtime_error)
    }

    /// Gate, up and down of each expert, as they were loaded, to the bit.
    fn unpack(&self, py: Python<'_>) -> PyResult<Vec<(Matrix, Matrix, Matrix)>> {
        let backend = self.runtime.backend();
        let unpacked: Result<Vec<_>, KernelError> = py.detach(|| {
            let experts = backend.unpack_group(&self.gate_up).zip(backend.unpack_group(&self.down));
            experts
                .map(|(gate_up, down)| Ok(gate_up?.into_iter().chain(down?).map(|part| Matrix::new(part.weight))))
                .collect()
        });
        let experts = unpacked.map_err(runtime_error)?.into_iter();
        let experts: Option<Vec<_>> =
            experts.map(|mut parts| Some((parts.next()?, parts.next()?, parts.next()?))).collect();
        experts.ok_or_else(|| PyRuntimeError::new_err("an expert without its matrices"))
    }

    /// Bytes they take in memory.
    #[getter]
    fn nbytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }

    fn __repr__(&self) -> String {
        format!("Experts({} of hidden {}, {})", self.count, self.hidden, self.runtime.detail())
    }
}

impl Experts {
    fn number(&self, expert: i64) -> PyResult<u32> {
        let number = u32::try_from(expert).ok().filter(|&expert| (expert as usize) < self.count);
        number.ok_or_else(|| PyValueError::new_err(format!("there is no expert {expert} among {}", self.count)))
    }
}

/// A matrix of an expert, with its bias.
fn part<'a>(matrix: &'a Matrix, bias: &Option<Vec<Vec<f32>>>, expert: usize) -> LinearPart<'a> {
    LinearPart { weight: matrix.0.borrowed(), bias: bias.as_ref().map(|bias| bias[expert].clone()) }
}

/// The rows of a bias, one for each expert.
fn rows_of(bias: &Bias<'_>, experts: usize) -> PyResult<Vec<Vec<f32>>> {
    if bias.shape()[0] != experts {
        let problem =
            format!("a bias must have a row for each of {experts} experts, found the shape {:?}", bias.shape());
        return Err(PyValueError::new_err(problem));
    }
    Ok(bias.as_array().rows().into_iter().map(|row| row.to_vec()).collect())
}
