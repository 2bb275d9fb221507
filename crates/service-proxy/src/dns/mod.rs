//! The cluster's DNS: an authority for the cluster domain, a forwarder for everything else.
//!
//! [`zone`] knows names (pure), [`message`] turns queries into answers, [`server`] owns sockets.

pub mod message;
pub mod server;
pub mod zone;

pub use server::{Server, ServerConfig};
pub use zone::Zone;
