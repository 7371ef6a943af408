// The nearest integer of 8 bits, 128 added.
fn code(value: f32) -> u32 {
    return u32(clamp(round(value), -128.0, 127.0) + 128.0);
}
