//! NICs for container groups and for virtual nodes themselves: NetworkInterface objects in home, addresses from the
//! platform's allocator, plugged in by this host's data plane.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use container_instances::{NicError, NicProvider, NicRequest};
use machines::agent::{AgentConfig, Network};
use reconcile::{Client, DeleteParams, Informer};
use resources::{ArmId, ArmSpec, NetworkInterface, VirtualNetwork, labels_of, object_name, views::NicAddresses};
use sandbox::PodIdentity;
use serde_json::json;
use vnet::NetnsRef;

/// Annotation of a NIC that belongs to a sandbox of this kind of host.
const SANDBOX: &str = "oaks.internal/sandbox";
/// Annotation with the host that holds the sandbox: another host must not collect its NICs.
const HOST: &str = "oaks.internal/host";
/// How long the allocator may take.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Clone)]
pub struct GroupNics {
    host: String,
    home: Client,
    nics: Informer<NetworkInterface>,
    vnets: Informer<VirtualNetwork>,
    fabric: Arc<vnet::Fabric>,
    network: Network,
}

/// A NIC to be made.
struct Wanted<'a> {
    /// Last part of its ARM id.
    name: &'a str,
    virtual_network: &'a str,
    subnet: &'a str,
    /// Sandbox behind it; `None` for a virtual node's own.
    sandbox: Option<&'a str>,
    /// Cluster whose Services are translated at its port.
    cluster: Option<&'a str>,
    netns: &'a Path,
}

