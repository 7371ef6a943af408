//! Metal Marlin as a library: open a checkpoint, open a device, load the model onto it.
//!
//! ```no_run
//! use metal_marlin::{DeviceOptions, load};
//!
//! let checkpoint = load::open_checkpoint(Some("path/to/model".as_ref()))?;
//! let device = DeviceOptions::default().open()?;
//! let model = load::load_model(&checkpoint, &device, &Default::default())?;
//! println!("{} on {}", model.info().architecture, model.info().device.name);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`marlin_engine::Engine`] then turns requests into text.

pub mod batch;
pub mod bench;
#[cfg(feature = "bundled-model")]
mod bundled;
pub mod cli;
pub mod device;
pub mod doctor;
pub mod hub;
pub mod kernel_bench;
pub mod kv_store;
pub mod load;
pub mod machine;
pub mod memory;
pub mod model_cache;
pub mod serve_bench;
pub mod stats;
mod table;
pub mod tile_cache;
pub mod verify;

pub use device::DeviceOptions;
pub use load::LoadError;
