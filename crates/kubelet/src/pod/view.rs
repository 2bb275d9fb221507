//! A pod as the node reads it: members in order, policies parsed, resources summed. Pure.

use std::sync::Arc;

use apimachinery::quantity;
use k8s_openapi::{
    api::core::v1::{Container, EphemeralContainer, Pod, PodSpec, ResourceRequirements},
    apimachinery::pkg::api::resource::Quantity,
};
use sandbox::{PodIdentity, Resources};

/// What a container is in its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: started in order, then runs beside the others.
    Sidecar,
    Main,
    /// Added by `kubectl debug`; never restarted.
    Ephemeral,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    Always,
    OnFailure,
    Never,
}

impl Restart {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            Some("Always") => Some(Self::Always),
            Some("OnFailure") => Some(Self::OnFailure),
            Some("Never") => Some(Self::Never),
            _ => None,
        }
    }

    /// Whether a container that ended with `code` runs again.
    pub fn again(self, code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => code != 0,
            Self::Never => false,
        }
    }
}

/// One container of the pod.
#[derive(Clone, Debug)]
pub struct Member {
    pub kind: Kind,
    pub restart: Restart,
    pub container: Container,
    /// JSON path, `spec.initContainers[0]`.
    pub path: String,
}

impl Member {
    pub fn name(&self) -> &str {
        &self.container.name
    }

    pub fn image(&self) -> &str {
        self.container.image.as_deref().unwrap_or_default()
    }
}

/// Quality of service, from requests and limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// The parsed pod. Rebuilt for every new version of the object.
#[derive(Clone, Debug)]
pub struct PodView {
    pub pod: Arc<Pod>,
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub restart: Restart,
    /// Init containers and sidecars in their order.
    pub init: Vec<Member>,
    pub main: Vec<Member>,
    pub ephemeral: Vec<Member>,
}

impl PodView {
    pub fn new(pod: Arc<Pod>) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let restart = Restart::parse(spec.restart_policy.as_deref()).unwrap_or(Restart::Always);
        let init = spec
            .init_containers
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(i, container)| {
                let own = Restart::parse(container.restart_policy.as_deref());
                let (kind, restart) = match (own, restart) {
                    (Some(Restart::Always), _) => (Kind::Sidecar, Restart::Always),
                    (Some(other), _) => (Kind::Init, other),
                    (None, Restart::Never) => (Kind::Init, Restart::Never),
                    (None, Restart::Always | Restart::OnFailure) => (Kind::Init, Restart::OnFailure),
                };
                Member {
                    kind,
                    restart,
                    container,
                    path: format!("spec.initContainers[{i}]"),
                }
            })
            .collect();
        let main = spec
            .containers
            .into_iter()
            .enumerate()
            .map(|(i, container)| {
                let restart = Restart::parse(container.restart_policy.as_deref()).unwrap_or(restart);
                Member {
                    kind: Kind::Main,
                    restart,
                    container,
                    path: format!("spec.containers[{i}]"),
                }
            })
            .collect();
        let ephemeral = spec
            .ephemeral_containers
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(i, c)| Member {
                kind: Kind::Ephemeral,
                restart: Restart::Never,
                container: as_container(c),
                path: format!("spec.ephemeralContainers[{i}]"),
            })
            .collect();
        Self {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            pod,
            restart,
            init,
            main,
            ephemeral,
        }
    }

    pub fn spec(&self) -> &PodSpec {
        static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
        self.pod.spec.as_ref().unwrap_or(&EMPTY)
    }

    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.init.iter().chain(&self.main).chain(&self.ephemeral)
    }

    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members().find(|m| m.name() == name)
    }

    pub fn identity(&self, attempt: u32) -> PodIdentity {
        PodIdentity {
            uid: self.uid.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            attempt,
        }
    }

    pub fn host_network(&self) -> bool {
        self.spec().host_network == Some(true)
    }

    /// Seconds between SIGTERM and SIGKILL when nothing else was asked for.
    pub fn grace_s(&self) -> u64 {
        self.spec()
            .termination_grace_period_seconds
            .and_then(|s| u64::try_from(s).ok())
            .unwrap_or(30)
    }

    pub fn deleting(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    pub fn qos(&self) -> Qos {
        let mut any = false;
        let mut guaranteed = true;
        for m in self.init.iter().chain(&self.main) {
            for what in ["cpu", "memory"] {
                let limit = limit(&m.container.resources, what);
                let request = request(&m.container.resources, what);
                any |= limit.is_some_and(|v| v > 0) || request.is_some_and(|v| v > 0);
                guaranteed &= limit.is_some_and(|v| v > 0) && request.is_none_or(|r| Some(r) == limit);
            }
        }
        match (any, guaranteed) {
            (false, _) => Qos::BestEffort,
            (true, true) => Qos::Guaranteed,
            (true, false) => Qos::Burstable,
        }
    }

    /// Requests of the whole pod in thousandths of the unit, upstream's rule: the larger of what runs together at the
    /// end (mains and sidecars) and of each init container together with the sidecars before it; plus overhead.
    pub fn request_milli(&self, what: &str) -> i64 {
        self.sum(what, |r, w| request(r, w).or_else(|| limit(r, w)).unwrap_or(0))
    }

    fn limit_milli(&self, what: &str) -> i64 {
        // One container without a limit makes the pod unlimited.
        if self
            .main
            .iter()
            .chain(self.init.iter())
            .any(|m| limit(&m.container.resources, what).is_none())
        {
            return 0;
        }
        self.sum(what, |r, w| limit(r, w).unwrap_or(0))
    }

    fn sum(&self, what: &str, of: impl Fn(&Option<ResourceRequirements>, &str) -> i64) -> i64 {
        let mut sidecars = 0;
        let mut peak = 0;
        for m in &self.init {
            let own = of(&m.container.resources, what);
            peak = peak.max(sidecars + own);
            if m.kind == Kind::Sidecar {
                sidecars += own;
            }
        }
        let together: i64 = self.main.iter().map(|m| of(&m.container.resources, what)).sum::<i64>() + sidecars;
        let overhead = self.spec().overhead.as_ref().and_then(|o| o.get(what)).map_or(0, milli);
        peak.max(together) + overhead
    }

    /// What the pod's cgroup holds its containers to.
    pub fn cgroup(&self) -> Resources {
        Resources {
            cpu_limit_milli: self.limit_milli("cpu"),
            cpu_request_milli: self.request_milli("cpu"),
            memory_limit_bytes: self.limit_milli("memory") / 1000,
            pids_limit: 0,
        }
    }
}

