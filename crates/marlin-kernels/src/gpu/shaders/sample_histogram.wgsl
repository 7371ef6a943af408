// Counts and weighs the tokens of a row by a digit of their ranks, those that have the digits before it.

var<workgroup> bins: array<atomic<u32>, HISTOGRAM>;

// Adds to an integer of 64 bits.
fn add_to_bin(index: u32, value: u32) {
    let before = atomicAdd(&bins[index], value);
    if (before + value < before) {
        atomicAdd(&bins[index + 1u], 1u);
    }
}

fn add_to_histogram(index: u32, low: u32, high: u32) {
    let before = atomicAdd(&histograms[index], low);
    let carry = select(0u, 1u, before + low < before);
    if (high + carry > 0u) {
        atomicAdd(&histograms[index + 1u], high + carry);
    }
}

// The state before the first histogram.
fn first_state(row: Row, workgroup_row: u32) -> State {
    var first: State;
    first.largest = LOWEST;
    var is_unsound = 0u;
    var is_any = 0u;
    for (var i = 0u; i < params.chunks; i++) {
        let partial = partials[workgroup_row * params.chunks + i];
        first.largest = min(first.largest, partial.rank);
        is_unsound |= partial.is_unsound;
        is_any |= partial.is_any;
    }
    let is_finite = first.largest != HIGHEST && first.largest != LOWEST;
    first.is_open = u32(is_unsound == 0u && is_any == 1u && is_finite && row.temperature > 0.0);
    return first;
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = rows[workgroup.y];
    var counts = true;
    if (params.histogram == 0u) {
        if (lane == 0u) {
            state = first_state(row, workgroup.y);
            is_open = state.is_open;
        }
        counts = workgroupUniformLoad(&is_open) == 1u;
    } else {
        counts = advance(workgroup.y, row, lane);
    }
    if (workgroup.x == 0u && lane == 0u) {
        states[workgroup.y * STATES + params.histogram] = state;
    }
    if (!counts) {
        return;
    }

    for (var i = lane; i < HISTOGRAM; i += SIZE) {
        atomicStore(&bins[i], 0u);
    }
    workgroupBarrier();
    let known = params.digit * WIDTH;
    let shift = 32u - known - width_of(params.digit);
    for (var i = 0u; i < EACH; i++) {
        let id = workgroup.x * CHUNK + i * SIZE + lane;
        if (id >= params.vocabulary) {
            break;
        }
        let rank = rank_of(logits[workgroup.y * params.vocabulary + id]);
        // A shift by all 32 bits would be none.
        if (known > 0u && rank >> (32u - known) != state.rank) {
            continue;
        }
        let bin = (rank >> shift) & ((1u << width_of(params.digit)) - 1u);
        let weight = weight_of(rank, state.largest, row.temperature);
        atomicAdd(&bins[3u * bin], 1u);
        add_to_bin(3u * bin + 1u, weight);
        if (params.digit == 0u && f32(weight) >= row.min_p * 2147483648.0) {
            add_to_bin(3u * BINS, weight);
        }
    }
    workgroupBarrier();
    let start = histogram_start(workgroup.y, params.histogram);
    for (var bin = lane; bin < BINS; bin += SIZE) {
        let count = atomicLoad(&bins[3u * bin]);
        if (count > 0u) {
            atomicAdd(&histograms[start + 3u * bin], count);
            add_to_histogram(start + 3u * bin + 1u, atomicLoad(&bins[3u * bin + 1u]), atomicLoad(&bins[3u * bin + 2u]));
        }
    }
    if (lane == 0u) {
        add_to_histogram(start + 3u * BINS, atomicLoad(&bins[3u * BINS]), atomicLoad(&bins[3u * BINS + 1u]));
    }
}