fn failed(doing: &str, e: &(dyn std::error::Error + 'static)) -> NicError {
    NicError::Failed {
        doing: doing.to_owned(),
        reason: stdx::chain(e).to_string(),
    }
}

impl GroupNics {
    pub fn new(config: &AgentConfig, network: Network) -> Self {
        Self {
            host: config.here.name.clone(),
            home: config.home.clone(),
            nics: config.informers.get(),
            vnets: config.informers.get(),
            fabric: config.fabric.clone(),
            network,
        }
    }

    /// Plugs the NIC that the platform made for a virtual node into the namespace pinned at `netns`; its addresses.
    pub async fn for_node(
        &self,
        nic: &str,
        virtual_network: &str,
        subnet: &str,
        netns: &Path,
    ) -> Result<Vec<IpAddr>, NicError> {
        let wanted = Wanted {
            name: nic,
            virtual_network,
            subnet,
            sandbox: None,
            cluster: None,
            netns,
        };
        self.plug_allocated(nic, &wanted).await
    }

    /// Unplugs a virtual node's own NIC; its object goes with the virtual node.
    pub async fn release_node(&self, nic: &str) -> Result<(), NicError> {
        self.detach(nic).await
    }

    fn vnet_id(&self, virtual_network: &str) -> Result<ArmId, NicError> {
        let missing = |reason: &str| NicError::Failed {
            doing: format!("finding virtual network {virtual_network}"),
            reason: reason.to_owned(),
        };
        let vnet = self
            .vnets
            .get("", virtual_network)
            .ok_or_else(|| missing("home has no such object"))?;
        ArmId::parse(&vnet.spec.id).map_err(|e| missing(&e.to_string()))
    }

    /// ARM id of a NIC beside its virtual network.
    fn id_of(&self, name: &str, virtual_network: &str) -> Result<String, NicError> {
        let mut id = self.vnet_id(virtual_network)?;
        id.provider = "Microsoft.Network".to_owned();
        id.segments = vec![("networkInterfaces".to_owned(), name.to_owned())];
        Ok(id.to_string())
    }

    async fn plug(&self, wanted: &Wanted<'_>) -> Result<Vec<IpAddr>, NicError> {
        let subnet_id = format!("{}/subnets/{}", self.vnet_id(wanted.virtual_network)?, wanted.subnet);
        let id = self.id_of(wanted.name, wanted.virtual_network)?;
        let name = object_name(&id);
        let mut body = json!({"location": "local", "properties": {"ipConfigurations": [
            {"name": "ipconfig1", "properties": {"primary": true, "privateIPAllocationMethod": "Dynamic", "subnet": {"id": subnet_id}}}]}});
        if wanted.sandbox.is_some() {
            body["oaks"] = json!({"group": {"cluster": wanted.cluster}});
        }
        let mut nic = NetworkInterface::new(&name, ArmSpec { id: id.clone(), body });
        nic.metadata.labels = Some(labels_of(&id));
        let annotations = nic.metadata.annotations.get_or_insert_default();
        annotations.insert(HOST.to_owned(), self.host.clone());
        if let Some(sandbox) = wanted.sandbox {
            annotations.insert(SANDBOX.to_owned(), sandbox.to_owned());
        }
        match self.home.create(None, &nic).await {
            Err(e) if !e.is_already_exists() => return Err(failed("creating the network interface", &e)),
            _ => {}
        }
        let result = self.plug_allocated(&name, wanted).await;
        if result.is_err() {
            // Nothing half-made stays: the next try starts anew.
            let _ = self.release(&name).await;
        }
        result
    }

    async fn plug_allocated(&self, name: &str, wanted: &Wanted<'_>) -> Result<Vec<IpAddr>, NicError> {
        let addresses = self.addresses(name, wanted.subnet).await?;
        self.network
            .ready_for(name)
            .await
            .map_err(|e| failed("waiting for the data plane", &e))?;
        let (fabric, key, target) = (
            self.fabric.clone(),
            name.to_owned(),
            NetnsRef::Path(wanted.netns.to_path_buf()),
        );
        tokio::task::spawn_blocking(move || fabric.attach(&key, &target, "eth0"))
            .await
            .map_err(|e| failed("plugging the NIC in", &e))?
            .map_err(|e| failed("plugging the NIC in", &e))?;
        Ok(addresses)
    }

    /// Waits for the allocator: its answer is an address or a reason.
    async fn addresses(&self, name: &str, subnet: &str) -> Result<Vec<IpAddr>, NicError> {
        let look = || -> Option<Result<Vec<IpAddr>, NicError>> {
            let nic = self.nics.get("", name)?;
            let status = nic.status.as_ref()?;
            if let Some(found) = NicAddresses::parse(&status.properties) {
                let mut all: Vec<_> = found.ip_configs.iter().map(|c| (!c.primary, c.address)).collect();
                all.sort();
                return Some(Ok(all.into_iter().map(|(_, a)| a).collect()));
            }
            let error = status.error.as_ref()?;
            Some(Err(NicError::Subnet {
                subnet: subnet.to_owned(),
                reason: format!("{}: {}", error.code, error.message),
            }))
        };
        let mut changes = self.nics.subscribe();
        let wait = async {
            loop {
                if let Some(answer) = look() {
                    return answer;
                }
                if changes.recv().await.is_none() {
                    return Err(NicError::Failed {
                        doing: "waiting for an address".to_owned(),
                        reason: "the host agent is stopping".to_owned(),
                    });
                }
            }
        };
        tokio::time::timeout(ADDRESS_TIMEOUT, wait).await.unwrap_or_else(|_| {
            let reason = format!(
                "the platform gave none within {} s (does `oaks server` run?)",
                ADDRESS_TIMEOUT.as_secs()
            );
            Err(NicError::Failed {
                doing: "waiting for an address".to_owned(),
                reason,
            })
        })
    }

    async fn detach(&self, name: &str) -> Result<(), NicError> {
        let (fabric, key) = (self.fabric.clone(), name.to_owned());
        tokio::task::spawn_blocking(move || fabric.detach(&key))
            .await
            .map_err(|e| failed("unplugging the NIC", &e))?
            .map_err(|e| failed("unplugging the NIC", &e))
    }

    async fn release(&self, name: &str) -> Result<(), NicError> {
        self.detach(name).await?;
        match self
            .home
            .delete::<NetworkInterface>(None, name, &DeleteParams::default())
            .await
        {
            Err(e) if !e.is_not_found() => Err(failed("deleting the network interface", &e)),
            _ => Ok(()),
        }
    }

    /// This host's NICs that stand behind sandboxes: `(object name, sandbox id)`.
    fn of_sandboxes(&self) -> Vec<(String, String)> {
        let nics = self.nics.list();
        nics.iter()
            .filter_map(|n| {
                let a = n.metadata.annotations.as_ref()?;
                (a.get(HOST)? == &self.host).then(|| Some((n.name().to_owned(), a.get(SANDBOX)?.clone())))?
            })
            .collect()
    }
}

#[async_trait]
impl NicProvider for GroupNics {
    async fn attach(&self, request: &NicRequest) -> Result<Vec<IpAddr>, NicError> {
        let short: String = request.sandbox_id.chars().take(16).collect();
        let name = format!("{}-{short}", request.pod.name.chars().take(40).collect::<String>());
        self.plug(&Wanted {
            name: &name,
            virtual_network: &request.virtual_network,
            subnet: &request.subnet,
            sandbox: Some(&request.sandbox_id),
            cluster: (!request.cluster.is_empty()).then_some(request.cluster.as_str()),
            netns: &request.netns,
        })
        .await
    }

    async fn detach(&self, sandbox_id: &str, _pod: &PodIdentity, _netns: Option<&Path>) -> Result<(), NicError> {
        for (name, sandbox) in self.of_sandboxes() {
            if sandbox == sandbox_id {
                self.release(&name).await?;
            }
        }
        Ok(())
    }

    async fn gc(&self, live_sandboxes: &[String]) -> Result<(), NicError> {
        self.nics.wait_synced().await;
        for (name, sandbox) in self.of_sandboxes() {
            if !live_sandboxes.contains(&sandbox) {
                self.release(&name).await?;
            }
        }
        Ok(())
    }
}

/// Pin of a virtual node's own network namespace (`v-` is the virtual networks').
pub fn node_netns(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join("netns").join(format!("n-{name}"))
}