/// What one container's cgroup holds it to.
pub fn container_resources(c: &Container) -> Resources {
    let limit_of = |w| limit(&c.resources, w).unwrap_or(0);
    Resources {
        cpu_limit_milli: limit_of("cpu"),
        cpu_request_milli: request(&c.resources, "cpu")
            .or_else(|| limit(&c.resources, "cpu"))
            .unwrap_or(0),
        memory_limit_bytes: limit_of("memory") / 1000,
        pids_limit: 0,
    }
}

/// Thousandths of the unit, rounded up; 0 for what does not parse (the API server has validated it).
pub fn milli(q: &Quantity) -> i64 {
    quantity::Quantity::parse(&q.0).map_or(0, |v| v.milli())
}

pub fn request(r: &Option<ResourceRequirements>, what: &str) -> Option<i64> {
    r.as_ref()?.requests.as_ref()?.get(what).map(milli)
}

pub fn limit(r: &Option<ResourceRequirements>, what: &str) -> Option<i64> {
    r.as_ref()?.limits.as_ref()?.get(what).map(milli)
}

fn as_container(e: EphemeralContainer) -> Container {
    Container {
        args: e.args,
        command: e.command,
        env: e.env,
        env_from: e.env_from,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        lifecycle: e.lifecycle,
        liveness_probe: e.liveness_probe,
        name: e.name,
        ports: e.ports,
        readiness_probe: e.readiness_probe,
        resize_policy: e.resize_policy,
        resources: e.resources,
        restart_policy: e.restart_policy,
        restart_policy_rules: e.restart_policy_rules,
        security_context: e.security_context,
        startup_probe: e.startup_probe,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        tty: e.tty,
        volume_devices: e.volume_devices,
        volume_mounts: e.volume_mounts,
        working_dir: e.working_dir,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    #[test]
    fn classes_of_service() {
        let of = |resources: serde_json::Value| {
            PodView::new(pod(
                serde_json::json!({"containers": [{"name": "c", "image": "i", "resources": resources}]}),
            ))
            .qos()
        };
        assert_eq!(of(serde_json::json!({})), Qos::BestEffort);
        assert_eq!(of(serde_json::json!({"requests": {"cpu": "10m"}})), Qos::Burstable);
        assert_eq!(
            of(serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}})),
            Qos::Guaranteed
        );
        assert_eq!(
            of(serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}})),
            Qos::Burstable
        );
    }

    #[test]
    fn requests_take_the_larger_of_start_and_run() {
        let v = PodView::new(pod(serde_json::json!({
            "initContainers": [
                {"name": "side", "image": "i", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "big", "image": "i", "resources": {"requests": {"cpu": "2"}}},
            ],
            "containers": [{"name": "a", "image": "i", "resources": {"requests": {"cpu": "500m", "memory": "1Mi"}}}],
        })));
        assert_eq!(v.request_milli("cpu"), 2100);
        assert_eq!(v.request_milli("memory"), 1_048_576_000);
        assert_eq!(v.cgroup().memory_limit_bytes, 0);
        assert_eq!(v.init[0].kind, Kind::Sidecar);
        assert_eq!(v.init[1].restart, Restart::OnFailure);
    }
}
