//! One forward call serves prefill, decode, verification and batches: however tokens are cut into steps, the results are the same
//! to the bit on a CPU.

mod common;

use common::{Device, Golden, Model, golden, options, packed, packed_in, same_bits, schemes};
use marlin_format::Format;
use marlin_kernels::cpu::Arithmetic;
use marlin_kernels::{KvType, SampleRow, StepError};
use marlin_model::{KvSequence, LoadOptions, LogitRows, ModelError, StepBatch};

/// Grouped heads, biases and several shards; a window; a llama3 rope.
const MODELS: [&str; 3] = ["llama-gqa4-bias-sharded", "qwen3-gqa3-window", "llama-gqa2-llama3-tied"];

/// Runs `check` on every model as it is and packed, the packed one in both arithmetics.
fn on_cpus(check: impl Fn(&mut Model, &[u32])) {
    on_threads(1, |mut model, tokens| check(&mut model, tokens));
}

fn on_threads(threads: usize, mut check: impl FnMut(Model, &[u32])) {
    for name in MODELS {
        let folder = golden(name);
        let tokens = Golden::read(&folder).input_ids;
        let target = packed(&folder, &schemes([Format::Fp4, Format::Int4, Format::Int8]));
        for (folder, arithmetic) in [
            (folder, Arithmetic::Exact),
            (packed_in(&target), Arithmetic::Exact),
            (packed_in(&target), Arithmetic::Int8),
        ] {
            check(Device::cpu(arithmetic, threads, None).load(&folder, &options(KvType::F16)).unwrap(), &tokens);
        }
    }
}

/// Runs `tokens` one at a time.
fn decode(model: &mut Model, sequence: &mut KvSequence, tokens: &[u32]) -> Vec<f32> {
    tokens.chunks(1).flat_map(|token| model.extend(sequence, token)).collect()
}

#[test]
fn prefill_in_chunks_equals_one_prefill() {
    on_cpus(|model, tokens| {
        let whole = model.logits_of(tokens, tokens.len());
        for chunk in [1, 3, 7, 16, 17, 33] {
            assert!(same_bits(&model.logits_of(tokens, chunk), &whole), "chunks of {chunk}");
        }
    });
}

/// Experts, latent attention, and sinks with a window, whichever tokens share a step with a token, and after a fork.
#[test]
fn the_reference_cuts_steps_of_experts_and_latents_alike() {
    for name in ["mixtral-top2", "glm4moelite-shared-mtp", "deepseekv3-direct-shared3", "gptoss-mxfp4"] {
        let folder = golden(name);
        let tokens = Golden::read(&folder).input_ids;
        let mut model = Device::Reference.load(&folder, &options(KvType::F16)).unwrap();
        let whole = model.logits_of(&tokens, tokens.len());
        for chunk in [1, 7, 33] {
            assert!(same_bits(&model.logits_of(&tokens, chunk), &whole), "{name} in chunks of {chunk}");
        }
        let of_prompt = 21 * model.model.info().vocabulary;
        let mut original = model.sequence();
        model.extend(&mut original, &tokens[..21]);
        let mut fork = model.fork(&original);
        model.extend(&mut fork, &[1, 2, 3]);
        model.truncate(&mut fork, 21);
        let mut both = model.step(&mut [(&mut fork, &tokens[21..]), (&mut original, &tokens[21..])]);
        assert!(same_bits(&both.remove(0), &whole[of_prompt..]) && same_bits(&both.remove(0), &whole[of_prompt..]));
        model.release(original);
        model.release(fork);
    }
}

#[test]
fn verification_rolls_back() {
    on_cpus(|model, tokens| {
        let mut plain = model.sequence();
        model.extend(&mut plain, &tokens[..30]);
        let wanted = decode(model, &mut plain, &tokens[30..]);

        // Five drafted tokens, of which two are right, across a block border.
        let mut sequence = model.sequence();
        model.extend(&mut sequence, &tokens[..30]);
        let wrong = |token: u32| (token + 1) % 67;
        let draft = [tokens[30], tokens[31], wrong(tokens[32]), wrong(tokens[33]), wrong(tokens[34])];
        let verified = model.extend(&mut sequence, &draft);
        model.truncate(&mut sequence, 32);
        let mut found = verified[..2 * model.model.info().vocabulary].to_vec();
        found.extend(decode(model, &mut sequence, &tokens[32..]));
        assert!(same_bits(&found, &wanted));
        model.release(plain);
        model.release(sequence);
    });
}

