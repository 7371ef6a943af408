// A row's selects from histogram to histogram.

var<workgroup> count_sums: array<u32, SIZE>;
var<workgroup> weight_sums: array<vec2<u32>, SIZE>;
var<workgroup> state: State;
var<workgroup> is_open: u32;

fn histogram_start(row: u32, histogram: u32) -> u32 {
    return (row * params.histograms + histogram) * HISTOGRAM;
}

// A bin: how many tokens, and their weight.
fn bin_count(start: u32, bin: u32) -> u32 {
    return atomicLoad(&histograms[start + 3u * bin]);
}

fn bin_weight(start: u32, bin: u32) -> vec2<u32> {
    return vec2<u32>(atomicLoad(&histograms[start + 3u * bin + 1u]), atomicLoad(&histograms[start + 3u * bin + 2u]));
}

fn wants(row: Row, which: u32) -> bool {
    switch which {
        case TOP_K: {
            return row.top_k > 0u && row.top_k < params.vocabulary;
        }
        case TOP_P: {
            return row.top_p < 0xffffffffu;
        }
        case CHOICE: {
            return true;
        }
        default: {
            return false;
        }
    }
}

// The weight up to the token at which the running weight exceeds what was wanted, and that token's place among those of its rank.
// All digits of the rank are known.
fn weight_to_choice(temperature: f32) -> vec2<u32> {
    let weight = weight_of(state.rank, state.largest, temperature);
    return wide_add(state.weight, wide_product(weight, place_of_choice(temperature) + 1u));
}

fn place_of_choice(temperature: f32) -> u32 {
    let weight = weight_of(state.rank, state.largest, temperature);
    return wide_quotient(wide_sub(state.wanted, state.weight), weight);
}

// Finds the next digit of the select under way in a histogram; the first digit begins the select. All invocations of the workgroup take part.
fn find_digit(row: Row, which: u32, digit: u32, start: u32, lane: u32) {
    const BINS_EACH = BINS / SIZE;
    var count = 0u;
    var weight = vec2<u32>();
    for (var i = 0u; i < BINS_EACH; i++) {
        count += bin_count(start, lane * BINS_EACH + i);
        weight = wide_add(weight, bin_weight(start, lane * BINS_EACH + i));
    }
    count_sums[lane] = count;
    weight_sums[lane] = weight;
    // Running sums, by doubling.
    for (var step = 1u; step < SIZE; step *= 2u) {
        workgroupBarrier();
        var other_count = 0u;
        var other_weight = vec2<u32>();
        if (lane >= step) {
            other_count = count_sums[lane - step];
            other_weight = weight_sums[lane - step];
        }
        workgroupBarrier();
        count_sums[lane] += other_count;
        weight_sums[lane] = wide_add(weight_sums[lane], other_weight);
    }
    workgroupBarrier();
    if (lane == 0u && digit == 0u) {
        begin_select(row, which, start);
    }
    workgroupBarrier();
    let before = state;
    workgroupBarrier();
    var sum_count = before.count + count_sums[lane] - count;
    var sum_weight = wide_add(before.weight, wide_sub(weight_sums[lane], weight));
    var is_found = reaches(before, row, which, sum_count, sum_weight);
    for (var i = 0u; i < BINS_EACH && !is_found; i++) {
        let bin = lane * BINS_EACH + i;
        let next_count = sum_count + bin_count(start, bin);
        let next_weight = wide_add(sum_weight, bin_weight(start, bin));
        is_found = reaches(before, row, which, next_count, next_weight);
        if (is_found) {
            state.rank = (before.rank << width_of(digit)) | bin;
            state.count = sum_count;
            state.weight = sum_weight;
        }
        sum_count = next_count;
        sum_weight = next_weight;
    }
    workgroupBarrier();
}

// Whether the token that a select looks for is among so many first tokens of such a weight.
fn reaches(before: State, row: Row, which: u32, count: u32, weight: vec2<u32>) -> bool {
    if (which == TOP_K) {
        return count >= row.top_k;
    }
    return wide_less(before.wanted, weight);
}

// By the first invocation; the running sums are those of the first histogram.
fn begin_select(row: Row, which: u32, start: u32) {
    if (state.total.x == 0u && state.total.y == 0u) {
        state.total = weight_sums[SIZE - 1u];
        state.kept = state.total;
        if (row.min_p > 0.0) {
            let likely = vec2<u32>(atomicLoad(&histograms[start + 3u * BINS]), atomicLoad(&histograms[start + 3u * BINS + 1u]));
            // The most likely token always stays.
            state.kept = select(likely, vec2<u32>(0x80000000u, 0u), wide_less(likely, vec2<u32>(0x80000000u, 0u)));
        }
    }
    state.rank = 0u;
    state.count = 0u;
    state.weight = vec2<u32>();
    if (which == TOP_P) {
        state.wanted = wide_share(state.total, row.top_p);
    } else {
        state.wanted = wide_share(state.kept, row.uniform);
    }
}

// By the first invocation.
fn end_select(row: Row, which: u32) {
    switch which {
        case TOP_K: {
            let weight = weight_of(state.rank, state.largest, row.temperature);
            state.total = wide_add(state.weight, wide_product(weight, row.top_k - state.count));
            state.kept = wide_min(state.kept, state.total);
        }
        case TOP_P: {
            state.kept = wide_min(state.kept, weight_to_choice(row.temperature));
        }
        default: {}
    }
}

// Bits of a digit.
fn width_of(digit: u32) -> u32 {
    return select(WIDTH, 32u - 2u * WIDTH, digit == 2u);
}

// Brings the state of a row up to the histogram that is to be made. Tells whether the row still needs it; the same for all invocations.
fn advance(workgroup_row: u32, row: Row, lane: u32) -> bool {
    if (lane == 0u) {
        state = states[workgroup_row * STATES + params.histogram - 1u];
        is_open = state.is_open;
    }
    if (workgroupUniformLoad(&is_open) == 0u) {
        return false;
    }
    // A select that ends here has counted its last digit.
    if (params.ends != NONE && wants(row, params.ends)) {
        find_digit(row, params.ends, 2u, histogram_start(workgroup_row, params.histogram - 1u), lane);
        if (lane == 0u) {
            end_select(row, params.ends);
        }
        workgroupBarrier();
    }
    if (params.select_under_way == NONE) {
        return true;
    }
    if (!wants(row, params.select_under_way)) {
        return false;
    }
    if (params.digit == 1u) {
        find_digit(row, params.select_under_way, 0u, histogram_start(workgroup_row, 0u), lane);
    } else {
        find_digit(row, params.select_under_way, 1u, histogram_start(workgroup_row, params.histogram - 1u), lane);
    }
    return true;
}
