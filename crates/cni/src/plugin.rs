//! The verbs of both binaries over a parsed invocation; they return what is to be printed.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use ipnet::{IpNet, Ipv4Net};
use linux::{
    netlink::{Link, Route as RouteSocket},
    netns::{self, NetNs},
};
use serde_json::Value;

use crate::{
    bridge::{self, Bridge},
    conf::{Mode, NetConf, OWN_IPAM},
    delegate,
    ipam::{self, Ipam},
    links::{self, Ends, KernelError, Owner, Plan, Prepared, doing, network_tag},
    masquerade,
    pool::Key,
    result::{CniResult, Interface, IpConfig, Route},
    spec::{Attachment, Command, Failure, Invocation, code},
    transparent,
};

/// One invocation: what to do, with which configuration, and where warnings go.
pub struct Call<'a> {
    pub invocation: &'a Invocation,
    pub conf: &'a NetConf,
    pub warn: &'a dyn Fn(&str),
}

/// What IPAM gave, and the NIC it belongs to as far as that is known.
#[derive(Default)]
struct Leased {
    result: CniResult,
    /// The NIC's MAC address.
    mac: Option<String>,
    /// The NIC's name when the pool was learned.
    nic: Option<String>,
}

fn kernel(error: &KernelError) -> Failure {
    Failure::from_error(code::KERNEL, error)
}

