// Packs a row of numbers in single precision as halves, 32 columns, a unit, sharing a power of two. SIZE invocations take an octet of columns each;
// `x_four`, `weighted`, `put_octet` and `put_power` come from what is packed and to where.

const SIZE = 128u;
var<workgroup> largest_of: array<f32, SIZE>;

// The power of two of a unit, whose four octets belong to neighbouring invocations.
fn power_of_unit(lane: u32, low: vec4<f32>, high: vec4<f32>) -> f32 {
    let both = max(abs(low), abs(high));
    // Those of the unit before have been read.
    workgroupBarrier();
    if (lane < SIZE) {
        largest_of[lane] = max(max(both.x, both.y), max(both.z, both.w));
    }
    workgroupBarrier();
    let first = min(lane, SIZE - 1u) & ~3u;
    let largest = vec4<f32>(largest_of[first], largest_of[first + 1u], largest_of[first + 2u], largest_of[first + 3u]);
    return power_above(max(max(largest.x, largest.y), max(largest.z, largest.w)));
}

// Packs the octets of a row from `first` on, SIZE of them in each step of `stride`. Gives this invocation's share of the sum of squares of x; the order
// of summation is the same wherever a row is packed.
fn pack_octets(row: u32, k: u32, first: u32, stride: u32, lane: u32) -> f32 {
    let octets = 4u * ((k + 31u) / 32u);
    var squares = vec4<f32>();
    for (var start = first; start < octets; start += stride) {
        let at = start + lane;
        let is_inside = lane < SIZE && at < octets;
        var low = vec4<f32>();
        var high = vec4<f32>();
        if (is_inside) {
            low = x_four(row, 8u * at, k);
            high = x_four(row, 8u * at + 4u, k);
            squares = fma(low, low, fma(high, high, squares));
            low = weighted(low, 8u * at, k);
            high = weighted(high, 8u * at + 4u, k);
        }
        let power = power_of_unit(lane, low, high);
        if (is_inside) {
            put_octet(row, at, octets, octet(low, high, power));
            if (at % 4u == 0u) {
                put_power(row, at / 4u, octets / 4u, power);
            }
        }
    }
    return (squares.x + squares.y) + (squares.z + squares.w);
}
