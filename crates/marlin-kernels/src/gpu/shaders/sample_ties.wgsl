// Ends the choice of a row but for ties: counts the tokens of each chunk that have the rank found.

var<workgroup> ties: atomic<u32>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = rows[workgroup.y];
    let is_chosen = advance(workgroup.y, row, lane);
    if (workgroup.x == 0u && lane == 0u) {
        if (is_chosen) {
            state.count = place_of_choice(row.temperature);
        }
        states[workgroup.y * STATES + params.histogram] = state;
    }
    if (!is_chosen) {
        return;
    }
    if (lane == 0u) {
        atomicStore(&ties, 0u);
    }
    workgroupBarrier();
    for (var i = 0u; i < EACH; i++) {
        let id = workgroup.x * CHUNK + i * SIZE + lane;
        if (id < params.vocabulary && rank_of(logits[workgroup.y * params.vocabulary + id]) == state.rank) {
            atomicAdd(&ties, 1u);
        }
    }
    workgroupBarrier();
    if (lane == 0u) {
        chunk_ties[workgroup.y * params.chunks + workgroup.x] = atomicLoad(&ties);
    }
}
