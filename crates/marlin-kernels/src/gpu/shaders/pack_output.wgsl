// Packs what a workgroup has computed, as `pack_input` would: the next linear finds it ready. OUTPUTS, a multiple of 32, neighbouring columns of
// some rows.

var<workgroup> kept: array<f32, KEPT>;

// Keeps a value for `pack_kept`; after a barrier, that is. Beyond the output's columns they are 0.
fn keep_output(i: u32, value: f32) {
    kept[i] = value;
}

// Packs the i-th octet of what is kept as one of row m, whose octets are so many.
fn pack_octet(i: u32, m: u32, at: u32, octets: u32) {
    let unit = i / 4u * 32u;
    var largest = 0.0;
    for (var j = 0u; j < 32u; j++) {
        largest = max(largest, abs(kept[unit + j]));
    }
    let power = power_above(largest);
    let s = 8u * i;
    let low = vec4<f32>(kept[s], kept[s + 1u], kept[s + 2u], kept[s + 3u]);
    let high = vec4<f32>(kept[s + 4u], kept[s + 5u], kept[s + 6u], kept[s + 7u]);
    packed_out[m * octets + at] = octet(low, high, power);
    if (at % 4u == 0u) {
        packed_out_scales[(m * octets + at) / 4u] = power;
    }
}
