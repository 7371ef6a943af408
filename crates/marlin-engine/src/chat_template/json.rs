//! `tojson` as templates know it: Python's `json.dumps`.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Deeper values are refused; Python's limit is about a thousand.
const MOST_DEPTH: usize = 128;

/// `value|tojson(indent=…, ensure_ascii=…, separators=…, sort_keys=…)`. Unlike Jinja's own filter, and like that of
/// `transformers`, it escapes nothing for HTML.
pub(super) fn to_json(state: &State, value: Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators must be a pair of strings")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let ensure_ascii: Option<bool> = arguments.get("ensure_ascii")?;
    let sort_keys: Option<bool> = arguments.get("sort_keys")?;
    arguments.assert_all_used()?;
    let mut writer = Writer {
        state,
        indent,
        item_separator: item,
        key_separator: key,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
        out: String::new(),
    };
    writer.value(&value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    /// Pays for what is written before it is.
    state: &'a State<'a, 'a>,
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
    out: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MOST_DEPTH {
            return Err(invalid(format!("tojson: a value nested more than {MOST_DEPTH} deep")));
        }
        match value.kind() {
            ValueKind::Map => self.map(value, depth),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            _ => {
                let text = scalar(value)?;
                self.push(&text)
            }
        }
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.push("[")?;
        let mut is_empty = true;
        for item in value.try_iter()? {
            self.begin_item(is_empty, depth + 1)?;
            is_empty = false;
            self.value(&item, depth + 1)?;
        }
        self.end("]", is_empty, depth)
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            self.state.consume_fuel(1)?;
            let name = match key.as_str() {
                Some(name) => name.to_owned(),
                None => scalar(&key)?,
            };
            entries.push((name, value.get_item(&key)?));
        }
        if self.sort_keys {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.push("{")?;
        for (index, (name, value)) in entries.iter().enumerate() {
            self.begin_item(index == 0, depth + 1)?;
            self.string(name)?;
            let separator = self.key_separator.clone();
            self.push(&separator)?;
            self.value(value, depth + 1)?;
        }
        self.end("}", entries.is_empty(), depth)
    }

    fn begin_item(&mut self, is_first: bool, depth: usize) -> Result<(), Error> {
        if !is_first {
            let separator = self.item_separator.clone();
            self.push(&separator)?;
        }
        self.new_line(depth)
    }

    fn end(&mut self, bracket: &str, is_empty: bool, depth: usize) -> Result<(), Error> {
        if !is_empty {
            self.new_line(depth)?;
        }
        self.push(bracket)
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.indent else { return Ok(()) };
        let spaces = indent.saturating_mul(depth);
        self.pay(spaces)?;
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n(' ', spaces));
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.pay(text.len())?;
        let quoted = serde_json::to_string(text).map_err(|error| invalid(error.to_string()))?;
        if !self.ensure_ascii {
            return self.push(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                self.out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
        Ok(())
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.pay(text.len())?;
        self.out.push_str(text);
        Ok(())
    }

    fn pay(&self, bytes: usize) -> Result<(), Error> {
        // Walking a value costs more than copying text.
        self.state.consume_fuel(1 + bytes as u64 / 16)
    }
}

/// What is neither text nor a collection.
fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(value.is_true().to_string()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(float(f64::try_from(value.clone())?)),
        kind => Err(invalid(format!("tojson: an {kind} value has no JSON"))),
    }
}

/// A float as Python writes it: Rust's shortest digits, with an exponent of a sign and two digits.
fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "NaN" } else { "Infinity" };
        return if value < 0.0 { format!("-{name}") } else { name.to_owned() };
    }
    let text = format!("{value:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    match exponent.strip_prefix('-') {
        Some(exponent) => format!("{digits}e-{exponent:0>2}"),
        None => format!("{digits}e+{exponent:0>2}"),
    }
}

fn invalid(problem: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}
