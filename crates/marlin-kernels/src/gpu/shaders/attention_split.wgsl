// Causal attention of up to HEADS query heads that share a KV head, of one token, over one split of the positions that it sees (Dao et al.
// 2022; "flash-decoding", Dao et al. 2023). A workgroup loads each key and value once for all its heads, as units of 8 dimensions.
//
// LANES neighbours, a group, share a key and its value: they hold their dimensions of the queries and of the sums in registers, and exchange
// what a score consists of. Each group goes through keys of its own, with a reference for its weights of its own; nothing waits for other
// groups until the end, where their sums meet in workgroup memory. The next keys are on their way while the last ones are multiplied. Values are
// cached beside keys, or the first dimensions of keys: those are loaded once, and dimensions beyond them are summed with the rest of a unit's lanes
// and left out of the result.
//
// If ROTATIONS is 1, and not 0, each sequence brings one token, whose row is as it was projected: queries are normalised and rotated here, and so is its
// key before it goes into the cache with its value. Workgroups of the last split write them, and begin with them; where several share a KV head, all
// write the same.
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
    // Splits of a token, at most 2 to the power of this.
    most_splits: u32,
    // The first of attention_tokens of this dispatch.
    first_token: u32,
    has_sinks: u32,
    // That token, if it is the only one: what it sees is then known without a load.
    row: u32,
    position: u32,
    table: u32,
    // Rotated dimensions, and the epsilon of the norms of heads.
    rotary: u32,
    eps: f32,
}
var<immediate> params: Params;

const LOWEST = -3.4028234663852886e38;
const GROUPS = SIZE / LANES;
// Keys that the workgroup takes at once, and those whose places it looks up at once.
const TILE = GROUPS * BATCH;
const SPAN = 16u * TILE;
// Neighbours that have the score of the same head.
const HEAD_LANES = LANES / HEADS;
// Vectors of four dimensions of a key head, and of a value head.
const VECTORS = DIM / 4u;
const VALUE_VECTORS = VALUE_DIM / 4u;
// Of a head's sums the first halves of all units, then the second ones, which begin in different banks.
const HALF_ROW = LANES * VALUE_UNITS + 4u;
const SUMS_ROW = HEADS * 2u * HALF_ROW;

// Eight dimensions.
struct Unit {
    low: vec4<f32>,
    high: vec4<f32>,
}

var<private> lane: u32;

// Where the keys and values of a span are, as units.
var<workgroup> places: array<u32, SPAN>;
// Of each head and group, the largest score and the sum of weights.
var<workgroup> references: array<f32, HEADS * GROUPS>;
var<workgroup> totals: array<f32, HEADS * GROUPS>;
var<workgroup> sums: array<vec4<f32>, KEPT_GROUPS * SUMS_ROW>;

// Four dimensions of a query; 0 beyond what there is. They are not scaled here: what has been loaded is not to be waited for.
fn query_vector(at: u32, exists: bool) -> vec4<f32> {
    if (exists) {
        return qkv[at];
    }
    return vec4<f32>();
}

fn product(q: Unit, k: Unit) -> f32 {
    let low = fma(q.low.x, k.low.x, fma(q.low.y, k.low.y, fma(q.low.z, k.low.z, q.low.w * k.low.w)));
    return fma(q.high.x, k.high.x, fma(q.high.y, k.high.y, fma(q.high.z, k.high.z, fma(q.high.w, k.high.w, low))));
}

// The sum over a group of what its invocations have of each head. Each gets that of one head: exchanges halve the heads first.
fn sum_of_group(parts: vec4<f32>) -> f32 {
    var two = parts.xy;
    if (HEADS == 4u) {
        let upper = (lane & (LANES / 2u)) != 0u;
        let gives = select(parts.zw, parts.xy, upper);
        two = select(parts.xy, parts.zw, upper) + vec2<f32>(exchange(gives.x, LANES / 2u), exchange(gives.y, LANES / 2u));
    }
    var one = two.x;
    if (HEADS > 1u) {
        let upper = (lane & HEAD_LANES) != 0u;
        one = select(two.x, two.y, upper) + exchange(select(two.y, two.x, upper), HEAD_LANES);
    }
    for (var bit = HEAD_LANES / 2u; bit > 0u; bit /= 2u) {
        one += exchange(one, bit);
    }
    return one;
}

