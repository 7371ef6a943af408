// What codes of each element are, two at a time: a word holds one in each of its halves.

// OCP Microscaling v1.0, section 5.3.3: sign, 2 bits of exponent with bias 1, 1 bit of mantissa. The i-th pair of a word of 4-bit codes in the order of
// `layout.rs`, as halves whose exponents are smaller by 14: value · 2^-14. Signs lie in bits 15, 12, 14 and 13 of each half, the rest of the codes
// below, so that the first pair takes one instruction, the second two, and the others four.
fn e2m1_halves(word: u32, i: u32) -> u32 {
    switch i {
        case 0u: { return word & 0x8e008e00u; }
        case 1u: { return (word << 3u) & 0x8e008e00u; }
        case 2u: { return ((word << 1u) & 0x80008000u) | ((word << 6u) & 0x0e000e00u); }
        default: { return ((word << 2u) & 0x80008000u) | ((word << 9u) & 0x0e000e00u); }
    }
}

// OCP FP8: sign, 4 bits of exponent with bias 7, 3 bits of mantissa. As halves whose exponents are smaller by 8: value · 2^-8. There is no NaN among
// the codes.
fn e4m3_halves(codes: u32) -> u32 {
    return ((codes & 0x00800080u) << 8u) | ((codes & 0x007f007fu) << 7u);
}

// GGUF's IQ4_NL: 16 values, steeper towards the ends, as bytes with 128 added. Chosen by comparisons: an array that is indexed would lie in memory.
fn iq4_nl_byte(code: u32) -> u32 {
    let low = select(0x3f2d1801u, 0x766a5d4fu, (code & 4u) != 0u);
    let high = select(0xa6998d81u, 0xf1d9c5b5u, (code & 4u) != 0u);
    return (select(low, high, code > 7u) >> (8u * (code & 3u))) & 0xffu;
}

// As bits of the mantissa of 1024 in half precision, like integers.
fn iq4_nl_pair(codes: u32) -> pair {
    return to_pair(iq4_nl_byte(codes & 15u) | (iq4_nl_byte(codes >> 16u) << 16u) | 0x64006400u) - pair(num(1152.0));
}

// A scale that is a power of two, with the exponents of single precision.
fn e8m0_scale(byte: u32) -> f32 {
    return bitcast<f32>(byte << 23u);
}

// A scale of E4M3, times 64, so that its products with E2M1 codes are normal numbers.
fn e4m3_scale(byte: u32) -> f32 {
    return unpack2x16float(e4m3_halves(byte)).x * 16384.0;
}
