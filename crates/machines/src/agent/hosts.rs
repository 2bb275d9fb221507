//! This host among others: what of the network is elsewhere (pure), and the host's own object and lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use reconcile::{Client, Patch};
use resources::{Host, HostSpec};
use serde::{Deserialize, Serialize};
use serde_json::json;
use stdx::Shutdown;
use vnet_model::{
    fabric::FabricSpec,
    underlay::{EDGE_VNI, RemoteHostSpec, UnderlaySpec, VNI_MAX},
};

use super::plan::World;

/// Where hosts' leases are, and what they are called.
pub const LEASE_NAMESPACE: &str = "kube-system";
/// How often a host renews its lease.
const RENEW: Duration = Duration::from_secs(3);
/// A host whose lease is older than this is lost.
pub const LEASE_S: i32 = 12;

pub fn lease_name(host: &str) -> String {
    format!("host-{host}")
}

/// This host.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Here {
    /// Home object name of its Host.
    pub name: String,
    pub primary: bool,
    /// Without one the host stands alone and has no Host object.
    pub underlay: Option<Ipv4Addr>,
}

impl Here {
    /// Whether a machine with this `spec.host` is for this host.
    pub fn runs(&self, host: &str) -> bool {
        match self.underlay {
            None => host.is_empty() || host == self.name,
            Some(_) => host == self.name,
        }
    }
}

/// Numbers of virtual networks between hosts, by key; stable as long as no two keys collide: they come from the key.
pub fn vnis<'a>(keys: impl IntoIterator<Item = &'a str>) -> BTreeMap<&'a str, u32> {
    let keys: BTreeSet<&str> = keys.into_iter().collect();
    let mut taken = BTreeSet::new();
    let first = EDGE_VNI + 1;
    keys.into_iter()
        .map(|key| {
            // FNV-1a, folded to 24 bits.
            let hash = key
                .bytes()
                .fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
            let mut vni = (hash ^ (hash >> 24)) & VNI_MAX;
            while vni < first || !taken.insert(vni) {
                vni = if vni >= VNI_MAX { first } else { vni + 1 };
            }
            (key, vni)
        })
        .collect()
}

/// Splits what `spec` holds into what is here and what is behind other hosts. A spec of a host that stands alone, or has no
/// number yet, stays as it is.
pub fn split(spec: &mut FabricSpec, world: &World, here: &Here) {
    let Some(address) = here.underlay else { return };
    let number = |h: &Host| h.status.as_ref().map_or(0, |s| s.number);
    let own = world.hosts.iter().find(|h| h.name() == here.name).map_or(0, number);
    if own == 0 {
        return;
    }
    let primary = world.hosts.iter().find(|h| h.spec.primary).map(Host::name);
    let places: BTreeMap<&str, &str> = world
        .machines
        .iter()
        .filter(|m| !m.spec.host.is_empty())
        .map(|m| (m.spec.nic.as_str(), m.spec.host.as_str()))
        .collect();
    let keys: Vec<String> = spec.vnets.iter().map(|v| v.key.clone()).collect();
    let vnis = vnis(keys.iter().map(String::as_str));
    for vnet in &mut spec.vnets {
        vnet.vni = vnis.get(vnet.key.as_str()).copied();
        for nic in &mut vnet.nics {
            // What is no machine's is a virtual node's or a group's, and those are the primary host's.
            let place = places.get(nic.key.as_str()).copied().or(primary);
            nic.host = place.filter(|p| *p != here.name).map(str::to_owned);
        }
        for site in &mut vnet.sites {
            // Gateways stand on the first host.
            site.host = primary.filter(|p| *p != here.name).map(str::to_owned);
        }
    }
    let endpoints = match here.primary {
        true => Vec::new(),
        false => std::mem::take(&mut spec.edge.endpoints),
    };
    let mut underlay = UnderlaySpec::new(address, own);
    underlay.hosts = world
        .hosts
        .iter()
        .filter(|h| h.name() != here.name && is_ready(h) && number(h) > 0)
        .filter_map(|h| {
            Some(RemoteHostSpec {
                key: h.name().to_owned(),
                address: h.spec.underlay.parse().ok()?,
                number: number(h),
                endpoints: if h.spec.primary { endpoints.clone() } else { Vec::new() },
            })
        })
        .collect();
    spec.underlay = Some(underlay);
}

fn is_ready(host: &Host) -> bool {
    host.metadata.deletion_timestamp.is_none() && host.status.as_ref().is_some_and(|s| s.phase == "Ready")
}

/// Writes this host's object, then renews its lease until `shutdown`. Failures are logged and tried again.
pub async fn announce(home: Client, here: Here, capacity: HostSpec, shutdown: Shutdown) {
    let mut written = false;
    loop {
        let step = async {
            if !written {
                write(&home, &here, &capacity).await?;
            }
            renew(&home, &here.name).await
        };
        match shutdown.or_stop(step).await {
            None => return,
            Some(Ok(())) => written = true,
            Some(Err(e)) => {
                tracing::warn!(controller = "hosts", name = here.name, reason = %stdx::chain(&e), "this host is not announced");
            }
        }
        if shutdown.or_stop(tokio::time::sleep(RENEW)).await.is_none() {
            return;
        }
    }
}

