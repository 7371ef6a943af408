// Values of other invocations, on devices without operations of subgroups. All of the workgroup take part.

struct Place {
    @builtin(local_invocation_index) lane: u32,
}

fn note_place(place: Place) {
    lane = place.lane;
}

var<workgroup> exchanged: array<f32, SIZE>;

// Of the one whose number differs in one bit.
fn exchange(value: f32, bit: u32) -> f32 {
    exchanged[lane] = value;
    workgroupBarrier();
    let other = exchanged[lane ^ bit];
    workgroupBarrier();
    return other;
}

// Of the one that is the i-th of those whose numbers differ from this one's in bits below `count` alone.
fn from_neighbour(value: f32, i: u32, count: u32) -> f32 {
    exchanged[lane] = value;
    workgroupBarrier();
    let other = exchanged[(lane & ~(count - 1u)) + i];
    workgroupBarrier();
    return other;
}
