// Prepares latent attention. The first workgroup of a token normalises the latent vector of a row [… | latent | rotated part], rotates the rest, and
// writes both to the token's slot of the cache, as a key. The others rotate those parts of the query heads, and write them behind the latent parts
// of the queries, a pair of dimensions to an invocation.

struct Params {
    heads: u32,
    // Of a query head, before it is rotated.
    nope_dim: u32,
    rope_dim: u32,
    rank: u32,
    // Width of a key: rank + rope_dim.
    head_dim: u32,
    block_tokens: u32,
    eps: f32,
    // Of a row of kv.
    kv_width: u32,
}
var<immediate> params: Params;

// The key as it goes into the cache.
var<workgroup> prepared: array<f32, MAX_DIM>;

// Two dimensions, turned by the angle of a pair of a token.
fn rotated(values: vec2<f32>, t: u32, pair: u32) -> vec2<f32> {
    let cosine = angles[t * params.rope_dim + pair];
    let sine = angles[t * params.rope_dim + params.rope_dim / 2u + pair];
    return vec2<f32>(values.x * cosine - values.y * sine, values.y * cosine + values.x * sine);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let t = workgroup.y;
    let lane = local.x;
    let pairs = params.rope_dim / 2u;
    if (workgroup.x > 0u) {
        let i = (workgroup.x - 1u) * SIZE + lane;
        if (i < params.heads * pairs) {
            let head = t * params.heads + i / pairs;
            let pair = i % pairs;
            let dimensions = dimensions_of(pair, pairs);
            let of_head = head * (params.nope_dim + params.rope_dim) + params.nope_dim;
            let of_query = head * params.head_dim + params.rank;
            let values = rotated(vec2<f32>(q[of_head + dimensions.x], q[of_head + dimensions.y]), t, pair);
            queries[of_query + dimensions.x] = values.x;
            queries[of_query + dimensions.y] = values.y;
        }
        return;
    }

    let latent = (t + 1u) * params.kv_width - params.head_dim;
    var sum = 0.0;
    for (var i = lane; i < params.rank; i += SIZE) {
        let value = kv[latent + i];
        prepared[i] = value;
        sum = fma(value, value, sum);
    }
    let scale = 1.0 / sqrt(reduce_sum(lane, sum) / f32(params.rank) + params.eps);
    for (var i = lane; i < params.rank; i += SIZE) {
        prepared[i] *= scale * norm[i];
    }
    for (var pair = lane; pair < pairs; pair += SIZE) {
        let dimensions = params.rank + dimensions_of(pair, pairs);
        let values = rotated(vec2<f32>(kv[latent + dimensions.x], kv[latent + dimensions.y]), t, pair);
        prepared[dimensions.x] = values.x;
        prepared[dimensions.y] = values.y;
    }
    workgroupBarrier();
    let token = step_tokens[t];
    let slot = block_tables[token.table + token.position / params.block_tokens] * params.block_tokens
        + token.position % params.block_tokens;
    store_head(lane, false, slot);
}
