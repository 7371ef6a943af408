// A split's sums relative to its largest score, for `attention_combine`.

fn store(row: u32, head: u32, at: u32, dim: u32, sum: f32, largest: f32, total: f32) {
    split_sums[at * DIM + dim] = sum;
    if (dim == 0u) {
        split_softmax[at] = vec2<f32>(largest, total);
    }
}
