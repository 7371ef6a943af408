//! The oracle against values worked out by hand.

use marlin_format::{PackedMatrix, Scheme};

use super::*;
use crate::{KvLayer, TokenCount, Values};

const LIMITS: StepLimits = StepLimits { tokens: 8, context: 64, width: 8, vocabulary: 8, logit_rows: 8 };

fn buffer(width: usize, values: &[f32]) -> HostBuffer {
    let rows = values.len() / width;
    let mut buffer = ReferenceBackend.buffer(rows, width).unwrap();
    ReferenceBackend.upload(&mut buffer, rows, values).unwrap();
    buffer
}

fn linear(cols: usize, parts: &[(&[f32], Option<&[f32]>)]) -> ReferenceLinear {
    let part = |&(weights, bias): &(&[f32], Option<&[f32]>)| {
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let weight = PackedMatrix::from_dense_bytes(Scheme::F32, weights.len() / cols, cols, bytes).unwrap();
        LinearPart { weight, bias: bias.map(<[f32]>::to_vec) }
    };
    let parts: Vec<_> = parts.iter().map(part).collect();
    ReferenceBackend.load_linear(&parts).unwrap()
}

/// One sequence of tokens from `first` on, whose blocks of two tokens are 1, 0, 2.
fn step<'a>(tokens: &'a [u32], positions: &'a [u32], offsets: &'a [u32; 2]) -> Step<'a> {
    Step {
        tokens,
        positions,
        sequence_offsets: offsets,
        block_tables: &[1, 0, 2],
        table_offsets: &[0, 3],
        logit_rows: &[],
    }
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let close = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6);
    assert!(close, "{found:?}, expected {expected:?}");
}

#[test]
fn layer_norms_and_rotations() {
    let mut encoder = ReferenceBackend.encoder(&LIMITS).unwrap();
    // Mean 2, variance 4.5.
    let x = buffer(4, &[0.0, 0.0, 3.0, 5.0]);
    let (weight, bias) = (vec![1.0, 2.0, 1.0, 1.0], vec![0.5, 0.0, 0.0, -1.0]);
    let mut out = ReferenceBackend.buffer(1, 4).unwrap();
    let root = 4.5f32.sqrt();
    encoder.layer_norm(&x, &weight, None, 0.0, &mut out);
    assert_close(out.values(), &[-2.0 / root, -4.0 / root, 1.0 / root, 3.0 / root]);
    // An eps of 11.5 makes the root 4.
    encoder.layer_norm(&x, &weight, Some(&bias), 11.5, &mut out);
    assert_close(out.values(), &[0.0, -1.0, 0.25, -0.25]);

    let mut x = buffer(4, &[1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 0.0, 0.0]);
    let rotation = |block| Hadamard::new(block).unwrap();
    encoder.hadamard(&mut x, &rotation(4));
    assert_close(x.values(), &[5.0, -1.0, -2.0, 0.0, 0.5, -0.5, 0.5, -0.5]);
    // It is its own inverse; a block of one stays.
    encoder.hadamard(&mut x, &rotation(4));
    encoder.hadamard(&mut x, &rotation(1));
    assert_close(x.values(), &[1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 0.0, 0.0]);
    encoder.hadamard(&mut x, &rotation(2));
    let root = 2f32.sqrt();
    assert_close(&x.values()[..4], &[3.0 / root, -1.0 / root, 7.0 / root, -1.0 / root]);
}

#[test]
#[should_panic(expected = "blocks of 4 for a width of 6")]
fn rotations_of_broken_blocks_are_refused() {
    let rotation = Hadamard::new(4).unwrap();
    ReferenceBackend.encoder(&LIMITS).unwrap().hadamard(&mut buffer(6, &[0.0; 6]), &rotation);
}

