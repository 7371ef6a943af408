// A split that is all that a query sees gives the result.

fn store(row: u32, head: u32, at: u32, dim: u32, sum: f32, largest: f32, total: f32) {
    out[(row * params.heads + head) * DIM + dim] = sum * (1.0 / total);
}
