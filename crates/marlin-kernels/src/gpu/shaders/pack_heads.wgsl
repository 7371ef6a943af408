// Packs the `count` heads that a workgroup of SIZE invocations keeps, from `first` on, of a row.

fn pack_heads(row: u32, first: u32, count: u32, heads: u32, lane: u32) {
    workgroupBarrier();
    for (var i = lane; i < count * DIM / 8u; i += SIZE) {
        pack_octet(i, row, first * DIM / 8u + i, heads * DIM / 8u);
    }
}
