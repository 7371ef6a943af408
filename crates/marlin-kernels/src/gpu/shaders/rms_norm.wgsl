// out[t, :] = x[t, :] / sqrt(mean(x²) + eps) · weight, or added to it. A workgroup a row.

struct Params {
    width: u32,
    eps: f32,
}
var<immediate> params: Params;

const SIZE = 256u;
var<workgroup> partial: array<f32, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let start = workgroup.x * params.width;
    var sum = 0.0;
    for (var i = local.x; i < params.width; i += SIZE) {
        sum = fma(x[start + i], x[start + i], sum);
    }
    partial[local.x] = sum;
    for (var step = SIZE / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (local.x < step) {
            partial[local.x] += partial[local.x + step];
        }
    }
    workgroupBarrier();
    let scale = 1.0 / sqrt(partial[0] / f32(params.width) + params.eps);
    for (var i = local.x; i < params.width; i += SIZE) {
        let normed = x[start + i] * scale * weight[i];
        out[start + i] = select(normed, out[start + i] + normed, ADDS);
    }
}
