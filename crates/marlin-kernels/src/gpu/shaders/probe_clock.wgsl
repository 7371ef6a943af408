// A chain of multiply-adds that wait for each other: how long it takes tells the clock, whatever memory does.

struct Params {
    rounds: u32,
}
var<immediate> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var value = f32(id.x);
    for (var i = 0u; i < params.rounds; i++) {
@for j < 16
        value = fma(value, 0.5, 1.0);
@end
    }
    out[id.x] = value;
}
