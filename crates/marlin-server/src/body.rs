//! Bodies of requests.

use std::fmt;
use std::marker::PhantomData;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::ApiError;

/// A body of JSON. What is wrong with it is said with the place: fields that are not known, too.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let media_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let essence = media_type.split(';').next().unwrap_or("").trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::media_type(format!(
                "the body must be JSON: send the header Content-Type: application/json (found {media_type:?})"
            )));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let message = rejection.body_text();
            if rejection.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
                ApiError::too_large(format!("{message} (the server's --max-body says how much it takes)"))
            } else {
                ApiError::invalid(message)
            }
        })?;
        parse(&bytes).map(Self)
    }
}

/// Reads a body.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner();
        // Serde names the field and those there are.
        let unknown = problem
            .to_string()
            .strip_prefix("unknown field `")
            .and_then(|rest| Some(rest.split_once('`')?.0.to_owned()));
        match unknown {
            Some(field) if problem.is_data() => {
                let parent = path.rsplit_once('.').map_or_else(String::new, |(parent, _)| format!("{parent}."));
                let name = if path.ends_with(&field) { path } else { format!("{parent}{field}") };
                ApiError::parameter(name.clone(), format!("{name} is not supported: {problem}"))
                    .with_code("unsupported_parameter")
            }
            _ if problem.is_data() && path != "." => ApiError::parameter(path.clone(), format!("{path}: {problem}")),
            _ => ApiError::invalid(format!("the body is not what it should be: {problem}")),
        }
    })?;
    json.end()
        .map_err(|error| ApiError::invalid(format!("there is something behind the JSON of the body: {error}")))?;
    Ok(value)
}

/// Reads an object that may be missing. Serde takes a list of its fields as well, which is no way to write one.
pub(crate) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_option(Object(PhantomData))
}

struct Object<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }
}

/// What clients may fill as they like.
const FREE: [&str; 2] = ["input", "arguments"];

/// Reads what is told apart by its `type`, within an enum that is told apart by its shape. There serde takes a number for a type: the place of
/// a variant.
pub(crate) fn by_type<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let value = Value::deserialize(deserializer)?;
    if !has_named_types(&value) {
        return Err(D::Error::custom("a type must be a text"));
    }
    T::deserialize(value).map_err(D::Error::custom)
}

fn has_named_types(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(has_named_types),
        Value::Object(object) => object.iter().all(|(name, inside)| match name.as_str() {
            "type" => inside.is_string(),
            name => FREE.contains(&name) || has_named_types(inside),
        }),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        deep: Option<f32>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        name: String,
        #[serde(default, deserialize_with = "object")]
        inner: Option<Inner>,
    }

    fn refusal(body: &str) -> String {
        let error = parse::<Outer>(body.as_bytes()).unwrap_err();
        serde_json::to_string(&error.into_body()).unwrap()
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        assert!(refusal(r#"{"name": "a", "nam": 1}"#).contains(r#""param":"nam","code":"unsupported_parameter""#));
        assert!(refusal(r#"{"name": "a", "inner": {"deeper": 1}}"#).contains(r#""param":"inner.deeper""#));
        assert!(refusal(r#"{"name": "a", "inner": {"deep": "x"}}"#).contains(r#""param":"inner.deep""#));
        assert!(refusal(r#"{"name": "a", "inner": [null]}"#).contains("expected an object"));
        assert!(parse::<Outer>(br#"{"name": "a", "inner": null}"#).is_ok());
        assert!(refusal(r#"{"name": "a"} x"#).contains("behind the JSON"));
        assert!(refusal(r#"{"name": "#).contains("EOF"));
        assert!(parse::<Outer>(b"{\"name\": \"\xff\"}").is_err());
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(refusal(&deep).contains("error"));
        let status = ApiError::media_type("").into_response().status();
        assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
}
