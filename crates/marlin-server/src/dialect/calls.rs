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

/// A list of such objects.
pub(super) fn of_list(json: &str) -> Option<Vec<Call>> {
    let objects: Vec<&RawValue> = serde_json::from_str(json).ok()?;
    objects.into_iter().map(|object| of_object(object.get())).collect()
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

/// `NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…`, white space between them or not.
pub(super) fn of_glm(text: &str, tools: &[Tool]) -> Option<Call> {
    let end = text.find("<arg_key>").unwrap_or(text.len());
    let name = text[..end].trim();
    if !is_name(name) {
        return None;
    }
    let mut arguments = Map::new();
    let mut rest = text[end..].trim();
    while !rest.is_empty() {
        let (key, after) = rest.strip_prefix("<arg_key>")?.split_once("</arg_key>")?;
        let (value, after) = after.trim_start().strip_prefix("<arg_value>")?.split_once("</arg_value>")?;
        let key = key.trim();
        arguments.insert(key.to_owned(), typed(value, schema_of(tools, name, key)));
        rest = after.trim_start();
    }
    Some(Call { name: name.to_owned(), arguments: Value::Object(arguments).to_string() })
}

/// `<function=NAME><parameter=KEY>\nVALUE\n</parameter>…</function>`.
pub(super) fn of_xml(text: &str, tools: &[Tool]) -> Option<Call> {
    let (name, rest) = text.trim().strip_prefix("<function=")?.split_once('>')?;
    let name = name.trim().trim_matches('"');
    if !is_name(name) {
        return None;
    }
    let mut arguments = Map::new();
    let mut rest = rest.trim_start();
    while let Some(after) = rest.strip_prefix("<parameter=") {
        let (key, after) = after.split_once('>')?;
        let key = key.trim().trim_matches('"');
        let (value, after) = after.split_once("</parameter>")?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        arguments.insert(key.to_owned(), typed(value, schema_of(tools, name, key)));
        rest = after.trim_start();
    }
    let rest = rest.strip_prefix("</function>")?;
    rest.trim().is_empty().then(|| Call { name: name.to_owned(), arguments: Value::Object(arguments).to_string() })
}

/// Whether functions may be called so.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(is_name_char)
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
