// The input of a linear as it is, `[rows, K]` in single precision, of whole units, which are packed as `pack_input` would, where they are multiplied.

// The power of two of the unit that was read last.
var<private> power_of_unit: f32;

fn input_unit(shape: Shape, m: u32, unit: u32) -> array<pair, 16> {
    let first = (m * input_stride(shape) + 32u * unit) / 4u;
    @for i < 8
    let x_@i = x[first + @iu];
    @end
    let low = max(max(abs(x_0), abs(x_1)), max(abs(x_2), abs(x_3)));
    let high = max(max(abs(x_4), abs(x_5)), max(abs(x_6), abs(x_7)));
    let both = max(low, high);
    power_of_unit = power_above(max(max(both.x, both.y), max(both.z, both.w)));
    return unit_of(
        octet(x_0, x_1, power_of_unit),
        octet(x_2, x_3, power_of_unit),
        octet(x_4, x_5, power_of_unit),
        octet(x_6, x_7, power_of_unit),
    );
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return power_of_unit;
}
