//! The ARM front door over the home cluster.

pub mod az;
pub mod error;
pub mod metadata;
pub mod path;
pub mod table;
pub mod token;
pub mod version;
