// Adds biases to the logits of a row and applies its penalties.

var<workgroup> is_counted: atomic<u32>;

fn penalised(row: Row, logit: f32, generated: u32) -> f32 {
    let repeated = select(logit * row.repetition_penalty, logit / row.repetition_penalty, logit > 0.0);
    if (generated == 0u) {
        return repeated;
    }
    return repeated - (row.presence_penalty + row.frequency_penalty * f32(generated));
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let start = workgroup.x * params.vocabulary;
    let row = rows[workgroup.x];
    for (var i = row.biases + lane; i < row.counts; i += SIZE) {
        logits[start + entries[i].x] += bitcast<f32>(entries[i].y);
    }
    var last = NOT_FINITE;
    if (row.last_sampled != ABSENT) {
        last = sampled[row.last_sampled];
    }
    if (lane == 0u) {
        atomicStore(&is_counted, 0u);
    }
    workgroupBarrier();
    storageBarrier();
    for (var i = row.counts + lane; i < row.end; i += SIZE) {
        let token = entries[i].x;
        let is_last = token == last;
        if (is_last) {
            atomicStore(&is_counted, 1u);
        }
        logits[start + token] = penalised(row, logits[start + token], entries[i].y + u32(is_last));
    }
    workgroupBarrier();
    if (lane == 0u && last != NOT_FINITE && atomicLoad(&is_counted) == 0u) {
        logits[start + last] = penalised(row, logits[start + last], 1u);
    }
}
