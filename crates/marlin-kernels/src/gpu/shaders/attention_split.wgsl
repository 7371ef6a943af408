// Causal attention of up to HEADS query heads that share a KV head, of one token, over one split of its positions (Dao et al. 2022;
// "flash-decoding", Dao et al. 2023). Splits begin at multiples of params.split, whatever else is in the step. A workgroup loads each
// key and value once for all its heads, as units of 8 dimensions:
//
// - KEY_LANES neighbours share a key and hold their dimensions of the queries in registers; their sums meet in `partial`;
// - each invocation then owns one key of the tile, whose score and weight it computes;
// - CHUNKS neighbours share a value, a unit each; VALUE_GROUPS such groups take turns with the keys, and their sums meet in `partial`.
//
// Scores are to base 2. Positions that are not seen read one that is, with weight 0. If there is one split, it gives the result;
// otherwise `attention_combine` does.

struct Params {
    heads: u32,
    kv_heads: u32,
    scale: f32,
    // Positions that a query looks back over, itself included; the largest number for all.
    window: u32,
    block_tokens: u32,
    // Tokens that the cache has room for.
    slots: u32,
    // Positions of a split, whole tiles.
    split: u32,
    // The first of attention_tokens of this dispatch.
    first_token: u32,
}
var<immediate> params: Params;

// Invocations, and positions of a tile.
const SIZE = 128u;
const LOWEST = -3.4028234663852886e38;
const LOG2_E = 1.4426950408889634;
// Keys from one row of `partial` to the next, so that rows begin in different banks.
const PARTIAL_ROW = SIZE + 4u;

// Eight dimensions.
struct Unit {
    low: vec4<f32>,
    high: vec4<f32>,
}

// [dimension within its unit, unit].
var<workgroup> query: array<Heads, QUERY_UNITS * 8u>;
var<workgroup> slots: array<u32, SIZE>;
var<workgroup> partial: array<Heads, PARTIALS>;
// Scores of the tile's keys, then their weights.
var<workgroup> weights: array<Heads, SIZE>;
// Maxima of an eighth of the scores each; at the end the sum of each group's weights.
var<workgroup> reduced: array<Heads, SIZE>;

// Dimension `dim` of head `h` of the `count` query heads that begin at `start`; 0 beyond what there is.
fn query_of(start: u32, dim: u32, count: u32, h: u32) -> f32 {
    if (dim < DIM && h < count) {
        return qkv[start + h * DIM + dim] * (params.scale * LOG2_E);
    }
    return 0.0;
}

