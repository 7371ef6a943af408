// Cached values in single precision: a unit of 8 is two vectors.

alias Raw = Unit;

fn decode(raw: Raw) -> Unit {
    return raw;
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[2u * unit], keys[2u * unit + 1u]);
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[2u * unit], values[2u * unit + 1u]);
}
