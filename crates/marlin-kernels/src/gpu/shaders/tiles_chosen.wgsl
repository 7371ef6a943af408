// A tile for each expert of one token. Each workgroup chooses them for itself, which takes less time than to wait for a kernel that does; one that has no
// tile writes them down.

fn route(workgroup: vec3<u32>, index: u32) {
    choose_experts(0u, index);
    if (workgroup.x == 0u && workgroup.y == slots()) {
        put_chosen(0u, 0u, index);
    }
}

fn slots() -> u32 {
    return params.routing.top_k + params.routing.shared_experts;
}

// Matrix, first row and end; none beyond the last slot.
fn tile_of(number: u32) -> vec4<u32> {
    if (number == slots()) {
        return vec4<u32>();
    }
    let place = place_of(number);
    return vec4<u32>(chosen[number], place, place + 1u, 0u);
}

fn pair_of(row: u32) -> u32 {
    return row;
}
