//! Names of links, tables and pins. They follow from the instance's name and the objects' keys alone, so that everything
//! can be found again, and removed, without any state.

use std::path::{Path, PathBuf};

/// The edge's link to the host, as the edge sees it.
pub const HOST_LINK: &str = "host";
/// A virtual network's link to the edge, as the virtual network sees it.
pub const EDGE_LINK: &str = "edge";
/// The device that leads to other hosts, in a virtual network's namespace and in the edge's.
pub const VXLAN_LINK: &str = "vxlan";
/// Table of NIC ports and inward protection in a virtual network's namespace.
pub const VNET_TABLE: &str = "oaks-vnet";
/// Tables of what NICs must not say over ARP and IPv6, in a virtual network's namespace.
pub const NEIGHBOUR_TABLE: &str = "oaks-neigh";
/// Table of load balancer frontends in a virtual network's namespace.
pub const BALANCER_TABLE: &str = "oaks-lb";
/// Table of security groups in a virtual network's namespace.
pub const SECURITY_TABLE: &str = "oaks-nsg";
/// Table that marks packets for route tables in a virtual network's namespace.
pub const ROUTES_TABLE: &str = "oaks-routes";
/// Table of public addresses for outward flows in a virtual network's namespace.
pub const OUTBOUND_TABLE: &str = "oaks-out";
/// Table that leads answers back by the host their question came through, in a virtual network's namespace.
pub const HOSTS_TABLE: &str = "oaks-hosts";
/// Table of on-premises sites in a virtual network's namespace.
pub const SITES_TABLE: &str = "oaks-sites";
/// Table of the edge's namespace.
pub const EDGE_TABLE: &str = "oaks-edge";
/// Links that one request can delete together.
pub const LINK_GROUP: u32 = 0x6f61;

/// FNV-1a, 64 bits; the same in every build, so that names stay.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The host's link to the edge: `<instance>-edge`, shortened with a hash to fit 15 characters.
pub fn host_link(instance: &str) -> String {
    if instance.len() <= 10 {
        format!("{instance}-edge")
    } else {
        format!("{}{:05x}-edge", &instance[..5], hash(instance) & 0xf_ffff)
    }
}

/// Table in the host's namespace.
pub fn host_table(instance: &str) -> String {
    format!("oaks-{instance}")
}

/// A NIC's port in its virtual network's namespace.
pub fn nic_link(nic: &str) -> String {
    format!("n{:012x}", hash(nic) & 0xffff_ffff_ffff)
}

/// Whether the link is a NIC's port.
pub fn is_nic_link(name: &str) -> bool {
    name.len() == 13 && name.starts_with('n')
}

/// The edge's link to a virtual network.
pub fn vnet_link(vnet: &str) -> String {
    format!("v{:012x}", hash(vnet) & 0xffff_ffff_ffff)
}

pub fn is_vnet_link(name: &str) -> bool {
    name.len() == 13 && name.starts_with('v')
}

/// A virtual network's link to its peer `other`.
pub fn peer_link(other: &str) -> String {
    format!("p{:012x}", hash(other) & 0xffff_ffff_ffff)
}

pub fn is_peer_link(name: &str) -> bool {
    name.len() == 13 && name.starts_with('p')
}

/// A virtual network's link to an on-premises site.
pub fn site_link(site: &str) -> String {
    format!("w{:012x}", hash(site) & 0xffff_ffff_ffff)
}

pub fn is_site_link(name: &str) -> bool {
    name.len() == 13 && name.starts_with('w')
}

pub fn pins(run_dir: &Path) -> PathBuf {
    run_dir.join("netns")
}

pub fn edge_pin(run_dir: &Path) -> PathBuf {
    pins(run_dir).join("edge")
}

const VNET_PIN: &str = "v-";

pub fn vnet_pin(run_dir: &Path, vnet: &str) -> PathBuf {
    pins(run_dir).join(format!("{VNET_PIN}{vnet}"))
}

/// The virtual network's key if the file is one's pin.
pub fn vnet_of_pin(file_name: &str) -> Option<&str> {
    file_name.strip_prefix(VNET_PIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        assert_eq!(host_link("oaks"), "oaks-edge");
        let long = ["a-rather-long-name-1", "a-rather-long-name-2"].map(host_link);
        assert_ne!(long[0], long[1]);
        for name in [&long[0], &nic_link("x"), &vnet_link("x")] {
            assert!(name.len() <= 15, "{name}");
        }
        assert!(is_nic_link(&nic_link("x")) && !is_nic_link("edge"));
    }
}
