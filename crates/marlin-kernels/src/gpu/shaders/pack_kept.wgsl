// Packs the outputs that a workgroup keeps, those of a matrix's rows that there are, if the kernel's variant or its caller wants that.

fn pack_kept(shape: Shape, rows: Rows, first: u32, first_m: u32, index: u32) {
    if (!wants_packed()) {
        return;
    }
    workgroupBarrier();
    let octets = (params.width + 31u) / 32u * 4u;
    for (var i = index; i < KEPT / 8u; i += INVOCATIONS) {
        let m = first_m + i / (OUTPUTS / 8u);
        let of_matrix = first / 8u + i % (OUTPUTS / 8u);
        if (m < rows.end && of_matrix < (output_rows(shape) + 31u) / 32u * 4u) {
            pack_octet(i, m, first_column() / 8u + of_matrix, octets);
        }
    }
}
