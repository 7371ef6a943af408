//! One answer on its way: its tokens, their place in the KV cache, and what is still to come.

mod part;

use std::time::Instant;

use marlin_checkpoint::Tokenizer;
use marlin_kernels::{SampleRow, Step};
use marlin_model::{KvPool, KvSequence, LogitRows, ModelError, StepBatch};

pub(crate) use self::part::{Computed, Lookup, Part, Rank, Room};
use crate::logprobs::token_logprobs;
use crate::pooling::{Pooled, Pooling};
use crate::prefix::BlockNames;
use crate::sampling::Sampler;
use crate::speculation::{Account, DraftedStep, Drafter, MOST_UNREAD, Pace};
use crate::store::BlockKey;
use crate::{
    Constraint, EngineError, Event, Finish, FinishReason, Request, RequestId, StopConditions, TextStream, TokenLogprobs,
};

/// The state of an answer from the request to its last token.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) rank: Rank,
    pub(crate) kv: KvSequence,
    sampler: Sampler,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// `tokens` never grows beyond this: prompt and max_tokens, or the context.
    most_tokens: usize,
    /// Tokens that finished steps have put into the KV cache; `kv` is longer while steps are under way.
    computed: usize,
    /// Tokens that were chosen after `tokens`, but not read yet: one more than those that steps under way have taken up.
    unread: usize,
    /// Row of the last of them in the last sampling.
    unread_row: u32,
    /// Names of its blocks, and how many of them the pool has been told.
    names: BlockNames,
    named: usize,
    /// Blocks that the store on disk was told of, and whether that was when the prompt was done.
    offered: usize,
    is_prompt_offered: bool,
    lookup: Lookup,
    /// Tokens of the prompt that the KV cache held when it was first looked at.
    cached_tokens: Option<usize>,
    /// Other answers to the same prompt, which branch off before its last token.
    to_fork: u32,
    logprobs: Option<usize>,
    /// Until they are delivered.
    prompt_logprobs: Option<usize>,
    scored: Vec<TokenLogprobs>,
    /// Of a prompt that becomes a vector.
    pooled: Option<Pooled>,
    /// Guesses of what comes after `tokens`.
    draft: Vec<u32>,
    /// Of the last step, those that were right.
    accepted: usize,
    account: Account,
    constraint: Option<Constraint>,
    /// Why the constraint has failed.
    broken: Option<EngineError>,
    stop: StopConditions,
    /// Tokens that end it: its own, and the model's unless it ignores them.
    end_tokens: Vec<u32>,
    text: TextStream,
}

impl Sequence {
    pub(crate) fn new(
        id: RequestId,
        request: Request,
        kv: KvSequence,
        room: Room,
        names: BlockNames,
        eos_tokens: &[u32],
        tokenizer: &Tokenizer,
    ) -> Result<Self, EngineError> {
        let Request {
            prompt,
            sampling,
            mut stop,
            choices,
            logprobs,
            prompt_logprobs,
            pooling,
            constraint,
            special_tokens,
            priority,
            cache_salt: _,
        } = request;
        let mut end_tokens = std::mem::take(&mut stop.tokens);
        if !stop.ignore_eos {
            end_tokens.extend_from_slice(eos_tokens);
        }
        let text = if special_tokens { TextStream::with_special } else { TextStream::new };
        Ok(Self {
            rank: Rank { priority, request: id, choice: 0 },
            kv,
            sampler: Sampler::new(sampling, &prompt, &end_tokens)?,
            prompt_tokens: prompt.len(),
            most_tokens: room.tokens,
            computed: 0,
            unread: 0,
            unread_row: 0,
            names,
            named: 0,
            offered: 0,
            is_prompt_offered: false,
            lookup: Lookup::NotYet,
            cached_tokens: None,
            to_fork: choices - 1,
            logprobs,
            prompt_logprobs,
            scored: Vec::new(),
            pooled: pooling.map(Pooled::new),
            draft: Vec::new(),
            accepted: 0,
            account: Account::default(),
            constraint,
            broken: None,
            text: text(tokenizer, &prompt, std::mem::take(&mut stop.strings))?,
            stop,
            end_tokens,
            tokens: prompt,
        })
    }

