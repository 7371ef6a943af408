// The input of a linear as `pack_rows` makes it: pairs in half precision, in rows padded to a multiple of PADDED columns, a scale for each row.

// Four pairs, of columns c to c + 7.
struct Octet {
    low: vec4<f16>,
    high: vec4<f16>,
}

fn input_octet(shape: Shape, m: u32, i: u32) -> Octet {
    return x[m * ((shape.k + PADDED - 1u) / PADDED * (PADDED / 8u)) + i];
}

fn input_scale(m: u32) -> f32 {
    return x_scales[m];
}
