//! Values that Python gives and takes: float32, float16, or bfloat16 as its bits in uint16, in memory that both share.

use std::ops::Range;

use half::bf16;
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use numpy::{Element, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Values to read.
pub(crate) enum Floats<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F16(PyReadonlyArrayDyn<'py, f16>),
    Bf16(PyReadonlyArrayDyn<'py, u16>),
}

/// Values to write.
pub(crate) enum FloatsMut<'py> {
    F32(PyReadwriteArrayDyn<'py, f32>),
    F16(PyReadwriteArrayDyn<'py, f16>),
    Bf16(PyReadwriteArrayDyn<'py, u16>),
}

/// Contiguous values, without what ties them to Python.
#[derive(Clone, Copy)]
pub(crate) enum Slice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

/// Contiguous values to write.
pub(crate) enum SliceMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

/// An array whose dtype is known.
enum Typed<'a, 'py> {
    F32(&'a Bound<'py, PyArrayDyn<f32>>),
    F16(&'a Bound<'py, PyArrayDyn<f16>>),
    Bf16(&'a Bound<'py, PyArrayDyn<u16>>),
}

impl<'a, 'py> Typed<'a, 'py> {
    fn of(array: &'a Bound<'py, PyAny>, name: &str) -> PyResult<Self> {
        if let Ok(array) = array.cast() {
            return Ok(Self::F32(array));
        }
        if let Ok(array) = array.cast() {
            return Ok(Self::Bf16(array));
        }
        if let Ok(array) = array.cast() {
            return Ok(Self::F16(array));
        }
        Err(not_floats(array, name))
    }
}

const WANTED: &str = "float32, float16, or bfloat16 as uint16";

impl<'py> Floats<'py> {
    /// Takes hold of an array. `name` is what messages call it.
    pub(crate) fn of(array: &Bound<'py, PyAny>, name: &str) -> PyResult<Self> {
        Ok(match Typed::of(array, name)? {
            Typed::F32(array) => Self::F32(borrow(array, name)?),
            Typed::F16(array) => Self::F16(borrow(array, name)?),
            Typed::Bf16(array) => Self::Bf16(borrow(array, name)?),
        })
    }

    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Self::F32(array) => array.shape(),
            Self::F16(array) => array.shape(),
            Self::Bf16(array) => array.shape(),
        }
    }

    /// The values, row by row.
    ///
    /// # Errors
    /// They are not contiguous.
    pub(crate) fn slice(&self, name: &str) -> PyResult<Slice<'_>> {
        Ok(match self {
            Self::F32(array) => Slice::F32(array.as_slice().map_err(|_| not_contiguous(name))?),
            Self::F16(array) => Slice::F16(array.as_slice().map_err(|_| not_contiguous(name))?),
            Self::Bf16(array) => Slice::Bf16(array.as_slice().map_err(|_| not_contiguous(name))?.reinterpret_cast()),
        })
    }
}

impl<'py> FloatsMut<'py> {
    /// Takes hold of an array that nobody else reads or writes. `name` is what messages call it.
    pub(crate) fn of(array: &Bound<'py, PyAny>, name: &str) -> PyResult<Self> {
        Ok(match Typed::of(array, name)? {
            Typed::F32(array) => Self::F32(borrow_mut(array, name)?),
            Typed::F16(array) => Self::F16(borrow_mut(array, name)?),
            Typed::Bf16(array) => Self::Bf16(borrow_mut(array, name)?),
        })
    }

    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Self::F32(array) => array.shape(),
            Self::F16(array) => array.shape(),
            Self::Bf16(array) => array.shape(),
        }
    }

    /// The values, row by row.
    ///
    /// # Errors
    /// They are not contiguous.
    pub(crate) fn slice(&mut self, name: &str) -> PyResult<SliceMut<'_>> {
        Ok(match self {
            Self::F32(array) => SliceMut::F32(array.as_slice_mut().map_err(|_| not_contiguous(name))?),
            Self::F16(array) => SliceMut::F16(array.as_slice_mut().map_err(|_| not_contiguous(name))?),
            Self::Bf16(array) => {
                SliceMut::Bf16(array.as_slice_mut().map_err(|_| not_contiguous(name))?.reinterpret_cast_mut())
            }
        })
    }
}

impl<'a> Slice<'a> {
    fn is_f32(self) -> bool {
        matches!(self, Self::F32(_))
    }

