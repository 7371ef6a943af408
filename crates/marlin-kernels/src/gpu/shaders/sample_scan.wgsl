// The most likely token of each chunk of a row of logits, and whether they allow a choice; clears the row's histograms.

var<workgroup> found: array<Partial, SIZE>;

// The better of two tokens, and what is known of both their logits.
fn best(a: Partial, b: Partial) -> Partial {
    let is_b = b.rank < a.rank || (b.rank == a.rank && b.id < a.id);
    return Partial(select(a.rank, b.rank, is_b), select(a.id, b.id, is_b), a.is_unsound | b.is_unsound, a.is_any | b.is_any);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let chunk = workgroup.x;
    let row = workgroup.y;
    var mine = Partial(LOWEST, ABSENT, 0u, 0u);
    for (var i = 0u; i < EACH; i++) {
        let id = chunk * CHUNK + i * SIZE + lane;
        if (id < params.vocabulary) {
            let logit = logits[row * params.vocabulary + id];
            let magnitude = bitcast<u32>(logit) & 0x7fffffffu;
            let rank = rank_of(logit);
            let is_unsound = magnitude > POSITIVE_INFINITY || rank == HIGHEST;
            mine = best(mine, Partial(rank, id, u32(is_unsound), u32(rank != LOWEST)));
        }
    }
    found[lane] = mine;
    for (var step = SIZE / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            found[lane] = best(found[lane], found[lane + step]);
        }
    }
    let index = row * params.chunks + chunk;
    if (lane == 0u) {
        var whole = found[0];
        if (params.is_first_scan == 0u) {
            whole.is_unsound = partials[index].is_unsound;
            whole.is_any = partials[index].is_any;
        }
        partials[index] = whole;
    }
    if (params.is_first_scan == 1u) {
        let words = params.histograms * HISTOGRAM;
        for (var i = chunk * SIZE + lane; i < words; i += params.chunks * SIZE) {
            atomicStore(&histograms[row * words + i], 0u);
        }
    }
}
