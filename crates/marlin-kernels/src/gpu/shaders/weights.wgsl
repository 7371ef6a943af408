// Packed weights `[rows, K]`, unpacked 32 columns ("a unit") at a time, in the order of pairs: pair p holds columns c and c + 4, c = 8 (p / 4) + p % 4.
// The constants, and what
// fetches and decodes codes, scales and offsets, come from the format's module.

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

// The same as they are stored.
struct PackedGroups {
    low_scales: Scales,
    high_scales: Scales,
    low_offsets: Offsets,
    high_offsets: Offsets,
}

fn units_of(shape: Shape) -> u32 {
    return (shape.k + 31u) / 32u;
}

fn fetch_groups(shape: Shape, quad: u32, unit: u32) -> PackedGroups {
    let first = quad * shape.groups;
    let low = first + 32u * unit / GROUP;
    if (HALVED) {
        // Half a unit may lie beyond the last group.
        let high = first + min((32u * unit + 16u) / GROUP, shape.groups - 1u);
        return PackedGroups(fetch_scales(low), fetch_scales(high), fetch_offsets(low), fetch_offsets(high));
    }
    let scales = fetch_scales(low);
    let offsets = fetch_offsets(low);
    return PackedGroups(scales, scales, offsets, offsets);
}

fn decode_groups(groups: PackedGroups) -> Groups {
    let low_scales = decode_scales(groups.low_scales);
    let low_offsets = decode_offsets(groups.low_offsets);
    if (HALVED) {
        return Groups(low_scales, decode_scales(groups.high_scales), low_offsets, decode_offsets(groups.high_offsets));
    }
    return Groups(low_scales, low_scales, low_offsets, low_offsets);
}

fn groups_of(shape: Shape, quad: u32, unit: u32) -> Groups {
    return decode_groups(fetch_groups(shape, quad, unit));
}

// The values of the i-th row of a quad, less their zero points.
fn decode_unit(codes: Codes, groups: Groups, i: u32) -> array<pair, 16> {
    if (ZEROED) {
        return decode_codes(codes, vec2<f32>(groups.low_offsets[i], groups.high_offsets[i]));
    }
    return decode_codes(codes, vec2<f32>());
}

// The weights of the i-th row of a quad, but for the row's factor.
fn decode_weights(codes: Codes, groups: Groups, i: u32) -> array<pair, 16> {
    let c = decode_unit(codes, groups, i);
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

fn codes_of_quad(shape: Shape, quad: u32, i: u32, unit: u32) -> Codes {
    return fetch_codes(shape, min(4u * quad + i, shape.rows - 1u), unit);
}

fn unit_of_quad(shape: Shape, groups: Groups, quad: u32, i: u32, unit: u32) -> array<pair, 16> {
    return decode_unit(codes_of_quad(shape, quad, i, unit), groups, i);
}

fn weights_of_quad(shape: Shape, groups: Groups, quad: u32, i: u32, unit: u32) -> array<pair, 16> {
    return decode_weights(codes_of_quad(shape, quad, i, unit), groups, i);
}

// The weights of a row, but for its factor.
fn unit_weights(shape: Shape, row: u32, unit: u32) -> array<pair, 16> {
    return weights_of_quad(shape, groups_of(shape, row / 4u, unit), row / 4u, row % 4u, unit);
}
