//! The binaries `azure-vnet` and `azure-vnet-ipam`: small, synchronous, no async runtime.
//!
//! [`entry`] turns a process into an [`spec::Invocation`] and a [`conf::NetConf`]; [`plugin`] has the verbs;
//! [`ipam`] reserves addresses ([`pool`], pure) that a [`source`] tells ([`wire`], [`http`]) and remembers them
//! ([`store`]); [`transparent`] and [`bridge`] make links, [`links`] removes them; [`masquerade`] lets pods out. What is printed is a [`result`] or a [`spec::Failure`].

pub mod bridge;
pub mod conf;
pub mod delegate;
pub mod entry;
pub mod http;
pub mod ipam;
pub mod links;
pub mod masquerade;
pub mod plugin;
pub mod pool;
pub mod result;
pub mod source;
pub mod spec;
pub mod steps;
pub mod store;
mod sys;
pub mod transparent;
pub mod wire;

pub use sys::Arena;
#[cfg(feature = "bench")]
pub use sys::children_kb_max;
