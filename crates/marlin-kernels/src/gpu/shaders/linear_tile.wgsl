// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for many rows m, on matrices of SIZE × SIZE that one of the mma modules multiplies. A workgroup
// computes TILE_M × TILE_N sums. It steps along K by TILE_K columns, which it unpacks into workgroup memory while the next ones are on their
// way into registers. Its subgroups of 32 are PARTS_M × PARTS_N, each with ROWS × 2 PAIRS matrices of sums, times SPLITS that divide the
// columns of each step among themselves.
//
// Of a gated linear, matrices of W's rows alternate between gate and the rows that it gates, so that pairs of matrices hold what belongs
// together.

const STRIDE = TILE_K + ROW_PADDING; // of rows in workgroup memory, which thereby begin in different banks
const X_HALVES = TILE_M * STRIDE;
const W_HALVES = TILE_N * STRIDE;
const PARTS = PARTS_M * PARTS_N;
const INVOCATIONS = 32u * PARTS * SPLITS;

// A matrix for each subgroup, of which each invocation then takes a share.
const SUMS_STRIDE = SIZE;
const SUMS = SIZE * SIZE;
const SHARE = (SUMS + 32u * SPLITS - 1u) / (32u * SPLITS);
var<workgroup> sums: array<f32, PARTS * SPLITS * SUMS>;

// An invocation's place among the 32 that share a matrix.
var<private> lane: u32;

// The row of W that is row r of a tile whose outputs begin at `first`; beyond the last one it is repeated.
fn weight_row(shape: Shape, first: u32, r: u32) -> u32 {
    if (GATED) {
        let output = first + r / (2u * SIZE) * SIZE + r % SIZE;
        return min(output, output_rows(shape) - 1u) + select(0u, output_rows(shape), r % (2u * SIZE) >= SIZE);
    }
    return min(first + r, shape.rows - 1u);
}

// The octet of a row of x that is the i-th of the tile in a step.
fn fetch_x(shape: Shape, x_row: u32, step: u32, i: u32) -> vec4<u32> {
    return fetch_octet(shape, x_row, step * (TILE_K / 8u) + i % (TILE_K / 8u));
}

// Where in a tile of W the unit is that comes i-th: its row and its place in the row. Two of a row come together, then those of the next row, so that
// neighbouring invocations store to different banks.
const TOGETHER = min(2u, TILE_K / 32u);

fn row_of_place(i: u32) -> u32 {
    return i / TOGETHER % TILE_N;
}

fn unit_of_place(i: u32) -> u32 {
    return i / (TOGETHER * TILE_N) * TOGETHER + i % TOGETHER;
}

// The unit of W that comes i-th in a step. Beyond the last one it is repeated, where x is 0.
fn unit_of_step(shape: Shape, step: u32, i: u32) -> u32 {
    return min(step * (TILE_K / 32u) + unit_of_place(i), units_of(shape) - 1u);
}

fn put_weights(at: u32, w: array<pair, 16>) {
    put_w(at, Octet(vec4<f16>(w[0], w[1]), vec4<f16>(w[2], w[3])));
    put_w(at + 8u, Octet(vec4<f16>(w[4], w[5]), vec4<f16>(w[6], w[7])));
    put_w(at + 16u, Octet(vec4<f16>(w[8], w[9]), vec4<f16>(w[10], w[11])));
    put_w(at + 24u, Octet(vec4<f16>(w[12], w[13]), vec4<f16>(w[14], w[15])));
}

// An invocation's share of a matrix's sums, which begin at `at` for the first split: those of all splits together.
fn share_of(at: u32, split: u32) -> array<f32, SHARE> {
    var share: array<f32, SHARE>;
    for (var e = 0u; e < SHARE; e++) {
        let i = (e * SPLITS + split) * 32u + lane;
        if (i < SUMS) {
            for (var s = 0u; s < SPLITS; s++) {
                share[e] += sums[at + s * PARTS * SUMS + i];
            }
        }
    }
    return share;
}

// Stores the outputs of an invocation's share of a matrix that begins at (first_m, first), and of what is gated by it.
fn store_share(shape: Shape, values: array<f32, SHARE>, others: array<f32, SHARE>, split: u32, rows: Rows, first_m: u32, first: u32) {
    var value = values;
    var other = others;
    for (var e = 0u; e < SHARE; e++) {
        let i = (e * SPLITS + split) * 32u + lane;
        let m = first_m + i / SIZE;
        let row = first + i % SIZE;
        if (i < SUMS && m < rows.end && row < output_rows(shape)) {
            let scale = input_scale(input_row(m));
            store_row(m, row, affine_of(row), value[e] * scale, other[e] * scale);
        }
    }
}

