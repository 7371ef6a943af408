// Matrix units that multiply 8 × 8 halves and sum in single precision: Metal's simdgroup matrices. Tiles are single halves, since naga hands
// Metal's load a pointer to what the tile is made of.

var<workgroup> x_tile: array<f16, X_HALVES>;
var<workgroup> w_tile: array<f16, W_HALVES>;

alias XMatrix = coop_mat8x8<f16, A>;
alias WMatrix = coop_mat8x8<f16, B>;
alias SumMatrix = coop_mat8x8<f32, C>;

fn put_x(at: u32, octet: Octet) {
    x_tile[at] = octet.low.x;
    x_tile[at + 1u] = octet.low.y;
    x_tile[at + 2u] = octet.low.z;
    x_tile[at + 3u] = octet.low.w;
    x_tile[at + 4u] = octet.high.x;
    x_tile[at + 5u] = octet.high.y;
    x_tile[at + 6u] = octet.high.z;
    x_tile[at + 7u] = octet.high.w;
}

fn put_w(at: u32, octet: Octet) {
    w_tile[at] = octet.low.x;
    w_tile[at + 1u] = octet.low.y;
    w_tile[at + 2u] = octet.low.z;
    w_tile[at + 3u] = octet.low.w;
    w_tile[at + 4u] = octet.high.x;
    w_tile[at + 5u] = octet.high.y;
    w_tile[at + 6u] = octet.high.z;
    w_tile[at + 7u] = octet.high.w;
}

// Rows of x lie one after the other, those of W are columns of the factor.
fn load_x(at: u32) -> XMatrix {
    return coopLoadT<XMatrix>(&x_tile[at], STRIDE);
}

fn load_w(at: u32) -> WMatrix {
    return coopLoad<WMatrix>(&w_tile[at], STRIDE);
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
