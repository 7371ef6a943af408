// Sorts the pairs of token and expert by expert and, of one expert, by token, and cuts each expert's into tiles: a counting sort, a workgroup an expert.
// Counts are the same in whatever order they are counted.

struct Params {
    // Pairs of token and expert, and experts.
    pairs: u32,
    experts: u32,
    // Rows of a tile, and how many tiles there may be.
    height: u32,
    tiles: u32,
}
var<immediate> params: Params;

const SIZE = 256u;

var<workgroup> counts: array<atomic<u32>, MOST_EXPERTS>;
// Pairs and tiles of the experts before, and all tiles.
var<workgroup> before: atomic<u32>;
var<workgroup> tiles_before: atomic<u32>;
var<workgroup> all_tiles: atomic<u32>;
var<workgroup> ends: array<u32, SIZE>;

fn tiles_of(count: u32) -> u32 {
    return (count + params.height - 1u) / params.height;
}

fn count_pairs(expert: u32, lane: u32) {
    for (var e = lane; e < params.experts; e += SIZE) {
        atomicStore(&counts[e], 0u);
    }
    if (lane == 0u) {
        atomicStore(&before, 0u);
        atomicStore(&tiles_before, 0u);
        atomicStore(&all_tiles, 0u);
    }
    workgroupBarrier();
    for (var pair = lane; pair < params.pairs; pair += SIZE) {
        atomicAdd(&counts[experts[pair]], 1u);
    }
    workgroupBarrier();
    for (var e = lane; e < params.experts; e += SIZE) {
        let count = atomicLoad(&counts[e]);
        atomicAdd(&all_tiles, tiles_of(count));
        if (e < expert) {
            atomicAdd(&before, count);
            atomicAdd(&tiles_before, tiles_of(count));
        }
    }
    workgroupBarrier();
}

// The sum of the values of the invocations before.
fn sum_before(lane: u32, value: u32) -> u32 {
    var sum = value;
    ends[lane] = sum;
    for (var step = 1u; step < SIZE; step *= 2u) {
        workgroupBarrier();
        let other = select(0u, ends[max(lane, step) - step], lane >= step);
        workgroupBarrier();
        sum += other;
        ends[lane] = sum;
    }
    return sum - value;
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let expert = workgroup.x;
    count_pairs(expert, lane);
    let count = atomicLoad(&counts[expert]);
    let first = atomicLoad(&before);
    let first_tile = atomicLoad(&tiles_before);

    for (var tile = lane; tile < tiles_of(count); tile += SIZE) {
        let start = first + tile * params.height;
        tiles[first_tile + tile] = vec4<u32>(expert, start, min(start + params.height, first + count), 0u);
    }
    if (expert == 0u) {
        for (var tile = atomicLoad(&all_tiles) + lane; tile < params.tiles; tile += SIZE) {
            tiles[tile] = vec4<u32>();
        }
    }

    // Each takes consecutive pairs.
    let share = (params.pairs + SIZE - 1u) / SIZE;
    let start = min(lane * share, params.pairs);
    let end = min(start + share, params.pairs);
    var own = 0u;
    for (var pair = start; pair < end; pair++) {
        own += u32(experts[pair] == expert);
    }
    var place = first + sum_before(lane, own);
    for (var pair = start; pair < end; pair++) {
        if (experts[pair] == expert) {
            pairs[place] = pair;
            places[pair] = place;
            place++;
        }
    }
}
