// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for many rows m: tiles of 64 × 64 outputs, 32 columns of x and W at a time in workgroup
// memory, 4 × 4 outputs an invocation.

const TILE = 64u;
// One more than a unit, so that a column's values lie in different banks.
const STRIDE = 33u;
var<workgroup> x_tile: array<f32, TILE * STRIDE>;
var<workgroup> w_tile: array<f32, TILE * STRIDE>;

@compute @workgroup_size(16, 16)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let shape = params.shape;
    let first_row = workgroup.x * TILE;
    let first_m = workgroup.y * TILE;
    let units = (shape.k + 31u) / 32u;

    var sums: array<f32, 16>;
    for (var unit = 0u; unit < units; unit++) {
        workgroupBarrier();
        for (var i = index; i < TILE * 32u; i += 256u) {
            let m = first_m + i / 32u;
            let column = 32u * unit + i % 32u;
            var value = 0.0;
            if (m < params.m && column < shape.k) {
                value = x[m * shape.k + column];
            }
            x_tile[i / 32u * STRIDE + i % 32u] = value;
        }
        if (index < TILE) {
            var weights = load_unit(shape, min(first_row + index, shape.rows - 1u), unit);
            for (var j = 0u; j < 32u; j++) {
                w_tile[index * STRIDE + j] = weights[j];
            }
        }
        workgroupBarrier();
        for (var j = 0u; j < 32u; j++) {
            var w: vec4<f32>;
            for (var c = 0u; c < 4u; c++) {
                w[c] = w_tile[(local.x + 16u * c) * STRIDE + j];
            }
            for (var r = 0u; r < 4u; r++) {
                let value = x_tile[(local.y + 16u * r) * STRIDE + j];
                for (var c = 0u; c < 4u; c++) {
                    sums[4u * r + c] = fma(value, w[c], sums[4u * r + c]);
                }
            }
        }
    }

    for (var i = 0u; i < 16u; i++) {
        let m = first_m + local.y + 16u * (i / 4u);
        let row = first_row + local.x + 16u * (i % 4u);
        if (m < params.m && row < shape.rows) {
            store(m * params.width + params.first + row, finish(row, sums[i]));
        }
    }
}
