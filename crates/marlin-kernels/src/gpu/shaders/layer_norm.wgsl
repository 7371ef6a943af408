// out[t, :] = (x[t, :] - mean) / sqrt(variance + eps) · weight + bias. A workgroup a row.

struct Params {
    width: u32,
    eps: f32,
}
var<immediate> params: Params;

const SIZE = 128u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let start = workgroup.x * params.width;
    let count = f32(params.width);
    var sum = 0.0;
    for (var i = local.x; i < params.width; i += SIZE) {
        sum += x[start + i];
    }
    let mean = reduce_sum(local.x, sum) / count;
    // The mean is rounded. What it is off by, the mean of the differences, would shift the row where the mean is large.
    var differences = 0.0;
    var squares = 0.0;
    for (var i = local.x; i < params.width; i += SIZE) {
        let difference = x[start + i] - mean;
        differences += difference;
        squares = fma(difference, difference, squares);
    }
    let shift = reduce_sum(local.x, differences) / count;
    let variance = max(reduce_sum(local.x, squares) / count - shift * shift, 0.0);
    let scale = 1.0 / sqrt(variance + params.eps);
    for (var i = local.x; i < params.width; i += SIZE) {
        out[start + i] = fma((x[start + i] - mean - shift) * scale, weight[i], bias_of(i));
    }
}