    /// Whether all of its prompt is computed, whatever is cached.
    fn needs_all(&self) -> bool {
        self.is_scored() || self.pooled.as_ref().is_some_and(|pooled| pooled.pooling == Pooling::Mean)
    }

    /// Begins with the tokens that are cached already, but for the last: its logits are wanted.
    pub(crate) fn take_cached_prefix(&mut self, kv: &mut KvPool) {
        if !self.kv.is_empty() || self.needs_all() {
            return;
        }
        let before_last = self.tokens.len() - 1;
        let tokens = &self.tokens[..before_last];
        self.kv = kv.cached_prefix(self.names.before(0), self.names.of(tokens), tokens);
        self.computed = self.kv.len();
        self.named = self.computed / kv.block_tokens();
    }

    /// It begins to run with what it has of the cache.
    pub(crate) fn note_cached(&mut self) {
        self.cached_tokens.get_or_insert(self.kv.len());
    }

    pub(crate) fn lookup(&self) -> Lookup {
        self.lookup
    }

    pub(crate) fn set_lookup(&mut self, lookup: Lookup) {
        self.lookup = lookup;
    }

    /// The blocks that it needs and may begin with, from the first on that the pool does not have.
    pub(crate) fn missing_blocks(&mut self, kv: &KvPool) -> Vec<BlockKey> {
        if self.needs_all() {
            return Vec::new();
        }
        let names = self.names.of(&self.tokens[..self.tokens.len() - 1]);
        let known = names.iter().take_while(|name| kv.find(name).is_some()).count();
        (known..names.len()).map(|index| self.names.key(index, &self.tokens)).collect()
    }

    /// Its full blocks with their places, once when the prompt is done and those that came after it at the end.
    pub(crate) fn blocks_to_offer(&mut self, is_finished: bool) -> Vec<(usize, BlockKey)> {
        let is_prompt_done = self.computed >= self.prompt_tokens;
        if !is_finished && (self.is_prompt_offered || !is_prompt_done) {
            return Vec::new();
        }
        self.is_prompt_offered |= is_prompt_done;
        let new = self.offered.min(self.named)..self.named;
        self.offered = self.named;
        new.map(|index| (index, self.names.key(index, &self.tokens))).collect()
    }

    /// Gives its blocks back: what they hold will be computed again, or found in the cache.
    pub(crate) fn leave(&mut self, kv: &mut KvPool) {
        let empty = kv.sequence();
        kv.release(std::mem::replace(&mut self.kv, empty));
        (self.computed, self.unread, self.named) = (0, 0, 0);
        self.scored.clear();
        self.pooled.iter_mut().for_each(Pooled::clear);
        self.draft.clear();
    }

    /// Whether it is time for the other answers to branch off.
    pub(crate) fn is_fork_due(&self) -> bool {
        self.to_fork > 0 && self.kv.len() == self.prompt_tokens - 1
    }

    /// Branches the next of the other answers off. It shares the blocks of the prompt if it can run at once, and otherwise waits without any.
    pub(crate) fn fork(&mut self, choice: u32, kv: &mut KvPool, can_run: bool) -> Self {
        self.to_fork -= 1;
        let shared = if can_run { kv.fork(&self.kv) } else { kv.sequence() };
        Self {
            rank: Rank { choice, ..self.rank },
            sampler: self.sampler.fork(choice),
            tokens: self.tokens.clone(),
            computed: self.computed.min(shared.len()),
            named: if can_run { self.named } else { 0 },
            kv: shared,
            names: self.names.clone(),
            to_fork: 0,
            prompt_logprobs: None,
            scored: Vec::new(),
            pooled: None,
            draft: Vec::new(),
            account: self.account.clone(),
            constraint: self.constraint.clone(),
            broken: None,
            stop: self.stop.clone(),
            end_tokens: self.end_tokens.clone(),
            text: self.text.clone(),
            ..*self
        }
    }

