// Matrices of SIZE × SIZE in plain arithmetic, for devices without matrix units. The 32 invocations of what would be a subgroup divide the sums
// among themselves, WIDTH neighbours of a row each; x and W are read where they lie, so a matrix of them is where an invocation's rows begin.

const WIDTH = SIZE * SIZE / 32u;
const ACROSS = SIZE / WIDTH;

var<workgroup> x_tile: array<vec4<f16>, X_HALVES / 4u>;
var<workgroup> w_tile: array<vec4<f16>, W_HALVES / 4u>;

alias XMatrix = u32;
alias WMatrix = u32;
alias SumMatrix = array<f32, WIDTH>;

fn put_x(at: u32, octet: Octet) {
    x_tile[at / 4u] = octet.low;
    x_tile[at / 4u + 1u] = octet.high;
}

fn put_w(at: u32, octet: Octet) {
    w_tile[at / 4u] = octet.low;
    w_tile[at / 4u + 1u] = octet.high;
}

fn load_x(at: u32) -> XMatrix {
    return (at + lane / ACROSS * STRIDE) / 4u;
}

fn load_w(at: u32) -> WMatrix {
    return (at + lane % ACROSS * WIDTH * STRIDE) / 4u;
}

fn multiply_add(x: XMatrix, w: WMatrix, sum: SumMatrix) -> SumMatrix {
    var result = sum;
    for (var k = 0u; k < SIZE / 4u; k++) {
        let values = vec4<f32>(x_tile[x + k]);
        for (var column = 0u; column < WIDTH; column++) {
            result[column] += dot(values, vec4<f32>(w_tile[w + column * STRIDE / 4u + k]));
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
