// Puts together what `attention_split` gives for one head of a token: the sums of its splits, each relative to the split's largest
// score. A workgroup a head of a token; each invocation adds four dimensions of every GROUPS-th split.

struct Params {
    heads: u32,
    // Positions that a query looks back over, itself included; the largest number for all.
    window: u32,
    // Positions of a split.
    split: u32,
    // The first of attention_tokens of this dispatch.
    first_token: u32,
    // Splits that each head has room for.
    splits: u32,
}
var<immediate> params: Params;

// Invocations, and the most splits there are.
const SIZE = 256u;
const LOWEST = -3.4028234663852886e38;
// Vectors of four dimensions.
const VECTORS = DIM / 4u;
const GROUPS = SIZE / VECTORS;
// Zero beyond what there is.
var<workgroup> weights: array<f32, 2u * SIZE>;
var<workgroup> partial_sums: array<vec4<f32>, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let lane = local.x;
    let head = workgroup.x;
    let token = attention_tokens[params.first_token + workgroup.y];
    let end = token.position + 1u;
    let begin = end - min(end, params.window);
    let splits = (end - 1u) / params.split - begin / params.split + 1u;
    let first = (workgroup.y * params.heads + head) * params.splits;

    var softmax = vec2<f32>(LOWEST, 0.0);
    if (lane < splits) {
        softmax = split_softmax[first + lane];
    }
    let largest = reduce_max(lane, softmax.x);
    let weight = exp2(softmax.x - largest);
    let total = reduce_sum(lane, weight * softmax.y);
    weights[lane] = select(0.0, weight * (1.0 / total), lane < splits);
    weights[SIZE + lane] = 0.0;
    workgroupBarrier();

    let vector = lane % VECTORS;
    let group = lane / VECTORS;
    var sum = vec4<f32>();
    if (group < GROUPS) {
        for (var split = group; split < splits; split += 4u * GROUPS) {
            @for i < 4
            let part@i = split_sums[(first + min(split + @iu * GROUPS, splits - 1u)) * VECTORS + vector];
            @end
            @for i < 4
            sum = fma(part@i, vec4<f32>(weights[split + @iu * GROUPS]), sum);
            @end
        }
    }
    partial_sums[lane] = sum;
    workgroupBarrier();
    if (lane < VECTORS) {
        for (var other = 1u; other < min(GROUPS, splits); other++) {
            sum += partial_sums[other * VECTORS + lane];
        }
        out[(token.row * params.heads + head) * VECTORS + lane] = sum;
        @for i < 4
        keep_output(4u * lane + @iu, sum[@i]);
        @end
    }
    pack_heads(token.row, head, 1u, params.heads, lane);
}
