//! The platform's own kinds: every intent of the platform and its status is one of these objects in the home cluster.
//!
//! All kinds are cluster-scoped in `oaks.internal/v1alpha1`. ARM-backed kinds carry an [`ArmSpec`]: the id in its first
//! casing and the ARM body exactly as sent; the typed views in [`views`] are parsed from the body where they are needed.
//! Kinds without an ARM twin ([`Machine`], [`VirtualNode`], [`Host`]) have a typed spec. No IO happens here.

pub mod aks;
pub mod id;
pub mod kinds;
pub mod site;
pub mod views;
pub mod vm_size;

pub use id::{ArmId, GROUP_FINALIZER, GROUP_LABEL, group_id, labels_of, object_name};
pub use kinds::*;
pub use site::{InterfaceSpec, SiteSpec, SiteStatus, WireGuardSpec};
