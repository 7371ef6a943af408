// Causal attention of one query head of up to TILE_ROWS tokens of a sequence over all the keys that they see, TILE_KEYS at a time (Dao 2023),
// on matrices of SIZE × SIZE that one of the mma modules multiplies. A subgroup of 32 has 16 tokens, whose queries and sums it keeps in
// matrices; scores pass through workgroup memory, where each invocation makes weights of half of a token's.
//
// Weights are 2^(score − reference). Matrices cannot be scaled but through memory, so a token's reference follows its largest score only
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

const LOWEST = -3.4028234663852886e38;
const SLACK = 8.0;
const INVOCATIONS = 2u * TILE_ROWS;
// Rows in workgroup memory, which begin in different banks: of weights (and queries, 16 dimensions at a time), keys, values.
const X_STRIDE = TILE_KEYS + 8u;
const KEY_STRIDE = DIM + 8u;
const VALUE_STRIDE = TILE_KEYS + 8u;
const SUMS_STRIDE = TILE_KEYS + 4u;
const X_HALVES = TILE_ROWS * X_STRIDE;
// Values, whose rows are dimensions, lie behind the keys.
const VALUES_AT = TILE_KEYS * KEY_STRIDE;
const W_HALVES = VALUES_AT + DIM * VALUE_STRIDE;
const QUADS = TILE_KEYS / 4u;
// Scores of an invocation.
const SHARE = TILE_KEYS / 2u;

// Eight dimensions.
struct Unit {
    low: vec4<f32>,
    high: vec4<f32>,
}

struct Octet {
    low: vec4<f16>,
    high: vec4<f16>,
}

// Scores; at other times 16 columns of a subgroup's sums.
var<workgroup> sums: array<f32, TILE_ROWS * SUMS_STRIDE>;
// Something of each invocation, and something of each token.
var<workgroup> halves: array<f32, INVOCATIONS>;
var<workgroup> factors: array<f32, TILE_ROWS>;
// Whether a reference must follow.
var<workgroup> follows: atomic<u32>;

// An invocation's place among the 32 that share a matrix.
var<private> lane: u32;

// The first unit of a head's key or value at a position.
fn unit_of(table: u32, kv_head: u32, position: u32) -> u32 {
    let slot = block_tables[table + position / params.block_tokens] * params.block_tokens + position % params.block_tokens;
    return (kv_head * params.slots + slot) * CHUNKS;
}

