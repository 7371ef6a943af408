//! Speculative decoding: tokens that are guessed, and looked at by the model together with the one before them.
//!
//! A [`Drafter`] guesses. The model computes logits behind every guessed token in one step, and each place's token is chosen from them just as it
//! would have been without a guess: by the same random number, a function of seed and place. As long as guesses turn out to be what is chosen,
//! what comes after them is right as well; the first that is not is replaced by the choice, and the KV cache forgets the rest. So an answer is the
//! same to the token, whatever is guessed and at whatever temperature. (For a guess that is certain of itself this is the rejection
//! sampling of Leviathan et al. 2023: it is accepted with the probability that the model gives it, and what replaces it has the distribution
//! of the rest.)
//!
//! A guess costs time. [`Pace`] measures how long steps of so many tokens take, and each answer has an [`Account`] of what guessing has
//! gained and cost it: it guesses as much as pays by its own rate of success, and when its credit is used up it only tries again from time to time.

mod draft_model;
mod lookup;
mod mtp;
#[cfg(test)]
mod tests;

pub use self::draft_model::DraftModel;
pub use self::lookup::PromptLookup;
pub use self::mtp::MtpDrafter;
use crate::{EngineError, RequestId};

/// Most tokens that are guessed at a time.
pub const MOST_DRAFT: usize = 15;

/// Names an answer of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AnswerId {
    /// Its request.
    pub request: RequestId,
    /// Which of the answers to it.
    pub choice: u32,
}

/// Guesses how answers go on.
pub trait Drafter: Send {
    /// Appends at most `most` tokens that may follow `tokens`, the prompt and the answer so far, to `draft`, which is empty.
    ///
    /// # Errors
    /// It fails in a way that others should know of. Having no guess is no error.
    fn draft(&mut self, answer: AnswerId, tokens: &[u32], most: usize, draft: &mut Vec<u32>)
    -> Result<(), EngineError>;

    /// How many of `tokens` it must read before it can guess what follows.
    fn unread(&self, _answer: AnswerId, _tokens: &[u32]) -> usize {
        0
    }

    /// Reads them.
    ///
    /// # Errors
    /// It fails.
    fn read(&mut self, _answer: AnswerId, _tokens: &[u32]) -> Result<(), EngineError> {
        Ok(())
    }

    /// Whether it guesses by what the model makes of tokens, which it is shown by [`Drafter::observe`].
    fn wants_hidden(&self) -> bool {
        false
    }

    /// The model has computed tokens of an answer, those that were guessed wrong left out: `hidden`, `[n, hidden size]`, are the hidden states
    /// after its last norm of the tokens at positions `first` to `first + n`. Positions come in order, but some may be left out (what the
    /// prefix cache had is not computed), and some come again (of an answer that had given way to others).
    fn observe(&mut self, _answer: AnswerId, _first: usize, _hidden: &[f32]) {}

    /// What a guessed token costs it, as a share of what a token costs the model: an estimate, until that is measured.
    fn relative_cost(&self) -> f64 {
        0.0
    }

    /// The same of a token that it reads.
    fn reading_cost(&self) -> f64 {
        self.relative_cost()
    }

    /// An answer has ended.
    fn forget(&mut self, answer: AnswerId);
}

/// A drafter that must read more than this reads it apart from guessing.
pub(crate) const MOST_UNREAD: usize = 2 * MOST_DRAFT;

/// How long steps take that only generate, by how many tokens they compute.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Those during which the next one was started already.
    overlapped: Times,
    /// How many of those were measured.
    overlapped_steps: usize,
    /// Those before which everything waited, as one must to guess; on a device that is never ahead, all.
    waited: Times,
    /// Of a token of a prompt.
    prompt: f64,
    /// Of a token that the drafter reads.
    read: f64,
    /// Of a guessed token, before the model looks at it.
    draft: f64,
    /// What guessing and reading a token cost as a share of what the model does, where that is not known.
    relative_cost: f64,
    reading_cost: f64,
    /// What the drafter has taken since the last step, which is no part of the next.
    drafting: f64,
    /// How likely guesses are right, of all answers: where a new one begins.
    success: f64,
    /// Seconds that all answers have gained by guesses, less those that the drafter has read.
    earned: f64,
    /// Seconds that may be lost before anything is known; `None` before that much is known.
    trial: Option<f64>,
}

