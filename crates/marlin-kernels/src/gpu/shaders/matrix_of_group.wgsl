// One matrix of many that lie one after the other in the same buffers, each with as many rows.

const NOWHERE = 0xffffffffu;

// Its place among them.
var<private> matrix: u32;

// Chooses the matrix of a number, and says whether it is here: those of other formats are elsewhere.
fn choose_matrix(number: u32) -> bool {
    matrix = number;
    if (params.is_whole == 0u) {
        matrix = matrices[number];
    }
    return matrix != NOWHERE;
}

fn first_row(shape: Shape) -> u32 {
    return matrix * shape.rows;
}

fn first_quad(shape: Shape) -> u32 {
    return matrix * ((shape.rows + 3u) / 4u);
}
