// Cached values in half precision: a unit of 8 is 16 bytes.

alias Raw = vec4<u32>;

fn decode(raw: Raw) -> Unit {
    return Unit(
        vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)),
        vec4<f32>(unpack2x16float(raw.z), unpack2x16float(raw.w)),
    );
}

// What the values of a unit, and those of a head, are to be multiplied by.
fn scale_of_unit(raw: Raw) -> f32 {
    return 1.0;
}

fn scale_of_head(raw: Raw) -> f32 {
    return 1.0;
}

fn load_key(unit: u32) -> Raw {
    return keys[unit];
}

fn load_value(unit: u32) -> Raw {
    return values[unit];
}
