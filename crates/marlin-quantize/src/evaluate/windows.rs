//! A text cut into evaluation windows.

use crate::QuantizeError;

/// The tokens of a text in windows of `context` tokens, stride = window; the last one may be shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    context: usize,
}

impl Windows {
    /// Cuts `tokens` into windows and keeps the first `limit` of them, or all.
    ///
    /// Fails if a window would predict nothing: `context` below 2 or fewer than 2 tokens.
    pub fn new(mut tokens: Vec<u32>, context: usize, limit: Option<usize>) -> Result<Self, QuantizeError> {
        if context < 2 {
            return Err(QuantizeError::Context { context });
        }
        if let Some(limit) = limit {
            tokens.truncate(limit.saturating_mul(context));
        }
        if tokens.len() < 2 {
            return Err(QuantizeError::TextTooShort { tokens: tokens.len() });
        }
        Ok(Self { tokens, context })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.tokens.len().div_ceil(self.context)
    }

    /// Never true: a text that is too short is refused.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Predicted tokens: all but the first of each window.
    pub fn predicted(&self) -> usize {
        self.tokens.len() - self.len()
    }

    /// The windows, none of them empty.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.tokens.chunks(self.context)
    }

    /// Predicted tokens of the windows before `window`.
    pub(super) fn predicted_before(&self, window: usize) -> usize {
        window * (self.context - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_window_is_shorter() {
        let windows = Windows::new((0..10).collect(), 4, None).unwrap();
        assert_eq!(windows.iter().collect::<Vec<_>>(), [&[0, 1, 2, 3][..], &[4, 5, 6, 7], &[8, 9]]);
        assert_eq!((windows.len(), windows.predicted()), (3, 7));
    }

    #[test]
    fn a_last_window_of_one_token_predicts_nothing() {
        let windows = Windows::new((0..9).collect(), 4, None).unwrap();
        assert_eq!((windows.len(), windows.predicted()), (3, 6));
    }

    #[test]
    fn a_limit_keeps_the_first_windows() {
        let windows = Windows::new((0..10).collect(), 4, Some(2)).unwrap();
        assert_eq!((windows.len(), windows.predicted()), (2, 6));
        assert_eq!(Windows::new((0..10).collect(), 4, Some(usize::MAX)).unwrap().len(), 3);
    }

    #[test]
    fn windows_that_predict_nothing_are_refused() {
        assert!(matches!(Windows::new(vec![1, 2], 1, None), Err(QuantizeError::Context { context: 1 })));
        assert!(matches!(Windows::new(vec![1], 8, None), Err(QuantizeError::TextTooShort { tokens: 1 })));
        assert!(matches!(Windows::new(vec![1, 2, 3], 8, Some(0)), Err(QuantizeError::TextTooShort { tokens: 0 })));
    }
}
