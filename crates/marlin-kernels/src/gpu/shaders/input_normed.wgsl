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
    let a = staged[unit];
    let b = staged[UNITS + unit];
    let c = staged[2u * UNITS + unit];
    let d = staged[3u * UNITS + unit];
    return array<pair, 16>(
        to_pair(a.x), to_pair(a.y), to_pair(a.z), to_pair(a.w),
        to_pair(b.x), to_pair(b.y), to_pair(b.z), to_pair(b.w),
        to_pair(c.x), to_pair(c.y), to_pair(c.z), to_pair(c.w),
        to_pair(d.x), to_pair(d.y), to_pair(d.z), to_pair(d.w),
    );
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return staged_scales[unit];
}
