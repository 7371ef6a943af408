//! Loops of kernels, written out.

use std::fmt::Write as _;

/// Writes out the loops of a text, so that compilers see separate variables: lines between `@for i < COUNT` and `@end` stand as often as
/// `counts` says of COUNT, with a number for `@i`.
pub(super) fn repeated(text: &str, counts: &[(&str, usize)]) -> String {
    let mut written = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some((variable, name)) = line.strip_prefix("@for ").and_then(|rest| rest.split_once(" < ")) else {
            // Writing to a string does not fail.
            let _ = writeln!(written, "{line}");
            continue;
        };
        let mut depth = 1;
        let mut body = String::new();
        for line in lines.by_ref() {
            depth += usize::from(line.starts_with("@for "));
            depth -= usize::from(line == "@end");
            if depth == 0 {
                break;
            }
            let _ = writeln!(body, "{line}");
        }
        let count = counts.iter().find(|(count, _)| *count == name).map_or(0, |(_, count)| *count);
        for i in 0..count {
            written += &repeated(&body.replace(&format!("@{variable}"), &i.to_string()), counts);
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_are_written_out() {
        let text = "a\n@for i < TWO\nb@i\n@for j < THREE\nc@i_@j + @ju\n@end\n@end\nd\n";
        let written = repeated(text, &[("TWO", 2), ("THREE", 3)]);
        assert_eq!(written, "a\nb0\nc0_0 + 0u\nc0_1 + 1u\nc0_2 + 2u\nb1\nc1_0 + 0u\nc1_1 + 1u\nc1_2 + 2u\nd\n");
    }
}