    /// How many tokens no step has taken up yet: what is left of the prompt, or the last token, which need not be read for that.
    pub(crate) fn pending(&self) -> usize {
        if self.to_fork > 0 {
            return self.prompt_tokens - 1 - self.kv.len();
        }
        let is_last = self.chosen() == self.stop.max_tokens || self.tokens.len() + self.unread == self.most_tokens;
        // What may come next in a grammar depends on the token before.
        if self.unread > 0 && (is_last || self.is_constrained()) {
            return 0;
        }
        // While guesses are looked at, the cache has more.
        (self.tokens.len() + self.unread).saturating_sub(self.kv.len())
    }

    /// Whether it must have a certain form.
    pub(crate) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// Finds out which tokens may come next, while the device computes how likely they are.
    pub(crate) fn compute_constraint(&mut self) {
        if let Some(Err(error)) = self.constraint.as_mut().map(Constraint::compute) {
            self.broken = Some(error);
        }
    }

    /// Whether each token of the prompt takes a row of logits.
    pub(crate) fn is_scored(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Whether the host must see its logits.
    pub(crate) fn wants_logits(&self, part: &Part) -> bool {
        self.is_scored() || (self.logprobs.is_some() && part.is_sampled)
    }

    /// Whether the host must see what the model makes of its tokens.
    pub(crate) fn wants_hidden(&self, part: &Part) -> bool {
        self.pooled.as_ref().is_some_and(|pooled| pooled.pooling == Pooling::Mean || part.is_complete)
    }

    /// Whether its tokens may be guessed: not in a grammar, which must be followed token by token.
    pub(crate) fn may_draft(&self) -> bool {
        !self.is_scored() && !self.is_constrained()
    }

    /// Guesses what comes next in a step of `tokens` others: at most `most` tokens, as many as pay unless `always`.
    pub(crate) fn draft(
        &mut self,
        drafter: &mut dyn Drafter,
        pace: &mut Pace,
        tokens: usize,
        most: usize,
        always: bool,
    ) -> Result<(), EngineError> {
        // The last token that may be generated is followed by none.
        let left = (self.stop.max_tokens - self.generated()).min(self.most_tokens - self.tokens.len());
        let most = most.min(left.saturating_sub(1));
        let most = if always { most } else { self.account.plan(pace, tokens, most) };
        let is_next = self.to_fork == 0 && self.kv.len() + 1 == self.tokens.len();
        if most == 0 || !is_next {
            return Ok(());
        }
        let answer = self.rank.answer();
        let unread = drafter.unread(answer, &self.tokens);
        if unread > MOST_UNREAD {
            if !always && !self.account.affords_reading(pace, tokens, unread, left) {
                return Ok(());
            }
            let started = Instant::now();
            drafter.read(answer, &self.tokens)?;
            let seconds = started.elapsed().as_secs_f64();
            pace.record_read(unread, seconds);
            self.account.has_read(seconds);
        }
        let started = Instant::now();
        drafter.draft(answer, &self.tokens, most, &mut self.draft)?;
        self.draft.truncate(most);
        pace.record_draft(self.draft.len(), started.elapsed().as_secs_f64());
        Ok(())
    }

    pub(crate) fn forget_draft(&mut self) {
        self.draft.clear();
    }

    /// Tokens that are guessed.
    pub(crate) fn drafted(&self) -> usize {
        self.draft.len()
    }

    /// What guessing has gained it.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    /// A step is over in which it had a part.
    pub(crate) fn settle(&mut self, pace: &mut Pace, step: DraftedStep, part: &Part) {
        self.account.settle(pace, step, part.drafted, self.accepted);
    }

    /// Guesses of its part that were right.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted
    }

    /// A step is over in which it had a part: shows the drafter what the model made of those of its tokens that stay. `hidden` are the hidden
    /// states of the whole step, `width` to a token.
    pub(crate) fn show(&self, drafter: &mut dyn Drafter, part: &Part, hidden: &[f32], width: usize) {
        let (first, count) = (part.tokens.start, self.computed - part.start);
        if self.may_draft() {
            drafter.observe(self.rank.answer(), part.start, &hidden[first * width..(first + count) * width]);
        }
    }