#[test]
fn linears() {
    let mut encoder = ReferenceBackend.encoder(&LIMITS).unwrap();
    let x = buffer(2, &[1.0, 2.0, -1.0, 0.5]);
    let fused = linear(2, &[(&[3.0, 4.0], Some(&[100.0])), (&[1.0, -1.0, 0.0, 2.0], None)]);
    let mut out = ReferenceBackend.buffer(2, 3).unwrap();
    encoder.linear(Input::Rows(&x), &fused, &mut out);
    assert_eq!(out.values(), [111.0, -1.0, 4.0, 99.0, -1.5, 1.0]);
    encoder.linear_add(&x, &fused, &mut out);
    assert_eq!(out.values(), [222.0, -2.0, 8.0, 198.0, -3.0, 2.0]);

    // Row 0: gate 2, up 3; row 1: gate 0.5, up −0.5. SiLU(2) = 2 / (1 + e⁻²); GELU's tanh form at 2 is 1.954597694.
    let gate_up = linear(2, &[(&[0.0, 1.0], None), (&[1.0, 1.0], None)]);
    let mut out = ReferenceBackend.buffer(2, 1).unwrap();
    encoder.linear_gated(Input::Rows(&x), &gate_up, Activation::Silu, &mut out);
    assert_close(out.values(), &[3.0 * 1.761_594_2, -0.5 * 0.311_229_67]);
    encoder.linear_gated(Input::Rows(&x), &gate_up, Activation::GeluTanh, &mut out);
    assert_close(out.values(), &[3.0 * 1.954_597_7, -0.5 * 0.345_714]);
}

#[test]
fn embedding_norm_and_selection() {
    let mut encoder = ReferenceBackend.encoder(&LIMITS).unwrap();
    let table = linear(2, &[(&[0.0, 1.0, 3.0, 4.0, 5.0, 6.0], None)]);
    let mut step = step(&[2, 1], &[0, 1], &[0, 2]);
    step.logit_rows = &[1];
    encoder.begin(&step);
    let mut x = ReferenceBackend.buffer(2, 2).unwrap();
    encoder.embed(&table, 1.0, &mut x);
    assert_eq!(x.values(), [5.0, 6.0, 3.0, 4.0]);

    let mut selected = ReferenceBackend.buffer(2, 2).unwrap();
    encoder.select_logit_rows(&x, &mut selected);
    assert_eq!(selected.values(), [3.0, 4.0]);

    // The mean square of 3 and 4 is 12.5; with eps 3.5 the root is 4.
    let mut normed = ReferenceBackend.buffer(1, 2).unwrap();
    encoder.rms_norm(&selected, &vec![2.0, -1.0], 3.5, &mut normed);
    assert_eq!(normed.values(), [1.5, -1.0]);

    // The same norm added to what is there, and a scaled embedding.
    encoder.rms_norm_add(&selected, &vec![2.0, -1.0], 3.5, &mut normed);
    assert_eq!(normed.values(), [3.0, -2.0]);
    encoder.embed(&table, 0.5, &mut x);
    assert_eq!(x.values(), [2.5, 3.0, 1.5, 2.0]);

    encoder.soft_cap(&mut normed, 2.0);
    assert_close(normed.values(), &[2.0 * 1.5f32.tanh(), 2.0 * (-1f32).tanh()]);
}

#[test]
fn rotation_turns_by_the_position() {
    let mut encoder = ReferenceBackend.encoder(&LIMITS).unwrap();
    let mut angles = ReferenceBackend.buffer(1, 4).unwrap();
    encoder.begin(&step(&[0], &[3], &[0, 1]));
    // A quarter turn a position, and none.
    encoder.rope_angles(&vec![std::f32::consts::FRAC_PI_2, 0.0], 2.0, &mut angles);
    assert_close(angles.values(), &[0.0, 2.0, -2.0, 0.0]);

    // Three quarter turns of (dimension 0, dimension 2), doubled; dimension 4 passes through.
    let mut head = [1.0, 10.0, 2.0, 20.0, 7.0];
    rotate(&mut head, angles.values(), RopeLayout::HalfSplit);
    assert_close(&head, &[4.0, 20.0, -2.0, 40.0, 7.0]);
}

