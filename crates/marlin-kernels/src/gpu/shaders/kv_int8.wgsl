// Cached values as integers of 8 bits, stored with 128 added: a unit of 8 is 8 bytes. A head of a token has one scale.

struct Raw {
    codes: vec2<u32>,
    scale: f32,
}

// Four codes. A byte below the exponent of 1024 is a half of 1024 + code; devices convert halves faster than integers.
fn decode_word(codes: u32) -> vec4<f32> {
    let even = unpack2x16float((codes & 0x00ff00ffu) | 0x64006400u);
    let odd = unpack2x16float((codes >> 8u & 0x00ff00ffu) | 0x64006400u);
    return vec4<f32>(even.x, odd.x, even.y, odd.y) - 1152.0;
}

fn decode(raw: Raw) -> Unit {
    return Unit(decode_word(raw.codes.x), decode_word(raw.codes.y));
}

// What the values of a unit, and those of a head, are to be multiplied by.
fn scale_of_unit(raw: Raw) -> f32 {
    return 1.0;
}

fn scale_of_head(raw: Raw) -> f32 {
    return raw.scale;
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[unit], f32(key_scales[unit / CHUNKS]));
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[unit], f32(value_scales[unit / CHUNKS]));
}