    /// Adds the next `count` of its pending tokens to a step; those beyond are guesses.
    pub(crate) fn take_part(
        &mut self,
        count: usize,
        kv: &mut KvPool,
        batch: &mut StepBatch,
    ) -> Result<Part, ModelError> {
        let start = self.kv.len();
        kv.append(&mut self.kv, count)?;
        let chosen = self.tokens.len() + self.unread;
        let drafted = self.kv.len().saturating_sub(chosen);
        let is_complete = self.kv.len() >= chosen;
        let is_sampled = is_complete && self.stop.max_tokens > 0;
        let logits = match (self.is_scored(), is_sampled) {
            (true, _) => LogitRows::All,
            (false, true) => LogitRows::LastN(1 + drafted),
            (false, false) => LogitRows::None,
        };
        let unread = [Step::SAMPLED + self.unread_row];
        self.tokens.extend_from_slice(&self.draft[..drafted]);
        let tokens = self.tokens.get(start..start + count).unwrap_or(&unread);
        let first = batch.tokens();
        let rows = batch.push(&self.kv, tokens, logits);
        self.tokens.truncate(self.tokens.len() - drafted);
        Ok(Part {
            rank: self.rank,
            tokens: first..first + count,
            start,
            computed: self.kv.len() - drafted,
            rows,
            is_complete,
            is_sampled,
            drafted,
        })
    }

