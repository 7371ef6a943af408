// Stores the prepared head as codes of CODE_BITS, 8 to an invocation, whose largest value is LARGEST_CODE. SCALED_UNITS invocations have a
// scale in common, all of a head if there are fewer.

var<workgroup> magnitudes: array<f32, SIZE>;

const LARGEST = 3.4028234663852886e38;

// Its absolute value; what is not finite counts as so large that the scale becomes infinite.
fn magnitude(value: f32) -> f32 {
    return select(LARGEST, abs(value), (bitcast<u32>(value) & 0x7fffffffu) < 0x7f800000u);
}

// A positive number in half precision, the nearest, ties to even: devices may convert towards 0, and codes are relative to it.
fn nearest_half(value: f32) -> f16 {
    let bits = bitcast<u32>(value);
    let normal = bitcast<f32>((bits + 0xfffu + (bits >> 13u & 1u)) & 0xffffe000u);
    let denormal = round(value * 16777216.0) * (1.0 / 16777216.0);
    return f16(select(denormal, normal, bits >= 0x38800000u));
}

fn store_head(lane: u32, is_value: bool, row: u32) {
    let units = params.head_dim / 8u;
    var largest = 0.0;
    if (lane < units) {
        @for i < 8
        largest = max(largest, magnitude(prepared[8u * lane + @iu]));
        @end
    }
    magnitudes[lane] = largest;
    workgroupBarrier();
    if (lane >= units) {
        return;
    }
    let first = lane / SCALED_UNITS * SCALED_UNITS;
    for (var other = first; other < min(first + SCALED_UNITS, units); other++) {
        largest = max(largest, magnitudes[other]);
    }
    // Codes are relative to the scale as it is stored.
    let scale = nearest_half(largest * (1.0 / LARGEST_CODE));
    let inverse = select(0.0, 1.0 / f32(scale), scale > 0.0);
    var words = vec2<u32>();
    @for i < 8
    words[@iu * CODE_BITS / 32u] |= code(prepared[8u * lane + @iu] * inverse) << (@iu * CODE_BITS % 32u);
    @end
    let at = (row * units + lane) * (CODE_BITS / 4u);
    if (is_value) {
        values[at] = words.x;
    } else {
        keys[at] = words.x;
    }
    if (CODE_BITS == 8u) {
        if (is_value) {
            values[at + 1u] = words.y;
        } else {
            keys[at + 1u] = words.y;
        }
    }
    if (lane == first) {
        let at_scale = row * ((units + SCALED_UNITS - 1u) / SCALED_UNITS) + lane / SCALED_UNITS;
        if (is_value) {
            value_scales[at_scale] = scale;
        } else {
            key_scales[at_scale] = scale;
        }
    }
}
