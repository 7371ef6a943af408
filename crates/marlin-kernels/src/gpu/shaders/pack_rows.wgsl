// Prepares the input of linears on matrix units: pairs in half precision, divided by a power of two that a row shares, so that sums need no
// scale before their end. Rows are padded with zeros to a multiple of PADDED columns. If NORMED, it is the RMS norm of x, and what the norm
// divides by becomes part of the row's scale. A workgroup takes a row.

struct Params {
    k: u32,
    eps: f32,
}
var<immediate> params: Params;

const SIZE = 256u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.y;
    let k = params.k;
    var squares = vec4<f32>();
    var largest = vec4<f32>();
    for (var column = 4u * lane; column < k; column += 4u * SIZE) {
        let four = x_four(row, column, k);
        squares = fma(four, four, squares);
        largest = max(largest, abs(weighted(four, column, k)));
    }
    let power = power_above(reduce_max(lane, max(max(largest.x, largest.y), max(largest.z, largest.w))));
    let octets = (k + PADDED - 1u) / PADDED * (PADDED / 8u);
    for (var i = lane; i < octets; i += SIZE) {
        let column = 8u * i;
        let low = weighted(x_four(row, column, k), column, k);
        let high = weighted(x_four(row, column + 4u, k), column + 4u, k);
        packed[row * octets + i] = octet(low, high, power);
    }
    var scale = power;
    if (NORMED) {
        scale *= norm_factor(reduce_sum(lane, (squares.x + squares.y) + (squares.z + squares.w)), k, params.eps);
    }
    if (lane == 0u) {
        packed_scales[row] = scale;
    }
}
