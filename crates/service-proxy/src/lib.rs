//! Services to nftables, and the cluster DNS.

pub mod executor;
pub mod plan;
pub mod world;
