// Tiles of pairs that were sorted by expert.

fn route(workgroup: vec3<u32>, index: u32) {}

// Matrix, first row and end.
fn tile_of(number: u32) -> vec4<u32> {
    return tiles[number];
}

fn pair_of(row: u32) -> u32 {
    return pairs[row];
}
