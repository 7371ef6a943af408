// Sums and maxima over the first SIZE invocations of a workgroup, a multiple of 32, in a fixed order: 32 of them take every 32nd value, and every
// invocation takes those. All take part and get the result.

var<workgroup> partial: array<f32, SIZE>;

// The first half of a sum; what follows it must come after a barrier.
fn begin_sum(lane: u32, value: f32) {
    if (lane < SIZE) {
        partial[lane] = value;
    }
    workgroupBarrier();
    if (lane < 32u) {
        var sum = value;
        for (var i = 1u; i < SIZE / 32u; i++) {
            sum += partial[32u * i + lane];
        }
        partial[lane] = sum;
    }
}

// The sum that was begun.
fn end_sum() -> f32 {
    var sum = 0.0;
    @for i < 32
    sum += partial[@i];
    @end
    return sum;
}

fn reduce_sum(lane: u32, value: f32) -> f32 {
    begin_sum(lane, value);
    workgroupBarrier();
    let sum = end_sum();
    workgroupBarrier();
    return sum;
}

fn reduce_max(lane: u32, value: f32) -> f32 {
    if (lane < SIZE) {
        partial[lane] = value;
    }
    workgroupBarrier();
    if (lane < 32u) {
        var largest = value;
        for (var i = 1u; i < SIZE / 32u; i++) {
            largest = max(largest, partial[32u * i + lane]);
        }
        partial[lane] = largest;
    }
    workgroupBarrier();
    var largest = partial[0];
    @for i < 31
    largest = max(largest, partial[@i + 1]);
    @end
    workgroupBarrier();
    return largest;
}
