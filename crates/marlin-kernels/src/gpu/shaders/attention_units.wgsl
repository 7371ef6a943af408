// Keys and values on their way from the cache into the matrices of attention.

// Eight dimensions.
struct Unit {
    low: vec4<f32>,
    high: vec4<f32>,
}

struct Octet {
    low: vec4<f16>,
    high: vec4<f16>,
}

// Puts a unit, scaled, into workgroup memory.
fn put_unit(at: u32, raw: Raw) {
    let unit = decode(raw);
    let scale = scale_of_unit(raw) * scale_of_head(raw);
    put_w(at, Octet(vec4<f16>(unit.low * scale), vec4<f16>(unit.high * scale)));
}
