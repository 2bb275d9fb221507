//! Sites of virtual networks: objects to specs (pure), this end's keys, and the objects' status.

use std::{collections::BTreeMap, io::Read as _, net::SocketAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::Ipv4Net;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use reconcile::{Client, Informer, Patch, Queue, Requeue, run_controller};
use resources::{Site, SiteStatus, object_name};
use serde_json::{Value, json};
use stdx::Shutdown;
use vnet::TunnelKeys;
use vnet_model::{
    fabric::VnetSpec,
    gateway::{GATEWAY_SUBNET, HandedLinkSpec, SiteSpec, SiteWay, TunnelSpec},
};

use super::{AgentConfig, AgentError};

/// Namespace at home of the keys' Secrets.
const NAMESPACE: &str = "kube-system";
const PRIVATE: &str = "privateKey";
const PRESHARED: &str = "presharedKey";

/// A site's place in the fabric: the network's key and the spec.
///
/// # Errors
/// A sentence that names the field.
pub fn site(object: &Site) -> Result<(String, SiteSpec), String> {
    let spec = &object.spec;
    refuse("", &spec.other)?;
    let prefixes: Vec<Ipv4Net> = spec
        .prefixes
        .iter()
        .map(|p| {
            p.parse::<Ipv4Net>()
                .map_err(|_| format!("spec.prefixes: {p:?} is no IPv4 prefix"))
        })
        .collect::<Result<_, _>>()?;
    let way = match (&spec.wire_guard, &spec.interface) {
        (Some(w), None) => {
            refuse("wireGuard.", &w.other)?;
            if w.listen_port == 0 {
                return Err("spec.wireGuard.listenPort: a port of the host is needed".to_owned());
            }
            key(&w.peer_public_key).map_err(|e| format!("spec.wireGuard.peerPublicKey: {e}"))?;
            let endpoint = w.endpoint.as_deref().map(|e| {
                e.parse::<SocketAddr>()
                    .map_err(|_| format!("spec.wireGuard.endpoint: {e:?} is not ADDRESS:PORT"))
            });
            SiteWay::Tunnel(TunnelSpec {
                listen_port: w.listen_port,
                endpoint: endpoint.transpose()?,
            })
        }
        (None, Some(i)) => {
            refuse("interface.", &i.other)?;
            let address = i.address.parse();
            let gateway = i.gateway.parse();
            SiteWay::Link(HandedLinkSpec {
                interface: i.name.clone(),
                address: address.map_err(|_| {
                    format!(
                        "spec.interface.address: {:?} is no address with prefix length",
                        i.address
                    )
                })?,
                gateway: gateway.map_err(|_| format!("spec.interface.gateway: {:?} is no IPv4 address", i.gateway))?,
            })
        }
        _ => return Err("spec: exactly one of wireGuard and interface is needed".to_owned()),
    };
    if spec.virtual_network.is_empty() {
        return Err("spec.virtualNetwork: the ARM id of a virtual network is needed".to_owned());
    }
    let site = SiteSpec {
        key: object.name().to_owned(),
        prefixes,
        way,
        host: None,
    };
    Ok((object_name(&spec.virtual_network), site))
}

/// Fields that are known from elsewhere get their reason.
fn refuse(at: &str, other: &BTreeMap<String, Value>) -> Result<(), String> {
    let Some(name) = other.keys().next() else { return Ok(()) };
    let reason = match name.as_str() {
        "ipsecPolicies"
        | "sharedKey"
        | "connectionProtocol"
        | "usePolicyBasedTrafficSelectors"
        | "dpdTimeoutSeconds" => "IPsec and IKE are not offered; tunnels are WireGuard's (spec.wireGuard)",
        "enableBgp" | "bgpSettings" | "asn" | "bgpPeeringAddress" | "peerASN" | "peerWeight" => {
            "BGP is not offered; routes are static (spec.prefixes)"
        }
        _ => "there is no such field",
    };
    Err(format!("spec.{at}{name}: {reason}"))
}

fn key(text: &str) -> Result<[u8; 32], &'static str> {
    let bytes = STANDARD.decode(text.trim()).map_err(|_| "it is no base64")?;
    bytes.try_into().map_err(|_| "a key has 32 bytes")
}

/// Puts the sites into their networks.
pub fn add(objects: &[Site], vnets: &mut [VnetSpec], notes: &mut Vec<String>) {
    for object in objects.iter().filter(|o| o.metadata.deletion_timestamp.is_none()) {
        if let Err(reason) = add_one(object, vnets) {
            notes.push(format!("Site {}: {reason}", object.name()));
        }
    }
}

