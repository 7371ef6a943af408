// Arithmetic in half precision: `num` and pairs of it.

alias num = f16;
alias pair = vec2<f16>;

// The two halves of a word.
fn to_pair(halves: u32) -> pair {
    return pair(unpack2x16float(halves));
}
