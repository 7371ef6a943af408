// Rotates blocks of a row by Hadamard matrices H_m ⊗ H_2ᵏ in workgroup memory: H_2ᵏ by butterflies, H_m by its signs where values are
// written back. A workgroup takes a tile of whole blocks one after the other, or `columns` of them side by side, whose values lie `stride`
// apart: blocks that are larger than a tile are transformed along their runs first and across them then.

struct Params {
    width: u32,
    // Values of a block, in all columns.
    block: u32,
    stride: u32,
    columns: u32,
    tile: u32,
    factor: f32,
}
var<immediate> params: Params;

const SIZE = 256u;

var<workgroup> values: array<f32, MOST>;

// Where a value of the tile lies.
fn place(i: u32) -> u32 {
    return i / params.columns * params.stride + i % params.columns;
}

// A value of the tile times H_m.
fn combined(i: u32, run: u32) -> f32 {
    if (ORDER == 1u) {
        return values[i];
    }
    let row = i / run % ORDER;
    // A bit for each value of the row, set where that is negative.
    let signs = signs_of(row);
    let first = i - row * run;
    var sum = 0.0;
    for (var j = 0u; j < ORDER; j++) {
        let sign = select(signs.x, signs.y, j >= 32u) >> (j % 32u) << 31u;
        sum += bitcast<f32>(bitcast<u32>(values[first + j * run]) ^ sign);
    }
    return sum;
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let groups = params.stride / params.columns;
    let first = workgroup.x / groups * groups * params.tile + workgroup.x % groups * params.columns;
    let start = workgroup.y * params.width + first;
    // The last tile of a row may have fewer blocks.
    let count = min(params.tile, (params.width - first + params.stride - 1u) / params.stride * params.columns);
    for (var i = local.x; i < count; i += SIZE) {
        values[i] = x[start + place(i)];
    }
    workgroupBarrier();
    let run = params.block / ORDER;
    for (var half = params.columns; half < run; half *= 2u) {
        for (var pair = local.x; pair < count / 2u; pair += SIZE) {
            let low = 2u * pair - pair % half;
            let a = values[low];
            let b = values[low + half];
            values[low] = a + b;
            values[low + half] = a - b;
        }
        workgroupBarrier();
    }
    for (var i = local.x; i < count; i += SIZE) {
        x[start + place(i)] = combined(i, run) * params.factor;
    }
}
