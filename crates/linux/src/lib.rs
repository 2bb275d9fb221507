//! Typed blocking netlink, nft batches, namespaces, mounts, cgroups v1 and v2. No async, no policy.

pub mod cgroup;
pub mod mount;
pub mod netlink;
pub mod netns;
pub mod process;
pub mod sysctl;
