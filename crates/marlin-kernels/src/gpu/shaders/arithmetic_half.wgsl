// Arithmetic in half precision: `num` and pairs of it.

alias num = f16;
alias pair = vec2<f16>;

// The two halves of a word.
fn to_pair(halves: u32) -> pair {
    return pair(unpack2x16float(halves));
}

// The 16 pairs of four octets.
fn unit_of(a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) -> array<pair, 16> {
    return array<pair, 16>(
        to_pair(a.x), to_pair(a.y), to_pair(a.z), to_pair(a.w),
        to_pair(b.x), to_pair(b.y), to_pair(b.z), to_pair(b.w),
        to_pair(c.x), to_pair(c.y), to_pair(c.z), to_pair(c.w),
        to_pair(d.x), to_pair(d.y), to_pair(d.z), to_pair(d.w),
    );
}
