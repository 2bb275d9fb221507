//! `azure-vnet-ipam`: reservations over the pool that its source tells.

use std::{cell::Cell, collections::BTreeSet, net::IpAddr, time::Duration};

use ipnet::IpNet;
use thiserror::Error;

use crate::{
    conf::NetConf,
    links::{self, network_tag},
    pool::{Allocation, Key, PoolError, Request, State, Usage},
    result::{CniResult, Dns, IpConfig, Route},
    source::SourceError,
    spec::{Attachment, Failure, code},
    steps,
    store::{Store, StoreError, Tracked, boot_clock_ms},
};

/// The VNet's resolver; every result names it.
pub const AZURE_DNS: &str = "168.63.129.16";
/// How long an ADD waits for resting addresses before it says "try again".
const COOL_DOWN_WAIT_MS_MAX: u64 = 5_000;

#[derive(Debug, Error)]
pub enum IpamError {
    #[error("failed to allocate address: {0}", match source { PoolError::Exhausted { .. } => "No available addresses", _ => "refused" })]
    Pool {
        #[source]
        source: PoolError,
    },
    #[error("failed to learn this machine's address pool")]
    Source {
        #[source]
        source: SourceError,
    },
    #[error("failed to use the reservations")]
    Store {
        #[source]
        source: StoreError,
    },
    #[error("attachment {container_id} {ifname} has no reservation")]
    NotReserved { container_id: String, ifname: String },
    #[error("attachment {container_id} {ifname} has {reserved} reserved, but its result says {expected}")]
    OtherAddress {
        container_id: String,
        ifname: String,
        reserved: IpAddr,
        expected: String,
    },
}

impl IpamError {
    pub fn failure(&self, command_code: Option<u32>) -> Failure {
        let code = command_code.unwrap_or(match self {
            Self::Pool {
                source: PoolError::NoSubnet { .. } | PoolError::NotInPool { .. },
            } => code::CONFIG,
            Self::Pool { .. } | Self::Source { .. } => code::TRY_AGAIN,
            Self::Store {
                source: StoreError::Locked { .. },
            } => code::TRY_AGAIN,
            Self::Store { .. } => code::IO,
            Self::NotReserved { .. } | Self::OtherAddress { .. } => code::CHECK_FAILED,
        });
        Failure::from_error(code, self)
    }
}

/// The plug-in's verbs over one configuration.
pub struct Ipam<'a> {
    conf: &'a NetConf,
    network: String,
    store: Store<'a>,
    warn: &'a dyn Fn(&str),
}

impl<'a> Ipam<'a> {
    pub fn new(conf: &'a NetConf, warn: &'a dyn Fn(&str)) -> Self {
        Self {
            conf,
            network: network_tag(&conf.name),
            store: Store::open(&conf.state_dir, &recover, warn),
            warn,
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Tracked) -> T) -> Result<T, IpamError> {
        self.store.with(f).map_err(|source| IpamError::Store { source })
    }

    /// Reserves an address of each of the pool's families for the attachment, or returns those it has. Asks the pool's source only if what is
    /// remembered is old or used up, and never under the lock.
    pub fn add(&self, attachment: &Attachment) -> Result<Vec<Allocation>, IpamError> {
        let request = Request {
            network: &self.network,
            attachment,
            subnet: self.conf.ipam.subnet,
            address: self.conf.ipam.address,
            cool_down_ms: self.conf.ipam.cool_down_ms,
        };
        let mut asked = false;
        let mut waited_ms = 0;
        loop {
            let now = boot_clock_ms();
            let usable = Cell::new(false);
            let outcome = self.with(|s| {
                let held = s.find(&Key::of(attachment));
                if !held.is_empty() {
                    usable.set(true);
                    return Ok(held);
                }
                usable.set(asked || self.is_fresh(s, now));
                if usable.get() {
                    s.reserve(&request, now)
                } else {
                    Err(PoolError::Exhausted {
                        used: 0,
                        total: 0,
                        withdrawn: 0,
                    })
                }
            })?;
            match outcome {
                Ok(allocation) => {
                    steps::reached("reserved");
                    return Ok(allocation);
                }
                Err(PoolError::Cooling { wait_ms }) if waited_ms + wait_ms <= COOL_DOWN_WAIT_MS_MAX => {
                    waited_ms += wait_ms;
                    std::thread::sleep(Duration::from_millis(wait_ms));
                }
                Err(source) if asked => return Err(IpamError::Pool { source }),
                // Old, unknown or used up: an address may have been added to the NIC since.
                Err(_) => {
                    self.refresh()?;
                    asked = true;
                }
            }
        }
    }

    fn is_fresh(&self, s: &State, now_ms: u64) -> bool {
        let source = &self.conf.ipam.source;
        s.pool.as_ref().is_some_and(|p| {
            source.is_remembered()
                && p.source == source.name()
                // One that was learned in the future is of another clock's time.
                && now_ms.checked_sub(p.fetched_ms).is_some_and(|age| age < self.conf.ipam.query_interval_ms)
        })
    }