fn add_one(object: &Site, vnets: &mut [VnetSpec]) -> Result<(), String> {
    let (network, site) = site(object)?;
    let vnet = vnets
        .iter_mut()
        .find(|v| v.key == network)
        .ok_or("spec.virtualNetwork: it is not here")?;
    if vnet.subnet(GATEWAY_SUBNET).is_none() {
        return Err(format!("spec.virtualNetwork: it needs a subnet named {GATEWAY_SUBNET}"));
    }
    vnet.sites.push(site);
    Ok(())
}

struct Controller {
    config: AgentConfig,
    sites: Informer<Site>,
    keys: parking_lot::Mutex<BTreeMap<String, TunnelKeys>>,
}

/// Makes keys and tells how the sites are, until `shutdown`. `notes` has what the network's plan last left out.
pub(super) async fn run(config: AgentConfig, notes: tokio::sync::watch::Receiver<Vec<String>>, shutdown: Shutdown) {
    let sites = config.informers.get::<Site>();
    sites.wait_synced().await;
    let queue: Queue<reconcile::Key> = Queue::new();
    let enqueue = queue.clone();
    sites.on_change(move |change| enqueue.add(change.key().clone()));
    let (enqueue, all, mut changed, ended) = (queue.clone(), sites.clone(), notes.clone(), shutdown.clone());
    tokio::spawn(async move {
        while let Some(Ok(())) = ended.or_stop(changed.changed()).await {
            all.list()
                .iter()
                .for_each(|s| enqueue.add(reconcile::Key::new("", s.name())));
        }
    });
    let controller = std::sync::Arc::new(Controller {
        config,
        sites,
        keys: parking_lot::Mutex::default(),
    });
    let work = move |key: reconcile::Key| {
        let (controller, notes) = (controller.clone(), notes.borrow().clone());
        async move { controller.reconcile(&key.name, &notes).await }
    };
    run_controller("sites", queue, 1, work, shutdown).await;
}

impl Controller {
    async fn reconcile(&self, name: &str, notes: &[String]) -> Result<Requeue, reconcile::Error> {
        let found = self.sites.get("", name);
        let Some(object) = found.filter(|s| s.metadata.deletion_timestamp.is_none()) else {
            self.keys.lock().remove(name);
            self.give_keys().await;
            return Ok(Requeue::Done);
        };
        let mut status = SiteStatus {
            phase: "Ready".to_owned(),
            ..SiteStatus::default()
        };
        let about = format!("Site {name}: ");
        let said = notes.iter().find_map(|n| n.strip_prefix(&about));
        match site(&object) {
            Err(reason) => (status.phase, status.message) = ("Failed".to_owned(), reason),
            Ok(_) => {
                if let Some(w) = &object.spec.wire_guard {
                    match self.keys_of(name, &w.peer_public_key).await? {
                        Ok(keys) => {
                            status.public_key = STANDARD.encode(TunnelKeys::public_of(keys.private));
                            self.keys.lock().insert(name.to_owned(), keys);
                        }
                        Err(reason) => (status.phase, status.message) = ("Failed".to_owned(), reason),
                    }
                }
                if let Some(reason) = said {
                    (status.phase, status.message) = ("Failed".to_owned(), reason.to_owned());
                }
            }
        }
        self.give_keys().await;
        if object.status.as_ref() != Some(&status) {
            let patch = Patch::Merge(json!({"status": status}));
            self.config
                .home
                .patch::<Site>(None, name, &patch, Some("status"))
                .await?;
        }
        Ok(Requeue::Done)
    }

    async fn give_keys(&self) {
        let (fabric, keys) = (self.config.fabric.clone(), self.keys.lock().clone());
        let given = super::machine::blocking("giving keys to tunnels", move || {
            fabric.set_tunnel_keys(keys);
            Ok::<_, AgentError>(())
        });
        if let Err(e) = given.await {
            tracing::warn!(controller = "sites", reason = %stdx::chain(&e), "tunnels have no keys yet");
        }
    }

