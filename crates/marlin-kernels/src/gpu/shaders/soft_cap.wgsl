// x = cap · tanh(x / cap).

struct Params {
    count: u32,
    cap: f32,
}
var<immediate> params: Params;

// Devices may take tanh from exponentials, which loses small numbers by cancellation and large ones by overflow.
fn exact_tanh(x: f32) -> f32 {
    let size = abs(x);
    let square = x * x;
    // To the ninth power, whose successor is less than 1e-9 of the whole.
    let series = size * fma(square, fma(square, fma(square, fma(square, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0), 1.0);
    let whole = 1.0 - 2.0 / (exp(2.0 * min(size, 20.0)) + 1.0);
    return sign(x) * select(whole, series, size < 0.1);
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    for (var i = id.x; i < params.count; i += workgroups.x * 256u) {
        let value = x[i];
        // Looked for in its bits, because compilers may assume that there is none.
        let is_nan = (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
        x[i] = select(params.cap * exact_tanh(value / params.cap), value, is_nan);
    }
}