@compute @workgroup_size(INVOCATIONS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let shape = params.shape;
    let rows = rows_of(workgroup, TILE_M);
    if (is_empty(rows)) {
        return;
    }
    let first_m = rows.first;
    let first = workgroup.x * select(TILE_N, TILE_N / 2u, GATED);
    lane = index % 32u;
    let subgroup = index / 32u;
    let split = subgroup / PARTS;
    // Where the subgroup's share of the tile begins.
    let part_m = subgroup % PARTS / PARTS_N * (TILE_M / PARTS_M);
    let part_n = subgroup % PARTS_N * (TILE_N / PARTS_N);
    let part_k = split * (TILE_K / SPLITS);
    let from_x = part_m * STRIDE + part_k;
    let from_w = part_n * STRIDE + part_k;
    let steps = (shape.k + TILE_K - 1u) / TILE_K;
    let last_step = (steps + AHEAD - 1u) / AHEAD * AHEAD - 1u;

@for i < W_UNITS
    let w_place_@i = index + @iu * INVOCATIONS;
    let row_@i = weight_row(shape, first, row_of_place(w_place_@i));
@end
@for i < X_OCTETS
    let x_place_@i = index + @iu * INVOCATIONS;
    let x_row_@i = input_row(min(first_m + x_place_@i / (TILE_K / 8u), rows.end - 1u));
@end
@for a < AHEAD
@for i < W_UNITS
    let unit_@a_@i = unit_of_step(shape, @au, w_place_@i);
    var codes_@a_@i = fetch_codes(shape, row_@i, unit_@a_@i);
    var groups_@a_@i = fetch_groups(shape, row_@i / 4u, unit_@a_@i);
@end
@for i < X_OCTETS
    var x_@a_@i = fetch_x(shape, x_row_@i, @au, x_place_@i);
@end
@end

    // Cooperative matrices are made of what is in memory.
    for (var i = lane; i < SUMS; i += 32u) {
        sums[subgroup * SUMS + i] = 0.0;
    }
    workgroupBarrier();
    let zero = load_sums(subgroup * SUMS);
@for r < ROWS
@for p < PAIRS
    var even_@r_@p = zero;
    var odd_@r_@p = zero;
@end
@end

    // AHEAD steps a round; those beyond the last one meet columns of x that are 0.
    for (var round = 0u; round < steps; round += AHEAD) {
@for a < AHEAD
    {
        // The step before has been multiplied.
        workgroupBarrier();
@for i < X_OCTETS
        put_x(x_place_@i / (TILE_K / 8u) * STRIDE + x_place_@i % (TILE_K / 8u) * 8u, halves(x_@a_@i));
@end
@for i < W_UNITS
        put_weights(
            row_of_place(w_place_@i) * STRIDE + unit_of_place(w_place_@i) * 32u,
            decode_weights(codes_@a_@i, decode_groups(groups_@a_@i, row_@i % 4u)),
        );
@end
        workgroupBarrier();
        let next = min(round + @au + AHEAD, last_step);
@for i < W_UNITS
        let next_unit_@i = unit_of_step(shape, next, w_place_@i);
        codes_@a_@i = fetch_codes(shape, row_@i, next_unit_@i);
        groups_@a_@i = fetch_groups(shape, row_@i / 4u, next_unit_@i);
@end
@for i < X_OCTETS
        x_@a_@i = fetch_x(shape, x_row_@i, next, x_place_@i);
@end
@for k < DEPTH
@for r < ROWS
        let x_@k_@r = load_x(from_x + @ru * SIZE * STRIDE + @ku * SIZE, STRIDE);
@end
@for p < PAIRS
        let even_w_@k_@p = load_w(from_w + 2u * @pu * SIZE * STRIDE + @ku * SIZE, STRIDE);
        let odd_w_@k_@p = load_w(from_w + (2u * @pu + 1u) * SIZE * STRIDE + @ku * SIZE, STRIDE);
@for r < ROWS
        even_@r_@p = multiply_add(x_@k_@r, even_w_@k_@p, even_@r_@p);
        odd_@r_@p = multiply_add(x_@k_@r, odd_w_@k_@p, odd_@r_@p);
@end
@end
@end
    }
@end
    }

    let at = subgroup % PARTS * SUMS;
    let first_of_part = first + select(part_n, part_n / 2u, GATED);
@for r < ROWS
@for p < PAIRS
    workgroupBarrier();
    store_sums(subgroup * SUMS, even_@r_@p);
    workgroupBarrier();
    let even_share_@r_@p = share_of(at, split);
    workgroupBarrier();
    store_sums(subgroup * SUMS, odd_@r_@p);
    workgroupBarrier();
    let odd_share_@r_@p = share_of(at, split);
    if (GATED) {
        store_share(shape, even_share_@r_@p, odd_share_@r_@p, split, rows, first_m + part_m + @ru * SIZE, first_of_part + @pu * SIZE);
    } else {
        let first_row = first_of_part + 2u * @pu * SIZE;
        store_share(shape, even_share_@r_@p, even_share_@r_@p, split, rows, first_m + part_m + @ru * SIZE, first_row);
        store_share(shape, odd_share_@r_@p, odd_share_@r_@p, split, rows, first_m + part_m + @ru * SIZE, first_row + SIZE);
    }
@end
@end
}
