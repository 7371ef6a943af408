// Which dimensions of a head are rotated together.

// The pair that a dimension belongs to, of so many.
fn pair_of(dimension: u32, pairs: u32) -> u32 {
    return select(dimension % pairs, dimension / 2u, INTERLEAVED);
}

// Its two dimensions.
fn dimensions_of(pair: u32, pairs: u32) -> vec2<u32> {
    return select(vec2<u32>(pair, pair + pairs), vec2<u32>(2u * pair, 2u * pair + 1u), INTERLEAVED);
}
