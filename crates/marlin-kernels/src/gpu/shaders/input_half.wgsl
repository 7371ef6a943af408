// The input of a linear as `pack_input` makes it: pairs in half precision, a scale for each 32 columns.

fn input_unit(shape: Shape, m: u32, unit: u32) -> array<pair, 16> {
    let start = (m * units_of(shape) + unit) * 4u;
    return unit_of(x[start], x[start + 1u], x[start + 2u], x[start + 3u]);
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return x_scales[m * units_of(shape) + unit];
}
