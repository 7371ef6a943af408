// Numbers in single precision as halves that share a power of two.

// The power of two that brings numbers up to `largest` below 16, and the largest of them not below 8.
fn power_above(largest: f32) -> f32 {
    // Kept where the power and its inverse are normal numbers.
    let exponent = clamp((bitcast<u32>(largest) >> 23u) & 255u, 16u, 240u);
    return bitcast<f32>((exponent - 3u) << 23u);
}

// Eight columns as four pairs.
fn octet(low: vec4<f32>, high: vec4<f32>, power: f32) -> vec4<u32> {
    // The inverse of a power of two is exact.
    let inverse = bitcast<f32>((254u << 23u) - bitcast<u32>(power));
    let a = low * inverse;
    let b = high * inverse;
    return vec4<u32>(
        pack2x16float(vec2<f32>(a.x, b.x)),
        pack2x16float(vec2<f32>(a.y, b.y)),
        pack2x16float(vec2<f32>(a.z, b.z)),
        pack2x16float(vec2<f32>(a.w, b.w)),
    );
}
