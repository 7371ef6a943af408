// Packs the outputs that a workgroup of a gated linear keeps.

fn pack_kept(rows: Rows, first: u32, first_m: u32, index: u32) {
    workgroupBarrier();
    let octets = (params.width + 31u) / 32u * 4u;
    for (var i = index; i < KEPT / 8u; i += INVOCATIONS) {
        let m = first_m + i / (OUTPUTS / 8u);
        let at = first / 8u + i % (OUTPUTS / 8u);
        if (m < rows.end && at < octets) {
            pack_octet(i, m, at, octets);
        }
    }
}
