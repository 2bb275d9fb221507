//! Limits of a group and of all groups together, as policy. The defaults are Azure's published ones.
//!
//! # Source
//! "Resource availability and quota limits for ACI", 2025-11: 60 containers, 20 volumes, 5 ports, 31 vCPU and 240 GB a
//! group; 100 groups and 100 cores a subscription; 300 creates an hour, 100 in five minutes.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::api::core::v1::Pod;
use kubelet::{Refusal, pod::view::PodView};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quota {
    /// Containers of one group, init containers included.
    pub containers: usize,
    /// Volumes of one group, without the service account volume that admission adds.
    pub volumes: usize,
    /// Distinct ports of one group.
    pub ports: usize,
    pub group_cpu_milli: i64,
    pub group_memory_bytes: i64,
    pub groups: usize,
    /// Of all groups together.
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub creates_5_min: usize,
    pub creates_hour: usize,
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            containers: 60,
            volumes: 20,
            ports: 5,
            group_cpu_milli: 31_000,
            group_memory_bytes: 240_000_000_000,
            groups: 100,
            cpu_milli: 100_000,
            memory_bytes: 1_000_000_000_000,
            creates_5_min: 100,
            creates_hour: 300,
        }
    }
}

/// What one group holds of the quota.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    pub cpu_milli: i64,
    pub memory_bytes: i64,
}

impl Share {
    pub fn of(view: &PodView) -> Self {
        Self {
            cpu_milli: view.request_milli("cpu"),
            memory_bytes: view.request_milli("memory") / 1000,
        }
    }
}

/// Who holds what, and when groups were made.
#[derive(Debug, Default)]
pub struct Ledger {
    held: HashMap<String, Share>,
    creates: VecDeque<SystemTime>,
}

impl Ledger {
    /// Takes a share for the pod, or says which limit is in the way. Asking again for the same pod changes nothing.
    ///
    /// # Errors
    /// A refusal that is not terminal: limits of the group can only be met by another spec, the others may be met later.
    pub fn admit(&mut self, quota: &Quota, pod: &Arc<Pod>, now: SystemTime) -> Result<Share, Refusal> {
        let view = PodView::new(pod.clone());
        shape(quota, &view)?;
        let share = Share::of(&view);
        if self.held.contains_key(&view.uid) {
            return Ok(share);
        }
        let (cpu, memory) = self
            .held
            .values()
            .fold((0, 0), |(c, m), s| (c + s.cpu_milli, m + s.memory_bytes));
        over("spec", "container groups", self.held.len() + 1, quota.groups)?;
        over(
            "spec.containers[*].resources.requests.cpu",
            "thousandths of a core in use",
            cpu + share.cpu_milli,
            quota.cpu_milli,
        )?;
        over(
            "spec.containers[*].resources.requests.memory",
            "bytes of memory in use",
            memory + share.memory_bytes,
            quota.memory_bytes,
        )?;
        let age = |at: &SystemTime| now.duration_since(*at).unwrap_or_default();
        while self
            .creates
            .front()
            .is_some_and(|at| age(at) > Duration::from_secs(3600))
        {
            self.creates.pop_front();
        }
        let recent = self
            .creates
            .iter()
            .filter(|at| age(at) <= Duration::from_secs(300))
            .count();
        over(
            "spec",
            "groups created within 5 minutes",
            recent + 1,
            quota.creates_5_min,
        )?;
        over(
            "spec",
            "groups created within an hour",
            self.creates.len() + 1,
            quota.creates_hour,
        )?;
        self.creates.push_back(now);
        self.held.insert(view.uid, share);
        Ok(share)
    }

    /// A group that was there before this process.
    pub fn adopt(&mut self, uid: &str, share: Share) {
        self.held.insert(uid.to_owned(), share);
    }

    pub fn release(&mut self, uid: &str) {
        self.held.remove(uid);
    }

    pub fn holds(&self, uid: &str) -> bool {
        self.held.contains_key(uid)
    }

    pub fn held(&self) -> usize {
        self.held.len()
    }
}

fn over<T: PartialOrd + std::fmt::Display>(field: &str, what: &str, want: T, limit: T) -> Result<(), Refusal> {
    if want <= limit {
        return Ok(());
    }
    Err(Refusal {
        reason: "QuotaExceeded".into(),
        field: field.into(),
        message: format!("{what}: {want} exceeds the quota of {limit}"),
        terminal: false,
    })
}

