// Writes the token of a row: none if its logits allow no choice, the most likely one, or the chosen one among those of the rank found.

var<workgroup> chunk: u32;
var<workgroup> place: u32;
var<workgroup> counts: array<u32, SIZE>;
var<workgroup> is_open: u32;

// The most likely token, or none.
fn most_likely(row: u32) -> u32 {
    var rank = LOWEST;
    var id = ABSENT;
    var is_unsound = 0u;
    var is_any = 0u;
    for (var i = 0u; i < params.chunks; i++) {
        let partial = partials[row * params.chunks + i];
        // Chunks lie in the order of ids.
        if (partial.rank < rank || id == ABSENT) {
            rank = partial.rank;
            id = partial.id;
        }
        is_unsound |= partial.is_unsound;
        is_any |= partial.is_any;
    }
    // Allowed tokens that have −∞ look like those that are not allowed.
    if (rank == LOWEST) {
        id = rows[row].lowest_allowed;
    }
    return select(NOT_FINITE, id, is_unsound == 0u && is_any == 1u);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    if (lane == 0u) {
        is_open = 0u;
        if (HAS_SELECTS) {
            is_open = states[row * STATES + params.histogram].is_open;
        }
        if (is_open == 0u) {
            sampled[row] = most_likely(row);
        } else {
            // The chunk that holds the chosen one of the tied tokens; of the last chunk that holds any, the last, if weights were rounded up.
            place = states[row * STATES + params.histogram].count;
            var ties = 0u;
            for (var i = 0u; i < params.chunks; i++) {
                let more = chunk_ties[row * params.chunks + i];
                if (more > 0u && ties <= place) {
                    chunk = i;
                    if (ties + more > place) {
                        place -= ties;
                        break;
                    }
                }
                ties += more;
            }
        }
    }
    if (workgroupUniformLoad(&is_open) == 0u) {
        return;
    }
    // Invocations hold runs of ids, so that ties are counted in the order of ids.
    let rank = states[row * STATES + params.histogram].rank;
    let first = workgroupUniformLoad(&chunk) * CHUNK + lane * EACH;
    let start = row * params.vocabulary;
    var count = 0u;
    for (var id = first; id < min(first + EACH, params.vocabulary); id++) {
        count += u32(rank_of(logits[start + id]) == rank);
    }
    counts[lane] = count;
    workgroupBarrier();
    var before = 0u;
    var all = 0u;
    for (var i = 0u; i < SIZE; i++) {
        before += select(0u, counts[i], i < lane);
        all += counts[i];
    }
    let wanted = min(workgroupUniformLoad(&place), all - 1u);
    for (var id = first; id < min(first + EACH, params.vocabulary); id++) {
        if (rank_of(logits[start + id]) == rank) {
            if (before == wanted) {
                sampled[row] = id;
            }
            before++;
        }
    }
}
