//! Who holds which address of a range: subnets, and the public pool.
//!
//! Dynamic allocation takes the lowest address that was never held; when all were, the one released longest ago, so that
//! an address rests before its next owner gets the last one's late packets. A [`Pool`] is rebuilt from objects: first
//! [`Pool::claim`] what they hold, then allocate what is new.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use thiserror::Error;

use crate::rules::is_reserved;

/// Addresses of one range and their holders.
#[derive(Clone, Debug)]
pub struct Pool {
    prefix: Ipv4Net,
    /// For error texts: the subnet's name.
    name: String,
    azure_reserved: bool,
    used: BTreeMap<Ipv4Addr, String>,
    /// Longest ago first; never an address in use.
    released: VecDeque<Ipv4Addr>,
    /// Every allocatable address below it is in use or released.
    fresh_from: u32,
}

#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum IpamError {
    #[error("Subnet {name} with address prefix {prefix} does not have enough capacity for {wanted} IP addresses.")]
    Full {
        name: String,
        prefix: Ipv4Net,
        wanted: usize,
    },
    #[error("Private static IP address {address} does not belong to the range of subnet prefix {prefix}.")]
    Outside { address: Ipv4Addr, prefix: Ipv4Net },
    #[error("Private static IP address {address} falls within reserved IP range of subnet prefix {prefix}.")]
    Reserved { address: Ipv4Addr, prefix: Ipv4Net },
    #[error(
        "IP configuration is using the private IP address {address} which is already allocated to resource {holder}."
    )]
    Taken { address: Ipv4Addr, holder: String },
}

impl IpamError {
    /// ARM's error code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Full { .. } => "SubnetIsFull",
            Self::Outside { .. } => "PrivateIPAddressNotInSubnet",
            Self::Reserved { .. } => "PrivateIPAddressInReservedRange",
            Self::Taken { .. } => "PrivateIPAddressIsAllocated",
        }
    }
}

impl Pool {
    /// Addresses of a subnet, without the five that the fabric keeps.
    pub fn subnet(name: impl Into<String>, prefix: Ipv4Net) -> Self {
        Self::new(name.into(), prefix, true)
    }

    /// Addresses of a plain range such as the public pool, without its first and last.
    pub fn plain(name: impl Into<String>, prefix: Ipv4Net) -> Self {
        Self::new(name.into(), prefix, false)
    }

    fn new(name: String, prefix: Ipv4Net, azure_reserved: bool) -> Self {
        let prefix = prefix.trunc();
        let fresh_from = u32::from(prefix.network());
        Self {
            prefix,
            name,
            azure_reserved,
            used: BTreeMap::new(),
            released: VecDeque::new(),
            fresh_from,
        }
    }

    pub fn prefix(&self) -> Ipv4Net {
        self.prefix
    }

    fn is_kept(&self, address: Ipv4Addr) -> bool {
        if self.azure_reserved {
            is_reserved(self.prefix, address)
        } else {
            address == self.prefix.network() || address == self.prefix.broadcast()
        }
    }

    /// How many addresses can be held at once.
    pub fn capacity(&self) -> usize {
        let all = 1_u64 << (32 - self.prefix.prefix_len());
        let kept = if self.azure_reserved { 5 } else { 2 };
        all.saturating_sub(kept) as usize
    }

    pub fn free(&self) -> usize {
        self.capacity().saturating_sub(self.used.len())
    }

    /// Addresses in use with their holders, ascending.
    pub fn used(&self) -> impl Iterator<Item = (Ipv4Addr, &str)> {
        self.used.iter().map(|(a, o)| (*a, o.as_str()))
    }

    pub fn holder(&self, address: Ipv4Addr) -> Option<&str> {
        self.used.get(&address).map(String::as_str)
    }

    /// Gives `owner` exactly this address (static allocation, or what an object already holds). Claiming one's own
    /// address again is fine.
    pub fn claim(&mut self, owner: &str, address: Ipv4Addr) -> Result<(), IpamError> {
        if !self.prefix.contains(&address) {
            return Err(IpamError::Outside {
                address,
                prefix: self.prefix,
            });
        }
        if self.is_kept(address) {
            return Err(IpamError::Reserved {
                address,
                prefix: self.prefix,
            });
        }
        match self.used.get(&address) {
            Some(holder) if holder != owner => Err(IpamError::Taken {
                address,
                holder: holder.clone(),
            }),
            Some(_) => Ok(()),
            None => {
                self.released.retain(|a| *a != address);
                self.used.insert(address, owner.to_owned());
                Ok(())
            }
        }
    }