    /// How its next token is chosen, and those behind its guesses, by the rows of its part in the sampling that is about to start.
    pub(crate) fn choose(&mut self, part: &Part) -> impl Iterator<Item = SampleRow<'_>> {
        let last_sampled = (self.unread > 0).then_some(self.unread_row);
        let index = self.chosen();
        (self.unread, self.unread_row) = (self.unread + 1, part.next_row() as u32);
        let allowed = self.constraint.as_ref().map(Constraint::allowed).filter(|_| self.broken.is_none());
        self.sampler.rows(index, &self.draft[..part.drafted], last_sampled, self.stop.min_tokens, allowed)
    }

    /// Forgets the steps under way.
    pub(crate) fn roll_back(&mut self, kv: &mut KvPool) {
        kv.truncate(&mut self.kv, self.computed);
        self.unread = 0;
        self.draft.clear();
    }

    /// Tokens generated and read so far.
    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens generated so far, read or not.
    fn chosen(&self) -> usize {
        self.generated() + self.unread
    }

    /// Tokens of the prompt that a step has computed for the first time.
    pub(crate) fn prompt_tokens_of(&self, part: &Part) -> usize {
        part.computed.min(self.prompt_tokens).saturating_sub(self.computed)
    }

    /// The oldest step under way has succeeded: takes note of what it computed, and appends an event for each of its tokens; tells whether
    /// one of them is the last.
    pub(crate) fn finish_part(
        &mut self,
        part: &Part,
        step: &Computed<'_>,
        kv: &mut KvPool,
        tokenizer: &Tokenizer,
        events: &mut Vec<Event>,
    ) -> Result<bool, EngineError> {
        let start = self.computed;
        self.computed = part.computed;
        self.name_blocks(kv);
        let row = |row: usize| &step.logits[row * step.vocabulary..(row + 1) * step.vocabulary];
        if let Some(alternatives) = self.prompt_logprobs {
            // The logits of a token tell how likely the next one was.
            for (place, index) in (start + 1..self.prompt_tokens.min(part.computed + 1)).zip(part.rows.clone()) {
                self.scored.push(token_logprobs(row(index), self.tokens[place], alternatives));
            }
        }
        if self.wants_hidden(part)
            && let Some(pooled) = &mut self.pooled
        {
            let width = step.hidden_size;
            pooled.add(&step.hidden[part.tokens.start * width..part.tokens.end * width], width);
        }
        self.accepted = 0;
        if !part.is_complete {
            return Ok(false);
        }
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let mut event = Event { prompt_logprobs: std::mem::take(&mut self.scored), ..self.event() };
        self.prompt_logprobs = None;
        if !part.is_sampled {
            let embedding = self.pooled.as_ref().map(Pooled::embedding);
            let is_lost = matches!(embedding, Some(None));
            event.embedding = embedding.flatten().unwrap_or_default();
            event.finish = Some(self.finish(if is_lost { FinishReason::NotFinite } else { FinishReason::Length }));
            events.push(event);
            return Ok(true);
        }
        self.unread -= 1;
        for index in part.next_row()..part.rows.end {
            event.token = Some(step.sampled[index]).filter(|&token| token != SampleRow::NOT_FINITE);
            event.logprobs =
                self.logprobs.zip(event.token).map(|(count, token)| token_logprobs(row(index), token, count));
            let reason = self.accept(event.token, tokenizer, &mut event.text)?;
            event.finish = reason.map(|reason| self.finish(reason));
            let (token, is_last) = (event.token, event.finish.is_some());
            events.push(event);
            if is_last {
                return Ok(true);
            }
            // What was computed behind a guess is right if the guess is.
            if index + 1 == part.rows.end || token != Some(self.draft[self.accepted]) {
                break;
            }
            self.accepted += 1;
            event = self.event();
        }
        if part.drafted > 0 {
            self.computed += self.accepted;
            kv.truncate(&mut self.kv, self.computed);
            self.draft.clear();
        }
        Ok(false)
    }

    /// Its last event, when it cannot go on.
    pub(crate) fn fail(&self, error: &EngineError) -> Event {
        let reason = match error {
            EngineError::Grammar { problem } => FinishReason::Grammar(problem.clone()),
            error => FinishReason::Failed(error.to_string()),
        };
        Event { finish: Some(self.finish(reason)), ..self.event() }
    }

    /// An event of nothing.
    fn event(&self) -> Event {
        Event {
            request: self.rank.request,
            choice: self.rank.choice,
            token: None,
            text: String::new(),
            logprobs: None,
            prompt_logprobs: Vec::new(),
            embedding: Vec::new(),
            finish: None,
        }
    }

    fn finish(&self, reason: FinishReason) -> Finish {
        Finish {
            reason,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            generated_tokens: self.generated(),
        }
    }

    /// Tells the pool what the blocks hold that are full by now.
    fn name_blocks(&mut self, kv: &mut KvPool) {
        let block_tokens = kv.block_tokens();
        let full = self.computed / block_tokens;
        if full == self.named {
            return;
        }
        self.names.of(&self.tokens[..self.computed]);
        for index in self.named..full {
            let tokens = &self.tokens[index * block_tokens..(index + 1) * block_tokens];
            kv.remember(&self.kv, index, self.names.before(index + 1), self.names.before(index), tokens);
        }
        self.named = full;
    }

    /// Takes its next token, or that there is none; appends its text and tells whether it was the last one.
    fn accept(
        &mut self,
        token: Option<u32>,
        tokenizer: &Tokenizer,
        text: &mut String,
    ) -> Result<Option<FinishReason>, EngineError> {
        let Some(token) = token else {
            self.text.finish(tokenizer, text)?;
            return Ok(Some(FinishReason::NotFinite));
        };
        self.tokens.push(token);
        self.sampler.accept(token);
        let reason = if self.end_tokens.contains(&token) {
            FinishReason::StopToken(token)
        } else {
            if self.generated() < self.stop.min_tokens {
                self.text.push_unstopped(tokenizer, token, text)?;
            } else if let Some(stop) = self.text.push(tokenizer, token, text)? {
                return Ok(Some(FinishReason::StopString(stop.to_owned())));
            }
            if self.follows_constraint(token)? {
                FinishReason::Complete
            } else if self.generated() == self.stop.max_tokens {
                FinishReason::Length
            } else if self.tokens.len() == self.most_tokens {
                FinishReason::Context
            } else {
                return Ok(None);
            }
        };
        let stopped = self.text.finish(tokenizer, text)?.map(|stop| FinishReason::StopString(stop.to_owned()));
        Ok(Some(stopped.unwrap_or(reason)))
    }

    /// Goes on in the grammar; tells whether nothing can follow.
    fn follows_constraint(&mut self, token: u32) -> Result<bool, EngineError> {
        let Some(constraint) = &mut self.constraint else { return Ok(false) };
        constraint.accept(token)?;
        Ok(constraint.is_finished())
    }
}
