// Causal attention of HEADS query heads, which share a KV head, of up to TILE_TOKENS tokens of a sequence over all the keys that they see,
// TILE_KEYS at a time (Dao 2023), on matrices of SIZE × SIZE that one of the mma modules multiplies. Rows are the tokens of the first head, then
// those of the second. SPLIT subgroups of 32 share SHARED_ROWS rows: they divide a tile's keys among themselves for the scores, and the dimensions
// for the sums, which registers keep, as they keep the queries. Scores pass through workgroup memory, where the invocations of a row make
// weights of them.
//
// Keys and values lie in workgroup memory as they do in the cache. While weights are made, the values of the tile and the keys of the next one
// go there from registers, and what comes after them is loaded; so there is a whole tile's time for that.
//
// Weights are 2^(score − reference). Matrices cannot be scaled but through memory, so a row's reference follows its largest score only
// when that is SLACK larger; weights in half precision have room for it (as in FlashAttention-4). Keys that no token sees read one that is
// seen.

struct Params {
    heads: u32,
    kv_heads: u32,
    scale: f32,
    // Positions that a query looks back over, itself included; the largest number for all.
    window: u32,
    block_tokens: u32,
    // Tokens that the cache has room for.
    slots: u32,
    has_sinks: u32,
}
var<immediate> params: Params;

// The score of a key that is not seen, and what is below every score but that one.
const UNSEEN = -3.4028234663852886e38;
const LOWEST = -1e30;
const SLACK = 8.0;
const TILE_ROWS = HEADS * TILE_TOKENS;
const INVOCATIONS = 32u * SPLIT * (TILE_ROWS / SHARED_ROWS);
// PER_ROW invocations have a row, and each of them every PER_ROW-th octet of its scores. Rows in workgroup memory, which begin in different
// banks: of weights (and queries), of keys and values, of scores.
const X_STRIDE = TILE_KEYS + 8u;
const W_STRIDE = DIM + 8u;
const SUMS_STRIDE = TILE_KEYS + 4u;
const X_HALVES = TILE_ROWS * X_STRIDE;
// Values lie behind the keys.
const VALUES_AT = TILE_KEYS * W_STRIDE;
const W_HALVES = 2u * VALUES_AT;

// Scores; at other times columns of a subgroup's sums. Behind each row is something of each of its invocations.
var<workgroup> sums: array<f32, TILE_ROWS * SUMS_STRIDE>;
// Where the keys of two tiles are, as units.
var<workgroup> places: array<u32, 2u * TILE_KEYS>;
// Something of each row.
var<workgroup> factors: array<f32, TILE_ROWS>;
// Whether a reference must follow, in the first of them. Like all that is in workgroup memory they are whole multiples of 16 bytes, so that
// matrices begin at one, in whatever order devices lay it out: those of Vulkan must.
var<workgroup> follows: array<atomic<u32>, 4>;

// An invocation's place among the 32 that share a matrix.
var<private> lane: u32;

// Where a token's key or value is, as a unit, if a head's first one is at `head_units`.
fn place_of(head_units: u32, table: u32, position: u32) -> u32 {
    let block = block_tables[table + position / params.block_tokens];
    return head_units + (block * params.block_tokens + position % params.block_tokens) * CHUNKS;
}

