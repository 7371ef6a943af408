//! `GET /`: a page to talk with the model in a browser. It holds all that it needs, and keeps conversations in the browser.

use axum::http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use axum::response::{Html, IntoResponse, Response};

/// The elements and their looks, and what they do.
const PAGE: &str = concat!(include_str!("page.html"), "<script>\n", include_str!("page.js"), "</script>\n");

/// It may talk with this server only, and load nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Gives the page, to anybody: what it asks for needs a key, if the server wants one.
pub(crate) async fn page() -> Response {
    let headers =
        [(CONTENT_SECURITY_POLICY, POLICY), (X_CONTENT_TYPE_OPTIONS, "nosniff"), (REFERRER_POLICY, "no-referrer")];
    (headers, Html(PAGE)).into_response()
}
