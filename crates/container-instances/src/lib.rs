//! Container groups on a host: sandbox, containers, volumes, a NIC of a delegated subnet, quotas, and a meter.
//!
//! A container group and a pod are the same thing, so the engine side ([`Groups`]) is `sandbox`'s traits over an engine
//! of the host, plus the places where a group differs from a pod of a machine: its NIC comes from a [`NicProvider`]
//! ([`NicNetwork`] hands it to the engine), quota decides admission ([`Quota`]), every group has a usage record from its
//! first image pull to its stop ([`meter`]), and home shows it as a ContainerGroup ([`home`]), if there is a home.

pub mod groups;
pub mod home;
pub mod meter;
pub mod nic;
pub mod quota;

pub use groups::{Groups, GroupsConfig, GroupsError};
pub use meter::{Meter, MeterError, Rule, Usage};
pub use nic::{NicError, NicNetwork, NicProvider, NicRequest};
pub use quota::Quota;
