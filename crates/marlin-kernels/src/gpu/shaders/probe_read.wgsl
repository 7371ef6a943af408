// Reads vectors, neighbouring invocations neighbouring ones; a fixed number of invocations takes turns.

struct Params {
    vectors: u32,
}
var<immediate> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    let stride = 256u * workgroups.x;
    var sum = vec4<u32>();
    for (var i = id.x; i < params.vectors; i += 4u * stride) {
        let last = params.vectors - 1u;
        // Four are on their way at once.
        let a = memory[i];
        let b = memory[min(i + stride, last)];
        let c = memory[min(i + 2u * stride, last)];
        let d = memory[min(i + 3u * stride, last)];
        sum += (a ^ b) + (c ^ d);
    }
    out[id.x] = sum;
}
