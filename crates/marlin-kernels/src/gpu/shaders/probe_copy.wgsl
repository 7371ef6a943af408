// Copies vectors, neighbouring invocations neighbouring ones; a fixed number of invocations takes turns.

struct Params {
    vectors: u32,
}
var<immediate> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    for (var i = id.x; i < params.vectors; i += 256u * workgroups.x) {
        out[i] = memory[i];
    }
}
