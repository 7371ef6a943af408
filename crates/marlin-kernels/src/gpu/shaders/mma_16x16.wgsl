// Matrix units that multiply 16 × 16 halves and sum in single precision: VK_KHR_cooperative_matrix. Tiles are vectors of four halves, which
// drivers load and store at once.

var<workgroup> x_tile: array<vec4<f16>, X_HALVES / 4u>;
var<workgroup> w_tile: array<vec4<f16>, W_HALVES / 4u>;

alias XMatrix = coop_mat16x16<f16, A>;
alias WMatrix = coop_mat16x16<f16, B>;
alias SumMatrix = coop_mat16x16<f32, C>;

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

// Rows of x lie `stride` apart, and so do those of W, which are columns of the factor.
fn load_x(at: u32, stride: u32) -> XMatrix {
    return coopLoadT<XMatrix>(&x_tile[at / 4u], stride / 4u);
}

// The same of rows that lie where those of W do.
fn load_x_from_w(at: u32, stride: u32) -> XMatrix {
    return coopLoadT<XMatrix>(&w_tile[at / 4u], stride / 4u);
}

fn load_w(at: u32, stride: u32) -> WMatrix {
    return coopLoad<WMatrix>(&w_tile[at / 4u], stride / 4u);
}

// The same of a factor whose rows lie `stride` apart.
alias RowsMatrix = WMatrix;

fn load_rows(at: u32, stride: u32) -> RowsMatrix {
    return coopLoadT<WMatrix>(&w_tile[at / 4u], stride / 4u);
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
