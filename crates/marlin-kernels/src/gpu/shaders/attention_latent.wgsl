// Causal latent attention on matrices of SIZE × SIZE that one of the mma modules multiplies: of query heads that share keys, whose first VALUE_DIM
// dimensions are the values, over one split of the positions (Dao et al. 2023, "flash-decoding"; DeepSeek-V2, section 2.1.2). Rows are the heads of a
// token, then those of the sequence's next one, as they lie in memory: a workgroup has ROWS of them, of one token or of a query tile, and goes through
// TILE_KEYS keys at a time, which it loads once for scores and values.
//
// 32 invocations, a subgroup, make the scores of 16 rows from a PARTS-th of the dimensions, of which registers keep the queries; the parts meet in
// workgroup memory, where invocations make weights of four scores each. Of the sums each subgroup has all rows and VALUE_BLOCKS times 16 dimensions,
// in registers. While weights are made, the next tile goes to workgroup memory from registers, and the one after it is loaded.
//
// Weights are 2^(score − reference). Matrices cannot be scaled but through memory, so a row's reference follows its largest score only
// when that is SLACK larger. Keys that no token sees read one that is seen.

struct Params {
    heads: u32,
    scale: f32,
    // Positions that a query looks back over, itself included; the largest number for all.
    window: u32,
    block_tokens: u32,
    // Splits of a token, at most 2 to the power of this.
    most_splits: u32,
    // The first of attention_tokens of this dispatch.
    first_token: u32,
    has_sinks: u32,
    // Rows are those of query tiles, and not of one token each.
    is_tiled: u32,
    // That token, if it is the only one: what it sees is then known without a load.
    row: u32,
    position: u32,
    table: u32,
}
var<immediate> params: Params;

// The score of a key that is not seen, and what is below every score but that one.
const UNSEEN = -3.4028234663852886e38;
const LOWEST = -1e30;
const SLACK = 8.0;
const SUBGROUPS = PARTS * ROWS / 16u;
const INVOCATIONS = 32u * SUBGROUPS;
// Rows in workgroup memory, which begin in different banks but for the scores: of weights, of keys, of scores, of queries.
const X_STRIDE = TILE_KEYS + 8u;
const W_STRIDE = DIM + 8u;
const SUMS_STRIDE = TILE_KEYS;
const QUERY_STRIDE = 16u * PARTS * QUERY_BLOCKS + 8u;
const X_HALVES = ROWS * X_STRIDE;
// Two tiles of keys; before there are any, queries.
const TILE_HALVES = TILE_KEYS * W_STRIDE;
const W_HALVES = 2u * TILE_HALVES;

// Each part's scores; at other times a matrix of each subgroup.
var<workgroup> sums: array<f32, PARTS * ROWS * SUMS_STRIDE>;
// Where the keys of two tiles are, as units.
var<workgroup> places: array<u32, 2u * TILE_KEYS>;
// Something of each quad of scores, and of each row.
var<workgroup> of_quads: array<f32, ROWS * QUADS>;
var<workgroup> factors: array<f32, ROWS>;
// Whether a reference must follow, in the first of them. Like all that is in workgroup memory they are whole multiples of 16 bytes, so that
// matrices begin at one, in whatever order devices lay it out: those of Vulkan must.
var<workgroup> follows: array<atomic<u32>, 4>;

// An invocation's place among the 32 that share a matrix.
var<private> lane: u32;

// Where a token's key is, as a unit.
fn place_of(table: u32, position: u32) -> u32 {
    let block = block_tables[table + position / params.block_tokens];
    return (block * params.block_tokens + position % params.block_tokens) * CHUNKS;
}

