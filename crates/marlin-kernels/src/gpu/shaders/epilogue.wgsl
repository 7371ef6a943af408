// What becomes of a linear's sums: they are multiplied by what all weights of their row share, biases are added, and the results are stored, added to
// the output, or multiplied with the activated gate.

// Rows that become columns of the output: of a gated linear, half of them.
fn output_rows(shape: Shape) -> u32 {
    return select(shape.rows, shape.rows / 2u, GATED);
}

// What a row's sums are multiplied by, and its bias; of a gated linear, those of the row that it gates, too.
struct Affine {
    own: vec2<f32>,
    gated: vec2<f32>,
}

fn affine_of(row: u32) -> Affine {
    let at = first_row(params.shape) + row;
    if (GATED) {
        return Affine(row_affine[at], row_affine[at + output_rows(params.shape)]);
    }
    return Affine(row_affine[at], vec2<f32>());
}

fn finish(affine: vec2<f32>, sum: f32) -> f32 {
    return fma(sum, affine.x, affine.y);
}

fn silu(x: f32) -> f32 {
    return x / (1.0 + exp(-x));
}

// The approximation of GELU by tanh, as x / (1 + e^-2y), which neither overflows nor cancels.
fn gelu_tanh(x: f32) -> f32 {
    let inner = 0.7978845608028654 * fma(0.044715 * x * x, x, x);
    return x / (1.0 + exp(-2.0 * inner));
}

// Comparisons, so that NaN stays NaN.
fn clamped_swiglu(gate: f32, up: f32) -> f32 {
    let g = select(gate, SWIGLU_LIMIT, gate > SWIGLU_LIMIT);
    let u = select(select(up, SWIGLU_LIMIT, up > SWIGLU_LIMIT), -SWIGLU_LIMIT, up < -SWIGLU_LIMIT);
    return g / (1.0 + exp(-SWIGLU_ALPHA * g)) * (u + 1.0);
}

fn gated(gate: f32, up: f32) -> f32 {
    switch params.epilogue {
        case GATE_SILU: {
            return silu(gate) * up;
        }
        case GATE_GELU_TANH: {
            return gelu_tanh(gate) * up;
        }
        default: {
            return clamped_swiglu(gate, up);
        }
    }
}

// Takes the sum of a row; of a gated linear, that of the gate and `other` of the row it gates. Gives what is stored.
fn store_row(m: u32, row: u32, affine: Affine, sum: f32, other: f32) -> f32 {
    let index = m * params.width + first_column() + row;
    if (GATED) {
        let value = gated(finish(affine.own, sum), finish(affine.gated, other));
        out[index] = value;
        return value;
    }
    var value = finish(affine.own, sum);
    switch params.epilogue {
        case ADD: {
            value += out[index];
        }
        case GATE_SILU, GATE_GELU_TANH, GATE_CLAMPED_SWIGLU: {
            value = gated(out[index], value);
        }
        default: {}
    }
    out[index] = value;
    return value;
}

const STORE = 0u;
const ADD = 1u;
const GATE_SILU = 2u;
const GATE_GELU_TANH = 3u;
const GATE_CLAMPED_SWIGLU = 4u;
const SWIGLU_LIMIT = 7.0;
const SWIGLU_ALPHA = 1.702;
