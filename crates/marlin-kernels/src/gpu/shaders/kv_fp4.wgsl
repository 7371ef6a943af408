// Cached values as floats of 4 bits, E2M1 of OCP Microscaling: a unit of 8 is 4 bytes. Four units, 32 values, have one scale.

struct Raw {
    codes: u32,
    scale: f32,
}

// Codes i and i + 4. Their exponent and mantissa, where half precision has its own, are 2^14 times too small, which the scale makes good.
fn decode_pair(codes: u32, i: u32) -> vec2<f32> {
    let pair = codes >> (4u * i);
    return unpack2x16float((pair & 0x00080008u) << 12u | (pair & 0x00070007u) << 9u);
}

fn decode(raw: Raw) -> Unit {
    let a = decode_pair(raw.codes, 0u);
    let b = decode_pair(raw.codes, 1u);
    let c = decode_pair(raw.codes, 2u);
    let d = decode_pair(raw.codes, 3u);
    return Unit(vec4<f32>(a.x, b.x, c.x, d.x), vec4<f32>(a.y, b.y, c.y, d.y));
}

// What the values of a unit, and those of a head, are to be multiplied by.
fn scale_of_unit(raw: Raw) -> f32 {
    return raw.scale * 16384.0;
}

fn scale_of_head(raw: Raw) -> f32 {
    return 1.0;
}

fn scale_at(unit: u32) -> u32 {
    return unit / CHUNKS * ((CHUNKS + 3u) / 4u) + unit % CHUNKS / 4u;
}

fn load_key(unit: u32) -> Raw {
    return Raw(keys[unit], f32(key_scales[scale_at(unit)]));
}

fn load_value(unit: u32) -> Raw {
    return Raw(values[unit], f32(value_scales[scale_at(unit)]));
}
