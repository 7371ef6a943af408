// Packed weights `[rows, K]`, unpacked 32 columns ("a unit") at a time, in the order of pairs: pair p holds columns c and c + 4, c = 8 (p / 4) + p % 4.
// The constants, and what
// fetches and decodes codes, scales and offsets, come from the format's module; where in the buffers the matrix begins, from one of the `matrix` modules.

struct Shape {
    // Columns.
    k: u32,
    rows: u32,
    // Groups of a row.
    groups: u32,
}

// Scale and zero point or bias of a row, for both halves of a unit.
struct Groups {
    low_scale: f32,
    high_scale: f32,
    low_offset: f32,
    high_offset: f32,
}

// Those of four rows, as they are stored.
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
    let first = (first_quad(shape) + quad) * shape.groups;
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

// Those of the i-th row of four.
fn decode_groups(groups: PackedGroups, i: u32) -> Groups {
    let low_scale = decode_scale(groups.low_scales, i);
    let low_offset = decode_offset(groups.low_offsets, i);
    if (HALVED) {
        return Groups(low_scale, decode_scale(groups.high_scales, i), low_offset, decode_offset(groups.high_offsets, i));
    }
    return Groups(low_scale, low_scale, low_offset, low_offset);
}

fn codes_of_quad(shape: Shape, quad: u32, i: u32, unit: u32) -> Codes {
    return fetch_codes(shape, min(4u * quad + i, shape.rows - 1u), unit);
}

// The values of codes, less their zero points.
fn decode_unit(codes: Codes, groups: Groups) -> array<pair, 16> {
    if (ZEROED) {
        return decode_codes(codes, vec2<f32>(groups.low_offset, groups.high_offset));
    }
    return decode_codes(codes, vec2<f32>());
}

// Weights, but for their row's factor.
fn decode_weights(codes: Codes, groups: Groups) -> array<pair, 16> {
    let c = decode_unit(codes, groups);
    if (!SCALED) {
        return c;
    }
    let s = pair(num(groups.low_scale));
    let t = pair(num(groups.high_scale));
    if (BIASED) {
        let a = pair(num(groups.low_offset));
        let b = pair(num(groups.high_offset));
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