    /// Gives `owner` one address.
    pub fn allocate(&mut self, owner: &str) -> Result<Ipv4Addr, IpamError> {
        let fresh = self.next_fresh().or_else(|| self.released.pop_front());
        let address = fresh.ok_or_else(|| IpamError::Full {
            name: self.name.clone(),
            prefix: self.prefix,
            wanted: 1,
        })?;
        self.used.insert(address, owner.to_owned());
        Ok(address)
    }

    /// Gives `owner` `count` addresses, or none and an error.
    pub fn allocate_many(&mut self, owner: &str, count: usize) -> Result<Vec<Ipv4Addr>, IpamError> {
        if self.free() < count {
            return Err(IpamError::Full {
                name: self.name.clone(),
                prefix: self.prefix,
                wanted: count,
            });
        }
        (0..count).map(|_| self.allocate(owner)).collect()
    }

    fn next_fresh(&mut self) -> Option<Ipv4Addr> {
        let last = u32::from(self.prefix.broadcast());
        while self.fresh_from <= last {
            let address = Ipv4Addr::from(self.fresh_from);
            self.fresh_from = self.fresh_from.checked_add(1)?;
            if !self.is_kept(address) && !self.used.contains_key(&address) && !self.released.contains(&address) {
                return Some(address);
            }
        }
        None
    }

    /// Takes the address back; `false` if nobody held it.
    pub fn release(&mut self, address: Ipv4Addr) -> bool {
        let held = self.used.remove(&address).is_some();
        if held {
            self.released.push_back(address);
        }
        held
    }

    /// Takes back everything `owner` held; returns it, ascending.
    pub fn release_all(&mut self, owner: &str) -> Vec<Ipv4Addr> {
        let held: Vec<Ipv4Addr> = self.used.iter().filter(|(_, o)| *o == owner).map(|(a, _)| *a).collect();
        for address in &held {
            self.release(*address);
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, last)
    }

    fn small() -> Pool {
        Pool::subnet("nodes", "10.0.0.0/29".parse().unwrap())
    }

    #[test]
    fn the_lowest_fresh_address_comes_first_then_the_longest_released() {
        let mut pool = small();
        assert_eq!((pool.capacity(), pool.free()), (3, 3));
        assert_eq!(pool.allocate("a"), Ok(ip(4)));
        assert!(pool.release(ip(4)));
        assert!(!pool.release(ip(4)));
        assert_eq!(pool.allocate("b"), Ok(ip(5)));
        assert_eq!(pool.allocate("c"), Ok(ip(6)));
        pool.release(ip(6));
        assert_eq!(pool.allocate("d"), Ok(ip(4)));
        assert_eq!(pool.allocate("e"), Ok(ip(6)));
        assert_eq!(pool.allocate("f").unwrap_err().code(), "SubnetIsFull");
        assert_eq!(pool.release_all("d"), [ip(4)]);
        assert_eq!(pool.free(), 1);
    }

    #[test]
    fn claims_are_checked() {
        let mut pool = small();
        assert_eq!(pool.claim("a", ip(5)), Ok(()));
        assert_eq!(pool.claim("a", ip(5)), Ok(()));
        assert_eq!(
            pool.claim("b", ip(5)).unwrap_err().code(),
            "PrivateIPAddressIsAllocated"
        );
        assert_eq!(
            pool.claim("b", ip(3)).unwrap_err().code(),
            "PrivateIPAddressInReservedRange"
        );
        assert_eq!(
            pool.claim("b", ip(7)).unwrap_err().code(),
            "PrivateIPAddressInReservedRange"
        );
        assert_eq!(
            pool.claim("b", ip(8)).unwrap_err().code(),
            "PrivateIPAddressNotInSubnet"
        );
        assert_eq!(pool.allocate_many("c", 3).unwrap_err().code(), "SubnetIsFull");
        assert_eq!(pool.free(), 2);
        assert_eq!(pool.allocate_many("c", 2), Ok(vec![ip(4), ip(6)]));
        assert_eq!(pool.holder(ip(4)), Some("c"));
    }

    #[test]
    fn a_large_pool_hands_out_each_address_once() {
        let mut pool = Pool::plain("public", "198.19.0.0/16".parse().unwrap());
        let all: std::collections::BTreeSet<_> = (0..pool.capacity()).map(|_| pool.allocate("x").unwrap()).collect();
        assert_eq!(all.len(), 65_534);
        assert_eq!(pool.allocate("y").unwrap_err().code(), "SubnetIsFull");
    }
}
