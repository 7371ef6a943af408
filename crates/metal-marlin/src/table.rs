//! Tables for people.

/// Columns side by side: the first row are headings, the first column names.
pub(crate) fn text_table<R: AsRef<[String]>>(rows: &[R]) -> String {
    let width = |column: usize| rows.iter().map(|row| row.as_ref()[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows.iter().map(AsRef::as_ref) {
        let mut line = format!("{:<width$}", row[0], width = width(0));
        for (column, cell) in row.iter().enumerate().skip(1) {
            line += &format!("  {cell:>width$}", width = width(column));
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}
