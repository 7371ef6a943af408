//! Checks of what Vulkan's drivers see: the SPIR-V that naga makes of WGSL.

use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};

use super::pipeline::Kernel;

/// `OpCooperativeMatrixMulAddKHR`.
const COOPERATIVE_MATRIX_MUL_ADD: u32 = 4459;

/// Asserts that a kernel becomes SPIR-V that multiplies cooperative matrices.
pub(super) fn assert_cooperative(kernel: &Kernel, what: &str) {
    let source = kernel.source();
    let module = naga::front::wgsl::parse_str(&source).map_err(|error| error.emit_to_string(&source));
    let module = module.unwrap_or_else(|error| panic!("{what}: {error}"));
    let info = Validator::new(ValidationFlags::all(), Capabilities::all()).validate(&module);
    let info = info.unwrap_or_else(|error| panic!("{what}: {}", error.emit_to_string(&source)));
    let words = spv::write_vec(&module, &info, &spv::Options::default(), None);
    let words = words.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(instructions(&words).contains(&COOPERATIVE_MATRIX_MUL_ADD), "{what}");
}

/// The opcodes of a SPIR-V module: after a header of five words, each instruction begins with its length and its opcode.
fn instructions(words: &[u32]) -> Vec<u32> {
    let mut opcodes = Vec::new();
    let mut at = 5;
    while let Some(word) = words.get(at) {
        opcodes.push(word & 0xffff);
        at += (word >> 16).max(1) as usize;
    }
    opcodes
}
