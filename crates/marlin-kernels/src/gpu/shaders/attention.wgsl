// Causal attention of one query head of one token over the cached keys that it sees, 64 keys at a time, with a running maximum
// (Dao et al. 2022). A workgroup a head of a token.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scale: f32,
    // Positions that a query looks back over, itself included; the largest number for all.
    window: u32,
    block_tokens: u32,
    // Tokens that the cache has room for.
    slots: u32,
}
var<immediate> params: Params;

const SIZE = 64u;
const MAX_DIM = 512u;
// Output dimensions of an invocation.
const DIMS = MAX_DIM / SIZE;
const LOWEST = -3.4028234663852886e38;
var<workgroup> query: array<f32, MAX_DIM>;
var<workgroup> weights: array<f32, SIZE>;
var<workgroup> slots: array<u32, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let h = workgroup.x;
    let t = workgroup.y;
    let lane = local.x;
    let dim = params.head_dim;
    let kv_head = h / (params.heads / params.kv_heads);
    let start = (t * (params.heads + 2u * params.kv_heads) + h) * dim;
    for (var i = lane; i < dim; i += SIZE) {
        query[i] = qkv[start + i] * params.scale;
    }
    workgroupBarrier();

    let token = step_tokens[t];
    let end = token.position + 1u;
    let begin = end - min(end, params.window);
    var largest = LOWEST;
    var total = 0.0;
    var sums: array<f32, DIMS>;
    for (var first = begin; first < end; first += SIZE) {
        let position = first + lane;
        var score = LOWEST;
        if (position < end) {
            let block = block_tables[token.table + position / params.block_tokens];
            let slot = block * params.block_tokens + position % params.block_tokens;
            slots[lane] = slot;
            let key = (kv_head * params.slots + slot) * dim;
            var dot = 0.0;
            for (var i = 0u; i < dim; i++) {
                dot = fma(query[i], f32(keys[key + i]), dot);
            }
            score = dot;
        }
        let largest_before = largest;
        largest = max(largest, reduce_max(lane, score));
        let shrink = exp(largest_before - largest);
        let weight = select(0.0, exp(score - largest), position < end);
        weights[lane] = weight;
        total = total * shrink + reduce_sum(lane, weight);
        let count = min(SIZE, end - first);
        for (var d = 0u; d < DIMS; d++) {
            let i = d * SIZE + lane;
            if (i < dim) {
                var sum = sums[d] * shrink;
                for (var j = 0u; j < count; j++) {
                    sum = fma(weights[j], f32(values[(kv_head * params.slots + slots[j]) * dim + i]), sum);
                }
                sums[d] = sum;
            }
        }
        workgroupBarrier();
    }
    for (var d = 0u; d < DIMS; d++) {
        let i = d * SIZE + lane;
        if (i < dim) {
            out[(t * params.heads + h) * dim + i] = sums[d] / total;
        }
    }
}
