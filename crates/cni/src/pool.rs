//! Reservations as pure data: which address belongs to which attachment, and which is next.
//!
//! Times are milliseconds of the boot clock, so a changed wall clock moves nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::spec::Attachment;

/// 40 hex digits of SHA-256 over container id and interface name; names the host's link and the reservation.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(transparent)]
pub struct Key(pub String);

impl Key {
    pub fn of(a: &Attachment) -> Self {
        // Neither part may hold a NUL byte, so the pair is unambiguous.
        let hash = hmac_sha256::Hash::hash(format!("{}\0{}", a.container_id, a.ifname).as_bytes());
        Self(hash[..20].iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Name of the link on the host: `azv` and 11 hex digits.
    pub fn link_name(&self) -> String {
        format!("azv{}", &self.0[..11.min(self.0.len())])
    }

    /// A locally administered unicast address, the same for every ADD of this attachment.
    pub fn mac(&self) -> [u8; 6] {
        let byte = |i: usize| {
            self.0
                .get(i * 2..i * 2 + 2)
                .and_then(|h| u8::from_str_radix(h, 16).ok())
                .unwrap_or(0)
        };
        [0x02, byte(6), byte(7), byte(8), byte(9), byte(10)]
    }
}

/// One subnet of one NIC, as the wire server tells it.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct PoolSubnet {
    /// Lower-case, colons; `*` matches any NIC.
    pub mac: String,
    /// Name of the link with that MAC when the pool was learned, to look there first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<String>,
    /// The machine's first NIC comes first.
    pub primary_nic: bool,
    pub prefix: String,
    /// Addresses for pods: the secondary ones.
    #[serde(with = "runs")]
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Pool {
    pub fetched_ms: u64,
    /// Base URL it came from; another URL means another pool.
    pub source: String,
    pub subnets: Vec<PoolSubnet>,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Reservation {
    pub key: Key,
    pub network: String,
    pub container_id: String,
    pub ifname: String,
    /// Prefix of its subnet and NIC, kept so that a withdrawn address still answers like before.
    pub prefix: IpNet,
    pub mac: String,
}

/// Everything that is remembered between invocations.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct State {
    pub pool: Option<Pool>,
    pub reservations: BTreeMap<IpAddr, Reservation>,
    /// When each free address was last given back.
    pub released_ms: BTreeMap<IpAddr, u64>,
}

/// What an ADD asks for.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    pub network: &'a str,
    pub attachment: &'a Attachment,
    pub subnet: Option<IpNet>,
    pub address: Option<IpAddr>,
    pub cool_down_ms: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    pub address: IpAddr,
    pub prefix: IpNet,
    pub mac: String,
    /// Name of the NIC's link when the pool was learned.
    pub nic: Option<String>,
}

#[derive(Debug, Error, PartialEq)]
pub enum PoolError {
    #[error("no available addresses: {used} of {total} are in use{}", if *.withdrawn > 0 { format!(", {withdrawn} more are in use but withdrawn") } else { String::new() })]
    Exhausted {
        used: usize,
        total: usize,
        withdrawn: usize,
    },
    #[error("all free addresses rest after their release; the next is free in {wait_ms} ms")]
    Cooling { wait_ms: u64 },
    #[error("address {address} is not in this machine's pool")]
    NotInPool { address: IpAddr },
    #[error("address {address} is held by container {container_id} interface {ifname}")]
    Held {
        address: IpAddr,
        container_id: String,
        ifname: String,
    },
    #[error("no pool in subnet {subnet}")]
    NoSubnet { subnet: IpNet },
}

impl State {
    /// What an attachment has reserved, IPv4 first; empty if nothing.
    pub fn find(&self, key: &Key) -> Vec<Allocation> {
        let held = self.reservations.iter().filter(|(_, r)| r.key == *key);
        held.map(|(a, r)| Allocation {
            address: *a,
            prefix: r.prefix,
            mac: r.mac.clone(),
            nic: self.nic(&r.mac),
        })
        .collect()
    }

    fn nic(&self, mac: &str) -> Option<String> {
        let mut subnets = self.pool.iter().flat_map(|p| &p.subnets);
        subnets.find(|s| s.mac == mac)?.nic.clone()
    }