#[test]
fn attention_weighs_what_it_sees() {
    let layer = KvLayer { heads: 1, key_dim: 2, value_dim: 2, window: None };
    let layout = KvLayout { block_tokens: 2, layers: vec![layer] };
    let mut kv = ReferenceBackend.kv_cache(&layout, KvType::F16, 3).unwrap();
    let mut encoder = ReferenceBackend.encoder(&LIMITS).unwrap();
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        scale: 0.5,
        window: None,
        values: Values::Cached,
        rope: RopeLayout::HalfSplit,
    };
    encoder.begin(&step(&[0; 3], &[0, 1, 2], &[0, 3]));

    // Two queries, a key and a value a token. 0.1 is stored as the nearest half.
    let ln3 = 3f32.ln();
    let mut qkv = buffer(
        8,
        &[
            [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.1, 8.0],
            [1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 4.0, 0.0],
            [ln3, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        ]
        .concat(),
    );
    let angles = buffer(2, &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
    encoder.rope_store_kv(&mut qkv, &shape, None, &angles, &mut kv, 0);
    let mut out = ReferenceBackend.buffer(3, 4).unwrap();
    encoder.attention(&qkv, &shape, None, &kv, 0, &mut out);
    // Row 2: the first head weighs the second key by e^(ln 3 · 2 · ½) = 3, the others by 1; the second head sees all alike.
    let tenth = 0.099_975_586;
    assert_close(&out.values()[..4], &[tenth, 8.0, tenth, 8.0]);
    let (first, second) = ((tenth + 12.0 + 1.0) / 5.0, (tenth + 4.0 + 1.0) / 3.0);
    assert_close(&out.values()[8..], &[first, 9.0 / 5.0, second, 9.0 / 3.0]);

    let windowed = AttentionShape { window: Some(2), ..shape };
    encoder.attention(&qkv, &windowed, None, &kv, 0, &mut out);
    assert_close(&out.values()[8..], &[13.0 / 4.0, 1.0 / 4.0, 2.5, 0.5]);
}

#[test]
fn qk_norm_spares_values() {
    let layer = KvLayer { heads: 1, key_dim: 2, value_dim: 2, window: None };
    let layout = KvLayout { block_tokens: 2, layers: vec![layer] };
    let mut kv = ReferenceBackend.kv_cache(&layout, KvType::F32, 3).unwrap();
    let mut encoder = ReferenceBackend.encoder(&LIMITS).unwrap();
    let shape = AttentionShape {
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        scale: 1.0,
        window: None,
        values: Values::Cached,
        rope: RopeLayout::HalfSplit,
    };
    encoder.begin(&step(&[0], &[2], &[0, 1]));
    let mut qkv = buffer(6, &[3.0, 4.0, 6.0, 8.0, 6.0, 8.0]);
    let norm = QkNorm { q: &vec![1.0, 1.0], k: &vec![10.0, 1.0], eps: 0.0 };
    encoder.rope_store_kv(&mut qkv, &shape, Some(norm), &buffer(2, &[1.0, 0.0]), &mut kv, 0);
    let root = 12.5f32.sqrt();
    assert_close(&qkv.values()[..2], &[3.0 / root, 4.0 / root]);
    // Position 2 lives in the first slot of its second block, which is block 0.
    assert_close(&load(&kv.layers[0].keys, 0, 0), &[30.0 / root, 4.0 / root]);
    assert_eq!(load(&kv.layers[0].values, 0, 0), [6.0, 8.0]);
}

/// Probabilities 0.5, 0.3, 0.2 of tokens 2, 0, 1.
fn sampled(row: SampleRow<'_>, uniform: f32) -> u32 {
    let mut logits = [0.3f32.ln() + 7.0, 0.2f32.ln() + 7.0, 0.5f32.ln() + 7.0];
    sample::sample(&SampleRow { uniform, ..row }, &mut logits, None)
}

const PLAIN: SampleRow<'static> = SampleRow { temperature: 1.0, ..SampleRow::GREEDY };

#[test]
fn sampling_follows_the_probabilities() {
    let borders = |row: SampleRow<'_>, cases: &[(f32, u32)]| {
        for &(uniform, token) in cases {
            assert_eq!(sampled(row, uniform), token, "{uniform} of {row:?}");
        }
    };
    borders(PLAIN, &[(0.0, 2), (0.499, 2), (0.501, 0), (0.799, 0), (0.801, 1), (0.999, 1)]);
    // Squared: 25, 9, 4 of 38.
    borders(SampleRow { temperature: 0.5, ..PLAIN }, &[(0.657, 2), (0.659, 0), (0.894, 0), (0.896, 1)]);
    borders(SampleRow { temperature: 0.0, ..PLAIN }, &[(0.999, 2)]);
    borders(SampleRow { top_k: 1, ..PLAIN }, &[(0.999, 2)]);
    borders(SampleRow { top_k: 2, ..PLAIN }, &[(0.624, 2), (0.626, 0), (0.999, 0)]);
    borders(SampleRow { top_p: 0.49, ..PLAIN }, &[(0.999, 2)]);
    borders(SampleRow { top_p: 0.51, ..PLAIN }, &[(0.624, 2), (0.626, 0), (0.999, 0)]);
    // Among the top two the first one has 0.625.
    borders(SampleRow { top_k: 2, top_p: 0.6, ..PLAIN }, &[(0.999, 2)]);
    borders(SampleRow { min_p: 0.5, ..PLAIN }, &[(0.624, 2), (0.626, 0), (0.999, 0)]);
    borders(SampleRow { min_p: 0.61, ..PLAIN }, &[(0.999, 2)]);
}

