//! The binaries azure-vnet and azure-vnet-ipam: small, synchronous, no async runtime.

pub mod conf;
pub mod http;
pub mod pool;
pub mod result;
pub mod spec;
pub mod store;
mod sys;
