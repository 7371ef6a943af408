// What an RMS norm multiplies its row by.

fn norm_factor(squares: f32, width: u32, eps: f32) -> f32 {
    return 1.0 / sqrt(squares / f32(width) + eps);
}