@compute @workgroup_size(SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let lane = local.x;
    let token = attention_tokens[params.first_token + workgroup.z];
    let end = token.position + 1u;
    let begin = end - min(end, params.window);
    let split = begin / params.split + workgroup.x;
    if (split * params.split >= end) {
        return;
    }
    let split_end = min(end, (split + 1u) * params.split);

    let group = params.heads / params.kv_heads;
    let parts = (group + HEADS - 1u) / HEADS;
    let kv_head = workgroup.y / parts;
    let first_in_group = workgroup.y % parts * HEADS;
    let count = min(HEADS, group - first_in_group);
    let first_head = kv_head * group + first_in_group;

    let start = (token.row * (params.heads + 2u * params.kv_heads) + first_head) * DIM;
    for (var i = lane; i < QUERY_UNITS * 8u; i += SIZE) {
        query[i % 8u * QUERY_UNITS + i / 8u] = load_query(start, i, count);
    }

    let head_units = kv_head * params.slots * CHUNKS;
    let key_lane = lane % KEY_LANES;
    let chunk = lane % CHUNKS;
    let value_group = lane / CHUNKS;
    let takes_values = VALUE_GROUPS * CHUNKS == SIZE || value_group < VALUE_GROUPS;
    var largest = Heads(LOWEST);
    var total = Heads();
    @for d < 8
    var sum@d = Heads();
    @end
    for (var tile = max(split * params.split, begin / SIZE * SIZE); tile < split_end; tile += SIZE) {
        let position = tile + lane;
        let seen = position >= begin && position < end;
        let loaded = clamp(position, begin, end - 1u);
        slots[lane] = block_tables[token.table + loaded / params.block_tokens] * params.block_tokens + loaded % params.block_tokens;
        workgroupBarrier();

        @for c < KEY_UNITS
        @for d < 8
        let q@c_@d = query[@du * QUERY_UNITS + @cu * KEY_LANES + key_lane];
        @end
        @end
        @for b < KEY_BATCHES
        {
            @for i < KEY_BATCH
            let key@i = (@bu * KEY_BATCH + @iu) * (SIZE / KEY_LANES) + lane / KEY_LANES;
            let at@i = head_units + slots[key@i] * CHUNKS;
            @for c < KEY_UNITS
            let raw@i_@c = load_key(at@i + min(@cu * KEY_LANES + key_lane, CHUNKS - 1u));
            @end
            @end
            @for i < KEY_BATCH
            {
                var dot = Heads();
                @for c < KEY_UNITS
                if (QUERY_UNITS == CHUNKS || @cu * KEY_LANES + key_lane < CHUNKS) {
                    let k = decode(raw@i_@c);
                    dot = fma(q@c_0, Heads(k.low.x), dot);
                    dot = fma(q@c_1, Heads(k.low.y), dot);
                    dot = fma(q@c_2, Heads(k.low.z), dot);
                    dot = fma(q@c_3, Heads(k.low.w), dot);
                    dot = fma(q@c_4, Heads(k.high.x), dot);
                    dot = fma(q@c_5, Heads(k.high.y), dot);
                    dot = fma(q@c_6, Heads(k.high.z), dot);
                    dot = fma(q@c_7, Heads(k.high.w), dot);
                }
                @end
                partial[key_lane * PARTIAL_ROW + key@i] = dot;
            }
            @end
        }
        @end
        workgroupBarrier();

        var score = Heads();
        @for j < KEY_LANES
        score += partial[@ju * PARTIAL_ROW + lane];
        @end
        score = select(Heads(LOWEST), score, seen);
        weights[lane] = score;
        workgroupBarrier();
        if (lane < 8u) {
            var eighth = weights[lane];
            @for i < 15
            eighth = max(eighth, weights[@iu * 8u + 8u + lane]);
            @end
            reduced[lane] = eighth;
        }
        workgroupBarrier();
        let before = largest;
        @for i < 8
        largest = max(largest, reduced[@i]);
        @end
        weights[lane] = select(Heads(), exp2(score - largest), seen);
        workgroupBarrier();

        let shrink = exp2(before - largest);
        total *= shrink;
        @for d < 8
        sum@d *= shrink;
        @end
        if (takes_values) {
            @for b < VALUE_BATCHES
            {
                @for i < VALUE_BATCH
                let key@i = (@bu * VALUE_BATCH + @iu) * VALUE_GROUPS + value_group;
                let raw@i = load_value(head_units + slots[key@i] * CHUNKS + chunk);
                @end
                @for i < VALUE_BATCH
                {
                    let weight = weights[key@i];
                    let v = decode(raw@i);
                    total += weight;
                    sum0 = fma(weight, Heads(v.low.x), sum0);
                    sum1 = fma(weight, Heads(v.low.y), sum1);
                    sum2 = fma(weight, Heads(v.low.z), sum2);
                    sum3 = fma(weight, Heads(v.low.w), sum3);
                    sum4 = fma(weight, Heads(v.high.x), sum4);
                    sum5 = fma(weight, Heads(v.high.y), sum5);
                    sum6 = fma(weight, Heads(v.high.z), sum6);
                    sum7 = fma(weight, Heads(v.high.w), sum7);
                }
                @end
            }
            @end
        }
        // The next tile's slots take the place of this one's.
        workgroupBarrier();
    }

    if (takes_values) {
        @for d < 8
        partial[(value_group * 8u + @du) * CHUNKS + chunk] = sum@d;
        @end
        if (chunk == 0u) {
            reduced[value_group] = total;
        }
    }
    workgroupBarrier();
    total = Heads();
    @for g < VALUE_GROUPS
    total += reduced[@g];
    @end
    for (var dim = lane; dim < DIM; dim += SIZE) {
        var sum = Heads();
        @for g < VALUE_GROUPS
        sum += partial[(@gu * 8u + dim % 8u) * CHUNKS + dim / 8u];
        @end
        @for h < HEADS
        if (@hu < count) {
            let head = first_head + @hu;
            if (workgroups.x == 1u) {
                let value = of_head(sum, @hu) * (1.0 / of_head(total, @hu));
                out[(token.row * params.heads + head) * DIM + dim] = value;
                keep_output(@hu * DIM + dim, value);
            } else {
                let at = (workgroup.z * params.heads + head) * workgroups.x + workgroup.x;
                split_sums[at * DIM + dim] = of_head(sum, @hu);
                if (dim == 0u) {
                    split_softmax[at] = vec2<f32>(of_head(largest, @hu), of_head(total, @hu));
                }
            }
        }
        @end
    }
    if (workgroups.x == 1u) {
        pack_heads(token.row, first_head, count, params.heads, lane);
    }
}