    /// Fetches the pool and remembers it. A remembered one of the same source goes on serving if the source fails.
    fn refresh(&self) -> Result<(), IpamError> {
        let from = &self.conf.ipam.source;
        match from.fetch(self.conf.ipam.timeout_ms) {
            Ok(pool) => {
                self.with(|s| s.set_pool(pool))?;
                steps::reached("pool-learned");
                Ok(())
            }
            Err(source) => {
                let known = self.with(|s| s.pool.as_ref().is_some_and(|p| p.source == from.name()))?;
                if !known {
                    return Err(IpamError::Source { source });
                }
                let text = IpamError::Source { source }.failure(None);
                (self.warn)(&format!("{text}; going on with the addresses known before"));
                Ok(())
            }
        }
    }

    /// Gives back the attachment's addresses; success if it has none.
    pub fn del(&self, attachment: &Attachment) -> Result<Vec<IpAddr>, IpamError> {
        let key = Key::of(attachment);
        let release = |s: &mut Tracked| match &s.find(&key)[..] {
            [] => Vec::new(),
            _ => s.release(&key, boot_clock_ms()),
        };
        let released = self.with(release)?;
        steps::reached("released");
        Ok(released)
    }

    /// The attachment holds the addresses that its result says.
    pub fn check(&self, attachment: &Attachment, expected: &[IpAddr]) -> Result<(), IpamError> {
        let (container_id, ifname) = (attachment.container_id.clone(), attachment.ifname.clone());
        let held = self.with(|s| s.find(&Key::of(attachment)))?;
        if held.is_empty() {
            return Err(IpamError::NotReserved { container_id, ifname });
        }
        match held.into_iter().find(|a| !expected.contains(&a.address)) {
            None => Ok(()),
            Some(a) => {
                let expected = expected.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                Err(IpamError::OtherAddress {
                    container_id,
                    ifname,
                    reserved: a.address,
                    expected,
                })
            }
        }
    }

    /// Gives back what this network holds for attachments that are not `valid`.
    pub fn gc(&self, valid: &BTreeSet<Key>) -> Result<Vec<IpAddr>, IpamError> {
        let released = self.with(|s| s.retain(&self.network, valid, boot_clock_ms()))?;
        steps::reached("released");
        Ok(released)
    }

    /// Keys that other networks hold; their links are not this network's to remove.
    pub fn keys_of_others(&self) -> Result<BTreeSet<Key>, IpamError> {
        self.with(|s| {
            s.reservations
                .values()
                .filter(|r| r.network != self.network)
                .map(|r| r.key.clone())
                .collect()
        })
    }

    /// Ready if at least one address of each of the pool's families is free, resting ones included.
    pub fn status(&self) -> Result<(), IpamError> {
        let fresh = self.with(|s| self.is_fresh(s, boot_clock_ms()))?;
        if !fresh {
            self.refresh()?;
        }
        let families = self.with(|s| {
            let there = [true, false].into_iter().filter(|v4| s.has_family(*v4));
            there.map(|v4| s.usage(v4)).collect::<Vec<Usage>>()
        })?;
        let full = families.iter().find(|u| u.used >= u.total);
        let none = Usage {
            used: 0,
            total: 0,
            withdrawn: 0,
        };
        match full.copied().or(families.is_empty().then_some(none)) {
            None => Ok(()),
            Some(Usage { used, total, withdrawn }) => Err(IpamError::Pool {
                source: PoolError::Exhausted { used, total, withdrawn },
            }),
        }
    }
}

/// The result of an IPAM ADD: the addresses with their subnet's mask, the subnet's first address as the gateway.
pub fn result(allocations: &[Allocation]) -> CniResult {
    let mut out = CniResult {
        dns: Dns {
            nameservers: vec![AZURE_DNS.to_owned()],
            ..Default::default()
        },
        ..Default::default()
    };
    for a in allocations {
        let address = IpNet::new(a.address, a.prefix.prefix_len()).unwrap_or(IpNet::from(a.address));
        let gateway = address.trunc().hosts().find(|h| *h != address.network() || h.is_ipv4());
        out.ips.push(IpConfig {
            address,
            gateway,
            interface: None,
        });
        out.routes.push(Route {
            dst: links::default_route(a.address.is_ipv4()),
            gw: gateway,
        });
    }
    out
}

/// Reservations as the kernel's links and routes show them; for pods of other plug-ins than `azure-vnet` it knows none.
fn recover() -> Result<State, Box<dyn std::error::Error + Send + Sync>> {
    let mut state = State::default();
    for live in links::live()? {
        let Some(owner) = live.owner else { continue };
        for address in live.addresses {
            state.adopt(
                address,
                owner.key.clone(),
                &owner.network,
                &owner.container_id,
                &owner.ifname,
            );
        }
    }
    Ok(state)
}
