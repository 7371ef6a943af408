//! Python's symbols are found when the module is loaded: on macOS the linker has to be told.

fn main() {
    pyo3_build_config::add_extension_module_link_args();
}
