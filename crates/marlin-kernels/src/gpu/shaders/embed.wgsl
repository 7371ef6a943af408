// out[t, :] = W[token t, :] · scale, for those tokens whose rows this part of the table holds.

struct Params {
    shape: Shape,
    first_token: u32,
    scale: f32,
}
var<immediate> params: Params;

// Token ids from here on are rows of the last sampling.
const SAMPLED = 0x80000000u;
const NOT_FINITE = 0xffffffffu;

fn token_at(t: u32) -> u32 {
    let token = tokens[t];
    if (token < SAMPLED) {
        return token;
    }
    let chosen = sampled[token - SAMPLED];
    // Where there was no choice, any token will do.
    return select(chosen, 0u, chosen == NOT_FINITE);
}

fn put(t: u32, column: u32, value: f32) {
    if (column < params.shape.k) {
        out[t * params.shape.k + column] = value * params.scale;
    }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let shape = params.shape;
    let t = workgroup.y;
    let unit = workgroup.x * 64u + local.x;
    let row = token_at(t) - params.first_token;
    // A token before the first becomes a very large row.
    if (row >= shape.rows || 32u * unit >= shape.k) {
        return;
    }
    let groups = decode_groups(fetch_groups(shape, row / 4u, unit), row % 4u);
    // Scaled in single precision, whatever the arithmetic.
    var codes = decode_unit(fetch_codes(shape, row, unit), groups);
    let factor = row_affine[row].x;
    for (var p = 0u; p < 16u; p++) {
        let scale = select(groups.high_scale, groups.low_scale, p < 8u);
        let bias = select(0.0, select(groups.high_offset, groups.low_offset, p < 8u), BIASED);
        let values = fma(vec2<f32>(codes[p]), vec2<f32>(scale), vec2<f32>(bias)) * factor;
        let column = 32u * unit + 8u * (p / 4u) + p % 4u;
        put(t, column, values.x);
        put(t, column + 4u, values.y);
    }
}
