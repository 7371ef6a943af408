// Chooses the experts of a token and their weights by its logits, exactly as `routing::choose` does, with the first SIZE invocations of a workgroup, all of
// which must call it. An expert's place among the chosen is how many others come before it.

const LOWEST = -3.4028234e38;
// The key of negative infinity.
const DROPPED = 0x007fffffu;

var<workgroup> scores: array<f32, MOST_EXPERTS>;
// What experts are chosen by, in the order of numbers, four at a time; what is not a number comes last, as do experts that there are none of.
var<workgroup> keys: array<vec4<u32>, MOST_EXPERTS / 4u>;
var<workgroup> group_keys: array<u32, MOST_GROUPS>;
var<workgroup> chosen: array<u32, MOST_EXPERTS>;

// The first expert, or slot, that an invocation takes; beyond SIZE, none.
fn first_of(lane: u32) -> u32 {
    return select(MOST_EXPERTS, lane, lane < SIZE);
}

fn key_of(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0u;
    }
    if (magnitude == 0u) {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, bits != magnitude);
}

fn key_at(e: u32) -> u32 {
    return keys[e / 4u][e % 4u];
}

fn corrected(e: u32) -> f32 {
    return scores[e] + correction[e];
}

fn score_logits(first: u32, lane: u32) {
    if (params.routing.is_softmax == 0u) {
        for (var e = first_of(lane); e < params.routing.experts; e += SIZE) {
            scores[e] = 1.0 / (1.0 + exp(-logits[first + e]));
        }
        return;
    }
    var largest = LOWEST;
    for (var e = first_of(lane); e < params.routing.experts; e += SIZE) {
        largest = max(largest, logits[first + e]);
    }
    largest = reduce_max(lane, largest);
    var sum = 0.0;
    for (var e = first_of(lane); e < params.routing.experts; e += SIZE) {
        scores[e] = exp(logits[first + e] - largest);
        sum += scores[e];
    }
    sum = reduce_sum(lane, sum);
    for (var e = first_of(lane); e < params.routing.experts; e += SIZE) {
        scores[e] /= sum;
    }
}

// What an expert is chosen by.
fn choice_key(first: u32, e: u32) -> u32 {
    if (e >= params.routing.experts) {
        return 0u;
    }
    if (params.routing.by_logits == 1u) {
        return key_of(logits[first + e]);
    }
    return key_of(corrected(e));
}

// The first expert of the largest key from `first` on, of so many, but for one of them.
fn first_largest(first: u32, count: u32, taken: u32) -> u32 {
    var best = select(first, first + 1u, first == taken);
    for (var e = best + 1u; e < first + count; e++) {
        if (e != taken && key_at(e) > key_at(best)) {
            best = e;
        }
    }
    return best;
}

// Whether a group is among the best ones.
fn is_kept(group: u32) -> bool {
    var rank = 0u;
    for (var other = 0u; other < params.routing.groups; other++) {
        let comes_first = group_keys[other] == group_keys[group] && other < group;
        rank += u32(group_keys[other] > group_keys[group] || comes_first);
    }
    return rank < params.routing.top_groups;
}

// Drops the experts of other groups than the best ones.
fn drop_other_groups(lane: u32) {
    let size = params.routing.experts / params.routing.groups;
    if (lane < params.routing.groups) {
        let best = first_largest(lane * size, size, ~0u);
        var score = corrected(best);
        if (size > 1u) {
            score += corrected(first_largest(lane * size, size, best));
        }
        group_keys[lane] = key_of(score);
    }
    workgroupBarrier();
    for (var q = first_of(lane); 4u * q < params.routing.experts; q += SIZE) {
        var four = keys[q];
        @for i < 4
        if (4u * q + @iu < params.routing.experts && !is_kept((4u * q + @iu) / size)) {
            four[@i] = DROPPED;
        }
        @end
        keys[q] = four;
    }
    workgroupBarrier();
}

// Chooses by the logits from `first` on. All invocations find the chosen after it.
fn choose_experts(first: u32, lane: u32) {
    if (params.routing.by_logits == 0u) {
        score_logits(first, lane);
        workgroupBarrier();
    }
    for (var q = first_of(lane); 4u * q < params.routing.experts; q += SIZE) {
        let e = 4u * q;
        keys[q] = vec4<u32>(choice_key(first, e), choice_key(first, e + 1u), choice_key(first, e + 2u), choice_key(first, e + 3u));
    }
    workgroupBarrier();
    if (params.routing.top_groups < params.routing.groups) {
        drop_other_groups(lane);
    }
    for (var e = first_of(lane); e < params.routing.experts; e += SIZE) {
        let key = vec4<u32>(key_at(e));
        var ranks = vec4<u32>();
        for (var q = 0u; 4u * q < params.routing.experts; q++) {
            let others = keys[q];
            let come_first = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(e);
            ranks += select(vec4<u32>(), vec4<u32>(1u), (others > key) | ((others == key) & come_first));
        }
        let rank = ranks.x + ranks.y + ranks.z + ranks.w;
        if (rank < params.routing.top_k) {
            chosen[rank] = e;
        }
    }
    for (var s = first_of(lane); s < params.routing.shared_experts; s += SIZE) {
        chosen[params.routing.top_k + s] = params.routing.experts + s;
    }
    workgroupBarrier();
}

// The place of a slot's pair among those of its token, which are sorted by expert.
fn place_of(slot: u32) -> u32 {
    var place = 0u;
    for (var other = 0u; other < params.routing.top_k + params.routing.shared_experts; other++) {
        place += u32(chosen[other] < chosen[slot]);
    }
    return place;
}

// Writes the chosen experts of a token, whose logits begin at `first`, and their weights.
fn put_chosen(token: u32, first: u32, lane: u32) {
    if (params.routing.by_logits == 1u) {
        score_logits(first, lane);
        workgroupBarrier();
    }
    var sum = 0.0;
    for (var slot = 0u; slot < params.routing.top_k; slot++) {
        sum += scores[chosen[slot]];
    }
    let slots = params.routing.top_k + params.routing.shared_experts;
    for (var slot = first_of(lane); slot < slots; slot += SIZE) {
        let expert = chosen[slot];
        var weight = 1.0;
        if (slot < params.routing.top_k) {
            weight = scores[expert];
            if (params.routing.normalizes == 1u) {
                weight /= sum + 1e-20;
            }
            weight *= params.routing.scale;
        }
        experts[token * slots + slot] = expert;
        weights[token * slots + slot] = weight;
    }
}
