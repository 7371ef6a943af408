// out[t, :] += Σ weight · x[place, :] over the slots of token t, in their order: what experts made of it, weighted.

struct Params {
    width: u32,
    slots: u32,
}
var<immediate> params: Params;

const SIZE = 256u;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = workgroup.x * SIZE + lane;
    if (column >= params.width) {
        return;
    }
    let first = workgroup.y * params.slots;
    var sum = 0.0;
    for (var slot = 0u; slot < params.slots; slot++) {
        sum = fma(weights[first + slot], x[places[first + slot] * params.width + column], sum);
    }
    out[workgroup.y * params.width + column] += sum;
}