async fn write(home: &Client, here: &Here, capacity: &HostSpec) -> Result<(), reconcile::Error> {
    let patch = Patch::Merge(json!({"spec": capacity}));
    match home.patch::<Host>(None, &here.name, &patch, None).await {
        Err(e) if e.is_not_found() && here.primary => {
            home.create(None, &Host::new(here.name.clone(), capacity.clone()))
                .await?;
        }
        other => {
            other?;
        }
    }
    Ok(())
}

async fn renew(home: &Client, name: &str) -> Result<(), reconcile::Error> {
    let lease = lease_name(name);
    let spec = json!({"spec": {"holderIdentity": name, "leaseDurationSeconds": LEASE_S, "renewTime": MicroTime(Timestamp::now())}});
    match home
        .patch::<Lease>(Some(LEASE_NAMESPACE), &lease, &Patch::Merge(spec), None)
        .await
    {
        Err(e) if e.is_not_found() => {
            let mut fresh = Lease::default();
            fresh.metadata.name = Some(lease);
            fresh.spec = Some(LeaseSpec {
                holder_identity: Some(name.to_owned()),
                lease_duration_seconds: Some(LEASE_S),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            });
            home.create(Some(LEASE_NAMESPACE), &fresh).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// What this machine has to give: online processors and memory.
pub fn capacity(underlay: Ipv4Addr, primary: bool) -> HostSpec {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse::<i64>().ok());
    HostSpec {
        underlay: underlay.to_string(),
        primary,
        cpu_milli: i64::try_from(cpus).unwrap_or(1) * 1000,
        memory_bytes: kib.unwrap_or(0) * 1024,
    }
}

#[cfg(test)]
mod tests {
    use resources::{HostStatus, Machine};
    use vnet_model::fabric::{NicSpec, VnetSpec};

    use super::*;

    fn host(name: &str, last: u8, primary: bool, phase: &str) -> Host {
        let mut h = Host::new(
            name,
            HostSpec {
                underlay: format!("192.0.2.{last}"),
                primary,
                ..HostSpec::default()
            },
        );
        h.status = Some(HostStatus {
            phase: phase.into(),
            number: last.into(),
            ..HostStatus::default()
        });
        h
    }

    fn world() -> (World, FabricSpec) {
        let mut machine = Machine::new("m2", Default::default());
        (machine.spec.nic, machine.spec.host) = ("n2".into(), "b".into());
        let world = World {
            hosts: vec![
                host("a", 1, true, "Ready"),
                host("b", 2, false, "Ready"),
                host("c", 3, false, "NotReady"),
            ],
            machines: vec![machine],
            ..World::default()
        };
        let nic = |key: &str| NicSpec {
            key: key.into(),
            ..NicSpec::default()
        };
        let mut spec = FabricSpec {
            vnets: vec![VnetSpec {
                key: "v".into(),
                nics: vec![nic("n1"), nic("n2")],
                ..VnetSpec::default()
            }],
            ..FabricSpec::default()
        };
        spec.edge.endpoints = vec![Ipv4Addr::new(198, 19, 0, 4)];
        (world, spec)
    }

    fn here(name: &str, last: u8) -> Here {
        Here {
            name: name.into(),
            primary: name == "a",
            underlay: Some(Ipv4Addr::new(192, 0, 2, last)),
        }
    }

    #[test]
    fn each_host_sees_the_others_things_behind_them() {
        let (world, spec) = world();
        let seen = |name: &str, last| {
            let mut s = spec.clone();
            split(&mut s, &world, &here(name, last));
            let nics: Vec<Option<String>> = s.vnets[0].nics.iter().map(|n| n.host.clone()).collect();
            let hosts = s.underlay.unwrap().hosts;
            let listed: Vec<(String, usize)> = hosts.into_iter().map(|h| (h.key, h.endpoints.len())).collect();
            (nics, listed, s.edge.endpoints.len(), s.vnets[0].vni)
        };
        let (a, b) = (seen("a", 1), seen("b", 2));
        assert_eq!(
            (a.0, a.1, a.2),
            (vec![None, Some("b".into())], vec![("b".into(), 0)], 1)
        );
        assert_eq!(
            (b.0, b.1, b.2),
            (vec![Some("a".into()), None], vec![("a".into(), 1)], 0)
        );
        assert!(a.3.is_some() && a.3 == b.3);
    }

    #[test]
    fn a_host_alone_changes_nothing_and_runs_what_nobody_was_chosen_for() {
        let (world, spec) = world();
        let mut s = spec.clone();
        split(&mut s, &world, &Here::default());
        assert_eq!(s, spec);
        assert!(Here::default().runs("") && !Here::default().runs("a"));
        assert!(here("a", 1).runs("a") && !here("a", 1).runs(""));
    }

    #[test]
    fn numbers_of_networks_are_unique_and_in_range() {
        let names: Vec<String> = (0..5000).map(|i| format!("vnet-{i}")).collect();
        let all = vnis(names.iter().map(String::as_str));
        let distinct: BTreeSet<u32> = all.values().copied().collect();
        assert_eq!(distinct.len(), 5000);
        assert!(distinct.iter().all(|v| (EDGE_VNI + 1..=VNI_MAX).contains(v)));
    }
}
