//! Tests of the number formats through the public API.

mod common;
mod elements;
mod encode;
mod groups;
mod layouts;
mod packed;
mod scheme;
mod sparse;
