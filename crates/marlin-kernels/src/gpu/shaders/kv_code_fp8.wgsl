// The nearest E4M3, ties to the even mantissa.
fn code(value: f32) -> u32 {
    let bits = bitcast<u32>(min(abs(value), 448.0));
    // Three bits of mantissa stay; exponents are 120 smaller.
    let normal = (bits + 0x7ffffu + (bits >> 20u & 1u) >> 20u) - (120u << 3u);
    let denormal = u32(round(bitcast<f32>(bits) * 512.0));
    return select(denormal, normal, bits >= 0x3c800000u) | (bitcast<u32>(value) >> 31u) << 7u;
}