impl Call<'_> {
    fn attachment(&self) -> Result<&Attachment, Failure> {
        self.invocation
            .attachment
            .as_ref()
            .ok_or_else(|| Failure::new(code::ENVIRONMENT, "CNI_CONTAINERID and CNI_IFNAME are required"))
    }

    fn ipam(&self) -> Ipam<'_> {
        Ipam::new(self.conf, self.warn)
    }

    fn own_ipam(&self) -> bool {
        self.conf.ipam.kind == OWN_IPAM
    }

    /// Refuses commands that are younger than the configuration's version.
    fn check_version(&self) -> Result<(), Failure> {
        let command = self.invocation.command;
        if self.conf.version < command.since() {
            let msg = format!(
                "{} needs cniVersion {} or later",
                command.as_str(),
                command.since().as_str()
            );
            return Err(Failure {
                details: format!("the configuration says {}", self.conf.version.as_str()),
                ..Failure::new(code::INCOMPATIBLE_VERSION, msg)
            });
        }
        Ok(())
    }

    fn valid_keys(&self) -> Result<BTreeSet<Key>, Failure> {
        match &self.conf.valid_attachments {
            Some(list) => Ok(list.iter().map(Key::of).collect()),
            // Taking a missing list for an empty one would cut off every pod.
            None => Err(Failure::new(code::CONFIG, "cni.dev/valid-attachments: missing")),
        }
    }

    fn prev_result(&self) -> Result<&CniResult, Failure> {
        self.conf
            .prev_result
            .as_ref()
            .ok_or_else(|| Failure::new(code::CONFIG, "prevResult: CHECK needs it"))
    }

    /// `azure-vnet-ipam`.
    pub fn run_ipam(&self) -> Result<Option<Value>, Failure> {
        self.check_version()?;
        if !self.own_ipam() {
            let msg = format!("ipam.type: {:?} was asked for, this is {OWN_IPAM}", self.conf.ipam.kind);
            return Err(Failure::new(code::CONFIG, msg));
        }
        let ipam = self.ipam();
        match self.invocation.command {
            Command::Add => {
                let allocations = ipam.add(self.attachment()?).map_err(|e| e.failure(None))?;
                return Ok(Some(ipam::result(&allocations).document(self.conf.version)));
            }
            Command::Del => drop(ipam.del(self.attachment()?).map_err(|e| e.failure(None))?),
            Command::Check => {
                let expected: Vec<IpAddr> = self.prev_result()?.ips.iter().map(|i| i.address.addr()).collect();
                ipam.check(self.attachment()?, &expected).map_err(|e| e.failure(None))?;
            }
            Command::Gc => drop(ipam.gc(&self.valid_keys()?).map_err(|e| e.failure(None))?),
            Command::Status => ipam.status().map_err(|e| e.failure(Some(code::UNAVAILABLE)))?,
            Command::Version => {}
        }
        Ok(None)
    }

    /// `azure-vnet`.
    pub fn run_vnet(&self) -> Result<Option<Value>, Failure> {
        self.check_version()?;
        match self.invocation.command {
            Command::Add => self.add().map(Some),
            Command::Del => self.del().map(|()| None),
            Command::Check => self.check().map(|()| None),
            Command::Gc => self.gc().map(|()| None),
            Command::Status => self.status().map(|()| None),
            Command::Version => Ok(None),
        }
    }

    /// The bridge of this configuration; `None` in transparent mode.
    fn bridge(&self, master: &Link) -> Option<Bridge> {
        let tunnel = match self.conf.mode {
            Mode::Transparent => return None,
            Mode::Bridge => false,
            Mode::Tunnel => true,
        };
        Some(Bridge::of(self.conf.bridge.as_deref(), master, tunnel))
    }

    /// The pod's namespace, which must not be this process's own, and a socket in each of both.
    fn ends(&self) -> Result<Ends, Failure> {
        let path = self.netns_path();
        let ns = netns::open(path).map_err(|e| Failure::from_error(code::NETNS, &e))?;
        let host = RouteSocket::open().map_err(|e| kernel(&doing("opening the host's namespace")(e)))?;
        let own = host
            .netns()
            .or_else(|_| NetNs::current())
            .map_err(|e| Failure::from_error(code::NETNS, &e))?;
        if ns.is_same(&own) {
            return Err(Failure::new(
                code::NETNS,
                format!("{} is the plug-in's own network namespace", path.display()),
            ));
        }
        let pod = RouteSocket::visit(&ns, &own).map_err(|e| kernel(&doing("opening the pod's namespace")(e)))?;
        Ok(Ends {
            ns,
            home: own,
            host,
            pod,
        })
    }

    fn netns_path(&self) -> &Path {
        self.invocation.netns.as_deref().unwrap_or(Path::new(""))
    }

    fn owner(&self, attachment: &Attachment) -> Owner {
        Owner {
            network: network_tag(&self.conf.name),
            key: Key::of(attachment),
            container_id: attachment.container_id.clone(),
            ifname: attachment.ifname.clone(),
        }
    }

    fn ipam_add(&self, attachment: &Attachment) -> Result<Leased, Failure> {
        if self.own_ipam() {
            let a = self.ipam().add(attachment).map_err(|e| e.failure(None))?;
            return Ok(Leased {
                result: ipam::result(&a),
                mac: a.first().map(|a| a.mac.clone()),
                nic: a.first().and_then(|a| a.nic.clone()),
            });
        }
        let result = delegate::run(self.conf, self.invocation).map_err(|e| e.failure())?;
        Ok(Leased {
            result: result.unwrap_or_default(),
            ..Leased::default()
        })
    }

    fn ipam_del(&self, attachment: &Attachment) -> Result<(), Failure> {
        if self.own_ipam() {
            return self.ipam().del(attachment).map(drop).map_err(|e| e.failure(None));
        }
        let invocation = Invocation {
            command: Command::Del,
            ..self.invocation.clone()
        };
        delegate::run(self.conf, &invocation).map(drop).map_err(|e| e.failure())
    }

    fn add(&self) -> Result<Value, Failure> {
        if self.conf.prev_result.is_some() {
            return Err(Failure::new(
                code::CONFIG,
                "prevResult: azure-vnet makes the interface and must come first in the list",
            ));
        }
        let attachment = self.attachment()?;
        let mut ends = self.ends()?;
        // Before IPAM: an interface that exists belongs to a living pod, whose address must not be given back below.
        let prepared = ends
            .prepare(&attachment.container_id, &attachment.ifname)
            .map_err(|e| kernel(&e))?;
        let outcome = self
            .ipam_add(attachment)
            .and_then(|leased| self.attach(attachment, &mut ends, prepared, leased));
        match outcome {
            Ok(result) => Ok(result.document(self.conf.version)),
            Err(failure) => {
                for left in self.undo(attachment) {
                    (self.warn)(&format!("while undoing a failed ADD: {left}"));
                }
                Err(failure)
            }
        }
    }

    fn attach(
        &self,
        attachment: &Attachment,
        ends: &mut Ends,
        prepared: Prepared,
        leased: Leased,
    ) -> Result<CniResult, Failure> {
        let Leased {
            result: leased,
            mac,
            nic,
        } = leased;
        let addresses: Vec<links::Leased> = leased
            .ips
            .iter()
            .map(|i| links::Leased {
                net: i.address,
                gateway: i.gateway,
            })
            .collect();
        if addresses.is_empty() {
            return Err(Failure::new(
                code::KERNEL,
                format!("IPAM plug-in {} gave no address", self.conf.ipam.kind),
            ));
        }
        let master = links::master(
            &mut ends.host,
            self.conf.master.as_deref(),
            mac.as_deref(),
            nic.as_deref(),
        )
        .map_err(|e| kernel(&e))?;
        let bridge = self.bridge(&master);
        let plan = Plan {
            owner: self.owner(attachment),
            ifname: attachment.ifname.clone(),
            addresses,
            mtu: self.conf.mtu.unwrap_or(master.mtu),
            master,
        };
        if let Some(exempt) = &self.conf.masquerade {
            let subnets: BTreeSet<Ipv4Net> = leased
                .ips
                .iter()
                .filter_map(|i| match i.address {
                    IpNet::V4(net) => Some(net.trunc()),
                    IpNet::V6(_) => None,
                })
                .collect();
            for subnet in subnets {
                masquerade::ensure(&plan.owner.network, &plan.master.name, subnet, exempt).map_err(|e| kernel(&e))?;
            }
        }
        let made = match &bridge {
            None => transparent::attach(ends, prepared, &plan),
            Some(bridge) => bridge::attach(ends, prepared, &plan, bridge),
        }
        .map_err(|e| kernel(&e))?;
        let mtu = Some(plan.mtu);
        let interface = |name, mac, sandbox| Interface {
            name,
            mac,
            mtu,
            sandbox,
        };
        let mut interfaces: Vec<Interface> = made
            .bridge
            .into_iter()
            .map(|(name, mac)| interface(name, mac, String::new()))
            .collect();
        interfaces.push(interface(made.host_link, made.host_mac, String::new()));
        let sandbox = self.netns_path().to_string_lossy().into_owned();
        interfaces.push(interface(plan.ifname, made.pod_mac, sandbox));
        let at = interfaces.len() - 1;
        Ok(CniResult {
            interfaces,
            ips: made
                .addresses
                .iter()
                .map(|(address, gateway)| IpConfig {
                    address: *address,
                    gateway: Some(*gateway),
                    interface: Some(at),
                })
                .collect(),
            routes: made
                .addresses
                .iter()
                .map(|(address, gateway)| Route {
                    dst: links::default_route(address.addr().is_ipv4()),
                    gw: Some(*gateway),
                })
                .collect(),
            dns: if self.conf.dns.nameservers.is_empty() {
                leased.dns
            } else {
                self.conf.dns.clone()
            },
        })
    }

    /// Link first, then address: an address is free only when nothing routes to its old owner any more.
    fn undo(&self, attachment: &Attachment) -> Vec<Failure> {
        let mut failures = Vec::new();
        failures.extend(links::detach(&Key::of(attachment)).err().map(|e| kernel(&e)));
        failures.extend(self.ipam_del(attachment).err());
        failures
    }

    fn del(&self) -> Result<(), Failure> {
        merged("DEL", self.undo(self.attachment()?))
    }

    fn check(&self) -> Result<(), Failure> {
        let attachment = self.attachment()?;
        let previous = self.prev_result()?;
        let mut ends = self.ends()?;
        let owner = self.owner(attachment);
        let differs = |what: &str, expected: &str| {
            Failure::new(
                code::CHECK_FAILED,
                format!("prevResult does not hold {what} {expected}"),
            )
        };
        let at = previous
            .interfaces
            .iter()
            .position(|i| i.name == attachment.ifname && !i.sandbox.is_empty());
        let at = at.ok_or_else(|| differs("interface", &attachment.ifname))?;
        if !previous.interfaces.iter().any(|i| i.name == owner.key.link_name()) {
            return Err(differs("interface", &owner.key.link_name()));
        }
        // Addresses of other interfaces are those of plug-ins that came later.
        let ours = previous
            .ips
            .iter()
            .filter(|i| i.interface == Some(at))
            .map(|i| i.address.addr());
        let addresses: Vec<IpAddr> = ours.collect();
        if addresses.is_empty() {
            return Err(differs("an address of", &attachment.ifname));
        }
        match self.checked_bridge(previous)? {
            None => transparent::check(&mut ends, &owner, &attachment.ifname, &addresses),
            Some(bridge) => bridge::check(&mut ends, &owner, &attachment.ifname, &addresses, &bridge),
        }
        .map_err(|e| Failure::from_error(code::CHECK_FAILED, &e))?;
        if self.own_ipam() {
            return self.ipam().check(attachment, &addresses).map_err(|e| e.failure(None));
        }
        delegate::run(self.conf, self.invocation)
            .map(drop)
            .map_err(|e| e.failure())
    }

    /// The bridge that the result names: without a configured name it depends on the NIC of that ADD.
    fn checked_bridge(&self, previous: &CniResult) -> Result<Option<Bridge>, Failure> {
        let tunnel = match self.conf.mode {
            Mode::Transparent => return Ok(None),
            Mode::Bridge => false,
            Mode::Tunnel => true,
        };
        let named = |i: &&Interface| {
            let wanted = self.conf.bridge.as_deref();
            i.sandbox.is_empty()
                && wanted.map_or(i.mac == linux::netlink::format_mac(bridge::mac(&i.name)), |w| {
                    w == i.name
                })
        };
        let name = previous.interfaces.iter().find(named).map(|i| i.name.clone());
        let name = name.ok_or_else(|| Failure::new(code::CHECK_FAILED, "prevResult does not hold the bridge"))?;
        Ok(Some(Bridge { name, tunnel }))
    }

    fn gc(&self) -> Result<(), Failure> {
        let keys = match self.conf.valid_attachments {
            Some(_) => self.valid_keys()?,
            // cnitool sends no list. What still has its link is kept: whether it is wanted, nobody has said.
            None => self.attached()?,
        };
        let mut failures = Vec::new();
        let others = if self.own_ipam() {
            self.ipam().keys_of_others().unwrap_or_else(|e| {
                failures.push(e.failure(None));
                BTreeSet::new()
            })
        } else {
            BTreeSet::new()
        };
        let network = network_tag(&self.conf.name);
        match links::live() {
            Err(e) => failures.push(kernel(&e)),
            Ok(live) => {
                let names = |keys: &BTreeSet<Key>| keys.iter().map(Key::link_name).collect::<BTreeSet<_>>();
                let (valid, others_links) = (names(&keys), names(&others));
                let (stale, kept): (Vec<_>, Vec<_>) = live.into_iter().partition(|l| match &l.owner {
                    Some(owner) => owner.network == network && !valid.contains(&l.link.name),
                    // Its ADD died before naming it; whose it is, the reservations say.
                    None => !valid.contains(&l.link.name) && !others_links.contains(&l.link.name),
                });
                let stale: Vec<_> = stale.into_iter().map(|l| l.link).collect();
                failures.extend(links::remove(&stale).err().map(|e| kernel(&e)));
                let mut alive: BTreeSet<_> = others.iter().chain(&keys).map(Key::mac).collect();
                alive.extend(kept.iter().filter_map(|l| l.owner.as_ref()).map(|o| o.key.mac()));
                failures.extend(bridge::sweep(&alive).err().map(|e| kernel(&e)));
                let of_network = |l: &links::Live| l.owner.as_ref().is_some_and(|o| o.network == network);
                if self.conf.masquerade.is_none() || !kept.iter().any(of_network) {
                    failures.extend(masquerade::remove(&network).err().map(|e| kernel(&e)));
                }
            }
        }
        let released = if self.own_ipam() {
            self.ipam().gc(&keys).map(drop).map_err(|e| e.failure(None))
        } else {
            delegate::run(self.conf, self.invocation)
                .map(drop)
                .map_err(|e| e.failure())
        };
        failures.extend(released.err());
        merged("GC", failures)
    }

    /// Attachments to this network whose links are there.
    fn attached(&self) -> Result<BTreeSet<Key>, Failure> {
        let network = network_tag(&self.conf.name);
        let owners = links::live()
            .map_err(|e| kernel(&e))?
            .into_iter()
            .filter_map(|l| l.owner);
        Ok(owners.filter(|o| o.network == network).map(|o| o.key).collect())
    }

    fn status(&self) -> Result<(), Failure> {
        let unavailable = |f: Failure| Failure {
            code: code::UNAVAILABLE,
            ..f
        };
        if self.conf.mode == Mode::Bridge
            && let Some(why) = bridge::netfilter_missing()
        {
            let msg = "mode: bridge needs br_netfilter for Services whose endpoints are on the caller's node";
            return Err(Failure {
                details: why,
                ..Failure::new(code::UNAVAILABLE, msg)
            });
        }
        if let Some(name) = self.conf.master.as_deref() {
            let host = RouteSocket::open().map_err(doing("opening the host's namespace"));
            host.and_then(|mut host| links::master(&mut host, Some(name), None, None))
                .map_err(|e| unavailable(kernel(&e)))?;
        }
        if self.own_ipam() {
            return self.ipam().status().map_err(|e| e.failure(Some(code::UNAVAILABLE)));
        }
        delegate::run(self.conf, self.invocation)
            .map(drop)
            .map_err(|e| e.failure())
    }
}

/// One failure of many steps, none of which stopped the others.
fn merged(verb: &str, mut failures: Vec<Failure>) -> Result<(), Failure> {
    match failures.len() {
        0 => Ok(()),
        1 => Err(failures.remove(0)),
        n => Err(Failure {
            details: failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
            ..Failure::new(code::TEARDOWN, format!("{n} steps of {verb} failed"))
        }),
    }
}
