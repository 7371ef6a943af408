// Arithmetic in single precision: `num` and pairs of it, the input x of a linear, `[rows, K]` as it is.

alias num = f32;
alias pair = vec2<f32>;

// The two halves of a word.
fn to_pair(halves: u32) -> pair {
    return unpack2x16float(halves);
}
