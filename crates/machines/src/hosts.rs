//! Hosts of a platform, seen from its server: which are alive, which numbers they have, which machine runs where.
//!
//! A host is alive while it renews its lease. A lost host's machines stay its own: they run on if only its agent or its link
//! died, and nobody can tell from here. They are given up when the Host object is deleted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{api::coordination::v1::Lease, jiff::Timestamp};
use reconcile::{Client, Informer, Informers, ListParams, Patch};
use resources::{Host, HostStatus, Machine};
use serde_json::json;
use stdx::Shutdown;
use tokio::sync::Notify;
use vnet_model::underlay::HOST_NUMBER_MAX;

use crate::agent::{FINALIZER, hosts as agent};

/// Leases are looked at this often.
const LOOK: Duration = Duration::from_secs(2);

/// What shall be written.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Status {
        host: String,
        status: HostStatus,
    },
    /// The machine runs on this host from now on.
    Place {
        machine: String,
        host: String,
    },
    /// Its host is gone for good: nobody will take it down.
    GiveUp {
        machine: String,
    },
}

/// Decides from the objects and from when each host renewed its lease last.
pub fn plan(
    hosts: &[Host],
    renewed: &BTreeMap<String, Timestamp>,
    machines: &[Machine],
    now: Timestamp,
) -> Vec<Action> {
    let mut out = Vec::new();
    if hosts.is_empty() {
        return out;
    }
    let number = |h: &Host| h.status.as_ref().map_or(0, |s| s.number);
    let mut taken: BTreeSet<u16> = hosts.iter().map(number).filter(|n| *n > 0).collect();
    let mut ready = BTreeSet::new();
    for host in hosts {
        let mut status = host.status.clone().unwrap_or_default();
        if status.number == 0
            && let Some(free) = (1..=HOST_NUMBER_MAX).find(|n| !taken.contains(n))
        {
            taken.insert(free);
            status.number = free;
        }
        let age = renewed.get(host.name()).map(|t| now.as_second() - t.as_second());
        (status.phase, status.message) = match age {
            None => ("Joining".to_owned(), "its agent has not called yet".to_owned()),
            Some(s) if s <= i64::from(agent::LEASE_S) => ("Ready".to_owned(), String::new()),
            // The message stays the same while nothing changes.
            Some(_) => {
                let since = renewed.get(host.name()).map(ToString::to_string).unwrap_or_default();
                ("NotReady".to_owned(), format!("its agent has not called since {since}"))
            }
        };
        if status.phase == "Ready" && host.metadata.deletion_timestamp.is_none() {
            ready.insert(host.name());
        }
        if host.status.as_ref() != Some(&status) {
            let host = host.name().to_owned();
            out.push(Action::Status { host, status });
        }
    }
    place(hosts, &ready, machines, &mut out);
    out
}

/// Machines without a host get the ready one with the most processors left, counted by what machines promise. One that runs
/// somewhere already stays there.
fn place(hosts: &[Host], ready: &BTreeSet<&str>, machines: &[Machine], out: &mut Vec<Action>) {
    let known = |name: &str| hosts.iter().any(|h| h.name() == name);
    let mut left: BTreeMap<&str, i64> = hosts
        .iter()
        .filter(|h| ready.contains(h.name()))
        .map(|h| (h.name(), h.spec.cpu_milli))
        .collect();
    for m in machines {
        if let Some(left) = left.get_mut(m.spec.host.as_str()) {
            *left -= m.spec.cpu_milli;
        }
    }
    for m in machines {
        let gone = !m.spec.host.is_empty() && !known(&m.spec.host);
        if m.metadata.deletion_timestamp.is_some() {
            if gone && m.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
                let machine = m.name().to_owned();
                out.push(Action::GiveUp { machine });
            }
            continue;
        }
        if !m.spec.host.is_empty() {
            continue;
        }
        let runs_at = m.status.as_ref().map(|s| s.host.as_str()).filter(|h| known(h));
        let most = || {
            left.iter()
                .max_by_key(|(name, left)| (**left, std::cmp::Reverse(**name)))
                .map(|(n, _)| *n)
        };
        if let Some(host) = runs_at.or_else(most) {
            if let Some(left) = left.get_mut(host) {
                *left -= m.spec.cpu_milli;
            }
            out.push(Action::Place {
                machine: m.name().to_owned(),
                host: host.to_owned(),
            });
        }
    }
}

/// Keeps hosts and machines so until `shutdown`.
pub async fn run(home: Client, informers: Informers, shutdown: Shutdown) {
    let (hosts, machines): (Informer<Host>, Informer<Machine>) = (informers.get(), informers.get());
    hosts.wait_synced().await;
    machines.wait_synced().await;
    let changed = Arc::new(Notify::new());
    let (by_host, by_machine) = (changed.clone(), changed.clone());
    hosts.on_change(move |_| by_host.notify_one());
    machines.on_change(move |_| by_machine.notify_one());
    loop {
        if !hosts.list().is_empty()
            && let Err(e) = step(&home, &hosts, &machines).await
        {
            tracing::warn!(controller = "hosts", reason = %stdx::chain(&e), "hosts are not as wanted yet");
        }
        // Each branch only wakes the loop, which looks at everything.
        tokio::select! {
            () = changed.notified() => {}
            () = tokio::time::sleep(LOOK), if !hosts.list().is_empty() => {}
            () = shutdown.wait() => return,
        }
    }
}

