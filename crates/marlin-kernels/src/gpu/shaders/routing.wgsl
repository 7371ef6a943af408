// How a router chooses.

struct Routing {
    // Routed experts, those of them that a token goes to, and shared ones.
    experts: u32,
    top_k: u32,
    shared_experts: u32,
    is_softmax: u32,
    // Groups of experts, and those of them that a token chooses from.
    groups: u32,
    top_groups: u32,
    normalizes: u32,
    // Of weights.
    scale: f32,
    // Experts are chosen by their logits, which come in the order of scores.
    by_logits: u32,
}
