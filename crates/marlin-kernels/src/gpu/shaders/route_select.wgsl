// Chooses the experts of a token: a workgroup a token. If TILES, there is one token, whose experts are put in order, each with a tile of its own.

struct Params {
    routing: Routing,
}
var<immediate> params: Params;

const SIZE = 256u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = workgroup.x * params.routing.experts;
    choose_experts(first, lane);
    put_chosen(workgroup.x, first, lane);
    if (TILES) {
        for (var slot = lane; slot < params.routing.top_k + params.routing.shared_experts; slot += SIZE) {
            put_tile(place_of(slot), slot, chosen[slot]);
        }
    }
}
