// The input of a linear, `[rows, K]` in single precision, 32 columns at a time in the order of pairs.

fn input_at(start: u32, column: u32, k: u32) -> f32 {
    return select(0.0, x[start + min(column, k - 1u)], column < k);
}

fn input_pair(start: u32, column: u32, k: u32) -> pair {
    return pair(input_at(start, column, k), input_at(start, column + 4u, k));
}

fn input_unit(shape: Shape, m: u32, unit: u32) -> array<pair, 16> {
    let s = m * input_stride(shape);
    let c = 32u * unit;
    let k = shape.k;
    return array<pair, 16>(
        input_pair(s, c, k), input_pair(s, c + 1u, k), input_pair(s, c + 2u, k), input_pair(s, c + 3u, k),
        input_pair(s, c + 8u, k), input_pair(s, c + 9u, k), input_pair(s, c + 10u, k), input_pair(s, c + 11u, k),
        input_pair(s, c + 16u, k), input_pair(s, c + 17u, k), input_pair(s, c + 18u, k), input_pair(s, c + 19u, k),
        input_pair(s, c + 24u, k), input_pair(s, c + 25u, k), input_pair(s, c + 26u, k), input_pair(s, c + 27u, k),
    );
}

fn input_scale(shape: Shape, m: u32, unit: u32) -> f32 {
    return 1.0;
}