async fn step(home: &Client, hosts: &Informer<Host>, machines: &Informer<Machine>) -> Result<(), reconcile::Error> {
    let leases = home
        .list::<Lease>(Some(agent::LEASE_NAMESPACE), &ListParams::default())
        .await?;
    let hosts: Vec<Host> = hosts.list().iter().map(|h| (**h).clone()).collect();
    let machines: Vec<Machine> = machines.list().iter().map(|m| (**m).clone()).collect();
    let renewed = hosts
        .iter()
        .filter_map(|h| {
            let name = agent::lease_name(h.name());
            let lease = leases
                .items
                .iter()
                .find(|l| l.metadata.name.as_deref() == Some(&name))?;
            let time = lease.spec.as_ref()?.renew_time.as_ref()?.0;
            Some((h.name().to_owned(), time))
        })
        .collect();
    for action in plan(&hosts, &renewed, &machines, Timestamp::now()) {
        match action {
            Action::Status { host, status } => {
                tracing::info!(controller = "hosts", name = host, phase = status.phase, "host");
                let patch = Patch::Merge(json!({"status": status}));
                home.patch::<Host>(None, &host, &patch, Some("status")).await?;
            }
            Action::Place { machine, host } => {
                tracing::info!(controller = "hosts", name = machine, host, "machine placed");
                let patch = Patch::Merge(json!({"spec": {"host": host}}));
                home.patch::<Machine>(None, &machine, &patch, None).await?;
            }
            Action::GiveUp { machine } => {
                let found = machines.iter().find(|m| m.name() == machine);
                let finalizers = found.and_then(|m| m.metadata.finalizers.clone()).unwrap_or_default();
                let rest: Vec<String> = finalizers.into_iter().filter(|f| f != FINALIZER).collect();
                let patch = Patch::Merge(json!({"metadata": {"finalizers": rest}}));
                home.patch::<Machine>(None, &machine, &patch, None).await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use resources::HostSpec;

    use super::*;

    fn host(name: &str, cpus: i64, number: u16) -> Host {
        let mut h = Host::new(
            name,
            HostSpec {
                cpu_milli: cpus * 1000,
                ..HostSpec::default()
            },
        );
        if number > 0 {
            h.status = Some(HostStatus {
                phase: "Ready".into(),
                number,
                ..HostStatus::default()
            });
        }
        h
    }

    fn machine(name: &str, host: &str) -> Machine {
        let mut m = Machine::new(name, Default::default());
        (m.spec.host, m.spec.cpu_milli) = (host.into(), 2000);
        m
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn hosts_get_numbers_and_are_lost_with_their_lease() {
        let hosts = [host("a", 4, 1), host("b", 4, 0), host("c", 4, 3)];
        let renewed = [("a".to_owned(), at(100)), ("c".to_owned(), at(50))].into();
        let actions = plan(&hosts, &renewed, &[], at(105));
        let [
            Action::Status {
                host: b,
                status: joining,
            },
            Action::Status { host: c, status: lost },
        ] = &actions[..]
        else {
            panic!("{actions:?}")
        };
        assert_eq!(
            (b.as_str(), joining.number, joining.phase.as_str()),
            ("b", 2, "Joining")
        );
        assert_eq!((c.as_str(), lost.number, lost.phase.as_str()), ("c", 3, "NotReady"));
        assert!(lost.message.contains("1970-01-01T00:00:50"), "{}", lost.message);
        assert!(plan(&[], &renewed, &[machine("m", "")], at(1)).is_empty());
    }

    #[test]
    fn machines_spread_over_ready_hosts_by_what_is_left() {
        let hosts = [host("a", 4, 1), host("b", 4, 2), host("lost", 64, 3)];
        let renewed = [
            ("a".to_owned(), at(100)),
            ("b".to_owned(), at(100)),
            ("lost".to_owned(), at(1)),
        ]
        .into();
        let mut adopted = machine("old", "");
        adopted.status = Some(resources::MachineStatus {
            host: "b".into(),
            ..Default::default()
        });
        let machines = [machine("m1", ""), machine("m2", ""), adopted, machine("there", "a")];
        let placed: Vec<(String, String)> = plan(&hosts, &renewed, &machines, at(101))
            .into_iter()
            .filter_map(|a| match a {
                Action::Place { machine, host } => Some((machine, host)),
                _ => None,
            })
            .collect();
        let pair = |m: &str, h: &str| (m.to_owned(), h.to_owned());
        assert_eq!(placed, [pair("m1", "b"), pair("m2", "a"), pair("old", "b")]);
    }

    #[test]
    fn a_deleted_machine_of_a_host_that_is_gone_is_given_up() {
        let mut m = machine("m", "gone");
        m.metadata.deletion_timestamp = Some(Time(at(1)));
        m.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
        let hosts = [host("a", 4, 1)];
        let renewed = [("a".to_owned(), at(1))].into();
        let actions = plan(&hosts, &renewed, &[m.clone()], at(1));
        assert_eq!(actions, [Action::GiveUp { machine: "m".into() }]);
        m.spec.host = "a".into();
        assert!(plan(&hosts, &renewed, &[m], at(1)).is_empty());
    }
}
