//! Typed blocking netlink, nft batches, namespaces, mounts, cgroups v1 and v2. No async, no policy.
//!
//! * [`netns`]: network namespaces pinned at a path, and running code inside one on a scratch thread.
//! * [`netlink`]: a sequence-checked socket; links, addresses, routes and neighbours as plain data.
//! * [`nft`]: tables as plain data, applied in one transaction.
//! * [`conntrack`]: forgetting the connections of an address.
//! * [`tun`]: TUN devices.
//! * [`sysctl`]: `net.*` keys of the calling thread's network namespace.
//! * [`mount`], [`cgroup`], [`process`]: what machines and sandboxes are made of.

pub mod cgroup;
pub mod conntrack;
pub mod mount;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod process;
pub mod sysctl;
pub mod tun;
