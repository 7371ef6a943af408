// Packed weights `[rows, K]`, unpacked 32 columns ("a unit") at a time. Codes lie least-significant bit first along K, each row
// padded to whole units. The constants and the functions `decode`, `stored_scale` come from the format's module.

struct Shape {
    // Columns.
    k: u32,
    // Words of codes in a row.
    row_words: u32,
    // Columns that share a scale, and such groups in a row.
    group_cols: u32,
    groups: u32,
    // Rows that share their scales.
    group_rows: u32,
    rows: u32,
}

// One part of w = (value − zero) · scale + bias, which hold for a group.
struct Group {
    scale: f32,
    zero: f32,
    bias: f32,
}

fn code_at(words: ptr<function, array<u32, WORDS>>, j: u32) -> u32 {
    let bit = j * BITS;
    let shift = bit % 32u;
    var code = (*words)[bit / 32u] >> shift;
    if (shift + BITS > 32u) {
        code |= (*words)[bit / 32u + 1u] << (32u - shift);
    }
    return code & MASK;
}

fn group_of(shape: Shape, row: u32, column: u32) -> Group {
    if (!SCALED) {
        return Group(1.0, 0.0, 0.0);
    }
    let index = row / shape.group_rows * shape.groups + column / shape.group_cols;
    return Group(stored_scale(index), stored_zero(index), stored_bias(index));
}

// The weights of columns 32·unit … 32·unit + 31 of a row. Columns beyond K have finite weights that mean nothing.
fn load_unit(shape: Shape, row: u32, unit: u32) -> array<f32, 32> {
    var words: array<u32, WORDS>;
    let first = row * shape.row_words + unit * WORDS;
    for (var i = 0u; i < WORDS; i++) {
        words[i] = codes[first + i];
    }
    var weights: array<f32, 32>;
    // Columns that are stored, a bit each.
    var kept = 0xffffffffu;
    if (SPARSE) {
        kept = 0u;
        let pairs = sparse_pairs(row * ((shape.k + 31u) / 32u) + unit);
        for (var quad = 0u; quad < 8u; quad++) {
            let pair = pairs >> (4u * quad);
            let low = decode(code_at(&words, 2u * quad));
            let high = decode(code_at(&words, 2u * quad + 1u));
            kept |= (1u << (pair & 3u) | 1u << (pair >> 2u & 3u)) << (4u * quad);
            for (var i = 0u; i < 4u; i++) {
                weights[4u * quad + i] = select(select(0.0, high, (pair >> 2u & 3u) == i), low, (pair & 3u) == i);
            }
        }
    } else {
        for (var j = 0u; j < 32u; j++) {
            weights[j] = decode(code_at(&words, j));
        }
    }
    // A group is a multiple of 16 columns.
    for (var half = 0u; half < 32u; half += 16u) {
        let column = min(32u * unit + half, shape.k - 1u);
        let group = group_of(shape, row, column);
        for (var j = half; j < half + 16u; j++) {
            let weight = (weights[j] - group.zero) * group.scale + group.bias;
            weights[j] = select(0.0, weight, (kept >> j & 1u) == 1u);
        }
    }
    return weights;
}
