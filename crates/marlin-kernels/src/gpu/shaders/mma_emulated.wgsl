// Matrices of SIZE × SIZE in plain arithmetic, for devices without matrix units. The 32 invocations of what would be a subgroup divide the sums
// among themselves, WIDTH neighbours of a row each. Of a matrix of x each has its row; W is read where it lies, so a matrix of it is where an
// invocation's first column begins, and how far apart columns are.

const WIDTH = SIZE * SIZE / 32u;
const ACROSS = SIZE / WIDTH;

var<workgroup> x_tile: array<vec4<f16>, X_HALVES / 4u>;
var<workgroup> w_tile: array<vec4<f16>, W_HALVES / 4u>;

alias XMatrix = array<vec4<f16>, SIZE / 4u>;
struct WMatrix {
    first: u32,
    stride: u32,
}
// Of a factor whose rows lie in rows: where the invocation's first column of them begins.
struct RowsMatrix {
    first: u32,
    stride: u32,
}
alias SumMatrix = array<f32, WIDTH>;

fn put_x(at: u32, octet: Octet) {
    x_tile[at / 4u] = octet.low;
    x_tile[at / 4u + 1u] = octet.high;
}

fn put_x_quad(at: u32, quad: vec4<f16>) {
    x_tile[at / 4u] = quad;
}

fn put_w(at: u32, octet: Octet) {
    w_tile[at / 4u] = octet.low;
    w_tile[at / 4u + 1u] = octet.high;
}

fn load_x(at: u32, stride: u32) -> XMatrix {
    var row: XMatrix;
    for (var k = 0u; k < SIZE / 4u; k++) {
        row[k] = x_tile[(at + lane / ACROSS * stride) / 4u + k];
    }
    return row;
}

// The same of rows that lie where those of W do.
fn load_x_from_w(at: u32, stride: u32) -> XMatrix {
    var row: XMatrix;
    for (var k = 0u; k < SIZE / 4u; k++) {
        row[k] = w_tile[(at + lane / ACROSS * stride) / 4u + k];
    }
    return row;
}

fn load_w(at: u32, stride: u32) -> WMatrix {
    return WMatrix((at + lane % ACROSS * WIDTH * stride) / 4u, stride / 4u);
}

fn multiply_add(x: XMatrix, w: WMatrix, sum: SumMatrix) -> SumMatrix {
    var row = x;
    var result = sum;
    // A bound that compilers do not see through, so that the loop stays one: kernels multiply hundreds of matrices.
    let quads = min(SIZE / 4u, arrayLength(&out));
    for (var k = 0u; k < quads; k++) {
        let values = vec4<f32>(row[k]);
        for (var column = 0u; column < WIDTH; column++) {
            result[column] += dot(values, vec4<f32>(w_tile[w.first + column * w.stride + k]));
        }
    }
    return result;
}

fn load_rows(at: u32, stride: u32) -> RowsMatrix {
    return RowsMatrix(at + lane % ACROSS * WIDTH, stride);
}

fn multiply_add_rows(x: XMatrix, w: RowsMatrix, sum: SumMatrix) -> SumMatrix {
    var row = x;
    var result = sum;
    // As above.
    let rows = min(SIZE, arrayLength(&out));
    for (var k = 0u; k < rows; k++) {
        let value = f32(row[k / 4u][k % 4u]);
        for (var column = 0u; column < WIDTH; column++) {
            let at = w.first + k * w.stride + column;
            result[column] = fma(value, f32(w_tile[at / 4u][at % 4u]), result[column]);
        }
    }
    return result;
}

fn sums_of_lane(at: u32) -> u32 {
    return at + lane / ACROSS * SUMS_STRIDE + lane % ACROSS * WIDTH;
}

fn load_sums(at: u32) -> SumMatrix {
    var result: SumMatrix;
    for (var column = 0u; column < WIDTH; column++) {
        result[column] = sums[sums_of_lane(at) + column];
    }
    return result;
}

fn store_sums(at: u32, sum: SumMatrix) {
    var values = sum;
    for (var column = 0u; column < WIDTH; column++) {
        sums[sums_of_lane(at) + column] = values[column];
    }
}
