//! Fakes of the kubelet's two edges, for tests: a runtime whose containers do what they are told, and an API with just
//! the rules that the kubelet relies on (uid preconditions, graceful deletion, conditions that merge by type).

mod api;
mod runtime;

pub use api::FakeApi;
pub use runtime::FakeRuntime;

use std::{path::Path, sync::Arc};

use stdx::clock::RuntimeClock;

use crate::config::{Capacity, DirectDialer, Features, KubeletConfig, NoHooks, Tuning};

/// A node `n1` over both fakes. Intervals are upstream's; tests with paused time pass them at once.
pub fn config(api: &Arc<FakeApi>, runtime: &Arc<FakeRuntime>, root: &Path) -> KubeletConfig {
    KubeletConfig {
        node_name: "n1".into(),
        api: api.clone(),
        runtime: runtime.clone(),
        images: runtime.clone(),
        root_dir: root.join("kubelet"),
        log_dir: root.join("logs"),
        pods_limit: None,
        capacity: Capacity {
            cpu_milli: 4000,
            memory_bytes: 8 << 30,
            pods: 110,
            ephemeral_storage_bytes: 10 << 30,
            ..Default::default()
        },
        labels: Default::default(),
        annotations: Default::default(),
        taints: vec![],
        addresses: vec!["10.1.0.4".parse().expect("an address")],
        instance_type: "Standard_D2s_v3".into(),
        provider_id: None,
        os_image: "Oaks".into(),
        runtime_version: "oaks://0.1.0".into(),
        cluster_dns: vec!["10.0.0.10".parse().expect("an address")],
        cluster_domain: "cluster.local".into(),
        kubernetes_service: Some("10.0.0.1:443".parse().expect("an address")),
        port: 0,
        serving: None,
        features: Features::MACHINE,
        hooks: Arc::new(NoHooks),
        dialer: Arc::new(DirectDialer),
        clock: Arc::new(RuntimeClock::new(std::time::SystemTime::now())),
        tuning: Tuning::default(),
    }
}