/// Seconds of steps by their tokens; 0 where nothing is known.
#[derive(Debug, Default)]
struct Times(Vec<f64>);

/// Weight of what was measured last: the more if it is less than what was known, since whatever else the machine does only adds to it.
const NEWS: f64 = 0.1;
const GOOD_NEWS: f64 = 0.5;
/// Of a guess, for what is known of all answers.
const OLD_NEWS: f64 = 0.02;
/// Steps that a device which is ahead of the host takes before anything is guessed.
const FIRST_STEPS: usize = 8;
/// Where nothing is known of more tokens, each is taken to cost so much of what those that are known do.
const UNKNOWN: f64 = 0.25;

impl Times {
    fn record(&mut self, tokens: usize, seconds: f64) {
        let fewer = self.0.iter().enumerate().take(tokens).rfind(|(_, seconds)| **seconds > 0.0);
        // Tokens together take no longer than one after the other, but for the first time, when a device prepares for so many.
        let most = fewer.map_or(f64::INFINITY, |(few, seconds)| seconds * tokens as f64 / few.max(1) as f64);
        if self.0.len() <= tokens {
            self.0.resize(tokens + 1, 0.0);
        }
        let known = &mut self.0[tokens];
        *known = if *known == 0.0 {
            seconds.min(most)
        } else {
            let weight = if seconds < *known { GOOD_NEWS } else { NEWS };
            *known + weight * (seconds.min(4.0 * *known) - *known)
        };
    }

    /// Seconds of a step of so many tokens; `None` if nothing is known.
    fn step(&self, tokens: usize) -> Option<f64> {
        let known = |(tokens, &seconds): (usize, &f64)| (seconds > 0.0).then_some((tokens, seconds));
        let below = self.0.iter().enumerate().take(tokens + 1).filter_map(known).next_back();
        let above = self.0.iter().enumerate().skip(tokens).find_map(known);
        match (below, above) {
            (Some((few, less)), Some((many, more))) if many > few => {
                Some(less + (more - less) * (tokens - few) as f64 / (many - few) as f64)
            }
            (Some((few, less)), _) => Some(less * (1.0 + UNKNOWN * (tokens - few) as f64 / few.max(1) as f64)),
            (None, above) => above.map(|(_, more)| more),
        }
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            overlapped: Times::default(),
            overlapped_steps: 0,
            waited: Times::default(),
            prompt: 0.0,
            read: 0.0,
            draft: 0.0,
            relative_cost: 0.0,
            reading_cost: 0.0,
            drafting: 0.0,
            success: FIRST_SUCCESS,
            earned: 0.0,
            trial: None,
        }
    }
}

impl Pace {
    /// Takes note of a step, and of whether it began when everything before it was finished.
    pub(crate) fn record(&mut self, tokens: usize, seconds: f64, has_waited: bool) {
        let seconds = self.without_drafting(seconds);
        let times = if has_waited { &mut self.waited } else { &mut self.overlapped };
        times.record(tokens, seconds);
        self.overlapped_steps += usize::from(!has_waited);
    }

    /// Whether it is known what a device gains by being ahead, so that waiting to guess has a price.
    pub(crate) fn knows_overlap(&self) -> bool {
        self.overlapped_steps >= FIRST_STEPS
    }

    /// For a drafter of this cost.
    pub(crate) fn of(drafter: &dyn Drafter) -> Self {
        let (relative_cost, reading_cost) = (drafter.relative_cost(), drafter.reading_cost());
        Self { relative_cost, reading_cost, ..Self::default() }
    }

    /// Takes note of a step that computes prompts.
    pub(crate) fn record_prompt(&mut self, tokens: usize, seconds: f64) {
        let seconds = self.without_drafting(seconds);
        learn(&mut self.prompt, tokens, seconds);
    }

