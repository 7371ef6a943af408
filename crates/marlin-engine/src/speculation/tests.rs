//! What guessing costs and gains, by a clock that is made up.

use super::*;

/// Seconds that a step takes by its tokens.
fn pace(step: impl Fn(usize) -> f64) -> Pace {
    let mut pace = Pace::default();
    for tokens in 1..=2 * MOST_DRAFT {
        pace.record(tokens, step(tokens), true);
    }
    pace
}

/// Runs one answer of `most` tokens alone, whose guess of the token at a place is right if `is_right` says so. Gives the time that it takes,
/// in steps of one token.
fn run(step: impl Fn(usize) -> f64, most: usize, is_right: impl Fn(usize) -> bool) -> f64 {
    let mut pace = Pace::default();
    let mut account = Account::default();
    let (mut said, mut time) = (0, 0.0);
    while said < most {
        let drafted = account.plan(&pace, 1, MOST_DRAFT.min(most - said - 1));
        let accepted = (said..said + drafted).take_while(|&place| is_right(place)).count();
        time += step(1 + drafted);
        pace.record(1 + drafted, step(1 + drafted), true);
        account.settle(&mut pace, DraftedStep { tokens: 1, drafted, has_waited: true }, drafted, accepted);
        said += 1 + accepted;
    }
    time / step(1)
}

/// Seconds of a step: on a CPU each token adds to it, on a GPU hardly any, and on a third device a second token costs as much as the first.
const DEVICES: [fn(usize) -> f64; 3] =
    [|n| 0.02 * (1.0 + 0.3 * (n - 1) as f64), |n| 0.002 * (1.0 + 0.02 * (n - 1) as f64), |n| 0.01 * n as f64];

#[test]
fn guesses_that_are_never_right_cost_little() {
    for device in DEVICES {
        for most in [64, 256, 2000] {
            let time = run(device, most, |_| false);
            assert!(time <= 1.03 * most as f64, "{time} steps for {most} tokens");
        }
    }
}

#[test]
fn guesses_that_are_right_pay() {
    let time = run(DEVICES[0], 512, |_| true);
    assert!(time < 512.0 / 2.4, "{time}: 16 tokens in the time of 5.5");
    assert!(run(DEVICES[1], 512, |_| true) < 512.0 / 8.0);
    // Nothing is to be gained here, and little lost.
    let time = run(DEVICES[2], 512, |_| true);
    assert!((500.0..=527.0).contains(&time), "{time}");
}

#[test]
fn a_device_may_be_slow_the_first_time() {
    // It takes a second to prepare for each number of tokens.
    let mut is_new = [true; MOST_DRAFT + 2];
    let (mut pace, mut account) = (Pace::default(), Account::default());
    let (mut said, mut steps) = (0, 0);
    while said < 512 {
        let drafted = account.plan(&pace, 1, MOST_DRAFT);
        let seconds = DEVICES[1](1 + drafted) + f64::from(u8::from(std::mem::take(&mut is_new[1 + drafted])));
        pace.record(1 + drafted, seconds, true);
        account.settle(&mut pace, DraftedStep { tokens: 1, drafted, has_waited: true }, drafted, drafted);
        said += 1 + drafted;
        steps += 1;
    }
    assert!(steps < 100, "{steps} steps");
}

#[test]
fn luck_may_turn() {
    // Half of the text can be guessed, and then the other half.
    for is_right in [|place| place < 1000, |place| place >= 1000] {
        let time = run(DEVICES[0], 2000, is_right);
        assert!(time < 1550.0, "{time}");
    }
    // Every third guess is wrong.
    assert!(run(DEVICES[0], 2000, |place| place % 3 != 0) < 2000.0);
}

