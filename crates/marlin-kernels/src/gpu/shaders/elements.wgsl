// The value of a code of each element. A kernel's format module calls the one it needs `decode`.

fn uint_value(code: u32) -> f32 {
    return f32(code);
}

fn int_value(code: u32) -> f32 {
    return f32(code) - f32(1u << (BITS - 1u));
}

// OCP Microscaling v1.0, section 5.3.3: sign, 2 bits of exponent with bias 1, 1 bit of mantissa. Integers only, because half
// precision may flush its smallest numbers to zero.
fn e2m1_value(code: u32) -> f32 {
    let magnitude = code & 7u;
    let normal = ((magnitude >> 1u) + 126u) << 23u | (magnitude & 1u) << 22u;
    let bits = select(normal, magnitude * 0x3f000000u, magnitude < 2u);
    return bitcast<f32>(bits | (code & 8u) << 28u);
}

// OCP FP8: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, 0x7f and 0xff are not numbers.
fn e4m3_value(code: u32) -> f32 {
    let magnitude = code & 0x7fu;
    let normal = bitcast<f32>((magnitude << 20u) + (120u << 23u));
    let subnormal = f32(magnitude) * 0x1p-9f;
    let finite = select(normal, subnormal, magnitude < 8u);
    let value = select(finite, bitcast<f32>(0x7fc00000u), magnitude == 0x7fu);
    return select(value, -value, (code & 0x80u) != 0u);
}

// GGUF's IQ4_NL: 16 values, steeper towards the ends.
const IQ4_NL = array<f32, 16>(
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
);

fn iq4_nl_value(code: u32) -> f32 {
    var values = IQ4_NL;
    return values[code];
}

fn f16_value(code: u32) -> f32 {
    return unpack2x16float(code).x;
}

fn bf16_value(code: u32) -> f32 {
    return bitcast<f32>(code << 16u);
}

fn f32_value(code: u32) -> f32 {
    return bitcast<f32>(code);
}

// 2^(code − 127); the smallest is subnormal in single precision.
fn e8m0_value(code: u32) -> f32 {
    return bitcast<f32>(select(code << 23u, 0x00400000u, code == 0u));
}
