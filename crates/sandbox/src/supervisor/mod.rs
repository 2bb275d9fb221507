//! The supervisor `oaks-init`: PID 1 of a machine, or once per host for container groups.
//!
//! It holds what must outlive every other process of ours: it is the parent of all containers, reads their output and
//! writes the logs, keeps exit codes until someone has recorded them, and restarts the node agent. Clients come and go
//! over a unix socket ([`protocol`], [`client`]). No async runtime and no dependency beyond `rustix`, `libc` and `serde`:
//! the program stays far below 1 MB.

pub mod client;
pub mod init;
pub mod protocol;
