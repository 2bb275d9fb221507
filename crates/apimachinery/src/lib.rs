//! The Kubernetes wire: type table, codecs, patches, selectors, quantities, Status, watch frames. No IO.

pub mod meta;
pub mod quantity;
pub mod selector;
pub mod time;
