// out[t, :] = x[t, :] / sqrt(mean(x²) + eps) · weight, or added to it, of the first values of rows of x. A workgroup a row.

struct Params {
    width: u32,
    eps: f32,
    // How far apart rows of x are.
    stride: u32,
}
var<immediate> params: Params;

const SIZE = 128u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let start = workgroup.x * params.width;
    let start_of_x = workgroup.x * params.stride;
    var sum = 0.0;
    for (var i = local.x; i < params.width; i += SIZE) {
        let value = x[start_of_x + i];
        sum = fma(value, value, sum);
    }
    let scale = norm_factor(reduce_sum(local.x, sum), params.width, params.eps);
    for (var i = local.x; i < params.width; i += SIZE) {
        let normed = x[start_of_x + i] * scale * weight[i];
        out[start + i] = select(normed, out[start + i] + normed, ADDS);
    }
}
