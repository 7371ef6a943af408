// out[t, :] = x[t, :] / sqrt(mean(x²) + eps) · weight, or added to it. A workgroup a row.

struct Params {
    width: u32,
    eps: f32,
}
var<immediate> params: Params;

const SIZE = 128u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let start = workgroup.x * params.width;
    var sum = 0.0;
    for (var i = local.x; i < params.width; i += SIZE) {
        sum = fma(x[start + i], x[start + i], sum);
    }
    let scale = norm_factor(reduce_sum(local.x, sum), params.width, params.eps);
    for (var i = local.x; i < params.width; i += SIZE) {
        let normed = x[start + i] * scale * weight[i];
        out[start + i] = select(normed, out[start + i] + normed, ADDS);
    }
}
