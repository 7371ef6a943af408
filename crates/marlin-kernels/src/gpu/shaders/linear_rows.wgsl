// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for few rows m. LANES invocations share four rows of W, a quad, and step along K unit by unit, so
// that each weight is read once for all MB rows of x. Products of a unit are summed in the device's arithmetic, units in single precision.

const SIZE = LANES * QUADS;
var<workgroup> partial: array<vec4<f32>, SIZE>;

// The first 8 pairs of a unit.
fn dot_low(w: array<pair, 16>, x: array<pair, 16>) -> pair {
    return fma(w[7], x[7], fma(w[6], x[6], fma(w[5], x[5], fma(w[4], x[4], fma(w[3], x[3], fma(w[2], x[2], fma(w[1], x[1], w[0] * x[0])))))));
}

// The other 8, added to `sum`.
fn dot_high(w: array<pair, 16>, x: array<pair, 16>, sum: pair) -> pair {
    return fma(w[15], x[15], fma(w[14], x[14], fma(w[13], x[13], fma(w[12], x[12],
        fma(w[11], x[11], fma(w[10], x[10], fma(w[9], x[9], fma(w[8], x[8], sum))))))));
}

fn dot_unit(w: array<pair, 16>, x: array<pair, 16>, low_scale: f32, high_scale: f32) -> f32 {
    if (HALVED && !BIASED) {
        let low = vec2<f32>(dot_low(w, x));
        let high = vec2<f32>(dot_high(w, x, pair()));
        return (low.x + low.y) * low_scale + (high.x + high.y) * high_scale;
    }
    let sum = vec2<f32>(dot_high(w, x, dot_low(w, x)));
    return select((sum.x + sum.y) * low_scale, sum.x + sum.y, BIASED);
}

fn row_of_quad(shape: Shape, groups: Groups, quad: u32, i: u32, unit: u32) -> array<pair, 16> {
    if (BIASED) {
        return weights_of_quad(shape, groups, quad, i, unit);
    }
    return unit_of_quad(shape, groups, quad, i, unit);
}

// An invocation's share of the sums of a quad, for MB rows of x from `first_m` on.
fn sum_quad(shape: Shape, quad: u32, first_m: u32, lane: u32) -> array<vec4<f32>, MB> {
    var sums: array<vec4<f32>, MB>;
    let units = units_of(shape);
    for (var unit = lane; unit < units; unit += LANES) {
        let g = groups_of(shape, quad, unit);
        let w0 = row_of_quad(shape, g, quad, 0u, unit);
        let w1 = row_of_quad(shape, g, quad, 1u, unit);
        let w2 = row_of_quad(shape, g, quad, 2u, unit);
        let w3 = row_of_quad(shape, g, quad, 3u, unit);
        for (var b = 0u; b < MB; b++) {
            let m = min(first_m + b, params.m - 1u);
            let x = input_unit(shape, m, unit);
            let dots = vec4<f32>(
                dot_unit(w0, x, g.low_scales.x, g.high_scales.x),
                dot_unit(w1, x, g.low_scales.y, g.high_scales.y),
                dot_unit(w2, x, g.low_scales.z, g.high_scales.z),
                dot_unit(w3, x, g.low_scales.w, g.high_scales.w),
            );
            sums[b] = fma(dots, vec4<f32>(input_scale(shape, m, unit)), sums[b]);
        }
    }
    return sums;
}

// The sum over the LANES invocations of a quad, in a fixed order; the first of them gets it.
fn reduce_lanes(index: u32, lane: u32, value: vec4<f32>) -> vec4<f32> {
    workgroupBarrier();
    partial[index] = value;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            partial[index] += partial[index + step];
        }
    }
    workgroupBarrier();
    return partial[index - lane];
}

@compute @workgroup_size(LANES, QUADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let shape = params.shape;
    let lane = local.x;
    let quads = (output_rows(shape) + 3u) / 4u;
    let wanted = workgroup.x * QUADS + local.y;
    // All take part in the reductions.
    let quad = min(wanted, quads - 1u);
    let first_m = workgroup.y * MB;
    let row = 4u * quad + lane;
    let stores = lane < 4u && wanted < quads && row < output_rows(shape);

    let sums = sum_quad(shape, quad, first_m, lane);
    var others: array<vec4<f32>, MB>;
    if (GATED) {
        others = sum_quad(shape, quad + output_rows(shape) / 4u, first_m, lane);
    }
    for (var b = 0u; b < MB; b++) {
        let sum = reduce_lanes(index, lane, sums[b])[lane % 4u];
        var other = 0.0;
        if (GATED) {
            other = reduce_lanes(index, lane, others[b])[lane % 4u];
        }
        if (stores && first_m + b < params.m) {
            store_row(first_m + b, row, sum, other);
        }
    }
}
