// The parameters of a linear, and where a workgroup finds its rows: those of the input in their order, of one matrix.

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

fn route(workgroup: vec3<u32>, index: u32) {}

// The rows of a workgroup: from `first` on, before `end`.
struct Rows {
    first: u32,
    end: u32,
}

fn rows_of(workgroup: vec3<u32>, height: u32) -> Rows {
    return Rows(workgroup.y * height, params.m);
}

// Workgroups without rows end at once; here there are none.
fn is_empty(rows: Rows) -> bool {
    return false;
}

// Whether row m is worth multiplying; here all rows but the last few are there, and beyond them the last one is repeated.
fn has_row(rows: Rows, m: u32) -> bool {
    return true;
}

// The row of the input that becomes row m of the output, and how far apart rows are in single precision.
fn input_row(m: u32) -> u32 {
    return m;
}

fn input_stride(shape: Shape) -> u32 {
    return shape.k;
}

// Where in row m of the output the first row of the matrix goes.
fn first_column() -> u32 {
    return params.first;
}
