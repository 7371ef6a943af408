// Sums and maxima over the first SIZE invocations of a workgroup, by a tree, so that their order is fixed. Every invocation takes part and gets the
// result.

var<workgroup> partial: array<f32, SIZE>;

fn reduce_sum(lane: u32, value: f32) -> f32 {
    if (lane < SIZE) {
        partial[lane] = value;
    }
    for (var step = SIZE / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            partial[lane] += partial[lane + step];
        }
    }
    workgroupBarrier();
    let result = partial[0];
    workgroupBarrier();
    return result;
}

fn reduce_max(lane: u32, value: f32) -> f32 {
    if (lane < SIZE) {
        partial[lane] = value;
    }
    for (var step = SIZE / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            partial[lane] = max(partial[lane], partial[lane + step]);
        }
    }
    workgroupBarrier();
    let result = partial[0];
    workgroupBarrier();
    return result;
}
