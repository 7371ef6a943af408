// The parameters of a group of linears, and where a workgroup finds its rows: those of a tile that has one matrix, or of a head.

struct Params {
    shape: Shape,
    m: u32,
    // The first of the output's columns, and how many it has.
    first: u32,
    width: u32,
    epilogue: u32,
    // Of the norm that the input goes through, if it does.
    eps: f32,
    // All matrices of the group are here, in their order.
    is_whole: u32,
    // Rows of the output that share one of the input, which is that of their pair; 0 if each has its own.
    slots: u32,
    // Matrices that rows are divided among, 0 if tiles say which rows a matrix has.
    heads: u32,
    // How far apart rows of the input are in single precision.
    input_stride: u32,
    // Columns of the output from one head to the next.
    head_width: u32,
    // What kernels keep of their output is packed, too.
    packs_output: u32,
    // Of one token that chooses its experts here.
    routing: Routing,
}
var<immediate> params: Params;

// The head, if rows are divided among heads.
var<private> head: u32;

// The rows of a workgroup: from `first` on, before `end`.
struct Rows {
    first: u32,
    end: u32,
}

fn rows_of(workgroup: vec3<u32>, height: u32) -> Rows {
    if (params.heads > 0u) {
        head = workgroup.z;
        return Rows(workgroup.y * height, select(0u, params.m, choose_matrix(head)));
    }
    let tile = tile_of(workgroup.y);
    return Rows(tile.y, select(0u, tile.z, choose_matrix(tile.x)));
}

// Of tiles there are as many as there may be; those that are left over are empty.
fn is_empty(rows: Rows) -> bool {
    return rows.first >= rows.end;
}

fn has_row(rows: Rows, m: u32) -> bool {
    return m < rows.end;
}

// The row of the input that becomes row m of the output, and how far apart rows are in single precision.
fn input_row(m: u32) -> u32 {
    if (params.slots > 0u) {
        return pair_of(m) / params.slots;
    }
    return select(m, m * params.heads + head, params.heads > 0u);
}

fn input_stride(shape: Shape) -> u32 {
    return params.input_stride;
}

// Where in row m of the output the first row of the matrix goes.
fn first_column() -> u32 {
    return params.first + head * params.head_width;
}