    /// Reserves one address of each family that the pool has, or returns those the attachment has; IPv4 first. Of the free
    /// ones the one released longest ago (or never used) is taken, first NIC first, so that a stale flow of the former owner
    /// has the longest time to end. Both families' addresses are of one NIC. All are reserved or none.
    pub fn reserve(&mut self, req: &Request<'_>, now_ms: u64) -> Result<Vec<Allocation>, PoolError> {
        let key = Key::of(req.attachment);
        let held = self.find(&key);
        if !held.is_empty() {
            return Ok(held);
        }
        let subnets = self.pool.iter().flat_map(|p| &p.subnets);
        let subnets: Vec<(IpNet, &PoolSubnet)> = subnets
            .filter_map(|s| Some((s.prefix.parse::<IpNet>().ok()?.trunc(), s)))
            .filter(|(p, _)| req.subnet.is_none_or(|want| want.trunc() == *p))
            .filter(|(p, _)| req.address.is_none_or(|want| want.is_ipv4() == p.addr().is_ipv4()))
            .collect();
        if let (Some(subnet), true) = (req.subnet, subnets.is_empty()) {
            return Err(PoolError::NoSubnet { subnet });
        }
        let (v4, v6): (Vec<_>, Vec<_>) = subnets.into_iter().partition(|(p, _)| p.addr().is_ipv4());
        let mut out = Vec::new();
        if !v4.is_empty() || v6.is_empty() {
            out.push(self.choose(&v4, true, req, now_ms)?);
        }
        let mac = out.first().map(|a: &Allocation| a.mac.clone());
        let of_nic = |s: &PoolSubnet| mac.as_ref().is_none_or(|m| m == "*" || s.mac == "*" || *m == s.mac);
        let v6: Vec<_> = v6.into_iter().filter(|(_, s)| of_nic(s)).collect();
        if !v6.is_empty() {
            out.push(self.choose(&v6, false, req, now_ms)?);
        }
        for allocation in &out {
            self.released_ms.remove(&allocation.address);
            self.reservations.insert(
                allocation.address,
                Reservation {
                    key: key.clone(),
                    network: req.network.to_owned(),
                    container_id: req.attachment.container_id.clone(),
                    ifname: req.attachment.ifname.clone(),
                    prefix: allocation.prefix,
                    mac: allocation.mac.clone(),
                },
            );
        }
        Ok(out)
    }

    /// The next address of these subnets, which are of one family.
    fn choose(
        &self,
        subnets: &[(IpNet, &PoolSubnet)],
        v4: bool,
        req: &Request<'_>,
        now_ms: u64,
    ) -> Result<Allocation, PoolError> {
        let candidates: Vec<(IpAddr, IpNet, &PoolSubnet)> = subnets
            .iter()
            .flat_map(|(p, s)| s.addresses.iter().map(|a| (*a, *p, *s)))
            .filter(|(a, ..)| req.address.is_none_or(|want| want == *a))
            .collect();
        if let Some(address) = req.address {
            if let Some(r) = self.reservations.get(&address) {
                let (container_id, ifname) = (r.container_id.clone(), r.ifname.clone());
                return Err(PoolError::Held {
                    address,
                    container_id,
                    ifname,
                });
            }
            if candidates.is_empty() {
                return Err(PoolError::NotInPool { address });
            }
        }
        let best = candidates
            .iter()
            .filter(|(a, ..)| !self.reservations.contains_key(a))
            .map(|c| (self.released_ms.get(&c.0).copied(), c))
            .min_by_key(|(released, (a, _, s))| (!s.primary_nic, *released, *a));
        let Some((released, (address, prefix, subnet))) = best else {
            let Usage { used, total, withdrawn } = self.usage(v4);
            return Err(PoolError::Exhausted { used, total, withdrawn });
        };
        // A release in the future is of another clock's time, and nothing to wait for.
        let rests = released.filter(|at| *at <= now_ms);
        let free_at = rests.map_or(0, |at| at.saturating_add(req.cool_down_ms));
        // An address asked for by name is given at once: the caller knows what it does.
        if free_at > now_ms && req.address.is_none() {
            return Err(PoolError::Cooling {
                wait_ms: free_at - now_ms,
            });
        }
        Ok(Allocation {
            address: *address,
            prefix: *prefix,
            mac: subnet.mac.clone(),
            nic: subnet.nic.clone(),
        })
    }

