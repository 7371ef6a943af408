//! Where a JSON value ends that comes in pieces.

/// Looks for the end of one object or array.
#[derive(Debug, Clone, Default)]
pub(super) struct Scanner {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Scanner {
    /// Scans on; gives the number of bytes up to the end of the value, if it ends here. The first byte of all must open it.
    pub(super) fn scan(&mut self, text: &str) -> Option<usize> {
        for (place, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(place + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_ends_outside_of_strings() {
        let value = r#"{"a": "}]\"\\", "b": [{"c": "{"}]}"#;
        let text = format!("{value} rest");
        assert_eq!(Scanner::default().scan(&text), Some(value.len()));
        for split in 0..value.len() {
            let mut scanner = Scanner::default();
            assert_eq!(scanner.scan(&text[..split]), None);
            assert_eq!(scanner.scan(&text[split..]), Some(value.len() - split));
        }
    }
}
