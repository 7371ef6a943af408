//! From the hidden states of a text to one vector for it.

/// How hidden states of tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The last token's, which has seen all others: what models are trained for that are made of decoders (Qwen3-Embedding).
    Last,
    /// The mean of all tokens'. Such a prompt is computed whole, whatever is cached.
    Mean,
}

/// The hidden states of a text, as far as they are computed.
#[derive(Debug, Clone)]
pub(crate) struct Pooled {
    pub(crate) pooling: Pooling,
    /// Sums in the order of tokens, so that they do not depend on how the text was cut into steps.
    sums: Vec<f64>,
}

impl Pooled {
    pub(crate) fn new(pooling: Pooling) -> Self {
        Self { pooling, sums: Vec::new() }
    }

    /// Takes the next tokens' hidden states, `[tokens, width]`.
    pub(crate) fn add(&mut self, states: &[f32], width: usize) {
        self.sums.resize(width, 0.0);
        for state in states.chunks_exact(width) {
            if self.pooling == Pooling::Last {
                self.sums.fill(0.0);
            }
            self.sums.iter_mut().zip(state).for_each(|(sum, &x)| *sum += f64::from(x));
        }
    }

    /// Forgets them.
    pub(crate) fn clear(&mut self) {
        self.sums.clear();
    }

    /// The vector, of length 1 (a mean and a sum have the same direction); `None` if it has none, or is not finite.
    pub(crate) fn embedding(&self) -> Option<Vec<f32>> {
        let length = self.sums.iter().map(|x| x * x).sum::<f64>().sqrt();
        (length.is_finite() && length > 0.0).then(|| self.sums.iter().map(|x| (x / length) as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_and_mean() {
        let states = [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]].concat();
        for cut in [0, 2, 4, 6] {
            let embedding = |pooling| {
                let mut pooled = Pooled::new(pooling);
                pooled.add(&states[..cut], 2);
                pooled.add(&states[cut..], 2);
                pooled.embedding().unwrap()
            };
            assert_eq!(embedding(Pooling::Last), [0.6, 0.8]);
            let length = 52f32.sqrt();
            assert_eq!(embedding(Pooling::Mean), [4.0 / length, 6.0 / length]);
        }
    }

    #[test]
    fn what_has_no_direction_is_no_embedding() {
        let mut pooled = Pooled::new(Pooling::Mean);
        pooled.add(&[1.0, -1.0, -1.0, 1.0], 2);
        assert_eq!(pooled.embedding(), None);
        pooled.clear();
        pooled.add(&[f32::NAN, 1.0], 2);
        assert_eq!(pooled.embedding(), None);
    }
}
