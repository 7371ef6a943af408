// Blocks of a row become their orthogonal Hadamard transforms, by butterflies in workgroup memory. A workgroup takes a tile of whole blocks, whose
// values lie `stride` apart: blocks that are larger than a tile are transformed along their tiles first and across them then.

struct Params {
    width: u32,
    block: u32,
    stride: u32,
    tile: u32,
    factor: f32,
}
var<immediate> params: Params;

const SIZE = 256u;

var<workgroup> values: array<f32, MOST>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let stride = params.stride;
    let first = workgroup.x / stride * stride * params.tile + workgroup.x % stride;
    let start = workgroup.y * params.width + first;
    // The last tile of a row may have fewer blocks.
    let count = min(params.tile, (params.width - first + stride - 1u) / stride);
    for (var i = local.x; i < count; i += SIZE) {
        values[i] = x[start + i * stride];
    }
    workgroupBarrier();
    for (var half = 1u; half < params.block; half *= 2u) {
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
        x[start + i * stride] = values[i] * params.factor;
    }
}
