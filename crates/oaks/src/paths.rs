//! Where an instance keeps its files. Everything that `oaks down` must find again follows from the instance's name.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Paths {
    pub instance: String,
    /// Kept over reboots: store, keys, machine data, images.
    pub data: PathBuf,
    /// On tmpfs: pids, pinned namespaces, sockets, mount points.
    pub run: PathBuf,
}

impl Paths {
    /// Defaults: `/var/lib/<instance>` and `/run/<instance>`.
    pub fn new(instance: &str, data: Option<&Path>, run: Option<&Path>) -> Self {
        Self {
            instance: instance.to_owned(),
            data: data.map_or_else(|| Path::new("/var/lib").join(instance), Path::to_path_buf),
            run: run.map_or_else(|| Path::new("/run").join(instance), Path::to_path_buf),
        }
    }

    pub fn store(&self) -> PathBuf {
        self.data.join("server/store")
    }
    pub fn server(&self) -> PathBuf {
        self.data.join("server")
    }
    /// Admin kubeconfig of the home cluster, 0600.
    pub fn home_kubeconfig(&self) -> PathBuf {
        self.data.join("home.kubeconfig")
    }
    /// The host agent's credentials for home, 0600.
    pub fn host_kubeconfig(&self) -> PathBuf {
        self.data.join("host/home.kubeconfig")
    }
    /// What a host that joined another one's platform remembers; absent elsewhere.
    pub fn joined(&self) -> PathBuf {
        self.data.join("host/joined.json")
    }
    /// What the host agent was told of this host and its borders; written at its start.
    pub fn told(&self) -> PathBuf {
        self.run.join("told.json")
    }
    /// What `oaks az` and the demo need of the ARM endpoint: URL, CA, tenant, client id and secret; 0600.
    pub fn arm_access(&self) -> PathBuf {
        self.data.join("arm.json")
    }
    /// Audit log of a cluster.
    pub fn audit_log(&self, cluster: &str) -> PathBuf {
        self.data.join("log/audit").join(cluster).join("audit.log")
    }
    pub fn images(&self) -> PathBuf {
        self.data.join("host/images")
    }
    pub fn machine_tree(&self) -> PathBuf {
        self.data.join("host/tree")
    }
    pub fn machine_data(&self, name: &str) -> PathBuf {
        self.data.join("host/machines").join(name)
    }
    pub fn groups(&self) -> PathBuf {
        self.data.join("host/groups")
    }
    pub fn usage(&self) -> PathBuf {
        self.data.join("host/usage")
    }
    pub fn log(&self, process: &str) -> PathBuf {
        self.data.join("log").join(format!("{process}.log"))
    }
    pub fn pid_file(&self, process: &str) -> PathBuf {
        self.run.join(format!("{process}.pid"))
    }
    pub fn machines_run(&self) -> PathBuf {
        self.run.join("machines")
    }
}
