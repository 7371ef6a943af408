// Puts together what `attention_split` or `attention_latent` gives for one head of a token: the sums of its splits, each relative to the split's
// largest score. PARTS workgroups have DIM dimensions each of a head of a token; each invocation adds four dimensions of every GROUPS-th split,
// relative to the largest score of those, so that nothing but the sums of the groups has to wait for others.

struct Params {
    heads: u32,
    // The first of attention_tokens of this dispatch.
    first_token: u32,
    // Splits that each head has room for; a token that has fewer has no weight in the others.
    splits: u32,
    has_sinks: u32,
    // Of that token, if it is the only one.
    row: u32,
}
var<immediate> params: Params;

const LOWEST = -3.4028234663852886e38;
// Vectors of four dimensions.
const VECTORS = DIM / 4u;
// Splits whose sums an invocation loads before it uses the first.
const BATCH = 4u;
var<workgroup> group_softmax: array<vec2<f32>, GROUPS>;
var<workgroup> group_sums: array<vec4<f32>, GROUPS * VECTORS>;

@compute @workgroup_size(SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = workgroup.x / PARTS;
    let part_of_head = workgroup.x % PARTS;
    var row = params.row;
    if (workgroups.y > 1u) {
        row = attention_tokens[params.first_token + workgroup.y].row;
    }
    let first = (workgroup.y * params.heads + head) * params.splits;
    let vector = lane % VECTORS;
    let group = lane / VECTORS;

    var largest = LOWEST;
    var total = 0.0;
    var sum = vec4<f32>();
    if (group < GROUPS) {
        for (var split = group; split < params.splits; split += BATCH * GROUPS) {
            @for i < BATCH
            let exists@i = split + @iu * GROUPS < params.splits;
            let at@i = first + select(split, split + @iu * GROUPS, exists@i);
            let loaded@i = split_softmax[at@i];
            let part@i = split_sums[(at@i * PARTS + part_of_head) * VECTORS + vector];
            @end
            let before = largest;
            @for i < BATCH
            let softmax@i = select(vec2<f32>(LOWEST, 0.0), loaded@i, exists@i);
            largest = max(largest, softmax@i.x);
            @end
            let shrink = exp2(before - largest);
            total *= shrink;
            sum *= shrink;
            @for i < BATCH
            let weight@i = exp2(softmax@i.x - largest);
            total = fma(weight@i, softmax@i.y, total);
            // Splits that do not exist may hold anything.
            sum = fma(select(vec4<f32>(), part@i, softmax@i.y > 0.0), vec4<f32>(weight@i), sum);
            @end
        }
        group_sums[lane] = sum;
        if (vector == 0u) {
            group_softmax[group] = vec2<f32>(largest, total);
        }
    }
    workgroupBarrier();
    if (lane < VECTORS) {
        largest = LOWEST;
        @for g < GROUPS
        let softmax_of@g = group_softmax[@g];
        largest = max(largest, softmax_of@g.x);
        @end
        total = sink_weight(head, largest);
        sum = vec4<f32>();
        @for g < GROUPS
        {
            let weight = exp2(softmax_of@g.x - largest);
            total = fma(weight, softmax_of@g.y, total);
            sum = fma(group_sums[@gu * VECTORS + lane], vec4<f32>(weight), sum);
        }
        @end
        sum *= 1.0 / total;
        out[(row * params.heads * PARTS + workgroup.x) * VECTORS + lane] = sum;
        @for i < 4
        keep_output(4u * lane + @iu, sum[@i]);
        @end
    }
    pack_heads(row, workgroup.x, 1u, params.heads * PARTS, lane);
}
