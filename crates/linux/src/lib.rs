//! Typed blocking netlink, nft batches, namespaces, mounts, cgroups v1 and v2. No async, no policy.
