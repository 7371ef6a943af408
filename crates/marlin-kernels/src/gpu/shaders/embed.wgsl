// out[t, :] = W[token t, :] · scale, for those tokens whose rows this part of the table holds.

struct Params {
    shape: Shape,
    first_token: u32,
    scale: f32,
}
var<immediate> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let shape = params.shape;
    let t = workgroup.y;
    let unit = workgroup.x * 64u + local.x;
    let row = tokens[t] - params.first_token;
    // A token before the first becomes a very large row.
    if (row >= shape.rows || 32u * unit >= shape.k) {
        return;
    }
    var weights = load_unit(shape, row, unit);
    let factor = row_affine[row].x;
    for (var j = 0u; j < min(32u, shape.k - 32u * unit); j++) {
        out[t * shape.k + 32u * unit + j] = weights[j] * factor * params.scale;
    }
}
