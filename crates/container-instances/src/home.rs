//! Groups as ContainerGroup objects in home: records of what runs, never a cause. Level-triggered: one wanted state per
//! group, written until home has it; what home has of this node and nobody wants is deleted.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    time::Duration,
};

use parking_lot::Mutex;
use reconcile::{Client, DeleteParams, Error, ListParams, Patch};
use resources::{ArmSpec, ContainerGroup, object_name};
use serde_json::{Value, json};
use tokio::{sync::Notify, time::sleep};

use crate::meter::{Subject, Usage};

/// Label of the records of one virtual node.
const NODE_LABEL: &str = "oaks.internal/virtual-node";
/// How often home is compared with what is wanted, whether or not anything changed.
const COMPARE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);

struct Wanted {
    object: ContainerGroup,
    status: Value,
    written: bool,
}

/// The records of one virtual node.
pub struct Records {
    home: Option<Client>,
    scope: String,
    node: String,
    wanted: Mutex<HashMap<String, Wanted>>,
    bell: Notify,
}

impl Records {
    pub fn new(home: Option<Client>, scope: String, node: String) -> Self {
        Self {
            home,
            scope,
            node,
            wanted: Mutex::default(),
            bell: Notify::new(),
        }
    }

    /// The group's state from now on. Returns at once.
    pub fn show(&self, s: &Subject, state: &str, ips: Vec<IpAddr>, usage: Vec<Usage>) {
        if self.home.is_none() {
            return;
        }
        let (object, status) = record(&self.scope, &self.node, s, state, &ips, &usage);
        self.wanted.lock().insert(
            s.uid.clone(),
            Wanted {
                object,
                status,
                written: false,
            },
        );
        self.bell.notify_one();
    }

    pub fn remove(&self, uid: &str) {
        if self.wanted.lock().remove(uid).is_some() {
            self.bell.notify_one();
        }
    }

    /// Writes until dropped.
    pub async fn run(&self) {
        let Some(home) = &self.home else {
            return std::future::pending().await;
        };
        let mut pause = Duration::ZERO;
        loop {
            tokio::select! {
                // Cancel safe: the bell keeps its permit.
                () = self.bell.notified() => {}
                () = sleep(pause) => {}
            }
            pause = match self.pass(home).await {
                Ok(()) => COMPARE,
                Err(e) => {
                    tracing::warn!(error = %stdx::chain(&e), "container groups not recorded");
                    RETRY
                }
            };
        }
    }

    async fn pass(&self, home: &Client) -> Result<(), Error> {
        let todo: Vec<(String, ContainerGroup, Value)> = {
            let wanted = self.wanted.lock();
            let open = wanted.iter().filter(|(_, w)| !w.written);
            open.map(|(uid, w)| (uid.clone(), w.object.clone(), w.status.clone()))
                .collect()
        };
        for (uid, object, status) in todo {
            let name = object.name().to_owned();
            match home.create(None, &object).await {
                Ok(_) => {}
                Err(e) if e.is_already_exists() => {}
                Err(e) => return Err(e),
            }
            let patch = Patch::Merge(json!({"status": status.clone()}));
            let _: ContainerGroup = home.patch(None, &name, &patch, Some("status")).await?;
            if let Some(w) = self.wanted.lock().get_mut(&uid)
                && w.status == status
            {
                w.written = true;
            }
        }
        let params = ListParams::labels(format!("{NODE_LABEL}={}", self.node));
        let there = home.list::<ContainerGroup>(None, &params).await?;
        for object in there.items {
            let name = object.name().to_owned();
            if self.wanted.lock().values().any(|w| w.object.name() == name) {
                continue;
            }
            match home
                .delete::<ContainerGroup>(None, &name, &DeleteParams::default())
                .await
            {
                Err(e) if !e.is_not_found() => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

fn record(
    scope: &str,
    node: &str,
    s: &Subject,
    state: &str,
    ips: &[IpAddr],
    usage: &[Usage],
) -> (ContainerGroup, Value) {
    // Namespace and name may be told apart in more than one way, the uid cannot.
    let short: String = s.uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    let id = format!(
        "{scope}/providers/Microsoft.ContainerInstance/containerGroups/{}-{}-{short}",
        s.namespace, s.name
    );
    let body = json!({
        "properties": {
            "osType": "Linux",
            "sku": "Standard",
            "virtualNode": {"node": s.node, "cluster": s.cluster, "namespace": s.namespace, "pod": s.name, "uid": s.uid},
            "resources": {"cpuMilli": s.cpu_milli, "memoryBytes": s.memory_bytes},
        },
        "tags": s.labels,
    });
    let mut object = ContainerGroup::new(object_name(&id), ArmSpec { id, body });
    object.metadata.labels = Some(BTreeMap::from([(NODE_LABEL.to_owned(), node.to_owned())]));
    let ip = ips.first().map(|ip| json!({"type": "Private", "ip": ip}));
    let segments: Vec<Value> = usage
        .iter()
        .map(|u| {
            json!({"id": u.id, "startNs": u.start_ns.to_string(), "endNs": u.end_ns.map(|e| e.to_string()),
                "openedBy": u.opened_by, "closedBy": u.closed_by,
                "durationNs": u.end_ns.map(|_| u.duration_ns.to_string())})
        })
        .collect();
    let status = json!({
        "provisioningState": if state == "Pending" { "Creating" } else { "Succeeded" },
        "properties": {"instanceView": {"state": state}, "ipAddress": ip, "usage": segments},
    });
    (object, status)
}
