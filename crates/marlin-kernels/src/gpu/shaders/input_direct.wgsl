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
    let a = octet(x_0, x_1, power_of_unit);
    let b = octet(x_2, x_3, power_of_unit);
    let c = octet(x_4, x_5, power_of_unit);
    let d = octet(x_6, x_7, power_of_unit);
    return array<pair, 16>(
        to_pair(a.x), to_pair(a.y), to_pair(a.z), to_pair(a.w),
        to_pair(b.x), to_pair(b.y), to_pair(b.z), to_pair(b.w),
        to_pair(c.x), to_pair(c.y), to_pair(c.z), to_pair(c.w),
        to_pair(d.x), to_pair(d.y), to_pair(d.z), to_pair(d.w),
    );
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return power_of_unit;
}