@compute @workgroup_size(INVOCATIONS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let is_tiled = params.is_tiled != 0u;
    var query_tile = QueryTile(params.first_token + workgroup.z, 1u);
    var token = AttentionToken(params.row, params.position, params.table);
    if (is_tiled) {
        // The last tokens of a sequence see most keys: they begin first.
        query_tile = query_tiles[workgroups.z - 1u - workgroup.z];
    }
    if (is_tiled || workgroups.z > 1u) {
        token = attention_tokens[query_tile.first];
    }
    let skipped = workgroup.y * ROWS;
    let rows = query_tile.count * params.heads;
    if (skipped >= rows) {
        return;
    }
    let count = min(ROWS, rows - skipped);
    let first_position = token.position + skipped / params.heads;
    let begin = first_position + 1u - min(first_position + 1u, params.window);
    let end = token.position + (skipped + count - 1u) / params.heads + 1u;
    let split = select(positions_of_split(end - begin), end - begin, workgroups.x == 1u);
    let split_begin = begin + workgroup.x * split;
    let split_end = min(end, split_begin + split);
    // Among all rows, and among those that have splits.
    let first_row = token.row * params.heads + skipped;
    let first_of_splits = (query_tile.first - params.first_token) * params.heads + skipped;
    if (split_begin >= end) {
        if (index < count) {
            split_softmax[(first_of_splits + index) * workgroups.x + workgroup.x] = vec2<f32>(LOWEST, 0.0);
        }
        return;
    }
    lane = index % 32u;
    let subgroup = index / 32u;
    // The rows and the part of the dimensions that its scores are of, and where its matrices pass through memory.
    let score_row = subgroup % (ROWS / 16u) * 16u;
    let part = subgroup / (ROWS / 16u);
    let scratch = subgroup * SIZE * SUMS_STRIDE;

    if (index < TILE_KEYS) {
        places[index] = place_of(token.table, min(split_begin + index, split_end - 1u));
        places[TILE_KEYS + index] = place_of(token.table, min(split_begin + TILE_KEYS + index, split_end - 1u));
    }
    // Cooperative matrices are made of what is in memory.
    for (var i = index; i < SIZE * SUMS_STRIDE; i += INVOCATIONS) {
        sums[i] = 0.0;
    }
    if (index == 0u) {
        atomicStore(&follows[0], 0u);
    }
    workgroupBarrier();
    let zero = load_sums(0u);
    @for b < VALUE_BLOCKS
    @for k < PER_BLOCK
    @for m < ROW_MATRICES
    var sum@b_@k_@m = zero;
    @end
    @end
    @end
    // Units of a tile that an invocation brings.
    @for u < LOADS
    let key@u = min((index + @uu * INVOCATIONS) / CHUNKS, TILE_KEYS - 1u);
    let chunk@u = (index + @uu * INVOCATIONS) % CHUNKS;
    let at@u = key@u * W_STRIDE + 8u * chunk@u;
    var raw@u = load_key(places[key@u] + chunk@u);
    @end

    // As many columns of the queries at a time, of each part, as there is room for.
    let scale = params.scale * LOG2_E;
    @for t < QUERY_TURNS
    @for u < QUERY_BLOCKS
    let octet_@t_@u = (index + @uu * INVOCATIONS) % (2u * PARTS * QUERY_BLOCKS);
    let row_@t_@u = (index + @uu * INVOCATIONS) / (2u * PARTS * QUERY_BLOCKS);
    let block_@t_@u = octet_@t_@u / (2u * QUERY_BLOCKS) * BLOCKS + @tu * QUERY_BLOCKS;
    let query_@t_@u = (first_row + min(row_@t_@u, count - 1u)) * (DIM / 4u)
        + 4u * block_@t_@u + octet_@t_@u % (2u * QUERY_BLOCKS) * 2u;
    let low_@t_@u = queries[query_@t_@u];
    let high_@t_@u = queries[query_@t_@u + 1u];
    @end
    workgroupBarrier();
    @for u < QUERY_BLOCKS
    put_w(
        row_@t_@u * QUERY_STRIDE + 8u * octet_@t_@u,
        Octet(vec4<f16>(low_@t_@u * scale), vec4<f16>(high_@t_@u * scale)),
    );
    @end
    workgroupBarrier();
    @for b < QUERY_BLOCKS
    @for k < PER_BLOCK
    @for m < PER_BLOCK
    let q@t_@b_@k_@m = load_x_from_w(
        (score_row + @mu * SIZE) * QUERY_STRIDE + 16u * (part * QUERY_BLOCKS + @bu) + @ku * SIZE,
        QUERY_STRIDE,
    );
    @end
    @end
    @end
    @end
    workgroupBarrier();

    // The invocations that make weights have a quad of a row.
    let has_quad = index < ROWS * QUADS;
    let r = min(index / QUADS, ROWS - 1u);
    let side = index % QUADS;
    let position = token.position + (skipped + min(r, count - 1u)) / params.heads;
    var reference = LOWEST;
    var total = 0.0;

    // The first tile, and the second one on its way.
    @for u < LOADS
    if (ALL_LOADS || index + @uu * INVOCATIONS < TILE_KEYS * CHUNKS) {
        put_unit(at@u, raw@u);
    }
    raw@u = load_key(places[TILE_KEYS + key@u] + chunk@u);
    @end
    var later = 0u;
    if (index < TILE_KEYS) {
        later = place_of(token.table, min(split_begin + 2u * TILE_KEYS + index, split_end - 1u));
    }
    workgroupBarrier();
    var half = 0u;
    if (index < TILE_KEYS) {
        places[index] = later;
    }

    var keys_at = 0u;
    for (var tile = split_begin; tile < split_end; tile += TILE_KEYS) {
        @for n < KEY_MATRICES
        @for m < PER_BLOCK
        var score_@n_@m = zero;
        @end
        @end
        @for t < QUERY_TURNS
        @for b < QUERY_BLOCKS
        @for k < PER_BLOCK
        @for n < KEY_MATRICES
        let keys_@t_@b_@k_@n = load_w(
            keys_at + @nu * SIZE * W_STRIDE + 16u * (part * BLOCKS + @tu * QUERY_BLOCKS + @bu) + @ku * SIZE,
            W_STRIDE,
        );
        @for m < PER_BLOCK
        score_@n_@m = multiply_add(q@t_@b_@k_@m, keys_@t_@b_@k_@n, score_@n_@m);
        @end
        @end
        @end
        @end
        @end
        @for n < KEY_MATRICES
        @for m < PER_BLOCK
        store_sums((part * ROWS + score_row + @mu * SIZE) * SUMS_STRIDE + @nu * SIZE, score_@n_@m);
        @end
        @end
        workgroupBarrier();

        @for u < LOADS
        if (ALL_LOADS || index + @uu * INVOCATIONS < TILE_KEYS * CHUNKS) {
            put_unit(TILE_HALVES - keys_at + at@u, raw@u);
        }
        raw@u = load_key(places[half + key@u] + chunk@u);
        @end
        if (index < TILE_KEYS) {
            later = place_of(token.table, min(tile + 3u * TILE_KEYS + index, split_end - 1u));
        }
        @for j < 4
        var own_@j = 0.0;
        @end
        if (has_quad) {
            @for p < PARTS
            @for j < 4
            own_@j += sums[(@pu * ROWS + r) * SUMS_STRIDE + 4u * side + @ju];
            @end
            @end
            var largest = LOWEST;
            @for j < 4
            let key_@j = tile + 4u * side + @ju;
            let is_seen_@j = key_@j < split_end && key_@j <= position && position - key_@j < params.window;
            own_@j = select(UNSEEN, own_@j, is_seen_@j);
            largest = max(largest, own_@j);
            @end
            if (largest > reference + SLACK) {
                atomicStore(&follows[0], 1u);
            }
            of_quads[index] = largest;
        }
        workgroupBarrier();
        // The same for all of the workgroup.
        if (atomicLoad(&follows[0]) != 0u) {
            if (has_quad) {
                let before = reference;
                @for i < QUADS
                reference = max(reference, of_quads[r * QUADS + @iu]);
                @end
                let factor = exp2(before - reference);
                total *= factor;
                if (side == 0u) {
                    factors[r] = factor;
                }
            }
            if (tile != split_begin) {
                @for b < VALUE_BLOCKS
                @for k < PER_BLOCK
                @for m < ROW_MATRICES
                store_sums(scratch, sum@b_@k_@m);
                workgroupBarrier();
                for (var i = lane; i < SIZE * SIZE; i += 32u) {
                    sums[scratch + i / SIZE * SUMS_STRIDE + i % SIZE] *= factors[@mu * SIZE + i / SIZE];
                }
                workgroupBarrier();
                sum@b_@k_@m = load_sums(scratch);
                workgroupBarrier();
                @end
                @end
                @end
            }
        }
        if (has_quad) {
            let weights = vec4<f16>(exp2(vec4<f32>(own_0, own_1, own_2, own_3) - reference));
            @for j < 4
            total += f32(weights[@j]);
            @end
            put_x_quad(r * X_STRIDE + 4u * side, weights);
        }
        workgroupBarrier();
        if (index == 0u) {
            atomicStore(&follows[0], 0u);
        }
        half = TILE_KEYS - half;
        if (index < TILE_KEYS) {
            places[half + index] = later;
        }

        @for n < KEY_MATRICES
        {
            @for m < ROW_MATRICES
            let weights_@m = load_x(@mu * SIZE * X_STRIDE + @nu * SIZE, X_STRIDE);
            @end
            @for b < VALUE_BLOCKS
            @for k < PER_BLOCK
            let values_@b_@k = load_rows(
                keys_at + @nu * SIZE * W_STRIDE + 16u * (subgroup * VALUE_BLOCKS + @bu) + @ku * SIZE,
                W_STRIDE,
            );
            @for m < ROW_MATRICES
            sum@b_@k_@m = multiply_add_rows(weights_@m, values_@b_@k, sum@b_@k_@m);
            @end
            @end
            @end
        }
        @end
        keys_at = TILE_HALVES - keys_at;
    }

    if (has_quad) {
        of_quads[index] = total;
    }
    workgroupBarrier();
    if (has_quad && side == 0u) {
        var all = 0.0;
        @for i < QUADS
        all += of_quads[r * QUADS + @iu];
        @end
        if (workgroups.x == 1u) {
            factors[r] = 1.0 / (all + sink_weight((skipped + r) % params.heads, reference));
        } else {
            factors[r] = 1.0;
            if (r < count) {
                split_softmax[(first_of_splits + r) * workgroups.x + workgroup.x] = vec2<f32>(reference, all);
            }
        }
    }
    @for b < VALUE_BLOCKS
    @for k < PER_BLOCK
    @for m < ROW_MATRICES
    workgroupBarrier();
    store_sums(scratch, sum@b_@k_@m);
    workgroupBarrier();
    for (var i = lane; i < SIZE * SIZE / 4u; i += 32u) {
        let row = @mu * SIZE + i / (SIZE / 4u);
        let at = scratch + i / (SIZE / 4u) * SUMS_STRIDE + i % (SIZE / 4u) * 4u;
        let value = vec4<f32>(sums[at], sums[at + 1u], sums[at + 2u], sums[at + 3u]) * factors[row];
        let vector = 4u * (subgroup * VALUE_BLOCKS + @bu) + @ku * (SIZE / 4u) + i % (SIZE / 4u);
        if (row < count) {
            if (workgroups.x == 1u) {
                out[(first_row + row) * (VALUE_DIM / 4u) + vector] = value;
            } else {
                split_sums[((first_of_splits + row) * workgroups.x + workgroup.x) * (VALUE_DIM / 4u) + vector] = value;
            }
        }
    }
    @end
    @end
    @end
}
