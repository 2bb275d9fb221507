//! The verbs of both binaries over a parsed invocation; they return what is to be printed.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use linux::netns::{self, NetNs};
use serde_json::Value;

use crate::{
    conf::{Mode, NetConf, OWN_IPAM},
    delegate,
    ipam::{self, Ipam},
    pool::Key,
    result::{CniResult, Interface, IpConfig, Route},
    spec::{Attachment, Command, Failure, Invocation, code},
    transparent::{self, GATEWAY, KernelError, Owner, Plan, network_tag},
};

/// One invocation: what to do, with which configuration, and where warnings go.
pub struct Call<'a> {
    pub invocation: &'a Invocation,
    pub conf: &'a NetConf,
    pub warn: &'a dyn Fn(&str),
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
                let allocation = ipam.add(self.attachment()?).map_err(|e| e.failure(None))?;
                return Ok(Some(ipam::result(&allocation).document(self.conf.version)));
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

    fn need_transparent(&self) -> Result<(), Failure> {
        let mode = match self.conf.mode {
            Mode::Transparent => return Ok(()),
            Mode::Bridge => "bridge (also the meaning of an omitted mode)",
            Mode::Tunnel => "tunnel",
        };
        Err(Failure::new(
            code::CONFIG,
            format!("mode: {mode} is not built yet; use \"transparent\""),
        ))
    }

    fn netns(&self) -> Result<(NetNs, String), Failure> {
        let path = self.invocation.netns.as_deref().unwrap_or(Path::new(""));
        let ns = netns::open(path).map_err(|e| Failure::from_error(code::NETNS, &e))?;
        let own = NetNs::current().map_err(|e| Failure::from_error(code::NETNS, &e))?;
        if ns.is_same(&own) {
            return Err(Failure::new(
                code::NETNS,
                format!("{} is the plug-in's own network namespace", path.display()),
            ));
        }
        Ok((ns, path.to_string_lossy().into_owned()))
    }

    fn owner(&self, attachment: &Attachment) -> Owner {
        Owner {
            network: network_tag(&self.conf.name),
            key: Key::of(attachment),
            container_id: attachment.container_id.clone(),
            ifname: attachment.ifname.clone(),
        }
    }

    /// Addresses from IPAM, and the MAC of the NIC they belong to if known.
    fn ipam_add(&self, attachment: &Attachment) -> Result<(CniResult, Option<String>), Failure> {
        if self.own_ipam() {
            let a = self.ipam().add(attachment).map_err(|e| e.failure(None))?;
            return Ok((ipam::result(&a), Some(a.mac)));
        }
        let result = delegate::run(self.conf, self.invocation).map_err(|e| e.failure())?;
        Ok((result.unwrap_or_default(), None))
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
        self.need_transparent()?;
        if self.conf.prev_result.is_some() {
            return Err(Failure::new(
                code::CONFIG,
                "prevResult: azure-vnet makes the interface and must come first in the list",
            ));
        }
        let attachment = self.attachment()?;
        let (ns, sandbox) = self.netns()?;
        // Before IPAM: an interface that exists belongs to a living pod, whose address must not be given back below.
        if transparent::pod_has_link(&ns, &attachment.ifname).map_err(|e| kernel(&e))? {
            let (ifname, container_id) = (attachment.ifname.clone(), attachment.container_id.clone());
            return Err(kernel(&KernelError::Exists { ifname, container_id }));
        }
        let outcome = self
            .ipam_add(attachment)
            .and_then(|(leased, mac)| self.attach(attachment, &ns, sandbox, leased, mac));
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
        ns: &NetNs,
        sandbox: String,
        leased: CniResult,
        mac: Option<String>,
    ) -> Result<CniResult, Failure> {
        let addresses = ipv4(leased.ips.iter().map(|i| i.address.addr())).map_err(|e| kernel(&e))?;
        if addresses.is_empty() {
            return Err(Failure::new(
                code::KERNEL,
                format!("IPAM plug-in {} gave no address", self.conf.ipam.kind),
            ));
        }
        let master = transparent::master(self.conf.master.as_deref(), mac.as_deref()).map_err(|e| kernel(&e))?;
        let plan = Plan {
            owner: self.owner(attachment),
            ifname: attachment.ifname.clone(),
            addresses,
            mtu: self.conf.mtu.unwrap_or(master.mtu),
            master: master.name,
        };
        let made = transparent::attach(ns, &plan).map_err(|e| kernel(&e))?;
        let mtu = Some(plan.mtu);
        Ok(CniResult {
            interfaces: vec![
                Interface {
                    name: made.host_link,
                    mac: made.host_mac,
                    mtu,
                    sandbox: String::new(),
                },
                Interface {
                    name: plan.ifname,
                    mac: made.pod_mac,
                    mtu,
                    sandbox,
                },
            ],
            ips: plan
                .addresses
                .iter()
                .map(|a| IpConfig {
                    address: IpAddr::V4(*a).into(),
                    gateway: Some(GATEWAY.into()),
                    interface: Some(1),
                })
                .collect(),
            routes: vec![Route {
                dst: ipnet::IpNet::V4(Default::default()),
                gw: Some(GATEWAY.into()),
            }],
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
        failures.extend(transparent::detach(&Key::of(attachment)).err().map(|e| kernel(&e)));
        failures.extend(self.ipam_del(attachment).err());
        failures
    }

    fn del(&self) -> Result<(), Failure> {
        merged("DEL", self.undo(self.attachment()?))
    }

    fn check(&self) -> Result<(), Failure> {
        self.need_transparent()?;
        let attachment = self.attachment()?;
        let previous = self.prev_result()?;
        let (ns, _) = self.netns()?;
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
        let addresses = ipv4(ours).map_err(|e| Failure::from_error(code::CHECK_FAILED, &e))?;
        if addresses.is_empty() {
            return Err(differs("an address of", &attachment.ifname));
        }
        transparent::check(&ns, &owner, &attachment.ifname, &addresses)
            .map_err(|e| Failure::from_error(code::CHECK_FAILED, &e))?;
        if self.own_ipam() {
            let expected: Vec<IpAddr> = addresses.into_iter().map(IpAddr::V4).collect();
            return self.ipam().check(attachment, &expected).map_err(|e| e.failure(None));
        }
        delegate::run(self.conf, self.invocation)
            .map(drop)
            .map_err(|e| e.failure())
    }

    fn gc(&self) -> Result<(), Failure> {
        let valid = self.valid_keys()?;
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
        match transparent::live() {
            Err(e) => failures.push(kernel(&e)),
            Ok(live) => {
                let names = |keys: &BTreeSet<Key>| keys.iter().map(Key::link_name).collect::<BTreeSet<_>>();
                let (valid, others) = (names(&valid), names(&others));
                let stale: Vec<_> = live
                    .into_iter()
                    .filter(|l| match &l.owner {
                        Some(owner) => owner.network == network && !valid.contains(&l.link.name),
                        // Its ADD died before naming it; whose it is, the reservations say.
                        None => !valid.contains(&l.link.name) && !others.contains(&l.link.name),
                    })
                    .map(|l| l.link)
                    .collect();
                failures.extend(transparent::remove(&stale).err().map(|e| kernel(&e)));
            }
        }
        let released = if self.own_ipam() {
            self.ipam().gc(&valid).map(drop).map_err(|e| e.failure(None))
        } else {
            delegate::run(self.conf, self.invocation)
                .map(drop)
                .map_err(|e| e.failure())
        };
        failures.extend(released.err());
        merged("GC", failures)
    }

    fn status(&self) -> Result<(), Failure> {
        let unavailable = |f: Failure| Failure {
            code: code::UNAVAILABLE,
            ..f
        };
        self.need_transparent().map_err(unavailable)?;
        if let Some(name) = self.conf.master.as_deref() {
            transparent::master(Some(name), None).map_err(|e| unavailable(kernel(&e)))?;
        }
        if self.own_ipam() {
            return self.ipam().status().map_err(|e| e.failure(Some(code::UNAVAILABLE)));
        }
        delegate::run(self.conf, self.invocation)
            .map(drop)
            .map_err(|e| e.failure())
    }
}

fn ipv4(addresses: impl Iterator<Item = IpAddr>) -> Result<Vec<Ipv4Addr>, KernelError> {
    addresses
        .map(|a| match a {
            IpAddr::V4(v4) => Ok(v4),
            address @ IpAddr::V6(_) => Err(KernelError::NotIpv4 { address }),
        })
        .collect()
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
