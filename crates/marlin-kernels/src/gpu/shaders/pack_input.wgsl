// Prepares the input of linears in half precision: pairs of columns c and c + 4, divided by a power of two that 32 columns share.

struct Params {
    k: u32,
}
var<immediate> params: Params;

fn value_at(start: u32, column: u32) -> f32 {
    return select(0.0, x[start + min(column, params.k - 1u)], column < params.k);
}

fn four_at(start: u32, column: u32) -> vec4<f32> {
    return vec4<f32>(value_at(start, column), value_at(start, column + 1u), value_at(start, column + 2u), value_at(start, column + 3u));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let units = (params.k + 31u) / 32u;
    let unit = workgroup.x * 64u + local.x;
    if (unit >= units) {
        return;
    }
    let m = workgroup.y;
    var values: array<vec4<f32>, 8>;
    var largest = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        values[i] = four_at(m * params.k, 32u * unit + 4u * i);
        largest = max(largest, abs(values[i]));
    }
    let power = power_above(max(max(largest.x, largest.y), max(largest.z, largest.w)));
    for (var i = 0u; i < 4u; i++) {
        packed[(m * units + unit) * 4u + i] = octet(values[2u * i], values[2u * i + 1u], power);
    }
    packed_scales[m * units + unit] = power;
}
