// Choosing tokens, what all its kernels share.
//
// Tokens are ordered by falling logit, ties by id, and weigh exp((logit - largest) / temperature). Weights are counted in units of 2^-31 by
// integers of 64 bits, so that sums do not depend on the order of their terms. Top-k, top-p and min-p each keep a beginning of that order, and the
// choice is the token at which the running weight exceeds a share of what is kept: all but min-p are found by a radix select over the bits of
// the logits, WIDTH bits at a time.

struct Params {
    vocabulary: u32,
    // Workgroups that share a row.
    chunks: u32,
    // Histograms of a row, and the one that is made.
    histograms: u32,
    histogram: u32,
    // The select under way, and which of its digits is counted.
    select_under_way: u32,
    digit: u32,
    // The select that ends here, if one does.
    ends: u32,
    // The logits are the model's own.
    is_first_scan: u32,
}
var<immediate> params: Params;

// How to choose the token of a row; see `SampleRow`.
struct Row {
    temperature: f32,
    top_k: u32,
    // Shares of 2^32.
    top_p: u32,
    uniform: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    // Where its entries begin: biases, then counts, then those of the next row.
    biases: u32,
    counts: u32,
    end: u32,
    last_sampled: u32,
    // Where the bits of its allowed tokens begin; absent if it allows all.
    mask: u32,
    lowest_allowed: u32,
}

// What a workgroup found among its logits.
struct Partial {
    // The rank and the id of the most likely token.
    rank: u32,
    id: u32,
    // A logit of the model is NaN or +∞.
    is_unsound: u32,
    // A logit of the model is above −∞.
    is_any: u32,
}

// How far a row is.
struct State {
    // The rank of its most likely token.
    largest: u32,
    // Whether it needs selects: a choice is to be made, and not the most likely token.
    is_open: u32,
    // The digits that the select under way has found.
    rank: u32,
    // Tokens before all that have these digits, and their weight.
    count: u32,
    weight: vec2<u32>,
    // The running weight that it looks for.
    wanted: vec2<u32>,
    // The weight of the tokens that top-k keeps, and of those that all finished selects and min-p keep.
    total: vec2<u32>,
    kept: vec2<u32>,
}

const SIZE = 256u;
// Logits of an invocation, and of a workgroup.
const EACH = 16u;
const CHUNK = SIZE * EACH;

// The selects.
const TOP_K = 0u;
const TOP_P = 1u;
const CHOICE = 2u;
const NONE = 3u;

const ABSENT = 0xffffffffu;
const NOT_FINITE = 0xffffffffu;
const POSITIVE_INFINITY = 0x7f800000u;
const NEGATIVE_INFINITY = 0xff800000u;

// Numbers that rise as logits fall; zeros of both signs have the same, and NaN that of −∞.
fn rank_of(logit: f32) -> u32 {
    var bits = bitcast<u32>(logit);
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > POSITIVE_INFINITY) {
        bits = NEGATIVE_INFINITY;
    }
    if (magnitude == 0u) {
        bits = 0u;
    }
    return select(0x7fffffffu - bits, bits, bits >= 0x80000000u);
}

fn logit_of(rank: u32) -> f32 {
    return bitcast<f32>(select(0x7fffffffu - rank, rank, rank >= 0x80000000u));
}

// Ranks of what is not finite.
const HIGHEST = 0x7fffffffu - POSITIVE_INFINITY;
const LOWEST = NEGATIVE_INFINITY;

// The weight of a token, in units of 2^-31.
fn weight_of(rank: u32, largest: u32, temperature: f32) -> u32 {
    if (rank == LOWEST) {
        return 0u;
    }
    return u32(exp((logit_of(rank) - logit_of(largest)) / temperature) * 2147483648.0 + 0.5);
}

// Integers of 64 bits: x holds the lower half.

fn wide_add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn wide_sub(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn wide_less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn wide_min(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return select(b, a, wide_less(a, b));
}

fn wide_product(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = vec2<u32>((a >> 16u) * (b & 0xffffu), (a & 0xffffu) * (b >> 16u));
    let high = (a >> 16u) * (b >> 16u);
    let sum = wide_add(vec2<u32>(low, high), vec2<u32>(middle.x << 16u, middle.x >> 16u));
    return wide_add(sum, vec2<u32>(middle.y << 16u, middle.y >> 16u));
}

// A share of 2^32 of a number.
fn wide_share(a: vec2<u32>, share: u32) -> vec2<u32> {
    return wide_add(vec2<u32>(wide_product(a.x, share).y, 0u), wide_product(a.y, share));
}

// How often `b` goes into `a`, at most 2^24 - 1 times.
fn wide_quotient(a: vec2<u32>, b: u32) -> u32 {
    var quotient = 0u;
    for (var bit = 1u << 23u; bit > 0u; bit >>= 1u) {
        if (!wide_less(a, wide_product(quotient | bit, b))) {
            quotient |= bit;
        }
    }
    return quotient;
}
