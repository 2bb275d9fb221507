//! Plugging a NIC into a namespace.
//!
//! The veth's end in the virtual network has the router's MAC; its other end is born in the target with the NIC's MAC,
//! address and a default route by the subnet's gateway, which is a permanent neighbour: nothing ever asks by ARP.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net};
use linux::netlink::{Address, Neighbour, Request, Route, RouteEntry, Veth, VethPeer};
use linux::netns::{self, NetNs};
use vnet_model::address::gateway;
use vnet_model::fabric::NicSpec;
use vnet_model::{Mac, ROUTER_MAC};

use crate::Error;
use crate::names::{LINK_GROUP, nic_link};

/// A network namespace to plug a NIC into.
#[derive(Clone, Debug)]
pub enum NetnsRef {
    /// A pin, or any other namespace file.
    Path(PathBuf),
    /// That of a process.
    Pid(u32),
}

impl NetnsRef {
    pub fn open(&self) -> Result<NetNs, Error> {
        let path = match self {
            Self::Path(path) => path.clone(),
            Self::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        };
        Ok(netns::open(&path)?)
    }
}

/// A NIC with what is needed from its subnet.
pub struct Port<'a> {
    pub nic: &'a NicSpec,
    pub subnet: Ipv4Net,
    /// Largest packet.
    pub mtu: u32,
}

/// Ports carry whole frames of ordinary size where no packet leaves the host in another one.
pub const MTU: u32 = 1500;

/// Makes the veth unless this very NIC is already there. The caller then converges the virtual network's namespace.
pub fn plug(vnet: &mut Route, port: &Port<'_>, target: &NetNs, ifname: &str) -> Result<(), Error> {
    if ifname.is_empty() || ifname.len() > 15 || ifname.contains(['/', ' ', ':']) {
        return Err(Error::LinkName {
            name: ifname.to_owned(),
        });
    }
    let nic = port.nic;
    let name = nic_link(&nic.key);
    let mut inside = Route::open_in(target)?;
    let plugged = vnet.link(&name)?;
    let there = inside.link(ifname)?;
    match (plugged, there) {
        (Some(a), Some(b)) if b.peer_index == Some(a.index) && b.mac == Some(nic.mac.0) => {
            vnet.run(Request::set_up(a.index, true))?;
        }
        (_, Some(_)) => {
            return Err(Error::LinkTaken {
                nic: nic.key.clone(),
                name: ifname.to_owned(),
            });
        }
        (stale, None) => {
            // A NIC moves: its last namespace may be gone or about to go.
            if let Some(stale) = stale {
                vnet.run(Request::delete_link(stale.index))?;
            }
            let veth = Veth {
                name,
                mac: Some(ROUTER_MAC.0),
                mtu: Some(port.mtu),
                up: true,
                peer: VethPeer {
                    name: ifname.to_owned(),
                    mac: Some(nic.mac.0),
                    mtu: Some(port.mtu),
                    netns: Some(target.as_fd()),
                },
            };
            vnet.run(Request::create_veth(&veth).in_group(LINK_GROUP))?;
        }
    }
    let link = inside.need_link(ifname)?.index;
    let lo = inside.need_link("lo")?;
    let Some(primary) = nic.primary() else {
        return Err(Error::UnknownNic { key: nic.key.clone() });
    };
    let router = gateway(port.subnet);
    let own = IpNet::new(IpAddr::V4(primary), port.subnet.prefix_len()).unwrap_or(IpNet::from(IpAddr::V4(primary)));
    inside.run_all(&[
        Request::set_up(lo.index, true),
        // The subnet's length tells tools where the NIC lives; its own route would ask neighbours by ARP.
        Request::add_address(&Address {
            link,
            address: own,
            no_prefix_route: true,
        }),
        Request::set_up(link, true),
        Request::add_neighbour(&permanent(link, router.into(), ROUTER_MAC)),
        Request::add_route(&RouteEntry::via_gateway(Ipv4Net::default(), link, router).with_source(primary)),
    ])?;
    // The port went up first: the first packets to the machine would be lost, and a lost answer costs its resolver seconds.
    vnet.settle(&nic_link(&nic.key))?;
    Ok(())
}

fn permanent(link: u32, address: IpAddr, mac: Mac) -> Neighbour {
    Neighbour {
        link,
        address,
        mac: Some(mac.0),
        proxy: false,
        permanent: true,
    }
}
