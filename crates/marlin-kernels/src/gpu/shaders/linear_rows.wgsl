// out[m, first + n] = epilogue(x[m, :] · W[n, :]) for few rows m. Four rows of W, a quad, are shared by LANES neighbouring invocations times SPLITS, which
// step along K unit by unit, so that each weight is read once for all MB rows of x, while the next ones are on their way. Products of a unit are summed
// in the device's arithmetic, units in single precision. Of a gated linear, quads of the gate and of what it gates are summed together.

// Stores the outputs of ROWS_AT_ONCE rows of x, an invocation those of one row of W, one after the other.
fn finish_rows(shape: Shape, rows: Rows, affine: Affine, first: u32, first_m: u32, index: u32) {
    for (var i = index; i < ROWS_AT_ONCE * OUTPUTS; i += INVOCATIONS) {
        let b = i / OUTPUTS;
        let output = i % OUTPUTS;
        let m = first_m + b;
        let row = first + output;
        var value = 0.0;
        if (m < rows.end && row < output_rows(shape)) {
            let factor = input_factor(shape);
            var other = 0.0;
            if (GATED) {
                other = factor * total(1u, b, output);
            }
            value = store_row(m, row, affine, factor * total(0u, b, output), other);
        }
        keep_output(i, value);
    }
    pack_kept(shape, rows, first, first_m, index);
}

@compute @workgroup_size(INVOCATIONS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let shape = params.shape;
    let units = units_of(shape);
    route(workgroup, index);
    let rows = rows_of(workgroup, MB);
    if (is_empty(rows)) {
        return;
    }
    let first_m = rows.first;
    // Quads beyond the last one repeat it.
    let quad_0 = min(workgroup.x * QUADS + index / LANES % QUADS, (output_rows(shape) + 3u) / 4u - 1u);
    let quad_1 = quad_0 + output_rows(shape) / 4u;
@for b < MB
    let m_@b = input_row(min(first_m + @bu, rows.end - 1u));
@end
    var unit = index / (LANES * QUADS) * LANES + index % LANES;
    let first_unit = min(unit, units - 1u);
@for q < MATRICES
    var groups_@q = fetch_groups(shape, quad_@q, first_unit);
@for i < 4
    var codes_@q_@i = codes_of_quad(shape, quad_@q, @iu, first_unit);
@end
@for b < MB
    var sums_@q_@b = vec4<f32>();
@end
@end
    // INVOCATIONS are a multiple of OUTPUTS. Loaded now, since it is waited for at the end.
    let affine = affine_of(min(workgroup.x * OUTPUTS + index % OUTPUTS, output_rows(shape) - 1u));
    prepare_input(shape, index);

    // All take as many steps: beyond the last unit they repeat it, times 0.
    for (var first = 0u; first < units; first += LANES * SPLITS) {
        let here = min(unit, units - 1u);
        let next = min(unit + LANES * SPLITS, units - 1u);
@for q < MATRICES
        let next_groups_@q = fetch_groups(shape, quad_@q, next);
@for i < 4
        let next_codes_@q_@i = codes_of_quad(shape, quad_@q, @iu, next);
@end
@end
@for q < MATRICES
@for i < 4
        let groups_@q_@i = decode_groups(groups_@q, @iu);
        let w_@q_@i = decode_row(codes_@q_@i, groups_@q_@i);
@end
@for b < MB
        if (has_row(rows, first_m + @bu)) {
            let values = input_unit(shape, m_@b, here);
            let scale = select(0.0, input_scale(shape, m_@b, here), unit < units);
            let dots = vec4<f32>(
                dot_unit(w_@q_0, values, groups_@q_0),
                dot_unit(w_@q_1, values, groups_@q_1),
                dot_unit(w_@q_2, values, groups_@q_2),
                dot_unit(w_@q_3, values, groups_@q_3),
            );
            sums_@q_@b = fma(dots, vec4<f32>(scale), sums_@q_@b);
        }
@end
        groups_@q = next_groups_@q;
@for i < 4
        codes_@q_@i = next_codes_@q_@i;
@end
@end
        unit += LANES * SPLITS;
    }

@for b < MB
    if (@bu > 0u && @bu % ROWS_AT_ONCE == 0u) {
        // The rows before are done.
        workgroupBarrier();
    }
@for q < MATRICES
    put_sums(@qu, @bu % ROWS_AT_ONCE, index, sums_@q_@b);
@end
    if (@bu % ROWS_AT_ONCE == ROWS_AT_ONCE - 1u) {
        workgroupBarrier();
        finish_rows(shape, rows, affine, workgroup.x * OUTPUTS, first_m + @bu + 1u - ROWS_AT_ONCE, index);
    }
@end
}