    /// The site's keys; this end's is made if there is none. The inner error is for the object.
    async fn keys_of(&self, name: &str, peer: &str) -> Result<Result<TunnelKeys, String>, reconcile::Error> {
        let home = &self.config.home;
        let secret_name = format!("site-{name}");
        let data = match home.get_opt::<Secret>(Some(NAMESPACE), &secret_name).await? {
            Some(secret) => secret.data.unwrap_or_default(),
            None => BTreeMap::new(),
        };
        let bytes = |field: &str| data.get(field).map(|b| <[u8; 32]>::try_from(b.0.as_slice()));
        let wrong = |field: &str| format!("{field} in Secret {NAMESPACE}/{secret_name} must have 32 bytes");
        let private = match bytes(PRIVATE) {
            Some(Ok(key)) => key,
            Some(Err(_)) => return Ok(Err(wrong(PRIVATE))),
            None => match make_key(home, &secret_name).await? {
                Ok(key) => key,
                Err(e) => return Ok(Err(format!("no random bytes: {e}"))),
            },
        };
        let preshared = match bytes(PRESHARED).transpose() {
            Ok(key) => key,
            Err(_) => return Ok(Err(wrong(PRESHARED))),
        };
        let keys = |peer_public| TunnelKeys {
            private,
            peer_public,
            preshared,
        };
        Ok(key(peer).map(keys).map_err(str::to_owned))
    }
}

async fn make_key(home: &Client, secret: &str) -> Result<std::io::Result<[u8; 32]>, reconcile::Error> {
    let mut key = [0_u8; 32];
    if let Err(e) = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut key)) {
        return Ok(Err(e));
    }
    let data = BTreeMap::from([(PRIVATE.to_owned(), ByteString(key.to_vec()))]);
    let mut object = Secret {
        data: Some(data),
        ..Secret::default()
    };
    object.metadata.name = Some(secret.to_owned());
    match home.create(Some(NAMESPACE), &object).await {
        Err(e) if e.is_already_exists() => {
            // A preshared key came first.
            let patch = Patch::Merge(json!({"data": {PRIVATE: STANDARD.encode(key)}}));
            home.patch::<Secret>(Some(NAMESPACE), secret, &patch, None).await?;
        }
        other => {
            other?;
        }
    }
    Ok(Ok(key))
}

#[cfg(test)]
mod tests {
    use vnet_model::fabric::SubnetSpec;

    use super::*;

    const VNET: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";

    fn object(spec: Value) -> Site {
        let mut spec = spec;
        spec["virtualNetwork"] = json!(VNET);
        spec["prefixes"] = json!(["192.168.0.0/24"]);
        Site::new("office", serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn objects_become_sites_and_what_is_not_offered_is_refused_by_name() {
        let key = STANDARD.encode([7; 32]);
        let tunnel = |more: Value| {
            let mut w = json!({"listenPort": 51820, "peerPublicKey": key, "endpoint": "203.0.113.2:51820"});
            w.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            object(json!({"wireGuard": w}))
        };
        let (network, spec) = site(&tunnel(json!({}))).unwrap();
        assert_eq!((network, spec.prefixes.len()), (object_name(VNET), 1));
        let link = object(json!({"interface": {"name": "eth1", "address": "192.0.2.1/30", "gateway": "192.0.2.2"}}));
        assert!(matches!(site(&link).unwrap().1.way, SiteWay::Link(_)));
        let refused = |o: &Site| site(o).unwrap_err();
        assert!(refused(&tunnel(json!({"sharedKey": "x"}))).contains("spec.wireGuard.sharedKey: IPsec"));
        assert!(refused(&object(json!({"ipsecPolicies": []}))).contains("spec.ipsecPolicies: IPsec"));
        assert!(refused(&object(json!({"bgpSettings": {}}))).contains("BGP is not offered"));
        assert!(refused(&tunnel(json!({"listenPort": 0}))).contains("listenPort"));
        assert!(refused(&tunnel(json!({"peerPublicKey": "AAAA"}))).contains("32 bytes"));
        assert!(refused(&tunnel(json!({"endpoint": "office"}))).contains("ADDRESS:PORT"));
        assert!(refused(&object(json!({}))).contains("exactly one"));
    }

    #[test]
    fn a_network_needs_its_gateway_subnet() {
        let link = object(json!({"interface": {"name": "eth1", "address": "192.0.2.1/30", "gateway": "192.0.2.2"}}));
        let mut vnets = [VnetSpec {
            key: object_name(VNET),
            ..VnetSpec::default()
        }];
        let mut notes = Vec::new();
        add(std::slice::from_ref(&link), &mut vnets, &mut notes);
        assert!(
            notes[0].contains("GatewaySubnet") && vnets[0].sites.is_empty(),
            "{notes:?}"
        );
        vnets[0].subnets.push(SubnetSpec {
            name: "gatewaysubnet".into(),
            ..SubnetSpec::default()
        });
        add(&[link], &mut vnets, &mut notes);
        assert_eq!((notes.len(), vnets[0].sites.len()), (1, 1));
    }
}
