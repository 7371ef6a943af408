// The input of a linear of one row in half precision: the RMS norm of x, which each workgroup packs for itself.

// Room for UNITS units, no fewer than there are; their octets side by side, so that neighbouring invocations read neighbouring memory.
var<workgroup> staged: array<vec4<u32>, 4u * UNITS>;
var<workgroup> staged_scales: array<f32, UNITS>;

fn put_octet(row: u32, at: u32, octets: u32, pairs: vec4<u32>) {
    staged[at % 4u * UNITS + at / 4u] = pairs;
}

fn put_power(row: u32, unit: u32, units: u32, power: f32) {
    staged_scales[unit] = power;
}

// The sum of squares is left for the end. Its barrier comes after all that was put.
fn prepare_input(shape: Shape, index: u32) {
    begin_sum(index, pack_octets(0u, shape.k, 0u, SIZE, index));
}

// What sums are multiplied by in the end: the norm's factor.
fn input_factor(shape: Shape) -> f32 {
    return norm_factor(end_sum(), shape.k, params.eps);
}

fn input_unit(shape: Shape, m: u32, unit: u32) -> array<pair, 16> {
    return unit_of(staged[unit], staged[UNITS + unit], staged[2u * UNITS + unit], staged[3u * UNITS + unit]);
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return staged_scales[unit];
}