@compute @workgroup_size(INVOCATIONS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    // The last tokens of a sequence see most keys: they begin first.
    let part = workgroups.y - 1u - workgroup.y;
    let query_tile = query_tiles[part / PARTS];
    let skipped = part % PARTS * TILE_TOKENS;
    if (skipped >= query_tile.count) {
        return;
    }
    let tokens = min(TILE_TOKENS, query_tile.count - skipped);
    let token = attention_tokens[query_tile.first + skipped];
    let begin = token.position + 1u - min(token.position + 1u, params.window);
    let end = token.position + tokens;
    let first_head = workgroup.x * HEADS;
    let head_units = first_head / (params.heads / params.kv_heads) * params.slots * CHUNKS;
    let first_tile = begin / TILE_KEYS * TILE_KEYS;
    lane = index % 32u;
    let subgroup = index / 32u;
    // Its rows, and its share of keys and dimensions.
    let first_row = subgroup / SPLIT * SHARED_ROWS;
    let share = subgroup % SPLIT;
    let first_sum = first_row * SUMS_STRIDE;

    if (index < TILE_KEYS) {
        places[index] = place_of(head_units, token.table, clamp(first_tile + index, begin, end - 1u));
        places[TILE_KEYS + index] = place_of(head_units, token.table, min(first_tile + TILE_KEYS + index, end - 1u));
    }
    // Cooperative matrices are made of what is in memory.
    for (var i = index; i < TILE_ROWS * SUMS_STRIDE; i += INVOCATIONS) {
        sums[i] = 0.0;
    }
    if (index == 0u) {
        atomicStore(&follows[0], 0u);
    }
    workgroupBarrier();
    let zero = load_sums(first_sum);
    @for b < BLOCKS
    @for k < PER_BLOCK
    @for m < ROW_BLOCKS
    var sum@b_@k_@m = zero;
    @end
    @end
    @end
    // Units of a tile that an invocation brings, and where the next ones are.
    @for u < LOADS
    let key@u = min((index + @uu * INVOCATIONS) / CHUNKS, TILE_KEYS - 1u);
    let chunk@u = (index + @uu * INVOCATIONS) % CHUNKS;
    let at@u = key@u * W_STRIDE + 8u * chunk@u;
    var next@u = places[TILE_KEYS + key@u] + chunk@u;
    var key_raw@u = load_key(places[key@u] + chunk@u);
    var value_raw@u = load_value(places[key@u] + chunk@u);
    @end

    // As many columns of the queries at a time as there is room for.
    let r = index / PER_ROW;
    let side = index % PER_ROW;
    let head = first_head + r / TILE_TOKENS;
    let own = min(r % TILE_TOKENS, tokens - 1u);
    let position = token.position + own;
    let query = ((token.row + own) * (params.heads + 2u * params.kv_heads) + head) * (DIM / 4u);
    let scale = params.scale * LOG2_E;
    @for b < ALL_BLOCKS
    if (@bu * 16u % TILE_KEYS == 0u) {
        workgroupBarrier();
        for (var o = side; o < min(TILE_KEYS, DIM - min(DIM, @bu * 16u)) / 8u; o += PER_ROW) {
            put_x(r * X_STRIDE + 8u * o, Octet(
                vec4<f16>(qkv[query + @bu * 4u + 2u * o] * scale),
                vec4<f16>(qkv[query + @bu * 4u + 2u * o + 1u] * scale),
            ));
        }
        workgroupBarrier();
    }
    @for k < PER_BLOCK
    @for m < ROW_BLOCKS
    let q@b_@k_@m = load_x((first_row + @mu * SIZE) * X_STRIDE + @bu * 16u % TILE_KEYS + @ku * SIZE, X_STRIDE);
    @end
    @end
    @end
    var reference = LOWEST;
    var total = 0.0;

    // The first tile's keys, and the second one's on their way.
    @for u < LOADS
    if (ALL_LOADS || index + @uu * INVOCATIONS < TILE_KEYS * CHUNKS) {
        put_unit(at@u, key_raw@u);
    }
    key_raw@u = load_key(next@u);
    @end
    var later = 0u;
    if (index < TILE_KEYS) {
        later = place_of(head_units, token.table, min(first_tile + 2u * TILE_KEYS + index, end - 1u));
    }
    workgroupBarrier();
    var half = 0u;
    if (index < TILE_KEYS) {
        places[index] = later;
    }

    for (var tile = first_tile; tile < end; tile += TILE_KEYS) {
        @for n < KEY_BLOCKS
        @for m < ROW_BLOCKS
        var score_@n_@m = zero;
        @end
        @end
        @for b < ALL_BLOCKS
        @for k < PER_BLOCK
        @for n < KEY_BLOCKS
        let keys_@b_@k_@n = load_w((share * KEY_BLOCKS + @nu) * SIZE * W_STRIDE + 16u * @bu + @ku * SIZE, W_STRIDE);
        @for m < ROW_BLOCKS
        score_@n_@m = multiply_add(q@b_@k_@m, keys_@b_@k_@n, score_@n_@m);
        @end
        @end
        @end
        @end
        @for n < KEY_BLOCKS
        @for m < ROW_BLOCKS
        store_sums(first_sum + @mu * SIZE * SUMS_STRIDE + (share * KEY_BLOCKS + @nu) * SIZE, score_@n_@m);
        @end
        @end
        workgroupBarrier();

        @for u < LOADS
        if (ALL_LOADS || index + @uu * INVOCATIONS < TILE_KEYS * CHUNKS) {
            put_unit(VALUES_AT + at@u, value_raw@u);
            put_unit(at@u, key_raw@u);
        }
        value_raw@u = load_value(next@u);
        next@u = places[half + key@u] + chunk@u;
        key_raw@u = load_key(next@u);
        @end
        if (index < TILE_KEYS) {
            later = place_of(head_units, token.table, min(tile + 3u * TILE_KEYS + index, end - 1u));
        }
        @for o < OCTETS
        @for j < 8
        var own_@o_@j = sums[r * SUMS_STRIDE + 8u * (side + PER_ROW * @ou) + @ju];
        @end
        @end
        // Whether a row does not see all of the tile.
        if (tile < begin || tile + TILE_KEYS - 1u > token.position || end - 1u - tile >= params.window) {
            @for o < OCTETS
            @for j < 8
            let key_@o_@j = tile + 8u * (side + PER_ROW * @ou) + @ju;
            own_@o_@j = select(UNSEEN, own_@o_@j, key_@o_@j <= position && position - key_@o_@j < params.window);
            @end
            @end
        }
        var largest = LOWEST;
        @for o < OCTETS
        @for j < 8
        largest = max(largest, own_@o_@j);
        @end
        @end
        if (largest > reference + SLACK) {
            atomicStore(&follows[0], 1u);
        }
        sums[r * SUMS_STRIDE + TILE_KEYS + side] = largest;
        workgroupBarrier();
        // The same for all of the workgroup.
        if (atomicLoad(&follows[0]) != 0u) {
            let before = reference;
            @for i < PER_ROW
            reference = max(reference, sums[r * SUMS_STRIDE + TILE_KEYS + @iu]);
            @end
            let factor = exp2(before - reference);
            total *= factor;
            if (side == 0u) {
                factors[r] = factor;
            }
            if (tile != first_tile) {
                let first_column = share * 16u;
                @for b < BLOCKS
                @for k < PER_BLOCK
                @for m < ROW_BLOCKS
                store_sums(first_sum + first_column + @mu * SIZE * SUMS_STRIDE + @ku * SIZE, sum@b_@k_@m);
                @end
                @end
                workgroupBarrier();
                for (var i = lane; i < 16u * SHARED_ROWS; i += 32u) {
                    sums[first_sum + first_column + i / 16u * SUMS_STRIDE + i % 16u] *= factors[first_row + i / 16u];
                }
                workgroupBarrier();
                @for k < PER_BLOCK
                @for m < ROW_BLOCKS
                sum@b_@k_@m = load_sums(first_sum + first_column + @mu * SIZE * SUMS_STRIDE + @ku * SIZE);
                @end
                @end
                workgroupBarrier();
                @end
            }
        }
        @for o < OCTETS
        @for j < 8
        let weight_@o_@j = f16(exp2(own_@o_@j - reference));
        total += f32(weight_@o_@j);
        @end
        put_x(r * X_STRIDE + 8u * (side + PER_ROW * @ou), Octet(
            vec4<f16>(weight_@o_0, weight_@o_1, weight_@o_2, weight_@o_3),
            vec4<f16>(weight_@o_4, weight_@o_5, weight_@o_6, weight_@o_7),
        ));
        @end
        workgroupBarrier();
        if (index == 0u) {
            atomicStore(&follows[0], 0u);
        }
        half = TILE_KEYS - half;
        if (index < TILE_KEYS) {
            places[half + index] = later;
        }

        @for n < ALL_KEY_BLOCKS
        {
            @for m < ROW_BLOCKS
            let weights_@m = load_x((first_row + @mu * SIZE) * X_STRIDE + @nu * SIZE, X_STRIDE);
            @end
            @for b < BLOCKS
            @for k < PER_BLOCK
            let values_@b_@k = load_rows(VALUES_AT + @nu * SIZE * W_STRIDE + (share * BLOCKS + @bu) * 16u + @ku * SIZE, W_STRIDE);
            @for m < ROW_BLOCKS
            sum@b_@k_@m = multiply_add_rows(weights_@m, values_@b_@k, sum@b_@k_@m);
            @end
            @end
            @end
        }
        @end
    }

    sums[r * SUMS_STRIDE + TILE_KEYS + side] = total;
    workgroupBarrier();
    if (side == 0u) {
        var all = sink_weight(head, reference);
        @for i < PER_ROW
        all += sums[r * SUMS_STRIDE + TILE_KEYS + @iu];
        @end
        factors[r] = 1.0 / all;
    }
    @for b < BLOCKS
    @for k < PER_BLOCK
    @for m < ROW_BLOCKS
    store_sums(first_sum + share * 16u + @mu * SIZE * SUMS_STRIDE + @ku * SIZE, sum@b_@k_@m);
    @end
    @end
    workgroupBarrier();
    for (var i = lane; i < 4u * SHARED_ROWS; i += 32u) {
        let row = first_row + i / 4u;
        let other = row % TILE_TOKENS;
        if (other < tokens) {
            let at = first_sum + i / 4u * SUMS_STRIDE + share * 16u + i % 4u * 4u;
            let value = vec4<f32>(sums[at], sums[at + 1u], sums[at + 2u], sums[at + 3u]) * factors[row];
            let other_head = first_head + row / TILE_TOKENS;
            out[((token.row + other) * params.heads + other_head) * (DIM / 4u) + (share * BLOCKS + @bu) * 4u + i % 4u] = value;
        }
    }
    workgroupBarrier();
    @end
}
