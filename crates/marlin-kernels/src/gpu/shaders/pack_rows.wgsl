// Prepares the input of linears on matrix units: pairs of columns c and c + 4, divided by a power of two that a row shares, so that a row's sums
// need no scale before their end. Rows are padded with zeros to PADDED columns. A workgroup takes a row.

struct Params {
    k: u32,
}
var<immediate> params: Params;

const SIZE = 256u;
var<workgroup> largest_of: array<f32, SIZE>;

fn four_at(start: u32, column: u32) -> vec4<f32> {
    let k = params.k;
    if (column + 4u <= k) {
        let s = start + column;
        return vec4<f32>(x[s], x[s + 1u], x[s + 2u], x[s + 3u]);
    }
    let columns = vec4<u32>(column, column + 1u, column + 2u, column + 3u);
    let inside = vec4<u32>(start) + min(columns, vec4<u32>(k - 1u));
    return select(vec4<f32>(), vec4<f32>(x[inside.x], x[inside.y], x[inside.z], x[inside.w]), columns < vec4<u32>(k));
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let m = workgroup.x;
    let start = m * params.k;
    let octets = (params.k + PADDED - 1u) / PADDED * (PADDED / 8u);
    var largest = vec4<f32>();
    for (var i = index; 8u * i < params.k; i += SIZE) {
        largest = max(largest, max(abs(four_at(start, 8u * i)), abs(four_at(start, 8u * i + 4u))));
    }
    largest_of[index] = max(max(largest.x, largest.y), max(largest.z, largest.w));
    for (var step = SIZE / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (index < step) {
            largest_of[index] = max(largest_of[index], largest_of[index + step]);
        }
    }
    workgroupBarrier();
    let power = power_above(largest_of[0]);
    for (var i = index; i < octets; i += SIZE) {
        packed[m * octets + i] = octet(four_at(start, 8u * i), four_at(start, 8u * i + 4u), power);
    }
    if (index == 0u) {
        packed_scales[m] = power;
    }
}
