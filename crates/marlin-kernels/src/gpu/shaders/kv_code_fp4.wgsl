// The nearest E2M1, ties to the even mantissa: steps of a half up to 2, of 1 up to 4, of 2 up to 6.
fn code(value: f32) -> u32 {
    let size = min(abs(value), 6.0);
    let upper = select(4.0 + round(size - 2.0), 6.0 + round((size - 4.0) * 0.5), size >= 4.0);
    return u32(select(round(2.0 * size), upper, size >= 2.0)) | (bitcast<u32>(value) >> 31u) << 3u;
}