#[test]
fn penalties_and_bias_move_logits() {
    let counts = [TokenCount { token: 0, generated: 0 }, TokenCount { token: 1, generated: 3 }];
    let row = SampleRow {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        counts: &counts,
        bias: &[(1, -1.0), (2, 10.0)],
        ..PLAIN
    };
    let mut logits = [4.0, -1.0, 2.0, f32::NAN];
    row.adjust(&mut logits, None);
    assert_eq!(logits, [2.0, -4.0 - 0.5 - 0.75, 12.0, f32::NEG_INFINITY]);
}

#[test]
fn sampling_survives_logits_that_are_not_finite() {
    let nan = f32::NAN;
    let infinity = f32::INFINITY;
    for mut logits in [[nan, nan], [-5.0, nan], [0.0, infinity], [-infinity, -infinity]] {
        assert_eq!(sample::sample(&PLAIN, &mut logits, None), SampleRow::NOT_FINITE, "{logits:?}");
    }
    assert_eq!(sample::sample(&PLAIN, &mut [-infinity, -5.0], None), 1);
    let biased = SampleRow { bias: &[(0, infinity), (1, infinity)], ..PLAIN };
    assert_eq!(sample::sample(&biased, &mut [-infinity, 0.0, 1.0], None), 1);
}

#[test]
fn only_allowed_tokens_are_sampled() {
    let infinity = f32::INFINITY;
    let allowing = |mask: &'static [u32]| SampleRow { allowed: Some(mask), ..PLAIN };
    let borders = [(0.0, 0), (0.599, 0), (0.601, 1), (0.999, 1)];
    for (uniform, token) in borders {
        assert_eq!(sampled(allowing(&[0b011]), uniform), token, "{uniform}");
    }
    assert_eq!(sampled(SampleRow { temperature: 0.0, ..allowing(&[0b011]) }, 0.0), 0);
    assert_eq!(sampled(allowing(&[0b010]), 0.0), 1);
    // Whatever was added to the others.
    let biased = SampleRow { bias: &[(2, infinity), (0, -infinity)], ..allowing(&[0b011]) };
    assert_eq!(sampled(biased, 0.0), 1);
    // The lowest of allowed tokens that the model rules out; the model's own logits say whether there is a choice.
    assert_eq!(sample::sample(&allowing(&[0b110]), &mut [1.0, -infinity, -infinity], None), 1);
    assert_eq!(sample::sample(&allowing(&[0b110]), &mut [infinity, 0.0, 1.0], None), SampleRow::NOT_FINITE);
    let mut logits = [0.0; 70];
    logits[64] = 1.0;
    assert_eq!(sample::sample(&allowing(&[0, 0, 0b100000]), &mut logits, None), 69);
}
