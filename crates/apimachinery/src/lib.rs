//! The Kubernetes wire: type table, codecs, patches, selectors, quantities, Status, watch frames. No IO.

pub mod codec;
pub mod columns;
pub mod cron;
pub mod defaults;
pub mod discovery;
pub mod field;
pub mod gvk;
pub mod meta;
pub mod openapi;
pub mod patch;
pub mod quantity;
pub mod selector;
pub mod ssa;
pub mod status;
pub mod structural;
pub mod table;
pub mod time;
pub mod usage;
pub mod validate;
