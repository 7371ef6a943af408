// Cached values in single precision: a unit of 8 is two vectors.

alias Raw = Unit;

fn decode(raw: Raw) -> Unit {
    return raw;
}

// What the values of a unit, and those of a head, are to be multiplied by.
fn scale_of_unit(raw: Raw) -> f32 {
    return 1.0;
}

fn scale_of_head(raw: Raw) -> f32 {
    return 1.0;
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[2u * unit], keys[2u * unit + 1u]);
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[2u * unit], values[2u * unit + 1u]);
}