// What the group's invocations have for each head.
fn of_all_heads(own: f32) -> vec4<f32> {
    var all = vec4<f32>(1.0);
    @for h < HEADS
    all[@h] = from_neighbour(own, @hu * HEAD_LANES, LANES);
    @end
    return all;
}

// Looks up the places of the keys of a span, before the end of the split's; beyond it, that of one that is there.
fn look_up(span: u32, keys_end: u32, table: u32, head_units: u32) {
    let span_keys = min(SPAN, keys_end - min(span, keys_end));
    for (var i = lane; i < min(SPAN, (max(span_keys, 1u) + TILE - 1u) / TILE * TILE); i += SIZE) {
        let position = min(span + i, max(keys_end, 1u) - 1u);
        let block = block_tables[table + position / params.block_tokens];
        places[i] = head_units + (block * params.block_tokens + position % params.block_tokens) * CHUNKS;
    }
    workgroupBarrier();
}

@compute @workgroup_size(SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    place: Place,
) {
    note_place(place);
    var token = AttentionToken(params.row, params.position, params.table);
    if (workgroups.z > 1u) {
        token = attention_tokens[params.first_token + workgroup.z];
    }
    let end = token.position + 1u;
    let begin = end - min(end, params.window);
    let seen = end - begin;
    let split = positions_of_split(seen);
    let split_begin = begin + workgroup.x * split;
    let split_end = min(end, split_begin + split);

    let of_kv_head = params.heads / params.kv_heads;
    let parts = (of_kv_head + HEADS - 1u) / HEADS;
    let kv_head = workgroup.y / parts;
    let first_in_group = workgroup.y % parts * HEADS;
    let count = min(HEADS, of_kv_head - first_in_group);
    let first_head = kv_head * of_kv_head + first_in_group;
    let head_units = kv_head * params.slots * CHUNKS;
    // Where the sums of the workgroup's heads go, and from one head to the next.
    let first_split = (workgroup.z * params.heads + first_head) * workgroups.x + workgroup.x;
    if (split_begin >= end) {
        if (lane < count) {
            split_softmax[first_split + lane * workgroups.x] = vec2<f32>(LOWEST, 0.0);
        }
        return;
    }

    let group = lane / LANES;
    let in_group = lane % LANES;
    let own_head = in_group / HEAD_LANES;
    let query = (token.row * (params.heads + BESIDE_QUERIES * params.kv_heads) + first_head) * VECTORS;
    @for c < UNITS
    let unit@c = min(@cu * LANES + in_group, CHUNKS - 1u);
    let exists@c = @cu * LANES + in_group < CHUNKS;
    @for h < HEADS
    var q@c_@h = Unit(
        query_vector(query + @hu * VECTORS + 2u * unit@c, exists@c && @hu < count),
        query_vector(query + @hu * VECTORS + 2u * unit@c + 1u, exists@c && @hu < count),
    );
    @end
    @end
    @for c < VALUE_UNITS
    @for h < HEADS
    var low@c_@h = vec4<f32>();
    var high@c_@h = vec4<f32>();
    @end
    @end
    var largest = LOWEST;
    var total = 0.0;

    // The split's keys in the cache: that of this step is not there, if it is not even rotated.
    let has_own = ROTATIONS == 1u && split_end == end;
    let keys_end = split_end - u32(has_own);
    look_up(split_begin, keys_end, token.table, head_units);
    @for b < BATCH
    let place@b = places[@bu * GROUPS + group];
    @for c < UNITS
    var key@b_@c = load_key(place@b + unit@c);
    @end
    @end
    @for b < BATCH
    @for c < CACHED_UNITS
    var value@b_@c = load_value(place@b + unit@c);
    @end
    @for c < UNITS_OF_KEYS
    var value@b_@c: Raw;
    @end
    @end

    // Meanwhile …
    @for r < ROTATIONS
    var squares = vec4<f32>();
    @for c < UNITS
    let partner@c = partner_of(unit@c);
    @for h < HEADS
    let other@c_@h = Unit(
        query_vector(query + @hu * VECTORS + 2u * partner@c, exists@c && @hu < count),
        query_vector(query + @hu * VECTORS + 2u * partner@c + 1u, exists@c && @hu < count),
    );
    squares[@h] += squares_of(q@c_@h);
    @end
    @end
    let factors = of_all_heads(factor_of_head(sum_of_group(squares)));
    @for c < UNITS
    @for h < HEADS
    q@c_@h = rotated(normed_query(q@c_@h, unit@c, factors[@h]), normed_query(other@c_@h, partner@c, factors[@h]), unit@c, token.row);
    @end
    @end
    if (has_own) {
        let own_key = (token.row * (params.heads + 2u * params.kv_heads) + params.heads + kv_head) * VECTORS;
        let own_value = own_key + params.kv_heads * VECTORS;
        var key_squares = vec4<f32>();
        @for c < UNITS
        let k@c = Unit(query_vector(own_key + 2u * unit@c, exists@c), query_vector(own_key + 2u * unit@c + 1u, exists@c));
        let other_k@c =
            Unit(query_vector(own_key + 2u * partner@c, exists@c), query_vector(own_key + 2u * partner@c + 1u, exists@c));
        let v@c = encode(Unit(qkv[own_value + 2u * unit@c], qkv[own_value + 2u * unit@c + 1u]));
        key_squares.x += squares_of(k@c);
        @end
        let factor = of_all_heads(factor_of_head(sum_of_group(key_squares))).x;
        let block = block_tables[token.table + token.position / params.block_tokens];
        let own_place = head_units + (block * params.block_tokens + token.position % params.block_tokens) * CHUNKS;
        var dots = vec4<f32>();
        @for c < UNITS
        let own@c = encode(rotated(normed_key(k@c, unit@c, factor), normed_key(other_k@c, partner@c, factor), unit@c, token.row));
        if (group == 0u && exists@c) {
            keys[own_place + unit@c] = own@c;
            values[own_place + unit@c] = v@c;
        }
        {
            let k = decode(own@c);
            @for h < HEADS
            dots[@h] += product(q@c_@h, k);
            @end
        }
        @end
        // The first group's first key.
        let score = sum_of_group(dots) * params.scale * LOG2_E;
        largest = select(LOWEST, score, group == 0u);
        total = select(0.0, 1.0, group == 0u);
        let weights = of_all_heads(total);
        @for c < VALUE_UNITS
        {
            let v = decode(v@c);
            @for h < HEADS
            low@c_@h = weights[@h] * v.low;
            high@c_@h = weights[@h] * v.high;
            @end
        }
        @end
    }
    @end

    for (var span = split_begin; span < keys_end; span += SPAN) {
        let span_keys = min(SPAN, keys_end - span);
        if (span > split_begin) {
            // The places of the span before have been read.
            workgroupBarrier();
            look_up(span, keys_end, token.table, head_units);
            @for b < BATCH
            let of_span@b = places[@bu * GROUPS + group];
            @for c < UNITS
            key@b_@c = load_key(of_span@b + unit@c);
            @end
            @for c < CACHED_UNITS
            value@b_@c = load_value(of_span@b + unit@c);
            @end
            @end
        }
        for (var tile = 0u; tile < span_keys; tile += TILE) {
            let next = tile + TILE;
            let has_next = next < span_keys;
            @for b < BATCH
            var dots@b = vec4<f32>();
            @for c < UNITS
            {
                let k = decode(key@b_@c);
                @for h < HEADS
                dots@b[@h] += product(q@c_@h, k) * scale_of_unit(key@b_@c);
                @end
            }
            @end
            @end
            @for b < BATCH
            let key_scale@b = key@b_0;
            @for c < UNITS_OF_KEYS
            value@b_@c = key@b_@c;
            @end
            @end
            if (has_next) {
                @for b < BATCH
                let next_place@b = places[next + @bu * GROUPS + group];
                @for c < UNITS
                key@b_@c = load_key(next_place@b + unit@c);
                @end
                @end
            }

            let before = largest;
            @for b < BATCH
            let is_seen@b = tile + @bu * GROUPS + group < span_keys;
            let scale@b = params.scale * LOG2_E * scale_of_head(key_scale@b);
            let score@b = select(LOWEST, sum_of_group(dots@b) * scale@b, is_seen@b);
            largest = max(largest, score@b);
            @end
            let shrink = exp2(before - largest);
            total *= shrink;
            let shrinks = of_all_heads(shrink);
            @for c < VALUE_UNITS
            @for h < HEADS
            low@c_@h *= shrinks[@h];
            high@c_@h *= shrinks[@h];
            @end
            @end
            @for b < BATCH
            {
                let weight = select(0.0, exp2(score@b - largest), is_seen@b);
                total += weight;
                let weights = of_all_heads(weight * scale_of_head(value@b_0));
                @for c < VALUE_UNITS
                let v@c = decode(value@b_@c);
                let scaled@c = weights * scale_of_unit(value@b_@c);
                @for h < HEADS
                low@c_@h = fma(vec4<f32>(scaled@c[@h]), v@c.low, low@c_@h);
                high@c_@h = fma(vec4<f32>(scaled@c[@h]), v@c.high, high@c_@h);
                @end
                @end
            }
            @end
            if (has_next) {
                @for b < BATCH
                @for c < CACHED_UNITS
                value@b_@c = load_value(places[next + @bu * GROUPS + group] + unit@c);
                @end
                @end
            }
        }
    }

    // All groups' sums become relative to the largest score of all.
    let own = own_head * GROUPS + group;
    if (in_group % HEAD_LANES == 0u) {
        references[own] = largest;
    }
    workgroupBarrier();
    var reference = LOWEST;
    for (var g = 0u; g < GROUPS; g++) {
        reference = max(reference, references[own_head * GROUPS + g]);
    }
    let shrink = exp2(largest - reference);
    let shrinks = of_all_heads(shrink);
    @for c < VALUE_UNITS
    @for h < HEADS
    low@c_@h *= shrinks[@h];
    high@c_@h *= shrinks[@h];
    @end
    @end
    if (in_group % HEAD_LANES == 0u) {
        totals[own] = total * shrink;
    }
    // KEPT_GROUPS of them at a time give their sums to the first ones, whose sums are added last.
    for (var first = GROUPS - KEPT_GROUPS; true; first -= KEPT_GROUPS) {
        let row = (group - first) * SUMS_ROW + in_group;
        if (group >= first && group - first < KEPT_GROUPS) {
            @for c < VALUE_UNITS
            @for h < HEADS
            sums[row + 2u * @hu * HALF_ROW + @cu * LANES] = low@c_@h;
            sums[row + (2u * @hu + 1u) * HALF_ROW + @cu * LANES] = high@c_@h;
            @end
            @end
        }
        workgroupBarrier();
        if (first == 0u) {
            break;
        }
        if (group < KEPT_GROUPS) {
            let own_row = group * SUMS_ROW + in_group;
            @for c < VALUE_UNITS
            @for h < HEADS
            low@c_@h += sums[own_row + 2u * @hu * HALF_ROW + @cu * LANES];
            high@c_@h += sums[own_row + (2u * @hu + 1u) * HALF_ROW + @cu * LANES];
            @end
            @end
        }
        workgroupBarrier();
    }

    for (var i = lane; i < count * VALUE_VECTORS; i += SIZE) {
        let h = i / VALUE_VECTORS;
        let vector = i % VALUE_VECTORS;
        var sum = vec4<f32>();
        for (var row = 0u; row < KEPT_GROUPS; row++) {
            sum += sums[row * SUMS_ROW + (2u * h + vector % 2u) * HALF_ROW + vector / 2u];
        }
        var all = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            all += totals[h * GROUPS + g];
        }
        var largest_of_head = LOWEST;
        for (var g = 0u; g < GROUPS; g++) {
            largest_of_head = max(largest_of_head, references[h * GROUPS + g]);
        }
        if (workgroups.x == 1u) {
            sum *= 1.0 / (all + sink_weight(first_head + h, largest_of_head));
            out[(token.row * params.heads + first_head + h) * VALUE_VECTORS + vector] = sum;
            @for d < 4
            keep_output(4u * i + @du, sum[@d]);
            @end
        } else {
            let at = first_split + h * workgroups.x;
            split_sums[at * VALUE_VECTORS + vector] = sum;
            if (vector == 0u) {
                split_softmax[at] = vec2<f32>(largest_of_head, all);
            }
        }
    }
    if (workgroups.x == 1u) {
        pack_heads(token.row, first_head, count, params.heads, lane);
    }
}