    /// Takes note of tokens that the drafter has read.
    pub(crate) fn record_read(&mut self, tokens: usize, seconds: f64) {
        learn(&mut self.read, tokens, seconds);
        self.earned -= seconds;
        self.drafting += seconds;
    }

    /// Takes note of guessed tokens.
    pub(crate) fn record_draft(&mut self, tokens: usize, seconds: f64) {
        learn(&mut self.draft, tokens, seconds);
        self.drafting += seconds;
    }

    /// The time from step to step, less what the drafter took of it, which has an account of its own.
    fn without_drafting(&mut self, seconds: f64) -> f64 {
        (seconds - std::mem::take(&mut self.drafting)).max(f64::MIN_POSITIVE)
    }

    /// What it takes the drafter to read so many tokens.
    fn read(&self, tokens: usize) -> f64 {
        let each = if self.read > 0.0 { self.read } else { self.reading_cost * self.prompt };
        tokens as f64 * each
    }

    /// Seconds of a step without guesses; `None` if nothing is known.
    fn step(&self, tokens: usize) -> Option<f64> {
        self.overlapped.step(tokens).or_else(|| self.waited.step(tokens))
    }

    /// How many tokens may be guessed in a step of `tokens` others: what many cost is found out by and by.
    fn most_known(&self, tokens: usize) -> usize {
        let longest = self.overlapped.0.len().max(self.waited.0.len()).saturating_sub(1);
        (2 * longest.saturating_sub(tokens)).max(1)
    }

    /// What guessing `drafted` tokens adds to a step of `tokens` others; of 0, what waiting to guess does. `None` if nothing is known.
    fn extra(&self, tokens: usize, drafted: usize) -> Option<f64> {
        let all = tokens + drafted;
        let more = self.waited.step(all).or_else(|| self.overlapped.step(all))? - self.step(tokens)?;
        let each = if self.draft > 0.0 { self.draft } else { self.relative_cost * self.step(1)? };
        Some(more.max(0.0) + drafted as f64 * each)
    }
}

/// Learns what each of so many tokens took.
fn learn(known: &mut f64, tokens: usize, seconds: f64) {
    if tokens > 0 {
        let each = seconds / tokens as f64;
        let weight = if *known == 0.0 { 1.0 } else { NEWS };
        *known += weight * (each - *known);
    }
}

/// A step of which each answer had a token, and some guessed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DraftedStep {
    /// Tokens that were not guessed, one for each answer.
    pub(crate) tokens: usize,
    /// Tokens that were.
    pub(crate) drafted: usize,
    /// It began when everything before it was finished.
    pub(crate) has_waited: bool,
}

/// What guessing has gained an answer, and what it has cost.
#[derive(Debug, Clone, Default)]
pub(crate) struct Account {
    /// Seconds that may be spent; `None` before anything is known.
    balance: Option<f64>,
    /// How likely a guess is right, by its last ones; `None` before the first.
    success: Option<f64>,
    /// Seconds that its tokens have taken, and that the drafter has taken to read.
    spent: f64,
    read: f64,
    /// Waits in a row on a device that could be ahead, after which there was nothing to guess, and steps until the next.
    barren: u32,
    pause: u32,
}

/// The most waits in a row by each of which the pause after the next is doubled.
const MOST_BARREN: u32 = 5;
/// Steps that an answer may lose before it knows anything.
const CREDIT: f64 = 0.5;
/// Steps that all answers together may lose besides.
const TRIAL: f64 = 1.0;
/// The share of its time that an answer may go on to lose.
const ALLOWANCE: f64 = 0.005;
/// How likely a guess is right before there was any.
const FIRST_SUCCESS: f64 = 0.6;
/// The share of an answer's time that reading may take as long as it has not earned more, and as how long, in tokens, an answer is taken that may be longer.
const READING: f64 = 0.02;
const USUAL: usize = 256;
/// Steps of what was gained that may be lost again.
const MOST_CREDIT: f64 = 4.0;

