// The parameters of a linear, and what becomes of a sum: it is multiplied by what all weights of its row share, the bias is added, and the result is stored, added,
// or multiplied with the activated gate that the output holds.

struct Params {
    shape: Shape,
    m: u32,
    // The first of the output's columns, and how many it has.
    first: u32,
    width: u32,
    epilogue: u32,
}
var<immediate> params: Params;

// The factor and the bias of a row.
fn finish(row: u32, sum: f32) -> f32 {
    let affine = row_affine[row];
    return fma(sum, affine.x, affine.y);
}

fn silu(x: f32) -> f32 {
    return x / (1.0 + exp(-x));
}

// The approximation of GELU by tanh, as 1 − 2 / (1 + e^2y), which neither overflows nor cancels for large y.
fn gelu_tanh(x: f32) -> f32 {
    let inner = 0.7978845608028654 * fma(0.044715 * x * x, x, x);
    return x / (1.0 + exp(-2.0 * inner));
}

fn store(index: u32, value: f32) {
    switch params.epilogue {
        case ADD: {
            out[index] += value;
        }
        case GATE_SILU: {
            out[index] = silu(out[index]) * value;
        }
        case GATE_GELU_TANH: {
            out[index] = gelu_tanh(out[index]) * value;
        }
        default: {
            out[index] = value;
        }
    }
}

const STORE = 0u;
const ADD = 1u;
const GATE_SILU = 2u;
const GATE_GELU_TANH = 3u;
