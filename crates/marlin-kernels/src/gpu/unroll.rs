//! Writes out loops of WGSL before it is compiled: compilers of drivers keep separate variables in registers, but not arrays of them.

use std::collections::HashMap;

/// Copies the lines between `@for i < COUNT` and `@end` as often as COUNT says, with a number for `@i`. COUNT is a number or a constant that
/// the source defines before, at the beginning of a line, as `const COUNT = …u;`. Such loops nest.
///
/// # Panics
/// If the source, which is the crate's own, is not of this form.
pub(super) fn unroll(source: &str) -> String {
    if !source.contains("@for ") {
        return source.to_owned();
    }
    let constants = source.lines().filter_map(constant).collect();
    let mut unrolled = String::with_capacity(4 * source.len());
    unroll_lines(source, &constants, &mut unrolled);
    unrolled
}

fn unroll_lines(source: &str, constants: &HashMap<&str, usize>, unrolled: &mut String) {
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let Some(head) = line.trim_start().strip_prefix("@for ") else {
            unrolled.push_str(line);
            unrolled.push('\n');
            continue;
        };
        let (variable, count) = head.split_once(" < ").unwrap_or_else(|| panic!("`@for i < COUNT`, found {line}"));
        let count = constants.get(count).copied().or_else(|| count.parse().ok());
        let count = count.unwrap_or_else(|| panic!("a number or a constant, found {line}"));
        let mut body = String::new();
        let mut depth = 1;
        for line in lines.by_ref() {
            depth += usize::from(line.trim_start().starts_with("@for "));
            depth -= usize::from(line.trim() == "@end");
            if depth == 0 {
                break;
            }
            body.push_str(line);
            body.push('\n');
        }
        assert_eq!(depth, 0, "an `@end` for {line}");
        for i in 0..count {
            unroll_lines(&body.replace(&format!("@{variable}"), &i.to_string()), constants, unrolled);
        }
    }
}

/// The name and the value of a whole number, if a line defines one.
fn constant(line: &str) -> Option<(&str, usize)> {
    let (name, value) = line.strip_prefix("const ")?.split_once(" = ")?;
    Some((name, value.strip_suffix("u;")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::unroll;

    #[test]
    fn loops_are_written_out() {
        let source = "const TWO = 2u;\n@for i < TWO\nb@i\n  @for j < 3\n  c@i_@j + @ju\n  @end\n@end\nd\n";
        let unrolled = "const TWO = 2u;\nb0\n  c0_0 + 0u\n  c0_1 + 1u\n  c0_2 + 2u\nb1\n  c1_0 + 0u\n  c1_1 + 1u\n  c1_2 + 2u\nd\n";
        assert_eq!(unroll(source), unrolled);
    }

    #[test]
    fn what_has_no_loops_stays() {
        assert_eq!(unroll("@compute fn main() {}"), "@compute fn main() {}");
        assert_eq!(unroll("@for i < 0\n@i\n@end\n"), "");
    }
}
