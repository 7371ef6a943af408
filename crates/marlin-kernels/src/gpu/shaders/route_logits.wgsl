// logits[t, e] = x[t, :] · router[e, :] + bias[e] in single precision; if NORMED, of the RMS norm of x. LANES neighbouring invocations share EXPERTS
// experts, whose weights they read once for TOKENS tokens, four columns at a time, STEPS of them under way at once.

struct Params {
    k: u32,
    eps: f32,
    m: u32,
    experts: u32,
}
var<immediate> params: Params;

const INVOCATIONS = 128u;
const GROUPS = INVOCATIONS / LANES;
// Shares of dot products and of sums of squares, each with one more than LANES, so that what is summed up together lies in different banks.
const SHARE = LANES + 1u;
const DOTS = TOKENS * EXPERTS;
var<workgroup> dots: array<f32, DOTS * GROUPS * SHARE>;
var<workgroup> squares: array<f32, TOKENS * GROUPS * SHARE>;

fn dot_four(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

@compute @workgroup_size(INVOCATIONS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let k = params.k;
    let lane = index % LANES;
    let group = index / LANES;
    // Experts and tokens beyond the last one repeat it.
@for e < EXPERTS
    let expert_@e = min((workgroup.x * GROUPS + group) * EXPERTS + @eu, params.experts - 1u);
@end
@for t < TOKENS
    let token_@t = min(workgroup.y * TOKENS + @tu, params.m - 1u);
    var square_@t = 0.0;
@for e < EXPERTS
    var dot_@t_@e = 0.0;
@end
@end
    // Beyond the last column loads give 0.
    for (var start = 4u * lane; start < k; start += 4u * LANES * STEPS) {
@for s < STEPS
        let column_@s = start + 4u * LANES * @su;
@for e < EXPERTS
        let w_@s_@e = router_four(expert_@e, column_@s, k);
@end
@for t < TOKENS
        let x_@s_@t = x_four(token_@t, column_@s, k);
@end
@end
@for s < STEPS
@for t < TOKENS
        let weighted_@s_@t = weighted(x_@s_@t, column_@s, k);
        if (NORMED) {
            square_@t = dot_four(x_@s_@t, x_@s_@t, square_@t);
        }
@for e < EXPERTS
        dot_@t_@e = dot_four(weighted_@s_@t, w_@s_@e, dot_@t_@e);
@end
@end
@end
    }
@for t < TOKENS
    squares[(@tu * GROUPS + group) * SHARE + lane] = square_@t;
@for e < EXPERTS
    dots[((@tu * EXPERTS + @eu) * GROUPS + group) * SHARE + lane] = dot_@t_@e;
@end
@end
    workgroupBarrier();
    if (index >= DOTS * GROUPS) {
        return;
    }
    // Each sums up one logit.
    let of_group = index % GROUPS;
    let t = index / GROUPS / EXPERTS;
    let e = index / GROUPS % EXPERTS;
    var sum = 0.0;
@for i < LANES
    sum += dots[index * SHARE + @iu];
@end
    if (NORMED) {
        var of_token = 0.0;
@for i < LANES
        of_token += squares[(t * GROUPS + of_group) * SHARE + @iu];
@end
        sum *= norm_factor(of_token, k, params.eps);
    }
    let token = workgroup.y * TOKENS + t;
    let expert = (workgroup.x * GROUPS + of_group) * EXPERTS + e;
    if (token < params.m && expert < params.experts) {
        logits[token * params.experts + expert] = sum + bias[expert];
    }
}
