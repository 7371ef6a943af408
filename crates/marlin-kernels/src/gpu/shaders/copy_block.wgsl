// Copies one KV block of every head of a plane [heads, slots, elements of a slot] to another.

struct Params {
    // Elements of a block of one head, and from one head to the next.
    block: u32,
    head: u32,
    from_block: u32,
    to_block: u32,
}
var<immediate> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < params.block) {
        let head = id.y * params.head;
        plane[head + params.to_block * params.block + id.x] = plane[head + params.from_block * params.block + id.x];
    }
}