    /// Gives back what the attachment holds; returns it. Unknown attachments are nothing to do.
    pub fn release(&mut self, key: &Key, now_ms: u64) -> Vec<IpAddr> {
        let held: Vec<IpAddr> = self.find(key).into_iter().map(|a| a.address).collect();
        for address in &held {
            self.reservations.remove(address);
            self.released_ms.insert(*address, now_ms);
        }
        held
    }

    /// Gives back everything `network` holds that is not in `valid`; returns the addresses.
    pub fn retain(&mut self, network: &str, valid: &BTreeSet<Key>, now_ms: u64) -> Vec<IpAddr> {
        let stale: BTreeSet<Key> = self
            .reservations
            .values()
            .filter(|r| r.network == network && !valid.contains(&r.key))
            .map(|r| r.key.clone())
            .collect();
        stale.iter().flat_map(|k| self.release(k, now_ms)).collect()
    }

    /// Takes over what the kernel shows of an attachment; what it does not show is corrected when the pool is known.
    pub fn adopt(&mut self, address: IpAddr, key: Key, network: &str, container_id: &str, ifname: &str) {
        let reservation = Reservation {
            key,
            network: network.to_owned(),
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
            prefix: IpNet::from(address),
            mac: "*".to_owned(),
        };
        self.reservations.insert(address, reservation);
    }

    /// Takes a new pool. Withdrawn addresses stay with their holders and are forgotten when released.
    pub fn set_pool(&mut self, pool: Pool) {
        let known: BTreeSet<IpAddr> = pool.subnets.iter().flat_map(|s| s.addresses.iter().copied()).collect();
        self.released_ms.retain(|a, _| known.contains(a));
        // Reservations rebuilt from the kernel do not know their subnet.
        for subnet in &pool.subnets {
            let Ok(prefix) = subnet.prefix.parse::<IpNet>() else {
                continue;
            };
            for (address, r) in &mut self.reservations {
                if subnet.addresses.contains(address) {
                    (r.prefix, r.mac) = (prefix.trunc(), subnet.mac.clone());
                }
            }
        }
        self.pool = Some(pool);
    }

    /// Of one family's addresses.
    pub fn usage(&self, v4: bool) -> Usage {
        let subnets = self.pool.iter().flat_map(|p| &p.subnets);
        let known: BTreeSet<IpAddr> = subnets
            .flat_map(|s| s.addresses.iter().copied())
            .filter(|a| a.is_ipv4() == v4)
            .collect();
        let reserved = || self.reservations.keys().filter(|a| a.is_ipv4() == v4);
        let used = reserved().filter(|a| known.contains(a)).count();
        Usage {
            used,
            total: known.len(),
            withdrawn: reserved().count() - used,
        }
    }

    /// Whether the pool has subnets of the family.
    pub fn has_family(&self, v4: bool) -> bool {
        let mut subnets = self.pool.iter().flat_map(|p| &p.subnets);
        subnets.any(|s| s.prefix.contains(':') != v4)
    }
}

/// How much of the pool is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub used: usize,
    pub total: usize,
    /// In use, but no longer in the pool.
    pub withdrawn: usize,
}

/// Neighbouring addresses as `first-last`: a NIC's addresses mostly are such, and every invocation reads them.
mod runs {
    use std::net::IpAddr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// No more than this many addresses come out of a file, whatever stands in it.
    const ADDRESSES_MAX: usize = 1 << 16;

