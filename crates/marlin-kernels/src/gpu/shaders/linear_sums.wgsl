// Sums of products of units of weights and of input, four rows of W, a quad, at a time: what kernels for few rows share. A quad's sums are shared by
// LANES neighbouring invocations times SPLITS.

const INVOCATIONS = LANES * QUADS * SPLITS;
const OUTPUTS = 4u * QUADS;

// Sums of quads that are still to be summed up, PARTS for each.
var<workgroup> parts: array<vec4<f32>, PARTS * MATRICES * ROWS_AT_ONCE * QUADS>;

// The first 8 pairs of a unit.
fn dot_low(w: array<pair, 16>, x: array<pair, 16>) -> pair {
    return fma(w[7], x[7], fma(w[6], x[6], fma(w[5], x[5], fma(w[4], x[4], fma(w[3], x[3], fma(w[2], x[2], fma(w[1], x[1], w[0] * x[0])))))));
}

// The other 8, added to `sum`.
fn dot_high(w: array<pair, 16>, x: array<pair, 16>, sum: pair) -> pair {
    return fma(w[15], x[15], fma(w[14], x[14], fma(w[13], x[13], fma(w[12], x[12],
        fma(w[11], x[11], fma(w[10], x[10], fma(w[9], x[9], fma(w[8], x[8], sum))))))));
}

fn dot_unit(w: array<pair, 16>, x: array<pair, 16>, groups: Groups) -> f32 {
    if (HALVED && !BIASED) {
        let low = vec2<f32>(dot_low(w, x));
        let high = vec2<f32>(dot_high(w, x, pair()));
        return fma(low.x + low.y, groups.low_scale, (high.x + high.y) * groups.high_scale);
    }
    let sum = vec2<f32>(dot_high(w, x, dot_low(w, x)));
    return select((sum.x + sum.y) * groups.low_scale, sum.x + sum.y, BIASED);
}

// Weights without their scales, unless biases are added to them.
fn decode_row(codes: Codes, groups: Groups) -> array<pair, 16> {
    if (BIASED) {
        return decode_weights(codes, groups);
    }
    return decode_unit(codes, groups);
}

fn part_at(part: u32, matrix: u32, b: u32, quad: u32) -> u32 {
    return ((part * MATRICES + matrix) * ROWS_AT_ONCE + b) * QUADS + quad;
}

// Puts an invocation's sums of a quad where those of the others are.
fn put_sums(matrix: u32, b: u32, index: u32, sums: vec4<f32>) {
    let lane = index % LANES;
    let quad = index / LANES % QUADS;
    let split = index / (LANES * QUADS);
    let sum = sum_of_lanes(sums);
    if (PARTS > SPLITS) {
        parts[part_at(split * LANES + lane, matrix, b, quad)] = sum;
    } else if (lane == 0u) {
        parts[part_at(split, matrix, b, quad)] = sum;
    }
}

fn total(matrix: u32, b: u32, output: u32) -> f32 {
    var sum = 0.0;
    for (var part = 0u; part < PARTS; part++) {
        sum += parts[part_at(part, matrix, b, output / 4u)][output % 4u];
    }
    return sum;
}