impl Account {
    /// How many tokens to guess, at most `most`, in a step of `tokens` others that serves as many answers.
    pub(crate) fn plan(&self, pace: &Pace, tokens: usize, most: usize) -> usize {
        if self.pause > 0 { 0 } else { self.best(pace, tokens, most).0 }
    }

    /// The same, and what that gains in seconds.
    fn best(&self, pace: &Pace, tokens: usize, most: usize) -> (usize, f64) {
        let Some(step) = pace.step(tokens) else { return (0, 0.0) };
        let success = self.success.unwrap_or(pace.success);
        let token = step / tokens as f64;
        let balance = self.balance.unwrap_or(CREDIT * token) + pace.trial.unwrap_or(TRIAL * token);
        let mut best = (0, 0.0);
        let (mut accepted, mut likely) = (0.0, 1.0);
        for drafted in 1..=most.min(pace.most_known(tokens)) {
            likely *= success;
            accepted += likely;
            let Some(cost) = pace.extra(tokens, drafted) else { break };
            if cost > balance {
                break;
            }
            let gain = accepted * token - cost;
            // A single guess tells whether luck has turned, even if it does not pay.
            if drafted == 1 || gain > best.1 {
                best = (drafted, gain);
            }
        }
        best
    }

    /// Whether the drafter may read `unread` tokens for an answer that has `left` to come, in steps of `tokens` answers.
    pub(crate) fn affords_reading(&self, pace: &Pace, tokens: usize, unread: usize, left: usize) -> bool {
        let Some(step) = pace.step(tokens) else { return false };
        let whole = self.spent + left.min(USUAL) as f64 * step / tokens as f64;
        let cost = pace.read(unread);
        let may_pay = self.best(pace, tokens, MOST_DRAFT).1 > 0.0;
        may_pay && (cost <= pace.earned || self.read + cost <= READING * whole)
    }

    /// The drafter has read for this answer.
    pub(crate) fn has_read(&mut self, seconds: f64) {
        self.read += seconds;
    }

    /// Waits less and less often where there is nothing to guess. What waiting costs is known from the device's first steps only, as long as
    /// everything waits, and these may have been slow.
    fn note_wait(&mut self, has_waited: bool, drafted: usize) {
        if drafted > 0 {
            self.barren = 0;
        } else if self.pause > 0 {
            self.pause -= 1;
        } else if has_waited {
            self.barren = (self.barren + 1).min(MOST_BARREN);
            self.pause = 1 << self.barren;
        }
    }

    /// A step is over in which `drafted` guesses were this answer's, and `accepted` of them right.
    pub(crate) fn settle(&mut self, pace: &mut Pace, step: DraftedStep, drafted: usize, accepted: usize) {
        if pace.knows_overlap() {
            self.note_wait(step.has_waited, drafted);
        }
        let extra = |drafted| pace.extra(step.tokens, drafted);
        let (Some(seconds), Some(wait), Some(all)) = (pace.step(step.tokens), extra(0), extra(step.drafted)) else {
            return;
        };
        let token = seconds / step.tokens as f64;
        self.spent += token;
        let balance = self.balance.unwrap_or(CREDIT * token) + ALLOWANCE * token;
        let mut cost = if step.has_waited { wait / step.tokens as f64 } else { 0.0 };
        if drafted > 0 {
            cost += (all - wait) * drafted as f64 / step.drafted as f64;
        }
        let gain = accepted as f64 * token - cost;
        let trial = pace.trial.get_or_insert(TRIAL * token);
        let tried = trial.min((-gain).max(0.0));
        *trial -= tried;
        self.balance = Some((balance + gain + tried).min(MOST_CREDIT * token));
        pace.earned += gain;
        for place in 0..drafted.min(accepted + 1) {
            let is_right = if place < accepted { 1.0 } else { 0.0 };
            let own = self.success.get_or_insert(pace.success);
            *own += NEWS * (is_right - *own);
            pace.success += OLD_NEWS * (is_right - pace.success);
        }
    }
}
