// The sum over LANES neighbouring invocations, which share a subgroup. All get the same one: the order differs by what commutes alone.

fn sum_of_lanes(value: vec4<f32>) -> vec4<f32> {
    var sum = value;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    return sum;
}