#[test]
fn forks_continue_independently() {
    on_cpus(|model, tokens| {
        let (prompt, rest) = tokens.split_at(21);
        let other: Vec<u32> = rest.iter().rev().copied().collect();
        let alone = |model: &mut Model, continuation: &[u32]| {
            let mut sequence = model.sequence();
            model.extend(&mut sequence, prompt);
            let logits = decode(model, &mut sequence, continuation);
            model.release(sequence);
            logits
        };
        let (wanted, wanted_other) = (alone(model, rest), alone(model, &other));

        let free = model.model.kv().free_blocks();
        let mut a = model.sequence();
        model.extend(&mut a, prompt);
        let mut b = model.fork(&a);
        assert_eq!(free - model.model.kv().free_blocks(), 1, "a fork shares its blocks");
        // In turns, the fork first: it must copy before either writes.
        let (mut found, mut found_other) = (Vec::new(), Vec::new());
        for (token, other) in rest.chunks(1).zip(other.chunks(1)) {
            found_other.extend(model.extend(&mut b, other));
            found.extend(model.extend(&mut a, token));
        }
        assert!(same_bits(&found, &wanted) && same_bits(&found_other, &wanted_other));

        // A fork of what was rolled back, written in one step with the original, which is released in between.
        model.truncate(&mut a, prompt.len());
        let (mut c, mut d) = (model.fork(&a), model.fork(&a));
        model.release(a);
        let mut both = model.step(&mut [(&mut c, rest), (&mut d, &other)]);
        assert!(same_bits(&both.remove(0), &wanted) && same_bits(&both.remove(0), &wanted_other));
        for sequence in [b, c, d] {
            model.release(sequence);
        }
        assert_eq!(model.model.kv().free_blocks(), free);
    });
}

#[test]
fn a_batch_changes_nothing() {
    on_cpus(|model, tokens| {
        for size in [1, 7, 64] {
            // Sequences of different lengths: 1 to 40 tokens of prompt, then one token each in one step.
            let prompts: Vec<&[u32]> = (0..size).map(|s| &tokens[s % 3..][..1 + s * 5 % 36]).collect();
            let mut sequences: Vec<KvSequence> = prompts.iter().map(|_| model.sequence()).collect();
            for (sequence, prompt) in sequences.iter_mut().zip(&prompts) {
                model.extend(sequence, prompt);
            }
            let next: Vec<[u32; 1]> = (0..size).map(|s| [tokens[s % tokens.len()]]).collect();
            let mut parts: Vec<(&mut KvSequence, &[u32])> =
                sequences.iter_mut().zip(&next).map(|(sequence, token)| (sequence, token.as_slice())).collect();
            let together = model.step(&mut parts);
            for (s, mut sequence) in sequences.into_iter().enumerate() {
                model.truncate(&mut sequence, prompts[s].len());
                let alone = model.extend(&mut sequence, &next[s]);
                assert!(same_bits(&alone, &together[s]), "sequence {s} of {size}");
                model.release(sequence);
            }
        }
    });
}

#[test]
fn prefill_and_decode_share_a_step() {
    on_cpus(|model, tokens| {
        let whole = model.logits_of(tokens, tokens.len());
        let vocabulary = model.model.info().vocabulary;
        let (mut a, mut b) = (model.sequence(), model.sequence());
        model.extend(&mut a, &tokens[..25]);
        let mut logits = model.step(&mut [(&mut b, &tokens[..18]), (&mut a, &tokens[25..26])]);
        assert!(same_bits(&logits.remove(0), &whole[..18 * vocabulary]));
        assert!(same_bits(&logits.remove(0), &whole[25 * vocabulary..26 * vocabulary]));
        model.release(a);
        model.release(b);
    });
}

#[test]
fn threads_change_nothing() {
    let [one, two] = [1, 2].map(|threads| {
        let mut logits = Vec::new();
        on_threads(threads, |mut model, tokens| logits.push(model.logits_of(tokens, 11)));
        logits
    });
    assert!(one.iter().zip(&two).all(|(one, two)| same_bits(one, two)));
    assert_ne!(one[1], one[2], "the arithmetics differ");
}

#[test]
fn any_subset_of_logit_rows_is_the_same_rows() {
    on_cpus(|model, tokens| {
        let vocabulary = model.model.info().vocabulary;
        let whole = model.logits_of(tokens, tokens.len());
        for (rows, first) in [(LogitRows::Last, 39), (LogitRows::LastN(4), 36), (LogitRows::None, 40)] {
            let mut sequence = model.sequence();
            model.model.kv().append(&mut sequence, tokens.len()).unwrap();
            let mut batch = StepBatch::new();
            batch.push(&sequence, tokens, rows);
            model.model.forward(&batch).unwrap();
            let mut logits = vec![f32::NAN; 3];
            model.model.read_logits(&mut logits).unwrap();
            assert!(same_bits(&logits, &whole[first * vocabulary..]), "{rows:?}");
            model.release(sequence);
        }
    });
}

