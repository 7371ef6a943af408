// Normalises and rotates the query and key heads of a row [q heads | k heads | v heads], and writes keys and values to their
// slots of the cache. A workgroup a head of a token.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // Rotated dimensions.
    rotary: u32,
    block_tokens: u32,
    // Tokens that the cache has room for.
    slots: u32,
    eps: f32,
}
var<immediate> params: Params;

const SIZE = 64u;
const MAX_DIM = 512u;
var<workgroup> head: array<f32, MAX_DIM>;
// The head as it goes into the cache.
var<workgroup> prepared: array<f32, MAX_DIM>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let h = workgroup.x;
    let t = workgroup.y;
    let lane = local.x;
    let dim = params.head_dim;
    let is_query = h < params.heads;
    let is_value = h >= params.heads + params.kv_heads;
    let start = (t * (params.heads + 2u * params.kv_heads) + h) * dim;

    var sum = 0.0;
    for (var i = lane; i < dim; i += SIZE) {
        let value = qkv[start + i];
        head[i] = value;
        sum = fma(value, value, sum);
    }
    if (NORMED && !is_value) {
        let scale = 1.0 / sqrt(reduce_sum(lane, sum) / f32(dim) + params.eps);
        for (var i = lane; i < dim; i += SIZE) {
            head[i] *= scale * norm_weight(is_query, i);
        }
    }
    workgroupBarrier();

    let half = params.rotary / 2u;
    for (var i = lane; i < dim; i += SIZE) {
        var value = head[i];
        if (!is_value && i < params.rotary) {
            let pair = pair_of(i, half);
            let dimensions = dimensions_of(pair, half);
            let cosine = angles[t * params.rotary + pair];
            let sine = angles[t * params.rotary + half + pair];
            let low = head[dimensions.x];
            let high = head[dimensions.y];
            value = select(high * cosine + low * sine, low * cosine - high * sine, i == dimensions.x);
        }
        if (is_query) {
            qkv[start + i] = value;
        } else {
            prepared[i] = value;
        }
    }
    if (is_query) {
        return;
    }
    workgroupBarrier();
    let token = step_tokens[t];
    let slot = block_tables[token.table + token.position / params.block_tokens] * params.block_tokens
        + token.position % params.block_tokens;
    // Among the heads of keys, or of values.
    let kv_head = (h - params.heads) % params.kv_heads;
    store_head(lane, is_value, kv_head * params.slots + slot);
}
