// The input of a linear as `pack_input` makes it: pairs in half precision, a scale for each 32 columns.

fn input_unit(shape: Shape, m: u32, unit: u32) -> array<pair, 16> {
    let start = (m * units_of(shape) + unit) * 4u;
    let a = x[start];
    let b = x[start + 1u];
    let c = x[start + 2u];
    let d = x[start + 3u];
    return array<pair, 16>(
        to_pair(a.x), to_pair(a.y), to_pair(a.z), to_pair(a.w),
        to_pair(b.x), to_pair(b.y), to_pair(b.z), to_pair(b.w),
        to_pair(c.x), to_pair(c.y), to_pair(c.z), to_pair(c.w),
        to_pair(d.x), to_pair(d.y), to_pair(d.z), to_pair(d.w),
    );
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return x_scales[m * units_of(shape) + unit];
}
