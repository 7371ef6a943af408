// Cached values as floats of 8 bits, E4M3 of OCP FP8: a unit of 8 is 8 bytes. A head of a token has one scale.

struct Raw {
    codes: vec2<u32>,
    scale: f32,
}

// Four codes. Their exponent and mantissa, where half precision has its own, are 2^8 times too small, which the scale makes good.
fn decode_word(codes: u32) -> vec4<f32> {
    let odd = unpack2x16float((codes & 0x80008000u) | (codes >> 1u & 0x3f803f80u));
    let even = unpack2x16float((codes << 8u & 0x80008000u) | (codes << 7u & 0x3f803f80u));
    return vec4<f32>(even.x, odd.x, even.y, odd.y);
}

fn decode(raw: Raw) -> Unit {
    return Unit(decode_word(raw.codes.x), decode_word(raw.codes.y));
}

// What the values of a unit, and those of a head, are to be multiplied by.
fn scale_of_unit(raw: Raw) -> f32 {
    return 1.0;
}

fn scale_of_head(raw: Raw) -> f32 {
    return raw.scale * 256.0;
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[unit], f32(key_scales[unit / CHUNKS]));
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[unit], f32(value_scales[unit / CHUNKS]));
}