#[test]
fn steps_that_do_not_fit_are_refused_and_harm_nothing() {
    let folder = golden("qwen3-gqa2-tied");
    let tokens = Golden::read(&folder).input_ids;
    let device = Device::cpu(Arithmetic::Exact, 1, None);
    let small =
        LoadOptions { context: Some(35), step_tokens: 20, logit_rows: 2, kv_blocks: Some(3), ..LoadOptions::default() };
    let mut model = device.load(&folder, &small).unwrap();
    let mut batch = StepBatch::new();
    let mut sequence = model.sequence();

    let mut refused = |model: &mut Model, sequence: &mut KvSequence, tokens: &[u32], rows: LogitRows| {
        let len = sequence.len();
        model.model.kv().append(sequence, tokens.len()).unwrap();
        batch.clear();
        batch.push(sequence, tokens, rows);
        let error = model.model.forward(&batch).unwrap_err();
        model.truncate(sequence, len);
        let mut logits = vec![0.0];
        model.model.read_logits(&mut logits).unwrap();
        assert!(logits.is_empty());
        error
    };
    let error = refused(&mut model, &mut sequence, &tokens[..21], LogitRows::Last);
    assert!(matches!(error, ModelError::Step(StepError::TooManyTokens { found: 21, limit: 20 })), "{error}");
    let error = refused(&mut model, &mut sequence, &tokens[..5], LogitRows::All);
    assert!(matches!(error, ModelError::TooManyLogitRows { found: 5, limit: 2 }), "{error}");
    let error = refused(&mut model, &mut sequence, &[3, 101], LogitRows::Last);
    assert!(matches!(error, ModelError::Step(StepError::Token { token: 101, row: 1, .. })), "{error}");

    assert!(model.greedy(&mut sequence, &tokens[..20]).is_ok());
    let next = model.greedy(&mut sequence, &tokens[20..34]).unwrap();
    let error = refused(&mut model, &mut sequence, &[1, 2], LogitRows::Last);
    assert!(matches!(error, ModelError::Step(StepError::Context { position: 35, context: 35 })), "{error}");

    let error = model.model.kv().append(&mut sequence, 63).unwrap_err();
    assert!(matches!(error, ModelError::OutOfBlocks { needed: 2, free: 1, blocks: 3, .. }), "{error}");
    let error = model.model.sample(&[SampleRow::GREEDY]).unwrap_err();
    assert!(matches!(error, ModelError::SampleRows { rows: 1, logits: 0 }), "{error}");

    // What was refused has left no trace.
    model.truncate(&mut sequence, 33);
    assert_eq!(model.greedy(&mut sequence, &tokens[33..34]).unwrap(), next);
    model.release(sequence);
    assert_eq!(model.model.kv().free_blocks(), 3);
}

#[test]
fn a_step_of_nothing_does_nothing() {
    let mut model = Device::Reference.load(&golden("llama-mha-untied"), &options(KvType::F32)).unwrap();
    model.model.forward(&StepBatch::new()).unwrap();
    assert!(model.step(&mut []).is_empty());
}

/// What a model computed, another instance of it goes on with: KV blocks that went through bytes, into other places of its pool.
#[test]
fn blocks_move_to_another_instance() {
    let latent = ["glm4moelite-shared-mtp", "gptoss-mxfp4"];
    let devices = MODELS.map(|name| (name, Device::cpu(Arithmetic::Exact, 2, None)));
    for (name, device) in devices.into_iter().chain(latent.map(|name| (name, Device::Reference))) {
        for kv_type in KvType::ALL {
            let folder = golden(name);
            let tokens = Golden::read(&folder).input_ids;
            let mut first = device.load(&folder, &options(kv_type)).unwrap();
            let whole = first.logits_of(&tokens, tokens.len());
            let block_tokens = first.model.kv().block_tokens();
            let kept = tokens.len().min(2 * block_tokens - 1) / block_tokens * block_tokens;
            let mut past = first.sequence();
            first.extend(&mut past, &tokens[..kept]);
            let mut bytes = vec![0; past.blocks().len() * first.model.info().kv_block_bytes()];
            first.model.read_kv_blocks(past.blocks(), &mut bytes).unwrap();

            let mut second = device.load(&folder, &options(kv_type)).unwrap();
            let mut others = second.sequence();
            second.extend(&mut others, &tokens[..1]);
            let mut sequence = second.sequence();
            second.model.kv().append(&mut sequence, kept).unwrap();
            second.model.write_kv_blocks(sequence.blocks(), &bytes).unwrap();
            let rest = second.extend(&mut sequence, &tokens[kept..]);
            let vocabulary = second.model.info().vocabulary;
            assert!(same_bits(&rest, &whole[kept * vocabulary..]), "{name}, {}", kv_type.name());
        }
    }
}
