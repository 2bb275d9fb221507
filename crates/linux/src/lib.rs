//! Typed blocking netlink, nft batches, namespaces, mounts, cgroups v1 and v2. No async, no policy.
//!
//! * [`netns`]: network namespaces pinned at a path, and running code inside one on a scratch thread.
//! * [`netlink`]: a sequence-checked socket; links, addresses, routes and neighbours as plain data.
//! * [`sysctl`]: `net.*` keys of the calling thread's network namespace.

pub mod netlink;
pub mod netns;
pub mod sysctl;
