// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for few rows m. 16 lanes share ROWS rows of W and step along K unit by unit, so that
// each weight is read once for all MB rows of x.

const LANES = 16u;
const GROUPS = 8u;
var<workgroup> partial: array<f32, LANES * GROUPS>;

@compute @workgroup_size(LANES, GROUPS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let shape = params.shape;
    let lane = local.x;
    let first_row = (workgroup.x * GROUPS + local.y) * ROWS;
    let first_m = workgroup.y * MB;
    let units = (shape.k + 31u) / 32u;

    var sums: array<f32, MB * ROWS>;
    for (var unit = lane; unit < units; unit += LANES) {
        let columns = min(32u, shape.k - 32u * unit);
        for (var r = 0u; r < ROWS; r++) {
            let row = min(first_row + r, shape.rows - 1u);
            var weights = load_unit(shape, row, unit);
            for (var b = 0u; b < MB; b++) {
                let start = min(first_m + b, params.m - 1u) * shape.k + 32u * unit;
                var sum = 0.0;
                for (var j = 0u; j < columns; j++) {
                    sum = fma(x[start + j], weights[j], sum);
                }
                sums[b * ROWS + r] += sum;
            }
        }
    }

    for (var i = 0u; i < MB * ROWS; i++) {
        let slot = local.y * LANES + lane;
        workgroupBarrier();
        partial[slot] = sums[i];
        for (var step = LANES / 2u; step > 0u; step /= 2u) {
            workgroupBarrier();
            if (lane < step) {
                partial[slot] += partial[slot + step];
            }
        }
        let row = first_row + i % ROWS;
        let m = first_m + i / ROWS;
        if (lane == 0u && row < shape.rows && m < params.m) {
            store(m * params.width + params.first + row, finish(row, partial[slot]));
        }
    }
}
