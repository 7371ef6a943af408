// out[t, i] = x[t, columns[i]], normalised if NORMED. A workgroup has SIZE columns of a row, and the norm of all of it: one workgroup for a whole row
// would wait for memory many times.

struct Params {
    width: u32,
    eps: f32,
    // How far apart rows of x are.
    stride: u32,
}
var<immediate> params: Params;

const SIZE = 256u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let start_of_x = workgroup.x * params.stride;
    var scale = 1.0;
    if (NORMED) {
        var sum = 0.0;
        for (var i = local.x; i < params.width; i += SIZE) {
            let value = x[start_of_x + i];
            sum = fma(value, value, sum);
        }
        scale = norm_factor(reduce_sum(local.x, sum), params.width, params.eps);
    }
    let i = workgroup.y * SIZE + local.x;
    if (i < params.width) {
        let column = columns[i];
        out[workgroup.x * params.width + i] = x[start_of_x + column] * scale * norm_weight(column);
    }
}
