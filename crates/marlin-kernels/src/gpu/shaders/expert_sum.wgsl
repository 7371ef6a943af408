// out[0, n] += Σ weight · (x[place, :] · W[n, :] + bias) over the experts of one token. SPLITS take turns at the token's slots; LANES neighbouring
// invocations share a quad of rows of each expert, step along K unit by unit, and load the next units while they multiply.

struct Params {
    shape: Shape,
    // The first of the output's columns.
    first: u32,
    slots: u32,
    // All experts are here, in their order.
    is_whole: u32,
}
var<immediate> params: Params;

fn input_stride(shape: Shape) -> u32 {
    return shape.k;
}

// What a quad's sums are multiplied by, and what is added to them.
fn weighted(shape: Shape, quad: u32, sums: vec4<f32>, weight: f32, adds_bias: bool) -> vec4<f32> {
    var result: vec4<f32>;
    for (var i = 0u; i < 4u; i++) {
        let affine = row_affine[first_row(shape) + min(4u * quad + i, shape.rows - 1u)];
        result[i] = weight * fma(sums[i], affine.x, select(0.0, affine.y, adds_bias));
    }
    return result;
}

@compute @workgroup_size(INVOCATIONS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let shape = params.shape;
    let units = units_of(shape);
    // Quads beyond the last one repeat it.
    let quad = min(workgroup.x * QUADS + index / LANES % QUADS, (shape.rows + 3u) / 4u - 1u);
    let lane = index % LANES;
    var sum_of_slots = vec4<f32>();
    for (var slot = index / (LANES * QUADS); slot < params.slots; slot += SPLITS) {
        let expert = experts[slot];
        if (!choose_matrix(expert)) {
            continue;
        }
        // Rows of x are sorted by expert.
        var place = 0u;
        for (var other = 0u; other < params.slots; other++) {
            place += u32(experts[other] < expert);
        }
        var sums = vec4<f32>();
        var unit = min(lane, units - 1u);
        var groups = fetch_groups(shape, quad, unit);
@for i < 4
        var codes_@i = codes_of_quad(shape, quad, @iu, unit);
@end
        // All lanes take as many steps: beyond the last unit they repeat it, times 0.
        for (var first = 0u; first < units; first += LANES) {
            let next = min(first + LANES + lane, units - 1u);
            let next_groups = fetch_groups(shape, quad, next);
@for i < 4
            let next_codes_@i = codes_of_quad(shape, quad, @iu, next);
@end
            let values = input_unit(shape, place, unit);
            let scale = select(0.0, input_scale(shape, place, unit), first + lane < units);
@for i < 4
            let groups_@i = decode_groups(groups, @iu);
            let dot_@i = dot_unit(decode_row(codes_@i, groups_@i), values, groups_@i);
@end
            sums = fma(vec4<f32>(dot_0, dot_1, dot_2, dot_3), vec4<f32>(scale), sums);
            unit = next;
            groups = next_groups;
@for i < 4
            codes_@i = next_codes_@i;
@end
        }
        sum_of_slots += weighted(shape, quad, sums, weights[slot], lane == 0u);
    }
    put_sums(0u, 0u, index, sum_of_slots);
    workgroupBarrier();
    for (var i = index; i < OUTPUTS; i += INVOCATIONS) {
        let row = workgroup.x * OUTPUTS + i;
        if (row < shape.rows) {
            out[params.first + row] += total(0u, 0u, i);
        }
    }
}
