// out[l, :] = x[logit row l, :].

struct Params {
    width: u32,
}
var<immediate> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < params.width) {
        out[id.y * params.width + id.x] = x[logit_rows[id.y] * params.width + id.x];
    }
}
