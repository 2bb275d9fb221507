//! Services to nftables, and the cluster DNS.
