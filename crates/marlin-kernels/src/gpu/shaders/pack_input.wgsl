// Prepares the input of linears in half precision. If NORMED, it is the RMS norm of x: one workgroup takes a row, and what the row's norm divides by
// becomes part of its scales. Otherwise workgroups share a row.

struct Params {
    k: u32,
    eps: f32,
    // How far apart rows of x are.
    stride: u32,
}
var<immediate> params: Params;

fn put_octet(row: u32, at: u32, octets: u32, pairs: vec4<u32>) {
    packed[row * octets + at] = pairs;
}

fn put_power(row: u32, unit: u32, units: u32, power: f32) {
    packed_scales[row * units + unit] = power;
}

@compute @workgroup_size(SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = workgroup.y * workgroups.z + workgroup.z;
    let squares = pack_octets(row, params.k, workgroup.x * SIZE, workgroups.x * SIZE, lane);
    if (NORMED) {
        let factor = norm_factor(reduce_sum(lane, squares), params.k, params.eps);
        let units = (params.k + 31u) / 32u;
        // Each invocation finds the scales that it has written.
        for (var at = lane; at < 4u * units; at += SIZE) {
            if (at % 4u == 0u) {
                packed_scales[row * units + at / 4u] *= factor;
            }
        }
    }
}
