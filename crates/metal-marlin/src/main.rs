//! The command line of Metal Marlin.

use std::process::ExitCode;

fn main() -> ExitCode {
    metal_marlin::cli::main(std::env::args_os()).into()
}
