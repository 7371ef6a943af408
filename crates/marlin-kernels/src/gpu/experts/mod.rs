//! Mixtures of experts: which experts tokens go to, and the memory that computing with them needs. The experts' linears are
//! [groups](super::linear::GpuLinearGroup).

mod router;
mod routes;
#[cfg(test)]
mod tests;

pub use self::router::GpuRouter;
pub(super) use self::router::{ROUTE_CHOOSE, compile, route_constants, select_parameters};
pub use self::routes::GpuRoutes;