    /// Some of the values.
    fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(values) => Self::F32(&values[range]),
            Self::F16(values) => Self::F16(&values[range]),
            Self::Bf16(values) => Self::Bf16(&values[range]),
        }
    }

    /// The values in single precision, in `converted` where they are not already.
    fn to_f32<'b>(self, converted: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Self::F32(values) => values,
            Self::F16(values) => widen(values, converted),
            Self::Bf16(values) => widen(values, converted),
        }
    }
}

impl SliceMut<'_> {
    fn is_f32(&self) -> bool {
        matches!(self, Self::F32(_))
    }

    /// Some of the values.
    fn part(&mut self, range: Range<usize>) -> SliceMut<'_> {
        match self {
            Self::F32(values) => SliceMut::F32(&mut values[range]),
            Self::F16(values) => SliceMut::F16(&mut values[range]),
            Self::Bf16(values) => SliceMut::Bf16(&mut values[range]),
        }
    }

    /// Lets `write` write values in single precision, in `converted` where they are to be stored otherwise. They are zeros or whatever was there.
    fn fill<E>(&mut self, converted: &mut Vec<f32>, write: impl FnOnce(&mut [f32]) -> Result<(), E>) -> Result<(), E> {
        match self {
            Self::F32(values) => write(values),
            Self::F16(values) => write_narrow(values, converted, write),
            Self::Bf16(values) => write_narrow(values, converted, write),
        }
    }
}

/// Memory for rows in single precision that Python has otherwise.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    input: Vec<f32>,
    output: Vec<f32>,
}

/// Bytes of a [`Scratch`], about, unless a single row takes more.
const SCRATCH_BYTES: usize = 32 << 20;
/// Rows that layers multiply at a time at most, for which they read all weights once: parts are of whole such steps where there is room.
const STEP_ROWS: usize = 512;

/// Lets `work` make rows of `out`, `[rows, width]`, from rows of `x`, `[rows, cols]`, both in single precision. It is told which: all of them,
/// or where Python has other values as many at a time as there is scratch memory for, since logits of a long text take gigabytes.
pub(crate) fn map_rows<E>(
    scratch: &mut Scratch,
    (x, cols): (Slice<'_>, usize),
    (mut out, width): (SliceMut<'_>, usize),
    rows: usize,
    mut work: impl FnMut(Range<usize>, &[f32], &mut [f32]) -> Result<(), E>,
) -> Result<(), E> {
    let most = match SCRATCH_BYTES / (size_of::<f32>() * (cols + width)) {
        _ if x.is_f32() && out.is_f32() => rows.max(1),
        most if most < STEP_ROWS => most.max(1),
        most => most - most % STEP_ROWS,
    };
    for first in (0..rows).step_by(most) {
        let step = first..rows.min(first + most);
        let x = x.part(step.start * cols..step.end * cols).to_f32(&mut scratch.input);
        let mut out = out.part(step.start * width..step.end * width);
        out.fill(&mut scratch.output, |out| work(step, x, out))?;
    }
    Ok(())
}

/// Values of half the bits in single precision.
fn widen<'a, T>(values: &[T], converted: &'a mut Vec<f32>) -> &'a [f32]
where
    [T]: HalfFloatSliceExt,
{
    converted.resize(values.len(), 0.0);
    values.convert_to_f32_slice(converted);
    converted
}

/// Rounds what `write` writes in single precision to values of half the bits.
fn write_narrow<T, E>(
    values: &mut [T],
    converted: &mut Vec<f32>,
    write: impl FnOnce(&mut [f32]) -> Result<(), E>,
) -> Result<(), E>
where
    [T]: HalfFloatSliceExt,
{
    converted.resize(values.len(), 0.0);
    write(converted)?;
    values.convert_from_f32_slice(converted);
    Ok(())
}

fn borrow<'py, T: Element>(array: &Bound<'py, PyArrayDyn<T>>, name: &str) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    array.try_readonly().map_err(|_| PyValueError::new_err(format!("{name} is written to by another call")))
}

fn borrow_mut<'py, T: Element>(array: &Bound<'py, PyArrayDyn<T>>, name: &str) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let in_use = |_| PyValueError::new_err(format!("{name} is read-only, or used by another call or argument"));
    array.try_readwrite().map_err(in_use)
}

fn not_contiguous(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name} must be C-contiguous: numpy.ascontiguousarray makes it so"))
}

fn not_floats(found: &Bound<'_, PyAny>, name: &str) -> PyErr {
    let found = match found.getattr("dtype") {
        Ok(dtype) => format!("an array of {dtype}"),
        Err(_) => found.get_type().to_string(),
    };
    PyTypeError::new_err(format!("{name} must be a numpy array of {WANTED}, found {found}"))
}
