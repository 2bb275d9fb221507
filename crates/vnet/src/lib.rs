//! Plan and apply of VNets and the edge; wire server, IMDS, VNet DNS. Knows no pods.
//!
//! A virtual network is a router: one network namespace per VNet on this host. [`plan`] turns a
//! [`vnet_model::fabric::FabricSpec`] into what every namespace shall hold; [`Fabric::apply`] makes it so and touches only
//! what changed; [`Fabric::attach`] plugs a NIC into a machine's or group's namespace; [`Fabric::serve`] opens the wire
//! server and VNet DNS inside; [`teardown`] removes everything by name; [`diff`] says what an apply
//! would change.

mod attach;
mod converge;
mod dial;
mod diff;
mod drops;
mod error;
mod fabric;
mod join;
mod names;
pub mod plan;
mod probe;
mod serve;
mod sites;
mod teardown;
mod tunnel;

pub use attach::NetnsRef;
pub use diff::{Action, Difference, diff};
pub use drops::drops;
pub use error::Error;
pub use fabric::{Fabric, Report};
pub use names::{edge_pin, host_link, host_table, nic_link, vnet_pin};
pub use plan::{DENIED, NOT_OF_SITE, ROGUE_DHCP, SPOOFED, SPOOFED_ARP, SPOOFED_ND, SPOOFED_RA, UNKNOWN_PEER};
pub use plan::{FORGOTTEN, NO_ADDRESS, NOT_A_SOURCE};
pub use probe::{Health, Target};
pub use serve::metadata::{Token, TokenFuture, TokenSource};
pub use teardown::teardown;
pub use tunnel::{Tunnel, TunnelConfig, TunnelKeys};
