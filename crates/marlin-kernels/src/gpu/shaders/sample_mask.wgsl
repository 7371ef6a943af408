// Rules out the tokens of a chunk that a row does not allow.

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let mask = rows[workgroup.y].mask;
    if (mask == ABSENT) {
        return;
    }
    for (var i = 0u; i < EACH; i++) {
        let id = workgroup.x * CHUNK + i * SIZE + lane;
        if (id < params.vocabulary && (masks[mask + id / 32u] >> (id % 32u) & 1u) == 0u) {
            logits[workgroup.y * params.vocabulary + id] = logit_of(LOWEST);
        }
    }
}