fn shape(quota: &Quota, view: &PodView) -> Result<(), Refusal> {
    let spec = view.spec();
    over(
        "spec.containers",
        "containers of a group",
        view.members().count(),
        quota.containers,
    )?;
    let own = |name: &str| !name.starts_with("kube-api-access-");
    let volumes = spec.volumes.iter().flatten().filter(|v| own(&v.name)).count();
    over("spec.volumes", "volumes of a group", volumes, quota.volumes)?;
    let ports: BTreeSet<_> = view
        .members()
        .flat_map(|m| m.container.ports.iter().flatten())
        .map(|p| (p.protocol.clone().unwrap_or_else(|| "TCP".into()), p.container_port))
        .collect();
    over("spec.containers[*].ports", "ports of a group", ports.len(), quota.ports)?;
    let share = Share::of(view);
    let cpu = "spec.containers[*].resources.requests.cpu";
    over(
        cpu,
        "thousandths of a core of a group",
        share.cpu_milli,
        quota.group_cpu_milli,
    )?;
    let memory = "spec.containers[*].resources.requests.memory";
    over(
        memory,
        "bytes of memory of a group",
        share.memory_bytes,
        quota.group_memory_bytes,
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, spec: Value) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": uid, "namespace": "d", "uid": uid}, "spec": spec}))
                .unwrap(),
        )
    }

    fn containers(n: usize) -> Value {
        (0..n).map(|i| json!({"name": format!("c{i}"), "image": "i"})).collect()
    }

    #[test]
    fn limits_of_a_group_name_the_field_and_the_number() {
        let ask = |spec: Value| Ledger::default().admit(&Quota::default(), &pod("u", spec), SystemTime::now());
        assert!(ask(json!({"containers": containers(60)})).is_ok());
        let e = ask(json!({"containers": containers(61)})).unwrap_err();
        assert_eq!(
            e.to_string(),
            "spec.containers: containers of a group: 61 exceeds the quota of 60"
        );
        let volumes: Value = (0..21)
            .map(|i| json!({"name": format!("v{i}"), "emptyDir": {}}))
            .collect();
        assert_eq!(
            ask(json!({"containers": containers(1), "volumes": volumes}))
                .unwrap_err()
                .field,
            "spec.volumes"
        );
        let ports: Value = (1..=6).map(|p| json!({"containerPort": p})).collect();
        let c = json!([{"name": "c", "image": "i", "ports": ports}]);
        assert_eq!(
            ask(json!({"containers": c})).unwrap_err().field,
            "spec.containers[*].ports"
        );
        let c = json!([{"name": "c", "image": "i", "resources": {"requests": {"cpu": "32"}}}]);
        assert_eq!(
            ask(json!({"containers": c})).unwrap_err().field,
            "spec.containers[*].resources.requests.cpu"
        );
    }

    #[test]
    fn totals_are_given_back() {
        let quota = Quota {
            groups: 2,
            ..Default::default()
        };
        let (mut l, now) = (Ledger::default(), SystemTime::now());
        for uid in ["a", "b", "a"] {
            l.admit(&quota, &pod(uid, json!({"containers": containers(1)})), now)
                .unwrap();
        }
        let third = pod("c", json!({"containers": containers(1)}));
        assert!(
            l.admit(&quota, &third, now)
                .unwrap_err()
                .message
                .starts_with("container groups: 3 exceeds")
        );
        l.release("a");
        l.admit(&quota, &third, now).unwrap();
    }

    #[test]
    fn creates_are_limited_in_time() {
        let quota = Quota {
            creates_5_min: 1,
            ..Default::default()
        };
        let (mut l, now) = (Ledger::default(), SystemTime::now());
        l.admit(&quota, &pod("a", json!({"containers": containers(1)})), now)
            .unwrap();
        l.release("a");
        let b = pod("b", json!({"containers": containers(1)}));
        assert!(l.admit(&quota, &b, now + Duration::from_secs(299)).is_err());
        l.admit(&quota, &b, now + Duration::from_secs(301)).unwrap();
    }
}
