// Cached values as integers of 8 bits, stored with 128 added: a unit of 8 is 8 bytes. A head of a token has one scale.

struct Raw {
    codes: vec2<u32>,
    scale: f32,
}

fn decode(raw: Raw) -> Unit {
    return Unit(
        (vec4<f32>(unpack4xU8(raw.codes.x)) - 128.0) * raw.scale,
        (vec4<f32>(unpack4xU8(raw.codes.y)) - 128.0) * raw.scale,
    );
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[unit], f32(key_scales[unit / CHUNKS]));
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[unit], f32(value_scales[unit / CHUNKS]));
}
