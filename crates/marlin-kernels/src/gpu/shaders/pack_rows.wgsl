// Prepares the input of linears on matrix units: pairs in half precision, divided by a power of two that a row shares, so that sums need no
// scale before their end. Rows are padded with zeros to a multiple of PADDED columns. If NORMED, it is the RMS norm of x, and what the norm
// divides by becomes part of the row's scale. A workgroup takes a row.

struct Params {
    k: u32,
    eps: f32,
    // How far apart rows of x are.
    stride: u32,
}
var<immediate> params: Params;

const SIZE = 256u;

@compute @workgroup_size(SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = workgroup.y * workgroups.z + workgroup.z;
    let k = params.k;
    var squares = vec4<f32>();
    var largest = vec4<f32>();
    // Four loads at once; beyond the last column they give 0.
    for (var column = 4u * lane; column < k; column += 16u * SIZE) {
        @for t < 4
        let four_@t = x_four(row, column + 4u * @tu * SIZE, k);
        @end
        @for t < 4
        squares = fma(four_@t, four_@t, squares);
        largest = max(largest, abs(weighted(four_@t, column + 4u * @tu * SIZE, k)));
        @end
    }
    let power = power_above(reduce_max(lane, max(max(largest.x, largest.y), max(largest.z, largest.w))));
    let octets = (k + PADDED - 1u) / PADDED * (PADDED / 8u);
    for (var first = lane; first < octets; first += 2u * SIZE) {
        @for t < 2
        let column_@t = 8u * (first + @tu * SIZE);
        let low_@t = weighted(x_four(row, column_@t, k), column_@t, k);
        let high_@t = weighted(x_four(row, column_@t + 4u, k), column_@t + 4u, k);
        @end
        @for t < 2
        if (column_@t < 8u * octets) {
            packed[row * octets + column_@t / 8u] = octet(low_@t, high_@t, power);
        }
        @end
    }
    var scale = power;
    if (NORMED) {
        scale *= norm_factor(reduce_sum(lane, (squares.x + squares.y) + (squares.z + squares.w)), k, params.eps);
    }
    if (lane == 0u) {
        packed_scales[row] = scale;
    }
}
