//! Which address comes next: pure functions over prefixes and the addresses that are taken. IPv4 only.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use sha2::{Digest, Sha256};

/// First and last address of a subnet that an interface may take: the first four and the last are the platform's.
/// `None` if there is none.
pub fn usable_range(prefix: &IpNet) -> Option<(IpAddr, IpAddr)> {
    let IpNet::V4(p) = prefix else { return None };
    let (first, last) = (
        u32::from(p.network()).checked_add(4)?,
        u32::from(p.broadcast()).checked_sub(1)?,
    );
    (first <= last).then(|| (Ipv4Addr::from(first).into(), Ipv4Addr::from(last).into()))
}

/// Addresses of one range that are taken, with a place to go on from, so that filling a subnet costs one sweep.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    addresses: BTreeSet<IpAddr>,
}

impl Taken {
    /// False if it was taken already.
    pub fn insert(&mut self, a: IpAddr) -> bool {
        self.addresses.insert(a)
    }

    pub fn contains(&self, a: &IpAddr) -> bool {
        self.addresses.contains(a)
    }

    /// Takes the `n` lowest free addresses of `prefix`; on failure takes none and says how many are free.
    pub fn take(&mut self, prefix: &IpNet, n: usize) -> Result<Vec<IpAddr>, usize> {
        let Some((IpAddr::V4(lo), IpAddr::V4(hi))) = usable_range(prefix) else {
            return Err(0);
        };
        let free: Vec<IpAddr> = (u32::from(lo)..=u32::from(hi))
            .map(|a| IpAddr::V4(a.into()))
            .filter(|a| !self.addresses.contains(a))
            .take(n)
            .collect();
        if free.len() < n {
            return Err(free.len());
        }
        self.addresses.extend(free.iter().copied());
        Ok(free)
    }
}

/// MAC address of an interface, as ARM prints it: Azure's `00-0D-3A`, then three bytes of a hash; `attempt` gives another
/// one when two interfaces collide.
pub fn mac(id: &str, attempt: u32) -> String {
    let h = Sha256::digest(format!("{} {attempt}", id.to_lowercase()).as_bytes());
    format!("00-0D-3A-{:02X}-{:02X}-{:02X}", h[0], h[1], h[2])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_small_subnet_has_three() {
        let p: IpNet = "10.0.0.8/29".parse().unwrap();
        let mut t = Taken::default();
        t.insert("10.0.0.13".parse().unwrap());
        assert_eq!(t.take(&p, 3), Err(2));
        let got: Vec<String> = t.take(&p, 2).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(got, ["10.0.0.12", "10.0.0.14"]);
        assert_eq!(t.take(&p, 1), Err(0));
        assert_eq!(usable_range(&"10.0.0.0/30".parse().unwrap()), None);
    }

    proptest! {
        #[test]
        fn never_twice_never_outside(bits in 20u8..=29, wants in proptest::collection::vec(0usize..40, 1..20)) {
            let p = IpNet::new("10.1.0.0".parse().unwrap(), bits).unwrap();
            let mut t = Taken::default();
            let mut seen = BTreeSet::new();
            for n in wants {
                let before = t.addresses.len();
                match t.take(&p, n) {
                    Ok(got) => for a in got {
                        prop_assert!(p.contains(&a) && seen.insert(a));
                    },
                    Err(_) => prop_assert_eq!(t.addresses.len(), before),
                }
            }
            prop_assert!(seen.len() as u64 <= resources::views::usable(&p));
        }
    }
}
