// Cached values as floats of 8 bits, E4M3 of OCP FP8: a unit of 8 is 8 bytes. A head of a token has one scale.

struct Raw {
    codes: vec2<u32>,
    scale: f32,
}

// Four codes. Their exponent and mantissa, where half precision has its own, are 2^8 times too small.
fn decode_word(codes: u32) -> vec4<f32> {
    let even = codes & 0x00ff00ffu;
    let odd = codes >> 8u & 0x00ff00ffu;
    let low = unpack2x16float((even & 0x00800080u) << 8u | (even & 0x007f007fu) << 7u);
    let high = unpack2x16float((odd & 0x00800080u) << 8u | (odd & 0x007f007fu) << 7u);
    return vec4<f32>(low.x, high.x, low.y, high.y);
}

fn decode(raw: Raw) -> Unit {
    let scale = raw.scale * 256.0;
    return Unit(decode_word(raw.codes.x) * scale, decode_word(raw.codes.y) * scale);
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[unit], f32(key_scales[unit / CHUNKS]));
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[unit], f32(value_scales[unit / CHUNKS]));
}
