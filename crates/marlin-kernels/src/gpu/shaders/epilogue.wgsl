// The parameters of a linear, and what becomes of its sums: they are multiplied by what all weights of their row share, biases are added, and the
// results are stored, added to the output, or multiplied with the activated gate.

struct Params {
    shape: Shape,
    m: u32,
    // The first of the output's columns, and how many it has.
    first: u32,
    width: u32,
    epilogue: u32,
    // Of the norm that the input goes through, if it does.
    eps: f32,
}
var<immediate> params: Params;

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
    if (GATED) {
        return Affine(row_affine[row], row_affine[row + output_rows(params.shape)]);
    }
    return Affine(row_affine[row], vec2<f32>());
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

fn activated(gate: f32) -> f32 {
    if (params.epilogue == GATE_SILU) {
        return silu(gate);
    }
    return gelu_tanh(gate);
}

// Takes the sum of a row; of a gated linear, that of the gate and `other` of the row it gates. Gives what is stored.
fn store_row(m: u32, row: u32, affine: Affine, sum: f32, other: f32) -> f32 {
    let index = m * params.width + params.first + row;
    if (GATED) {
        let gated = activated(finish(affine.own, sum)) * finish(affine.gated, other);
        out[index] = gated;
        return gated;
    }
    var value = finish(affine.own, sum);
    switch params.epilogue {
        case ADD: {
            value += out[index];
        }
        case GATE_SILU, GATE_GELU_TANH: {
            value *= activated(out[index]);
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
