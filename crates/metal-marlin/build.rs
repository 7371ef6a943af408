//! Tells the program which compiler built it, for `doctor`.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let version = env::var_os("RUSTC").and_then(|rustc| Command::new(rustc).arg("--version").output().ok());
    let version = version.map_or_else(String::new, |output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    println!("cargo::rustc-env=METAL_MARLIN_RUSTC={}", if version.is_empty() { "unknown" } else { &version });
}
