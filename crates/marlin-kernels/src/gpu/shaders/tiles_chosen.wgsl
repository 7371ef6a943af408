// A tile for each expert of one token. Each workgroup chooses them for itself, which takes less time than to wait for a kernel that does; the first one
// writes them down.

fn route(workgroup: vec3<u32>, index: u32) {
    choose_experts(0u, index);
    if (workgroup.x == 0u && workgroup.y == 0u) {
        put_chosen(0u, 0u, index);
    }
}

// Matrix, first row and end.
fn tile_of(number: u32) -> vec4<u32> {
    let place = place_of(number);
    return vec4<u32>(chosen[number], place, place + 1u, 0u);
}

fn pair_of(row: u32) -> u32 {
    return row;
}
