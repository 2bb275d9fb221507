//! VNet, NIC, NSG and route types, IPAM, wire-server XML, NSG evaluator. No IO.
//!
//! * [`address`]: MAC addresses and the fabric's well-known addresses.
//! * [`arm`]: ARM's bodies of security rules and routes, read and shown.
//! * [`balancer`]: load balancers' distribution and probes, NAT gateways, public addresses, outbound rules.
//! * [`rules`]: what a virtual network and its subnets must satisfy, with ARM's error codes.
//! * [`ipam`]: who holds which address of a subnet.
//! * [`interfaces`]: the wire server's interface information, rendered and parsed.
//! * [`fabric`]: what one host's data plane shall be: input of the `vnet` crate's plan.
//! * [`underlay`]: other hosts, and the numbers of virtual networks between them; [`gateway`]: on-premises sites.
//! * [`nsg`]: network security rules and their evaluation; [`service_tags`]: the names in them.
//! * [`endpoints`]: service endpoints of subnets.
//! * [`zone`]: private DNS zones, [`private_dns`]: their ARM bodies; [`instance`]: what a machine's metadata say.

pub mod address;
pub mod arm;
pub mod balancer;
mod check;
pub mod endpoints;
pub mod fabric;
pub mod gateway;
pub mod instance;
pub mod interfaces;
pub mod ipam;
pub mod nsg;
pub mod private_dns;
pub mod rules;
pub mod service_tags;
pub mod underlay;
pub mod zone;

pub use address::{Mac, ROUTER_MAC, WIRE_SERVER};
