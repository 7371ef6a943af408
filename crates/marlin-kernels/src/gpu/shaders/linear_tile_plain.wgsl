// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for many rows m: tiles of 64 × 64 outputs, 32 columns of x and W at a time in workgroup
// memory, 4 × 4 outputs an invocation.

const TILE = 64u;
// One more than the pairs of a unit, so that a pair's values lie in different banks.
const STRIDE = 17u;
var<workgroup> x_tile: array<vec2<f32>, TILE * STRIDE>;
var<workgroup> w_tile: array<vec2<f32>, TILE * STRIDE>;

// An invocation's sums of the tile whose first row of W is `first_of_w`.
fn sum_tile(shape: Shape, rows: Rows, first_of_w: u32, local: vec2<u32>) -> array<f32, 16> {
    let index = 16u * local.y + local.x;
    let units = units_of(shape);
    let x_row = input_row(min(rows.first + index % TILE, rows.end - 1u));
    var sums: array<f32, 16>;
    for (var unit = 0u; unit < units; unit++) {
        workgroupBarrier();
        if (index < TILE) {
            let row = min(first_of_w + index, shape.rows - 1u);
            let groups = decode_groups(fetch_groups(shape, row / 4u, unit), row % 4u);
            var weights = decode_weights(fetch_codes(shape, row, unit), groups);
            for (var p = 0u; p < 16u; p++) {
                w_tile[index * STRIDE + p] = vec2<f32>(weights[p]);
            }
        } else if (index < 2u * TILE) {
            let row = index - TILE;
            var values = input_unit(shape, x_row, unit);
            let scale = input_scale(shape, x_row, unit);
            for (var p = 0u; p < 16u; p++) {
                x_tile[row * STRIDE + p] = vec2<f32>(values[p]) * scale;
            }
        }
        workgroupBarrier();
        for (var p = 0u; p < 16u; p++) {
            var w: array<vec2<f32>, 4>;
            for (var c = 0u; c < 4u; c++) {
                w[c] = w_tile[(local.x + 16u * c) * STRIDE + p];
            }
            for (var r = 0u; r < 4u; r++) {
                let value = x_tile[(local.y + 16u * r) * STRIDE + p];
                for (var c = 0u; c < 4u; c++) {
                    sums[4u * r + c] = fma(value.x, w[c].x, fma(value.y, w[c].y, sums[4u * r + c]));
                }
            }
        }
    }
    return sums;
}

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let shape = params.shape;
    let first_of_w = workgroup.x * TILE;
    let rows = rows_of(workgroup, TILE);
    if (is_empty(rows)) {
        return;
    }
    var sums = sum_tile(shape, rows, first_of_w, local.xy);
    var others: array<f32, 16>;
    if (GATED) {
        others = sum_tile(shape, rows, first_of_w + output_rows(shape), local.xy);
    }
    for (var i = 0u; i < 16u; i++) {
        let m = rows.first + local.y + 16u * (i / 4u);
        let row = first_of_w + local.x + 16u * (i % 4u);
        if (m < rows.end && row < output_rows(shape)) {
            store_row(m, row, affine_of(row), sums[i], others[i]);
        }
    }
}
