// Attention sinks: a learnt score of each head, which takes its share of the weights and gives nothing.

const LOG2_E = 1.4426950408889634;

// The weight of a head's sink relative to the largest score, to base 2; 0 without sinks.
fn sink_weight(head: u32, largest: f32) -> f32 {
    if (params.has_sinks == 0u) {
        return 0.0;
    }
    return exp2(sinks[head] * LOG2_E - largest);
}
