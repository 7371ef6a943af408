// Matrix units that multiply 8 × 8 halves and sum in single precision: Metal's simdgroup matrices. Tiles are single halves, since naga hands
// Metal's load a pointer to what the tile is made of.

var<workgroup> x_tile: array<f16, X_HALVES>;
var<workgroup> w_tile: array<f16, W_HALVES>;

alias XMatrix = coop_mat8x8<f16, A>;
alias WMatrix = coop_mat8x8<f16, B>;
alias SumMatrix = coop_mat8x8<f32, C>;

fn put_x_quad(at: u32, quad: vec4<f16>) {
    x_tile[at] = quad.x;
    x_tile[at + 1u] = quad.y;
    x_tile[at + 2u] = quad.z;
    x_tile[at + 3u] = quad.w;
}

fn put_x(at: u32, octet: Octet) {
    put_x_quad(at, octet.low);
    put_x_quad(at + 4u, octet.high);
}

fn put_w_quad(at: u32, quad: vec4<f16>) {
    w_tile[at] = quad.x;
    w_tile[at + 1u] = quad.y;
    w_tile[at + 2u] = quad.z;
    w_tile[at + 3u] = quad.w;
}

fn put_w(at: u32, octet: Octet) {
    put_w_quad(at, octet.low);
    put_w_quad(at + 4u, octet.high);
}

// Rows of x lie `stride` apart, and so do those of W, which are columns of the factor.
fn load_x(at: u32, stride: u32) -> XMatrix {
    return coopLoadT<XMatrix>(&x_tile[at], stride);
}

// The same of rows that lie where those of W do.
fn load_x_from_w(at: u32, stride: u32) -> XMatrix {
    return coopLoadT<XMatrix>(&w_tile[at], stride);
}

fn load_w(at: u32, stride: u32) -> WMatrix {
    return coopLoad<WMatrix>(&w_tile[at], stride);
}

// The same of a factor whose rows lie `stride` apart.
alias RowsMatrix = WMatrix;

fn load_rows(at: u32, stride: u32) -> RowsMatrix {
    return coopLoadT<WMatrix>(&w_tile[at], stride);
}

fn multiply_add_rows(x: XMatrix, w: RowsMatrix, sum: SumMatrix) -> SumMatrix {
    return coopMultiplyAdd(x, w, sum);
}

fn multiply_add(x: XMatrix, w: WMatrix, sum: SumMatrix) -> SumMatrix {
    return coopMultiplyAdd(x, w, sum);
}

fn load_sums(at: u32) -> SumMatrix {
    return coopLoadT<SumMatrix>(&sums[at], SUMS_STRIDE);
}

fn store_sums(at: u32, sum: SumMatrix) {
    coopStoreT(sum, &sums[at], SUMS_STRIDE);
}
