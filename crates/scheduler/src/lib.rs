//! Pure placement, and the loop that binds.
//!
//! [`model`] turns Pods and Nodes into what placement needs; [`Cache`] is the world as the scheduler believes it to be
//! (bindings it has decided count at once); [`plan`](plan::plan) picks a node or says in upstream's words why none fits;
//! [`run`] follows the informers, binds, and reports. Preemption is not there: a pod that fits nowhere waits.

pub mod cache;
pub mod filter;
pub mod model;
mod pending;
pub mod plan;
mod run;
pub mod score;
#[cfg(test)]
mod tests;

pub use cache::Cache;
pub use plan::{Decision, plan};
pub use run::{SCHEDULER_NAME, run};
