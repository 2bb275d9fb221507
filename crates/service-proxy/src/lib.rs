//! Services to nftables, and the cluster DNS.
//!
//! Data flows: informers -> [`world`] (Services joined with their endpoints) -> [`plan`] (one table, pure) ->
//! [`executor`] (one transaction in a namespace), and -> [`dns::zone`] -> [`dns::server`]. [`run()`] is the loop.
//!
//! # Where DNS is bound
//! In a machine the DNS address itself is put on `lo` and the server binds it: pods route there by default, so no
//! translation is needed. In a VNet's namespace two clusters may have the same DNS address, so there the server binds an
//! address and port of the namespace and the VNet leads each cluster's queries to it.

pub mod dns;
pub mod executor;
pub mod plan;
mod run;
pub mod world;

pub use run::{Mode, ProxyConfig, RunError, remove, run};
