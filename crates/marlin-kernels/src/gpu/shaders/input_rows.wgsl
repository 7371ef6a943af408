// The input of a linear as `pack_rows` makes it: pairs in half precision, in rows padded to a multiple of PADDED columns, a scale for each row.

// Four pairs, of columns c to c + 7, as they are stored and as halves: words are loaded at once, vectors of halves one by one.
struct Octet {
    low: vec4<f16>,
    high: vec4<f16>,
}

fn fetch_octet(shape: Shape, m: u32, i: u32) -> vec4<u32> {
    return x[m * ((shape.k + PADDED - 1u) / PADDED * (PADDED / 8u)) + i];
}

fn halves(octet: vec4<u32>) -> Octet {
    return Octet(vec4<f16>(to_pair(octet.x), to_pair(octet.y)), vec4<f16>(to_pair(octet.z), to_pair(octet.w)));
}

fn input_scale(m: u32) -> f32 {
    return x_scales[m];
}