/// What the drafter takes is no part of the step that follows, which would make guesses seem to cost twice as much.
#[test]
fn drafting_is_told_apart_from_the_step() {
    let mut pace = Pace::default();
    pace.record(1, 0.1, true);
    for _ in 0..20 {
        pace.record_draft(2, 0.04);
        pace.record_read(10, 0.05);
        pace.record(3, 0.2 + 0.04 + 0.05, true);
    }
    assert!((pace.extra(1, 2).unwrap() - (0.1 + 0.04)).abs() < 1e-9);
    assert!((pace.earned + 20.0 * 0.05).abs() < 1e-9);
    // It is taken off once.
    pace.record(3, 0.2, true);
    assert!((pace.waited.step(3).unwrap() - 0.2).abs() < 1e-9);
}

#[test]
fn waiting_for_a_guess_that_does_not_come_costs_little() {
    // A device that is ahead of the host takes a step in 10 ms, and 12 if it must wait to be told the next.
    let (mut pace, mut account, mut time) = (Pace::default(), Account::default(), 0.0);
    for _ in 0..1000 {
        let has_waited = pace.knows_overlap() && account.plan(&pace, 1, MOST_DRAFT) > 0;
        let seconds = if has_waited { 0.012 } else { 0.010 };
        time += seconds;
        pace.record(1, seconds, has_waited);
        account.settle(&mut pace, DraftedStep { tokens: 1, drafted: 0, has_waited }, 0, 0);
    }
    assert!(time < 1.03 * 1000.0 * 0.010, "{time}");
}

#[test]
fn waiting_that_looked_cheap_at_first_costs_little() {
    // The first steps take as long as those that wait.
    let (mut pace, mut account, mut time) = (Pace::default(), Account::default(), 0.0);
    for step in 0..1000 {
        let has_waited = pace.knows_overlap() && account.plan(&pace, 1, MOST_DRAFT) > 0;
        let seconds = if has_waited || step < 16 { 0.012 } else { 0.010 };
        time += if has_waited { 0.002 } else { 0.0 };
        pace.record(1, seconds, has_waited);
        account.settle(&mut pace, DraftedStep { tokens: 1, drafted: 0, has_waited }, 0, 0);
    }
    assert!(time < 0.03 * 1000.0 * 0.010, "{time}");
}

#[test]
fn what_is_not_known_lies_between_what_is() {
    let mut known = Times::default();
    assert_eq!(known.step(1), None);
    known.record(2, 1.0);
    assert_eq!((known.step(2), known.step(4), known.step(1)), (Some(1.0), Some(1.25), Some(1.0)));
    known.record(6, 3.0);
    assert_eq!((known.step(4), known.step(6)), (Some(2.0), Some(3.0)));
    // An odd one does not upset it.
    known.record(6, 1000.0);
    assert!(known.step(6).unwrap() < 4.0);
    assert_eq!(pace(|_| 1.0).extra(1, 3), Some(0.0));
    assert_eq!(pace(|tokens| tokens as f64).extra(1, 3), Some(3.0));
}

#[test]
fn the_longest_and_last_place_is_found() {
    let guess = |tokens: &[u32], most: usize| {
        let mut draft = Vec::new();
        let answer = AnswerId { request: RequestId(0), choice: 0 };
        PromptLookup::default().draft(answer, tokens, most, &mut draft).unwrap();
        draft
    };
    assert_eq!(guess(&[1, 2, 3, 4, 9, 1, 2], 3), [3, 4, 9]);
    assert_eq!(guess(&[1, 2, 3, 4, 9, 1, 2], 1), [3]);
    assert_eq!(guess(&[1, 2, 3, 7, 1, 2, 5, 1, 2], 1), [5], "the last of two");
    assert_eq!(guess(&[0, 1, 2, 3, 7, 1, 2, 5, 0, 1, 2], 1), [3], "the longer of two");
    assert_eq!(guess(&[7, 7, 7, 7], 4), [7; 4]);
    assert_eq!(guess(&[5, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1], "what repeats goes on");
    for tokens in [&[1, 2, 3, 4, 2][..], &[5], &[]] {
        assert!(guess(tokens, 4).is_empty(), "one token is alike by chance");
    }
}
