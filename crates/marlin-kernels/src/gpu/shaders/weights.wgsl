// Packed weights `[rows, K]`, unpacked 32 columns ("a unit") at a time, in the order of pairs: pair p holds columns c and c + 4, c = 8 (p / 4) + p % 4.
// The constants, `unit_codes`, `quad_scales` and `quad_offsets` come from the format's module.

struct Shape {
    // Columns.
    k: u32,
    rows: u32,
    // Groups of a row.
    groups: u32,
}

// Scales and zero points or biases of four rows, for both halves of a unit.
struct Groups {
    low_scales: vec4<f32>,
    high_scales: vec4<f32>,
    low_offsets: vec4<f32>,
    high_offsets: vec4<f32>,
}

fn units_of(shape: Shape) -> u32 {
    return (shape.k + 31u) / 32u;
}

fn groups_of(shape: Shape, quad: u32, unit: u32) -> Groups {
    var groups: Groups;
    let first = quad * shape.groups;
    if (HALVED) {
        let low = first + 32u * unit / GROUP;
        // Half a unit may lie beyond the last group.
        let high = first + min((32u * unit + 16u) / GROUP, shape.groups - 1u);
        groups.low_scales = quad_scales(low);
        groups.high_scales = quad_scales(high);
        groups.low_offsets = quad_offsets(low);
        groups.high_offsets = quad_offsets(high);
    } else {
        let index = first + 32u * unit / GROUP;
        groups.low_scales = quad_scales(index);
        groups.high_scales = groups.low_scales;
        groups.low_offsets = quad_offsets(index);
        groups.high_offsets = groups.low_offsets;
    }
    return groups;
}

// The codes' values of the i-th row of a quad, less their zero points.
fn unit_of_quad(shape: Shape, groups: Groups, quad: u32, i: u32, unit: u32) -> array<pair, 16> {
    let row = min(4u * quad + i, shape.rows - 1u);
    if (ZEROED) {
        return unit_codes(shape, row, unit, vec2<f32>(groups.low_offsets[i], groups.high_offsets[i]));
    }
    return unit_codes(shape, row, unit, vec2<f32>());
}

// The weights of the i-th row of a quad, but for the row's factor.
fn weights_of_quad(shape: Shape, groups: Groups, quad: u32, i: u32, unit: u32) -> array<pair, 16> {
    let c = unit_of_quad(shape, groups, quad, i, unit);
    if (!SCALED) {
        return c;
    }
    let s = pair(num(groups.low_scales[i]));
    let t = pair(num(groups.high_scales[i]));
    if (BIASED) {
        let a = pair(num(groups.low_offsets[i]));
        let b = pair(num(groups.high_offsets[i]));
        return array<pair, 16>(
            fma(c[0], s, a), fma(c[1], s, a), fma(c[2], s, a), fma(c[3], s, a),
            fma(c[4], s, a), fma(c[5], s, a), fma(c[6], s, a), fma(c[7], s, a),
            fma(c[8], t, b), fma(c[9], t, b), fma(c[10], t, b), fma(c[11], t, b),
            fma(c[12], t, b), fma(c[13], t, b), fma(c[14], t, b), fma(c[15], t, b),
        );
    }
    return array<pair, 16>(
        c[0] * s, c[1] * s, c[2] * s, c[3] * s, c[4] * s, c[5] * s, c[6] * s, c[7] * s,
        c[8] * t, c[9] * t, c[10] * t, c[11] * t, c[12] * t, c[13] * t, c[14] * t, c[15] * t,
    );
}

// The weights of a row, but for its factor.
fn unit_weights(shape: Shape, row: u32, unit: u32) -> array<pair, 16> {
    return weights_of_quad(shape, groups_of(shape, row / 4u, unit), row / 4u, row % 4u, unit);
}
