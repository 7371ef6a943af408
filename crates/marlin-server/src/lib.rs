//! The OpenAI API over HTTP.
