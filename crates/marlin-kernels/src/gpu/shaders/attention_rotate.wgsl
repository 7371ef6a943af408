// Rotation, and norms, of query and key heads where attention loads them: units of 8 dimensions, of which `rope_store_kv` has 1.

// The unit whose dimensions are rotated together with those of this one.
fn partner_of(unit: u32) -> u32 {
    let half = params.rotary / 16u;
    if (INTERLEAVED || unit >= 2u * half) {
        return unit;
    }
    return select(unit - half, unit + half, unit < half);
}

fn rotated(own: Unit, partner: Unit, unit: u32, row: u32) -> Unit {
    if (8u * unit >= params.rotary) {
        return own;
    }
    let cosines = row * params.rotary / 4u;
    let sines = cosines + params.rotary / 8u;
    if (INTERLEAVED) {
        let c = angles[cosines + unit];
        let s = angles[sines + unit];
        return Unit(
            own.low * c.xxyy + own.low.yxwz * vec4<f32>(-s.x, s.x, -s.y, s.y),
            own.high * c.zzww + own.high.yxwz * vec4<f32>(-s.z, s.z, -s.w, s.w),
        );
    }
    let half = params.rotary / 16u;
    let at = 2u * (unit % half);
    let sign = select(1.0, -1.0, unit < half);
    return Unit(
        own.low * angles[cosines + at] + sign * partner.low * angles[sines + at],
        own.high * angles[cosines + at + 1u] + sign * partner.high * angles[sines + at + 1u],
    );
}

fn squares_of(unit: Unit) -> f32 {
    return dot(unit.low, unit.low) + dot(unit.high, unit.high);
}

// What the norm multiplies a head by whose squares have this sum.
fn factor_of_head(squares: f32) -> f32 {
    return select(1.0, 1.0 / sqrt(squares / f32(DIM) + params.eps), NORMED);
}

// A unit as it goes into the cache, rounded as `rope_store_kv` rounds, which `pack2x16float` need not do.
fn encode(unit: Unit) -> Raw {
    return Raw(
        pack2x16float(vec2<f32>(vec2<f16>(unit.low.xy))),
        pack2x16float(vec2<f32>(vec2<f16>(unit.low.zw))),
        pack2x16float(vec2<f32>(vec2<f16>(unit.high.xy))),
        pack2x16float(vec2<f32>(vec2<f16>(unit.high.zw))),
    );
}
