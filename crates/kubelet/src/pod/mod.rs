//! One pod: its parsed form, what is refused, what to do next, what to report, and the task that does it.

pub mod hooks;
pub mod ops;
pub mod plan;
#[cfg(test)]
mod plan_tests;
pub mod refuse;
pub mod start;
pub mod status;
pub mod view;
pub mod worker;
pub mod writer;
