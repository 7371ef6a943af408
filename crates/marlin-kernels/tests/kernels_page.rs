//! docs/kernels.md has a row for each kernel.

use std::collections::BTreeSet;
use std::path::Path;

use marlin_kernels::conformance::{HEAD_DIMS, LATENT_DIMS, schemes};
use marlin_kernels::gpu::{GpuArithmetic, GpuCaps, MatrixSize, kernels};

#[test]
fn each_kernel_has_a_row_and_each_row_a_kernel() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/kernels.md");
    let page = std::fs::read_to_string(page).expect("docs/kernels.md");
    // The first table, whose rows begin with the name of a kernel.
    let (table, _) = page.split_once("\n## ").expect("a section after the table");
    let name = |line: &str| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned());
    let listed: BTreeSet<String> = table.lines().filter_map(name).collect();

    let apple = GpuCaps::apple();
    let devices = [
        GpuCaps { matrices: Vec::new(), subgroups: false, ..apple.clone() },
        GpuCaps { matrices: vec![MatrixSize::Sixteen], ..apple.clone() },
        apple,
    ];
    // The names of kernels do not depend on the format: a packed one, a dense one, and one with columns in an order of their own.
    let mut schemes = schemes();
    schemes.retain(|(name, _)| ["fp4", "bf16", "gptq-act-order"].contains(&name.as_str()));
    let mut found = BTreeSet::new();
    for caps in devices {
        for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
            let kernels = kernels(&caps, arithmetic, &schemes, &HEAD_DIMS, &LATENT_DIMS).expect("kernels that compile");
            found.extend(kernels.iter().map(|kernel| kernel.name().to_owned()));
        }
    }
    assert_eq!(listed, found, "rows of docs/kernels.md, and the kernels that devices compile");
}
