// Values of other invocations of a subgroup.

struct Place {
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
}

var<private> subgroup_lane: u32;

fn note_place(place: Place) {
    lane = place.lane;
    subgroup_lane = place.subgroup_lane;
}

// Of the one whose number differs in one bit.
fn exchange(value: f32, bit: u32) -> f32 {
    return subgroupShuffleXor(value, bit);
}

// Of the one that is the i-th of those whose numbers differ from this one's in bits below `count` alone.
fn from_neighbour(value: f32, i: u32, count: u32) -> f32 {
    return subgroupShuffle(value, (subgroup_lane & ~(count - 1u)) + i);
}
