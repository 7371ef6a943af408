// Packs a row of numbers in single precision as halves, 32 columns, a unit, sharing a power of two. SIZE invocations take an octet of columns each;
// `x_four`, `weighted`, `put_octet` and `put_power` come from what is packed and to where.

const SIZE = 128u;
var<workgroup> largest_of: array<f32, TURNS * SIZE>;

fn largest_of_octet(low: vec4<f32>, high: vec4<f32>) -> f32 {
    let both = max(abs(low), abs(high));
    return max(max(both.x, both.y), max(both.z, both.w));
}

// The power of two of a unit, whose four octets belong to neighbouring invocations; this is the `turn`-th octet of each.
fn power_of_unit(lane: u32, turn: u32) -> f32 {
    let first = turn * SIZE + (min(lane, SIZE - 1u) & ~3u);
    let largest = vec4<f32>(largest_of[first], largest_of[first + 1u], largest_of[first + 2u], largest_of[first + 3u]);
    return power_above(max(max(largest.x, largest.y), max(largest.z, largest.w)));
}

// Packs the octets of a row from `first` on, SIZE of them in each turn of `stride`; TURNS are loaded at once. Gives this invocation's share of
// the sum of squares of x; the order of summation is the same wherever a row is packed.
fn pack_octets(row: u32, k: u32, first: u32, stride: u32, lane: u32) -> f32 {
    let octets = 4u * ((k + 31u) / 32u);
    var squares = vec4<f32>();
    for (var start = first; start < octets; start += TURNS * stride) {
        @for t < TURNS
        let at_@t = start + @tu * stride + lane;
        let is_inside_@t = lane < SIZE && at_@t < octets;
        var low_@t = vec4<f32>();
        var high_@t = vec4<f32>();
        if (is_inside_@t) {
            low_@t = x_four(row, 8u * at_@t, k);
            high_@t = x_four(row, 8u * at_@t + 4u, k);
        }
        @end
        if (start > first) {
            // The maxima of the units before have been read.
            workgroupBarrier();
        }
        @for t < TURNS
        squares = fma(low_@t, low_@t, fma(high_@t, high_@t, squares));
        if (is_inside_@t) {
            low_@t = weighted(low_@t, 8u * at_@t, k);
            high_@t = weighted(high_@t, 8u * at_@t + 4u, k);
        }
        if (lane < SIZE) {
            largest_of[@tu * SIZE + lane] = largest_of_octet(low_@t, high_@t);
        }
        @end
        workgroupBarrier();
        @for t < TURNS
        if (is_inside_@t) {
            let power = power_of_unit(lane, @tu);
            put_octet(row, at_@t, octets, octet(low_@t, high_@t, power));
            if (at_@t % 4u == 0u) {
                put_power(row, at_@t / 4u, octets / 4u, power);
            }
        }
        @end
    }
    return (squares.x + squares.y) + (squares.z + squares.w);
}
