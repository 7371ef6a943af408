//! Prompts that become vectors, on the fake model.

use super::engine::{ROOMY, engine, finish_events, greedy};
use super::fake_model::hidden_state;
use crate::{EngineError, FinishReason, Pooling, Request, StopConditions};

fn request(prompt: &[u32], pooling: Pooling) -> Request {
    let stop = StopConditions { max_tokens: 0, ..StopConditions::default() };
    Request { stop, pooling: Some(pooling), ..greedy(prompt, 1) }
}

fn expected(prompt: &[u32], pooling: Pooling) -> Vec<f32> {
    let states = prompt.iter().zip(0..).map(|(&token, position)| hidden_state(token, position).map(f64::from));
    let skipped = if pooling == Pooling::Last { prompt.len() - 1 } else { 0 };
    let [x, y] = states.skip(skipped).fold([0.0; 2], |[x, y], state| [x + state[0], y + state[1]]);
    let length = (x * x + y * y).sqrt();
    vec![(x / length) as f32, (y / length) as f32]
}

#[test]
fn a_vector_does_not_depend_on_chunks_company_or_the_cache() {
    let prompts: Vec<Vec<u32>> =
        (1..40).step_by(6).map(|len| (0..len).map(|i| (i * 7 + len) % 200).collect()).collect();
    let tight = super::fake_model::Sizes { blocks: 12, ..ROOMY };
    let overlapping = super::fake_model::Sizes { overlaps: true, ..ROOMY };
    for sizes in [ROOMY, tight, overlapping] {
        let (mut engine, _) = engine(sizes);
        // The second time, the cache holds what the prompts begin with.
        for _ in 0..2 {
            let mut ids = Vec::new();
            for prompt in &prompts {
                engine.add(greedy(prompt, 4)).unwrap();
                for pooling in [Pooling::Last, Pooling::Mean] {
                    ids.push((engine.add(request(prompt, pooling)).unwrap(), prompt, pooling));
                }
            }
            let events = finish_events(&mut engine);
            for (id, prompt, pooling) in ids {
                let own: Vec<_> = events.iter().filter(|event| event.request == id).collect();
                let [event] = own[..] else { panic!("{} events", own.len()) };
                assert_eq!(event.embedding, expected(prompt, pooling), "{pooling:?} of {prompt:?}");
                let finish = event.finish.as_ref().unwrap();
                assert_eq!((&finish.reason, finish.generated_tokens), (&FinishReason::Length, 0));
                assert!(pooling == Pooling::Last || finish.cached_tokens == 0);
            }
        }
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

#[test]
fn a_prompt_may_fill_the_context_and_generates_nothing() {
    let (mut engine, _) = engine(ROOMY);
    let prompt: Vec<u32> = (0..64).collect();
    engine.add(request(&prompt, Pooling::Mean)).unwrap();
    assert_eq!(finish_events(&mut engine)[0].embedding, expected(&prompt, Pooling::Mean));
    let refused = engine.add(Request { pooling: Some(Pooling::Last), ..greedy(&[1], 1) });
    assert!(matches!(refused, Err(EngineError::Parameter { name: "max_tokens", .. })), "{refused:?}");
}
