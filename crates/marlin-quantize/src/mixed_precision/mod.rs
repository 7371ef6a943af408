//! Mixed precision: which matrix in how many bits.
//!
//! [`measure_sensitivity`] finds out what rounding each matrix costs the model's output; [`BitPlan::allocate`] spends bits
//! where they save most of it. A [`BitPlan`] is a JSON file, so that it can be looked at, edited and used again.

mod allocate;
mod plan;
mod sensitivity;

pub use self::plan::{BitPlan, PlannedMatrix};
pub use self::sensitivity::measure_sensitivity;

use marlin_format::Scheme;

use crate::scheme_by_name;

/// Formats that a mix is made of: of those of `docs/quality.md` the ones that others do not beat at the same size.
const CANDIDATES: [&str; 9] =
    ["int2:64", "int2:32", "int3:128", "int3:64", "int3:32", "int4:128", "int4:64", "int4:32", "int8:128"];

/// The candidate that matrices are rounded to when their cost is measured: coarse enough for the cost of a single matrix to stand out from
/// the arithmetic's noise, and fine enough for costs to add up.
const PROBE: &str = "int3:64";

/// Names of the candidates with their schemes.
fn candidates() -> [(&'static str, Scheme); CANDIDATES.len()] {
    CANDIDATES.map(|name| (name, scheme_by_name(name).expect("every candidate is a format")))
}
