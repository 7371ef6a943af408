//! What is written between the markers of a call.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::Tool;

/// A call.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) name: String,
    /// A JSON object.
    pub(super) arguments: String,
}

/// A call as a JSON object.
#[derive(Deserialize)]
struct CallObject<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

/// `{"name": …, "arguments": {…}}`, with `parameters` for `arguments` as well. Arguments are what was written, to the byte; those that
/// some models put into a text are taken out of it.
pub(super) fn of_object(json: &str) -> Option<Call> {
    let CallObject { name, arguments } = serde_json::from_str(json).ok()?;
    if name.is_empty() {
        return None;
    }
    let arguments = arguments.map_or("null", RawValue::get);
    let arguments = match arguments.as_bytes().first() {
        Some(b'{') => arguments.to_owned(),
        Some(b'"') => {
            let inner: String = serde_json::from_str(arguments).ok()?;
            serde_json::from_str::<Map<String, Value>>(&inner).ok()?;
            inner
        }
        _ if arguments == "null" => "{}".to_owned(),
        _ => return None,
    };
    Some(Call { name, arguments })
}

/// What is known of an object that is cut off: the name, and what there is of the arguments.
pub(super) fn of_beginning(json: &str) -> Option<Call> {
    let rest = json.split_once("\"name\"")?.1.trim_start().strip_prefix(':')?.trim_start();
    let mut names = serde_json::Deserializer::from_str(rest).into_iter::<String>();
    let name = names.next()?.ok()?;
    let rest = &rest[names.byte_offset()..];
    let key = ["\"arguments\"", "\"parameters\""].iter().find_map(|key| rest.split_once(key))?;
    let arguments = key.1.trim_start().strip_prefix(':')?.trim_start();
    arguments.starts_with('{').then(|| Call { name, arguments: arguments.to_owned() })
}

/// A call in which arguments stand between tags, as far as it can be read.
pub(super) struct TaggedCall<'a> {
    name: &'a str,
    arguments: Map<String, Value>,
    /// What stands behind the last argument.
    rest: &'a str,
}

impl TaggedCall<'_> {
    /// The call, if nothing is left but what closes it.
    pub(super) fn whole(self, close: &str) -> Option<Call> {
        let is_whole = self.rest.trim() == close;
        is_whole.then(|| Call { name: self.name.to_owned(), arguments: Value::Object(self.arguments).to_string() })
    }

    /// What is known of a call that is cut off: an object that nothing closes.
    pub(super) fn beginning(self) -> Call {
        let mut arguments = Value::Object(self.arguments).to_string();
        arguments.pop();
        Call { name: self.name.to_owned(), arguments }
    }
}

/// `NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…`, white space between them or not.
pub(super) fn of_glm<'a>(text: &'a str, tools: &[Tool]) -> Option<TaggedCall<'a>> {
    let text = text.trim_start();
    let (name, mut rest) = text.split_at(text.find('<').unwrap_or(text.len()));
    let name = name.trim();
    let mut arguments = Map::new();
    let argument = |rest: &'a str| {
        let (key, after) = rest.trim_start().strip_prefix("<arg_key>")?.split_once("</arg_key>")?;
        let (value, after) = after.trim_start().strip_prefix("<arg_value>")?.split_once("</arg_value>")?;
        Some((key.trim(), value, after))
    };
    while let Some((key, value, after)) = argument(rest) {
        arguments.insert(key.to_owned(), typed(value, schema_of(tools, name, key)));
        rest = after;
    }
    is_name(name).then_some(TaggedCall { name, arguments, rest })
}

/// `<function=NAME><parameter=KEY>\nVALUE\n</parameter>…</function>`.
pub(super) fn of_xml<'a>(text: &'a str, tools: &[Tool]) -> Option<TaggedCall<'a>> {
    let (name, mut rest) = text.trim_start().strip_prefix("<function=")?.split_once('>')?;
    let name = unquoted(name);
    let mut arguments = Map::new();
    let argument = |rest: &'a str| {
        let (key, after) = rest.trim_start().strip_prefix("<parameter=")?.split_once('>')?;
        let (value, after) = after.split_once("</parameter>")?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        Some((unquoted(key), value.strip_suffix('\n').unwrap_or(value), after))
    };
    while let Some((key, value, after)) = argument(rest) {
        arguments.insert(key.to_owned(), typed(value, schema_of(tools, name, key)));
        rest = after;
    }
    is_name(name).then_some(TaggedCall { name, arguments, rest })
}

fn unquoted(text: &str) -> &str {
    text.trim().trim_matches('"')
}

/// Whether functions may be called so.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(is_name_char)
}

/// The name that a text begins with, which may be empty, and what follows.
pub(super) fn split_name(text: &str) -> (&str, &str) {
    text.split_at(text.find(|char| !is_name_char(char)).unwrap_or(text.len()))
}

pub(super) fn is_name_char(char: char) -> bool {
    char.is_alphanumeric() || matches!(char, '_' | '-' | '.' | ':' | '/')
}

/// The schema of one argument of a tool.
fn schema_of<'a>(tools: &'a [Tool], name: &str, key: &str) -> Option<&'a Value> {
    let tool = tools.iter().find(|tool| tool.name == name)?;
    tool.parameters.as_ref()?.get("properties")?.get(key)
}

/// A value written without quotes: a text where the schema wants one, otherwise JSON if it is that.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    let kinds = schema.and_then(|schema| schema.get("type"));
    let is = |kind: &str| match kinds {
        Some(Value::String(only)) => only == kind,
        Some(Value::Array(several)) => several.iter().any(|one| one == kind),
        _ => false,
    };
    let as_text = || Value::String(text.to_owned());
    if is("string") && !(is("null") && text.trim() == "null") {
        return as_text();
    }
    serde_json::from_str(text.trim()).unwrap_or_else(|_| as_text())
}
