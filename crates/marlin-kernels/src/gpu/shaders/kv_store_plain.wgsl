// Stores the prepared head as it is.

fn store_head(lane: u32, is_value: bool, row: u32) {
    for (var i = lane; i < params.head_dim; i += SIZE) {
        if (is_value) {
            values[row * params.head_dim + i] = to_kv(prepared[i]);
        } else {
            keys[row * params.head_dim + i] = to_kv(prepared[i]);
        }
    }
}