fn put_values(dim: u32, quad: u32, a: f32, b: f32, c: f32, d: f32) {
    put_w_quad(VALUES_AT + dim * VALUE_STRIDE + 4u * quad, vec4<f16>(vec4<f32>(a, b, c, d)));
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
    let skipped = part % PARTS * TILE_ROWS;
    if (skipped >= query_tile.count) {
        return;
    }
    let rows = min(TILE_ROWS, query_tile.count - skipped);
    let token = attention_tokens[query_tile.first + skipped];
    let begin = token.position + 1u - min(token.position + 1u, params.window);
    let end = token.position + rows;
    let head = workgroup.x;
    let kv_head = head / (params.heads / params.kv_heads);
    lane = index % 32u;
    let subgroup = index / 32u;
    let first_sum = subgroup * 16u * SUMS_STRIDE;

    // Two invocations a token.
    let r = index / 2u;
    let side = index % 2u;
    let own = min(r, rows - 1u);
    let position = token.position + own;
    let query = ((token.row + own) * (params.heads + 2u * params.kv_heads) + head) * (DIM / 4u) + 2u * side;
    let scale = params.scale * LOG2_E;
    @for b < BLOCKS
    workgroupBarrier();
    put_x(r * X_STRIDE + 8u * side, Octet(
        vec4<f16>(qkv[query + 4u * @bu] * scale),
        vec4<f16>(qkv[query + 4u * @bu + 1u] * scale),
    ));
    workgroupBarrier();
    @for k < PER_BLOCK
    @for m < PER_BLOCK
    let q@b_@k_@m = load_x((subgroup * 16u + @mu * SIZE) * X_STRIDE + @ku * SIZE, X_STRIDE);
    @end
    @end
    @end

    // Cooperative matrices are made of what is in memory.
    for (var i = lane; i < 16u * SUMS_STRIDE; i += 32u) {
        sums[first_sum + i] = 0.0;
    }
    if (index == 0u) {
        atomicStore(&follows, 0u);
    }
    workgroupBarrier();
    let zero = load_sums(first_sum);
    @for b < BLOCKS
    @for k < PER_BLOCK
    @for m < PER_BLOCK
    var sum@b_@k_@m = zero;
    @end
    @end
    @end
    var reference = LOWEST;
    var total = 0.0;

    for (var tile = begin / TILE_KEYS * TILE_KEYS; tile < end; tile += TILE_KEYS) {
        for (var i = index; i < TILE_KEYS * CHUNKS; i += INVOCATIONS) {
            let key = i / CHUNKS;
            let chunk = i % CHUNKS;
            let unit = decode(load_key(unit_of(token.table, kv_head, clamp(tile + key, begin, end - 1u)) + chunk));
            put_w(key * KEY_STRIDE + 8u * chunk, Octet(vec4<f16>(unit.low), vec4<f16>(unit.high)));
        }
        for (var i = index; i < QUADS * CHUNKS; i += INVOCATIONS) {
            let quad = i % QUADS;
            let chunk = i / QUADS;
            let first = tile + 4u * quad;
            let a = decode(load_value(unit_of(token.table, kv_head, clamp(first, begin, end - 1u)) + chunk));
            let b = decode(load_value(unit_of(token.table, kv_head, clamp(first + 1u, begin, end - 1u)) + chunk));
            let c = decode(load_value(unit_of(token.table, kv_head, clamp(first + 2u, begin, end - 1u)) + chunk));
            let d = decode(load_value(unit_of(token.table, kv_head, clamp(first + 3u, begin, end - 1u)) + chunk));
            put_values(8u * chunk, quad, a.low.x, b.low.x, c.low.x, d.low.x);
            put_values(8u * chunk + 1u, quad, a.low.y, b.low.y, c.low.y, d.low.y);
            put_values(8u * chunk + 2u, quad, a.low.z, b.low.z, c.low.z, d.low.z);
            put_values(8u * chunk + 3u, quad, a.low.w, b.low.w, c.low.w, d.low.w);
            put_values(8u * chunk + 4u, quad, a.high.x, b.high.x, c.high.x, d.high.x);
            put_values(8u * chunk + 5u, quad, a.high.y, b.high.y, c.high.y, d.high.y);
            put_values(8u * chunk + 6u, quad, a.high.z, b.high.z, c.high.z, d.high.z);
            put_values(8u * chunk + 7u, quad, a.high.w, b.high.w, c.high.w, d.high.w);
        }
        workgroupBarrier();

        @for n < KEY_BLOCKS
        {
            @for m < PER_BLOCK
            var score_@m = zero;
            @end
            @for b < BLOCKS
            @for k < PER_BLOCK
            let keys_@b_@k = load_w(@nu * SIZE * KEY_STRIDE + 16u * @bu + @ku * SIZE, KEY_STRIDE);
            @for m < PER_BLOCK
            score_@m = multiply_add(q@b_@k_@m, keys_@b_@k, score_@m);
            @end
            @end
            @end
            @for m < PER_BLOCK
            store_sums(first_sum + @mu * SIZE * SUMS_STRIDE + @nu * SIZE, score_@m);
            @end
        }
        @end
        workgroupBarrier();

        var largest = LOWEST;
        @for o < OCTETS
        @for j < 8
        let key_@o_@j = tile + side * SHARE + 8u * @ou + @ju;
        let seen_@o_@j = key_@o_@j <= position && position - key_@o_@j < params.window;
        let score_@o_@j = sums[r * SUMS_STRIDE + side * SHARE + 8u * @ou + @ju];
        largest = select(largest, max(largest, score_@o_@j), seen_@o_@j);
        @end
        @end
        if (largest > reference + SLACK) {
            atomicStore(&follows, 1u);
        }
        workgroupBarrier();
        // The same for all of the workgroup.
        if (atomicLoad(&follows) != 0u) {
            halves[index] = largest;
            workgroupBarrier();
            let before = reference;
            reference = max(reference, max(largest, halves[index ^ 1u]));
            let factor = exp2(before - reference);
            total *= factor;
            factors[r] = factor;
            @for b < BLOCKS
            @for k < PER_BLOCK
            @for m < PER_BLOCK
            store_sums(first_sum + @mu * SIZE * SUMS_STRIDE + @ku * SIZE, sum@b_@k_@m);
            @end
            @end
            workgroupBarrier();
            for (var i = lane; i < 256u; i += 32u) {
                sums[first_sum + i / 16u * SUMS_STRIDE + i % 16u] *= factors[subgroup * 16u + i / 16u];
            }
            workgroupBarrier();
            @for k < PER_BLOCK
            @for m < PER_BLOCK
            sum@b_@k_@m = load_sums(first_sum + @mu * SIZE * SUMS_STRIDE + @ku * SIZE);
            @end
            @end
            workgroupBarrier();
            @end
        }
        @for o < OCTETS
        @for j < 8
        let weight_@o_@j = f16(select(0.0, exp2(score_@o_@j - reference), seen_@o_@j));
        total += f32(weight_@o_@j);
        @end
        put_x(r * X_STRIDE + side * SHARE + 8u * @ou, Octet(
            vec4<f16>(weight_@o_0, weight_@o_1, weight_@o_2, weight_@o_3),
            vec4<f16>(weight_@o_4, weight_@o_5, weight_@o_6, weight_@o_7),
        ));
        @end
        workgroupBarrier();
        if (index == 0u) {
            atomicStore(&follows, 0u);
        }

        @for n < KEY_BLOCKS
        @for m < PER_BLOCK
        let weights_@n_@m = load_x((subgroup * 16u + @mu * SIZE) * X_STRIDE + @nu * SIZE, X_STRIDE);
        @end
        @end
        @for b < BLOCKS
        @for k < PER_BLOCK
        @for n < KEY_BLOCKS
        let values_@b_@k_@n = load_w(VALUES_AT + (16u * @bu + @ku * SIZE) * VALUE_STRIDE + @nu * SIZE, VALUE_STRIDE);
        @for m < PER_BLOCK
        sum@b_@k_@m = multiply_add(weights_@n_@m, values_@b_@k_@n, sum@b_@k_@m);
        @end
        @end
        @end
        @end
        workgroupBarrier();
    }

    halves[index] = total;
    workgroupBarrier();
    factors[r] = 1.0 / (total + halves[index ^ 1u] + sink_weight(head, reference));
    @for b < BLOCKS
    @for k < PER_BLOCK
    @for m < PER_BLOCK
    store_sums(first_sum + @mu * SIZE * SUMS_STRIDE + @ku * SIZE, sum@b_@k_@m);
    @end
    @end
    workgroupBarrier();
    for (var i = lane; i < 256u; i += 32u) {
        let other = subgroup * 16u + i / 16u;
        if (other < rows) {
            let value = sums[first_sum + i / 16u * SUMS_STRIDE + i % 16u] * factors[other];
            out[((token.row + other) * params.heads + head) * DIM + 16u * @bu + i % 16u] = value;
        }
    }
    workgroupBarrier();
    @end
}
