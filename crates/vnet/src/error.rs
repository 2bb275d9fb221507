//! What can go wrong on the way to the data plane.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use thiserror::Error;
use vnet_model::fabric::SpecError;

#[derive(Debug, Error)]
pub enum Error {
    #[error("the fabric's spec is not valid")]
    Spec(#[source] SpecError),
    #[error(transparent)]
    Netlink(#[from] linux::netlink::Error),
    #[error(transparent)]
    Nft(#[from] linux::nft::Error),
    #[error(transparent)]
    Netns(#[from] linux::netns::Error),
    #[error(transparent)]
    Sysctl(#[from] linux::sysctl::Error),
    #[error("the host already routes {route} (link {link}), which overlaps {wanted}; choose another range")]
    RouteTaken { wanted: IpNet, route: IpNet, link: String },
    #[error("there is no uplink {name}")]
    NoUplink { name: String },
    #[error("{count} virtual networks do not fit the transit range")]
    TooManyVnets { count: usize },
    #[error("virtual network {key} is not as it should be; the others are")]
    Vnet { key: String, source: Box<Error> },
    #[error("there is no virtual network {key}")]
    UnknownVnet { key: String },
    #[error("there is no NIC {key}")]
    UnknownNic { key: String },
    #[error("link name {name:?} is not valid")]
    LinkName { name: String },
    #[error("NIC {nic}: the namespace already has a link {name}")]
    LinkTaken { nic: String, name: String },
    #[error("cannot connect from virtual network {vnet} to {address}")]
    Dial {
        vnet: String,
        address: SocketAddr,
        source: io::Error,
    },
    #[error("cannot listen on {address} in {netns}")]
    Listen {
        netns: PathBuf,
        address: SocketAddr,
        source: io::Error,
    },
    #[error("cannot make the link of site {site}")]
    Site { site: String, source: io::Error },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
}