    fn next(address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::from(n.to_be_bytes())),
            IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::from(n.to_be_bytes())),
        }
    }

    pub fn serialize<S: Serializer>(addresses: &[IpAddr], out: S) -> Result<S::Ok, S::Error> {
        let mut runs: Vec<(IpAddr, IpAddr)> = Vec::new();
        for address in addresses {
            match runs.last_mut() {
                Some((_, last)) if next(*last) == Some(*address) => *last = *address,
                _ => runs.push((*address, *address)),
            }
        }
        out.collect_seq(runs.iter().map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}-{last}")
            }
        }))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<IpAddr>, D::Error> {
        let mut out = Vec::new();
        for run in Vec::<String>::deserialize(input)? {
            let (first, last) = run.split_once('-').unwrap_or((&run, &run));
            let parse = |text: &str| text.parse::<IpAddr>().map_err(D::Error::custom);
            let (mut at, last) = (parse(first)?, parse(last)?);
            out.push(at);
            while at != last {
                at = next(at)
                    .filter(|n| n <= &last && out.len() < ADDRESSES_MAX)
                    .ok_or_else(|| D::Error::custom(format!("{run} is no range of addresses")))?;
                out.push(at);
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(n: u8) -> State {
        let addresses = (0..n).map(|i| IpAddr::from([10, 0, 0, 10 + i])).collect();
        let subnets = vec![PoolSubnet {
            mac: "*".into(),
            nic: None,
            primary_nic: true,
            prefix: "10.0.0.0/24".into(),
            addresses,
        }];
        State {
            pool: Some(Pool {
                subnets,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn at(id: &str) -> Attachment {
        Attachment {
            container_id: id.into(),
            ifname: "eth0".into(),
        }
    }

    fn add(s: &mut State, id: &str, now: u64) -> Result<IpAddr, PoolError> {
        let req = Request {
            network: "n",
            attachment: &at(id),
            subnet: None,
            address: None,
            cool_down_ms: 100,
        };
        s.reserve(&req, now).map(|a| a[0].address)
    }

    #[test]
    fn the_longest_released_comes_back_first_and_only_after_its_rest() {
        let mut s = pool(2);
        let (a, b) = (add(&mut s, "a", 0).unwrap(), add(&mut s, "b", 0).unwrap());
        assert_ne!(a, b);
        assert_eq!(
            add(&mut s, "a", 5).unwrap(),
            a,
            "the same attachment gets its address again"
        );
        assert_eq!(
            add(&mut s, "c", 5),
            Err(PoolError::Exhausted {
                used: 2,
                total: 2,
                withdrawn: 0
            })
        );
        assert_eq!(s.release(&Key::of(&at("b")), 1000), [b]);
        assert!(s.release(&Key::of(&at("b")), 1001).is_empty());
        assert_eq!(s.release(&Key::of(&at("a")), 1050), [a]);
        assert_eq!(add(&mut s, "c", 1099), Err(PoolError::Cooling { wait_ms: 1 }));
        assert_eq!(add(&mut s, "c", 1100), Ok(b));
        assert_eq!(add(&mut s, "d", 1150), Ok(a));
    }

    #[test]
    fn withdrawn_addresses_stay_with_their_holder_only() {
        let mut s = pool(2);
        let a = add(&mut s, "a", 0).unwrap();
        s.set_pool(Pool::default());
        assert_eq!(add(&mut s, "a", 1), Ok(a));
        assert_eq!(
            add(&mut s, "b", 1),
            Err(PoolError::Exhausted {
                used: 0,
                total: 0,
                withdrawn: 1
            })
        );
    }

    #[test]
    fn retain_touches_its_own_network_only() {
        let mut s = pool(3);
        add(&mut s, "a", 0).unwrap();
        let b = add(&mut s, "b", 0).unwrap();
        let other = Request {
            network: "other",
            attachment: &at("c"),
            subnet: None,
            address: None,
            cool_down_ms: 0,
        };
        s.reserve(&other, 0).unwrap();
        let valid = [Key::of(&at("a"))].into();
        assert_eq!(s.retain("n", &valid, 9), [b]);
        assert_eq!(s.reservations.len(), 2);
    }

    #[test]
    fn an_address_by_name_is_given_or_its_holder_named() {
        let mut s = pool(2);
        let a = add(&mut s, "a", 0).unwrap();
        let want = |s: &mut State, id: &str, address: IpAddr| {
            s.reserve(
                &Request {
                    network: "n",
                    attachment: &at(id),
                    subnet: None,
                    address: Some(address),
                    cool_down_ms: 9,
                },
                0,
            )
        };
        assert!(matches!(want(&mut s, "b", a), Err(PoolError::Held { container_id, .. }) if container_id == "a"));
        let far = "10.9.9.9".parse().unwrap();
        assert_eq!(want(&mut s, "b", far), Err(PoolError::NotInPool { address: far }));
    }

    #[test]
    fn an_attachment_gets_one_address_of_each_family_of_one_nic_or_none() {
        let subnet = |mac: &str, prefix: &str, addresses: &[&str]| PoolSubnet {
            mac: mac.into(),
            primary_nic: mac == "a",
            prefix: prefix.into(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..Default::default()
        };
        let mut s = State {
            pool: Some(Pool {
                subnets: vec![
                    subnet("b", "fd00:b::/64", &["fd00:b::9"]),
                    subnet("a", "fd00:a::/64", &["fd00:a::9"]),
                    subnet("a", "10.0.0.0/24", &["10.0.0.9", "10.0.0.10"]),
                ],
                ..Default::default()
            }),
            ..Default::default()
        };
        let reserve = |s: &mut State, id: &str, subnet: Option<&str>| {
            let req = Request {
                network: "n",
                attachment: &at(id),
                subnet: subnet.map(|t| t.parse().unwrap()),
                address: None,
                cool_down_ms: 0,
            };
            s.reserve(&req, 0)
                .map(|all| all.iter().map(|a| a.address.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(reserve(&mut s, "x", None).unwrap(), ["10.0.0.9", "fd00:a::9"]);
        assert_eq!(reserve(&mut s, "x", None).unwrap(), ["10.0.0.9", "fd00:a::9"]);
        let exhausted = PoolError::Exhausted {
            used: 1,
            total: 2,
            withdrawn: 0,
        };
        assert_eq!(
            reserve(&mut s, "y", None),
            Err(exhausted),
            "the other NIC's would not do"
        );
        assert_eq!(s.reservations.len(), 2, "and nothing is half reserved");
        assert_eq!(reserve(&mut s, "y", Some("fd00:b::/64")).unwrap(), ["fd00:b::9"]);
        assert_eq!(s.release(&Key::of(&at("x")), 0).len(), 2);
        assert_eq!(s.reservations.len(), 1);
    }

    #[test]
    fn addresses_are_kept_in_runs_and_come_back_in_their_order() {
        let addresses: Vec<IpAddr> = [
            "10.0.0.9",
            "10.0.0.4",
            "10.0.0.5",
            "10.0.0.6",
            "255.255.255.255",
            "fd00::1",
            "fd00::2",
        ]
        .map(|a| a.parse().unwrap())
        .to_vec();
        let subnet = PoolSubnet {
            addresses,
            ..Default::default()
        };
        let text = serde_json::to_string(&subnet).unwrap();
        assert!(
            text.contains(r#"["10.0.0.9","10.0.0.4-10.0.0.6","255.255.255.255","fd00::1-fd00::2"]"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<PoolSubnet>(&text).unwrap(), subnet);
        for bad in [
            "10.0.0.9-10.0.0.4",
            "10.0.0.1-fd00::1",
            "0.0.0.0-255.255.255.255",
            "x",
            "10.0.0.1-",
        ] {
            let text = text.replace("10.0.0.9", bad);
            assert!(serde_json::from_str::<PoolSubnet>(&text).is_err(), "{bad}");
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(u8),
        /// An ADD that dies after its reservation.
        DieInAdd(u8),
        Del(u8),
        /// A DEL that dies after the link is gone.
        DieInDel(u8),
        /// Of one network, with all that is attached listed.
        Gc(u8),
        LoseState,
        /// The pool holds every address whose bit is set.
        SetPool(u8),
        Wait(u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        let id = 0..6u8;
        prop_oneof![
            6 => id.clone().prop_map(Step::Add),
            1 => id.clone().prop_map(Step::DieInAdd),
            4 => id.clone().prop_map(Step::Del),
            1 => id.prop_map(Step::DieInDel),
            1 => (0..2u8).prop_map(Step::Gc),
            1 => Just(Step::LoseState),
            1 => any::<u8>().prop_map(Step::SetPool),
            2 => (0..300u16).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Whatever comes, in whatever order and dying wherever: no address of a pod that has its link is given to another
        /// one, an attachment keeps what it has, and once all is quiet a GC leaves exactly what is attached.
        #[test]
        fn no_address_is_given_out_twice(steps in proptest::collection::vec(step(), 1..80)) {
            let address = |family: u16, bit: u16| match family {
                4 => IpAddr::from([10, 0, 0, 10 + bit as u8]),
                _ => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, bit]),
            };
            let pool_of = |bits: u8| {
                let subnet = |family, prefix: &str| PoolSubnet {
                    mac: "*".into(),
                    primary_nic: true,
                    prefix: prefix.into(),
                    addresses: (0..8).filter(|b| bits >> b & 1 == 1).map(|b| address(family, b)).collect(),
                    ..Default::default()
                };
                let subnets = vec![subnet(4, "10.0.0.0/24"), subnet(6, "fd00::/64")];
                Pool { subnets, ..Default::default() }
            };
            // Attachments 0..3 are one network's, 3..6 another's.
            let network = |id: u8| if id < 3 { "n" } else { "m" };
            let mut pool = pool_of(0xff);
            let mut state = State::default();
            state.set_pool(pool.clone());
            let mut kernel: BTreeMap<u8, Vec<IpAddr>> = BTreeMap::new();
            let mut now = 0;
            for step in steps {
                match step {
                    Step::Add(id) | Step::DieInAdd(id) => {
                        let attachment = at(&id.to_string());
                        let req = Request {
                            network: network(id),
                            attachment: &attachment,
                            subnet: None,
                            address: None,
                            cool_down_ms: 100,
                        };
                        let Ok(got) = state.reserve(&req, now) else { continue };
                        let got: Vec<IpAddr> = got.iter().map(|a| a.address).collect();
                        for (other, has) in &kernel {
                            prop_assert!(*other == id || got.iter().all(|a| !has.contains(a)), "{other} has {has:?}, {id} gets {got:?}");
                        }
                        if let Some(has) = kernel.get(&id) {
                            prop_assert_eq!(has, &got);
                        } else if matches!(step, Step::Add(_)) {
                            kernel.insert(id, got);
                        }
                    }
                    Step::Del(id) => {
                        kernel.remove(&id);
                        state.release(&Key::of(&at(&id.to_string())), now);
                    }
                    Step::DieInDel(id) => drop(kernel.remove(&id)),
                    Step::Gc(which) => {
                        let of = ["n", "m"][usize::from(which)];
                        let valid = kernel.keys().map(|id| Key::of(&at(&id.to_string()))).collect();
                        state.retain(of, &valid, now);
                    }
                    Step::LoseState => {
                        state = State::default();
                        for (id, has) in &kernel {
                            let a = at(&id.to_string());
                            has.iter().for_each(|ip| state.adopt(*ip, Key::of(&a), network(*id), &a.container_id, &a.ifname));
                        }
                        state.set_pool(pool.clone());
                    }
                    Step::SetPool(bits) => {
                        pool = pool_of(bits);
                        state.set_pool(pool.clone());
                    }
                    Step::Wait(ms) => now += u64::from(ms),
                }
            }
            let valid: BTreeSet<Key> = kernel.keys().map(|id| Key::of(&at(&id.to_string()))).collect();
            state.retain("n", &valid, now);
            state.retain("m", &valid, now);
            let held: BTreeSet<IpAddr> = state.reservations.keys().copied().collect();
            prop_assert_eq!(held, kernel.values().flatten().copied().collect());
        }
    }

    #[test]
    fn keys_do_not_collide_on_a_common_prefix() {
        let long = "a".repeat(64);
        let (x, y) = (Key::of(&at(&format!("{long}1"))), Key::of(&at(&format!("{long}2"))));
        assert_ne!(x.link_name(), y.link_name());
        assert_eq!(x.link_name().len(), 14);
        assert_eq!(x.mac()[0] & 3, 2);
        let swapped = Key::of(&Attachment {
            container_id: "aeth".into(),
            ifname: "0".into(),
        });
        assert_ne!(
            swapped,
            Key::of(&Attachment {
                container_id: "a".into(),
                ifname: "eth0".into()
            })
        );
    }
}
