// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for few rows m. Four rows of W, a quad, are shared by LANES neighbouring invocations times SPLITS, which
// step along K unit by unit, so that each weight is read once for all MB rows of x, while the next ones are on their way. Products of a unit are summed
// in the device's arithmetic, units in single precision. Of a gated linear, quads of the gate and of what it gates are summed together.

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

// Stores the outputs of ROWS_AT_ONCE rows of x, an invocation those of one row of W, one after the other.
fn finish_rows(shape: Shape, affine: Affine, first: u32, first_m: u32, index: u32) {
    for (var i = index; i < ROWS_AT_ONCE * OUTPUTS; i += INVOCATIONS) {
        let b = i / OUTPUTS;
        let output = i % OUTPUTS;
        let m = first_m + b;
        let row = first + output;
        var value = 0.0;
        if (m < params.m && row < output_rows(shape)) {
            let factor = input_factor(shape);
            var other = 0.0;
            if (GATED) {
                other = factor * total(1u, b, output);
            }
            value = store_row(m, row, affine, factor * total(0u, b, output), other);
        }
        keep_output(i, value);
    }
    pack_kept(first, first_m, index);
}

@compute @workgroup_size(INVOCATIONS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let shape = params.shape;
    let units = units_of(shape);
    let first_m = workgroup.y * MB;
    // Quads beyond the last one repeat it.
    let quad_0 = min(workgroup.x * QUADS + index / LANES % QUADS, (output_rows(shape) + 3u) / 4u - 1u);
    let quad_1 = quad_0 + output_rows(shape) / 4u;
@for b < MB
    let m_@b = min(first_m + @bu, params.m - 1u);
@end
    var unit = index / (LANES * QUADS) * LANES + index % LANES;
    let first_unit = min(unit, units - 1u);
@for q < MATRICES
    var groups_@q = fetch_groups(shape, quad_@q, first_unit);
@for i < 4
    var codes_@q_@i = codes_of_quad(shape, quad_@q, @iu, first_unit);
@end
@for b < MB
    var sums_@q_@b = vec4<f32>();
@end
@end
    // INVOCATIONS are a multiple of OUTPUTS. Loaded now, since it is waited for at the end.
    let affine = affine_of(min(workgroup.x * OUTPUTS + index % OUTPUTS, output_rows(shape) - 1u));
    prepare_input(shape, index);

    // All take as many steps: beyond the last unit they repeat it, times 0.
    for (var first = 0u; first < units; first += LANES * SPLITS) {
        let here = min(unit, units - 1u);
        let next = min(unit + LANES * SPLITS, units - 1u);
@for q < MATRICES
        let next_groups_@q = fetch_groups(shape, quad_@q, next);
@for i < 4
        let next_codes_@q_@i = codes_of_quad(shape, quad_@q, @iu, next);
@end
@end
@for q < MATRICES
@for i < 4
        let groups_@q_@i = decode_groups(groups_@q, @iu);
        let w_@q_@i = decode_row(codes_@q_@i, groups_@q_@i);
@end
@for b < MB
        let x_@q_@b = input_unit(shape, m_@b, here);
        let scale_@q_@b = select(0.0, input_scale(shape, m_@b, here), unit < units);
        let dots_@q_@b = vec4<f32>(
            dot_unit(w_@q_0, x_@q_@b, groups_@q_0),
            dot_unit(w_@q_1, x_@q_@b, groups_@q_1),
            dot_unit(w_@q_2, x_@q_@b, groups_@q_2),
            dot_unit(w_@q_3, x_@q_@b, groups_@q_3),
        );
        sums_@q_@b = fma(dots_@q_@b, vec4<f32>(scale_@q_@b), sums_@q_@b);
@end
        groups_@q = next_groups_@q;
@for i < 4
        codes_@q_@i = next_codes_@q_@i;
@end
@end
        unit += LANES * SPLITS;
    }

@for b < MB
    if (@bu > 0u && @bu % ROWS_AT_ONCE == 0u) {
        // The rows before are done.
        workgroupBarrier();
    }
@for q < MATRICES
    put_sums(@qu, @bu % ROWS_AT_ONCE, index, sums_@q_@b);
@end
    if (@bu % ROWS_AT_ONCE == ROWS_AT_ONCE - 1u) {
        workgroupBarrier();
        finish_rows(shape, affine, workgroup.x * OUTPUTS, first_m + @bu + 1u - ROWS_AT_ONCE, index);
    }
@end
}
