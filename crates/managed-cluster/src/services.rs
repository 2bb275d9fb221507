//! Services of type LoadBalancer: an address each, and two load balancers per cluster, one public and one internal, whose
//! frontends hold the ready pod addresses, so that the data plane needs to know no Services. A pass computes everything from
//! state; what no Service asks for any more goes.
//!
//! A public address is made for the Service, or is one that somebody else made and the Service names. An internal one is given
//! by the platform's allocator to the load balancer's frontend: the first pass asks for it, a later one finds it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{LoadBalancerIngress, Service, ServicePort},
    discovery::v1::EndpointSlice,
};
use reconcile::{Client, Error, EventType, ListParams, Patch, Recorder, Requeue};
use resources::{
    ArmId, ArmSpec, LoadBalancer, ManagedCluster, PublicIPAddress,
    aks::ClusterView,
    object_name,
    views::{LbBackend, LbFrontend, NicAddresses, VnetView, subnet_ref},
};
use serde_json::{Value, json};

use crate::{
    context::{Context, own},
    names::{CLUSTER_LABEL, Ids, SERVICE_LABEL},
    reconcile_cluster::{LOOK_AGAIN, address_of},
    service_request::{Place, Request, request},
    status::Progress,
};

const SLICE_SERVICE: &str = "kubernetes.io/service-name";

/// Where one Service is to stand.
struct Front {
    service: Arc<Service>,
    uid: String,
    request: Request,
    /// `properties` of its frontend in the load balancer.
    properties: Value,
    /// Absent until the allocator has given one.
    address: Option<IpAddr>,
}

impl Front {
    /// Name of its frontend.
    fn name(&self) -> String {
        format!("a{}", self.uid.replace('-', ""))
    }

    fn is_internal(&self) -> bool {
        matches!(self.request.place, Place::Internal { .. })
    }
}

/// One pass over the LoadBalancer Services of a cluster.
pub(crate) async fn reconcile(context: &Context, name: &str) -> Result<Requeue, Error> {
    let Some(cluster) = context.clusters.get("", name) else {
        return Ok(Requeue::Done);
    };
    if cluster.metadata.deletion_timestamp.is_some() {
        return Ok(Requeue::Done);
    }
    let Some(id) = ArmId::parse(&cluster.spec.id).ok() else {
        return Ok(Requeue::Done);
    };
    let Ok(view) = ClusterView::parse(&id, &cluster.spec.body) else {
        return Ok(Requeue::Done);
    };
    let ids = Ids::new(&id, &view.node_resource_group);
    // Before the control plane runs there are no Services; its start queues this cluster.
    let Some((client, informers)) = context.hosted(name) else {
        return Ok(Requeue::Done);
    };
    let (services, slices) = (informers.get::<Service>(), informers.get::<EndpointSlice>());
    if !services.is_synced() || !slices.is_synced() {
        return Ok(Requeue::After(LOOK_AGAIN));
    }
    let nodes_subnet = view.pools.first().map(|p| view.subnet_of(&id.subscription, p));
    let vnet = nodes_subnet
        .as_deref()
        .and_then(subnet_ref)
        .map(|s| s.0)
        .unwrap_or_default();
    let pass = Pass {
        context,
        cluster: &cluster,
        view: &view,
        ids: &ids,
        client: &client,
        recorder: context.recorder(name),
        subscription: &id.subscription,
        nodes_subnet: nodes_subnet.unwrap_or_default(),
        vnet,
    };
    let slices = slices.list();
    let (mut fronts, mut wanted): (Vec<Front>, Vec<String>) = (Vec::new(), Vec::new());
    for service in services.list() {
        let uid = service.metadata.uid.clone().unwrap_or_default();
        let placed = match request(&service) {
            Ok(None) => {
                pass.clear(&service).await?;
                continue;
            }
            Ok(Some(request)) => pass.place(&service, &uid, request).await?,
            Err(problem) => Err(problem),
        };
        match placed {
            Ok(front) => {
                if matches!(front.request.place, Place::Public { .. }) {
                    wanted.push(uid);
                }
                fronts.push(front);
            }
            Err(problem) => {
                pass.failed(&service, &problem);
                pass.clear(&service).await?;
            }
        }
    }
    let (mut frontends, mut reached) = (Vec::new(), Vec::new());
    for front in &fronts {
        let Some(address) = front.address else { continue };
        let own_slices: Vec<&EndpointSlice> = slices
            .iter()
            .map(AsRef::as_ref)
            .filter(|s| is_slice_of(s, &front.service))
            .collect();
        let own = frontends_of(front, address, &pass.vnet, &own_slices);
        let place = |f: &LbFrontend| (f.address, f.protocol.clone(), f.port);
        let taken = own.iter().find(|f| frontends.iter().any(|o| place(o) == place(f)));
        if let Some(f) = taken {
            pass.failed(
                &front.service,
                &format!(
                    "port {} ({}) at {address} belongs to another Service",
                    f.port, f.protocol
                ),
            );
            continue;
        }
        if !own.is_empty() {
            reached.push((front, address));
        }
        frontends.extend(own);
    }
    for internal in [false, true] {
        let fronts: Vec<&Front> = fronts.iter().filter(|f| f.is_internal() == internal).collect();
        let here = |f: &&LbFrontend| fronts.iter().any(|o| o.address == Some(f.address));
        let frontends: Vec<&LbFrontend> = frontends.iter().filter(here).collect();
        pass.load_balancer(internal, &fronts, &frontends).await?;
    }
    pass.release(&wanted).await?;
    // The address is told last: who reads it can connect.
    for (front, address) in reached {
        pass.tell(&front.service, address).await?;
    }
    let mut waiting = false;
    for front in fronts.iter().filter(|f| f.address.is_none()) {
        // What it had before, if anything, leads there no more.
        pass.clear(&front.service).await?;
        waiting = true;
    }
    Ok(if waiting {
        Requeue::After(LOOK_AGAIN)
    } else {
        Requeue::Done
    })
}

fn is_slice_of(slice: &EndpointSlice, service: &Service) -> bool {
    let named = slice.metadata.labels.as_ref().and_then(|l| l.get(SLICE_SERVICE));
    slice.metadata.namespace == service.metadata.namespace
        && named.is_some()
        && named == service.metadata.name.as_ref()
        && slice.address_type == "IPv4"
}

/// One frontend per TCP or UDP port. An endpoint counts unless it says that it is not ready.
fn frontends_of(front: &Front, address: IpAddr, vnet: &str, slices: &[&EndpointSlice]) -> Vec<LbFrontend> {
    let mut out = Vec::new();
    for port in ports(&front.service) {
        let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
        let Ok(number) = u16::try_from(port.port) else { continue };
        if !matches!(protocol.as_str(), "tcp" | "udp") {
            continue;
        }
        let mut backends: Vec<LbBackend> = slices.iter().flat_map(|s| backends_of(s, port)).collect();
        backends.sort();
        backends.dedup();
        out.push(LbFrontend {
            address,
            protocol,
            port: number,
            virtual_network: vnet.to_owned(),
            backends,
            sources: front.request.sources.iter().map(|n| (*n).into()).collect(),
            client_affinity: front.request.client_affinity,
            idle_timeout_s: front.request.idle_timeout_s,
            tcp_reset: front.request.tcp_reset,
        });
    }
    out
}

fn ports(service: &Service) -> &[ServicePort] {
    let spec = service.spec.as_ref();
    spec.and_then(|s| s.ports.as_deref()).unwrap_or_default()
}

fn backends_of(slice: &EndpointSlice, port: &ServicePort) -> Vec<LbBackend> {
    let name = port.name.as_deref().unwrap_or_default();
    let number = slice
        .ports
        .iter()
        .flatten()
        .find(|p| p.name.as_deref().unwrap_or_default() == name)
        .and_then(|p| p.port);
    let Some(number) = number.and_then(|n| u16::try_from(n).ok()) else {
        return Vec::new();
    };
    slice
        .endpoints
        .iter()
        .flatten()
        .filter(|e| e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true))
        .filter_map(|e| e.addresses.first()?.parse().ok())
        .map(|address| LbBackend { address, port: number })
        .collect()
}

struct Pass<'a> {
    context: &'a Context,
    cluster: &'a ManagedCluster,
    view: &'a ClusterView,
    ids: &'a Ids,
    client: &'a Client,
    recorder: Option<Arc<Recorder>>,
    subscription: &'a str,
    /// ARM id of the subnet of the first pool, and home name of its virtual network.
    nodes_subnet: String,
    vnet: String,
}

impl Pass<'_> {
    /// Finds, or asks for, what the Service needs; the inner error is for its owner.
    async fn place(&self, service: &Arc<Service>, uid: &str, request: Request) -> Result<Result<Front, String>, Error> {
        let found = match &request.place {
            Place::Public { name, group, label } => {
                if name.is_some() || request.address.is_some() {
                    self.named_address(name.as_deref(), group.as_deref(), request.address)
                } else {
                    self.own_address(service, uid, label.as_deref()).await?
                }
            }
            Place::Internal { subnet } => self.private_address(uid, subnet.as_deref(), request.address),
        };
        Ok(found.map(|(properties, address)| Front {
            service: service.clone(),
            uid: uid.to_owned(),
            request,
            properties,
            address,
        }))
    }

    /// The public address made for the Service, made if need be.
    async fn own_address(
        &self,
        service: &Service,
        uid: &str,
        label: Option<&str>,
    ) -> Result<Result<(Value, Option<IpAddr>), String>, Error> {
        let id = self.ids.service_address(uid);
        let name = object_name(&id);
        let settings = label.map_or(Value::Null, |l| json!({"domainNameLabel": l}));
        let other = self.context.public_ips.list().into_iter().find(|o| {
            let theirs = &o.spec.body["properties"]["dnsSettings"]["domainNameLabel"];
            label.is_some()
                && theirs.as_str() == label
                && o.name() != name
                && o.spec.body["location"] == self.view.location
        });
        if let Some(other) = other {
            return Ok(Err(format!(
                "DNS label {} is used by {}",
                label.unwrap_or_default(),
                other.spec.id
            )));
        }
        let properties = json!({"publicIPAddress": {"id": id}});
        let Some(object) = self.context.public_ips.get("", &name) else {
            let (ns, svc) = (service.metadata.namespace.as_deref(), service.metadata.name.as_deref());
            let tag = format!("{}/{}", ns.unwrap_or_default(), svc.unwrap_or_default());
            let mut body = json!({"location": self.view.location, "sku": {"name": "Standard"}, "tags": {"k8s-azure-service": tag},
                "properties": {"publicIPAllocationMethod": "Static", "publicIPAddressVersion": "IPv4"}});
            if label.is_some() {
                body["properties"]["dnsSettings"] = settings;
            }
            let mut object = PublicIPAddress::new(name, ArmSpec { id: id.clone(), body });
            own(&mut object.metadata, self.cluster, &id);
            object
                .metadata
                .labels
                .get_or_insert_default()
                .insert(SERVICE_LABEL.to_owned(), uid.to_owned());
            self.event(
                service,
                EventType::Normal,
                "EnsuringLoadBalancer",
                "Ensuring load balancer",
            );
            self.context.create(None, &object).await?;
            return Ok(Ok((properties, None)));
        };
        if object.spec.body["properties"]["dnsSettings"]["domainNameLabel"].as_str() != label {
            let patch = Patch::Merge(json!({"spec": {"body": {"properties": {"dnsSettings": settings}}}}));
            self.context
                .home
                .patch::<PublicIPAddress>(None, &name, &patch, None)
                .await?;
        }
        Ok(match address_of(object.status.as_ref()) {
            Ok(address) => Ok((properties, address)),
            Err(Progress::Failed(e)) => Err(e.message),
            Err(_) => Ok((properties, None)),
        })
    }

    /// A public address that somebody made, by name or by number.
    fn named_address(
        &self,
        name: Option<&str>,
        group: Option<&str>,
        address: Option<Ipv4Addr>,
    ) -> Result<(Value, Option<IpAddr>), String> {
        let group = group.unwrap_or(&self.view.node_resource_group);
        let scope = resources::group_id(self.subscription, group);
        let given = |o: &PublicIPAddress| address_of(o.status.as_ref()).ok().flatten();
        let found = match name {
            Some(name) => {
                let id = format!("{scope}/providers/Microsoft.Network/publicIPAddresses/{name}");
                self.context
                    .public_ips
                    .get("", &object_name(&id))
                    .ok_or_else(|| format!("user supplied IP Name {name} was not found in resource group {group}"))?
            }
            None => {
                let wanted = address.map(IpAddr::V4);
                let within = |o: &PublicIPAddress| {
                    let id = o.spec.id.to_lowercase();
                    id.starts_with(&format!("{}/", scope.to_lowercase()))
                };
                let all = self.context.public_ips.list();
                let found = all.into_iter().find(|o| given(o) == wanted && within(o));
                let missing = || {
                    let address = address.map(|a| a.to_string()).unwrap_or_default();
                    format!("user supplied IP Address {address} was not found in resource group {group}")
                };
                found.ok_or_else(missing)?
            }
        };
        let id = &found.spec.id;
        let shown = found.status.as_ref().map_or(&Value::Null, |s| &s.properties);
        let users = ["ipConfiguration", "natGateway"]
            .iter()
            .filter_map(|f| shown[f]["id"].as_str());
        let own = self.ids.load_balancer().to_lowercase();
        if let Some(user) = users
            .into_iter()
            .find(|u| !u.to_lowercase().starts_with(&format!("{own}/")))
        {
            return Err(format!("public IP address {id} is in use by {user}"));
        }
        let of_service = found
            .metadata
            .labels
            .as_ref()
            .is_some_and(|l| l.contains_key(SERVICE_LABEL));
        if of_service || found.spec.body["oaks"]["endpoint"] == true || found.metadata.deletion_timestamp.is_some() {
            return Err(format!(
                "public IP address {id} belongs to the platform, to another Service, or is going"
            ));
        }
        if let (Some(wanted), Some(has)) = (address, given(&found))
            && has != wanted
        {
            return Err(format!("public IP address {id} is {has}, not {wanted}"));
        }
        Ok((json!({"publicIPAddress": {"id": id}}), given(&found)))
    }

    /// A frontend in a subnet of the cluster's virtual network.
    fn private_address(
        &self,
        uid: &str,
        subnet: Option<&str>,
        address: Option<Ipv4Addr>,
    ) -> Result<(Value, Option<IpAddr>), String> {
        let subnet_id = match (subnet, self.nodes_subnet.rsplit_once('/')) {
            (Some(name), Some((vnet, _))) => format!("{vnet}/{name}"),
            _ => self.nodes_subnet.clone(),
        };
        let name = subnet_id.rsplit('/').next().unwrap_or_default();
        let vnet = self.context.vnets.get("", &self.vnet);
        let vnet = vnet.and_then(|v| VnetView::parse(&v.spec.body).ok());
        let here = vnet.as_ref().and_then(|v| v.subnet(name));
        let Some(here) = here else {
            return Err(format!("subnet {name} is not in the cluster's virtual network"));
        };
        let mut properties = json!({"subnet": {"id": subnet_id}, "privateIPAllocationMethod": "Dynamic"});
        if let Some(address) = address {
            if !here.is_usable(address.into()) {
                return Err(format!(
                    "{address} is not one of the usable addresses of subnet {name} ({})",
                    here.prefix
                ));
            }
            let nics = self.context.nics.list();
            let holder = nics.iter().find(|n| {
                let given = n.status.as_ref().and_then(|s| NicAddresses::parse(&s.properties));
                let same = |v: &str| subnet_ref(v).is_some_and(|s| s.0 == self.vnet);
                given.is_some_and(|g| g.ip_configs.iter().any(|c| c.address == address && same(&c.subnet)))
            });
            if let Some(nic) = holder {
                return Err(format!("{address} is already allocated to {}", nic.spec.id));
            }
            properties["privateIPAddress"] = json!(address);
            properties["privateIPAllocationMethod"] = json!("Static");
        }
        let lb = self
            .context
            .load_balancers
            .get("", &object_name(&self.ids.internal_load_balancer()));
        let Some(status) = lb.as_ref().and_then(|lb| lb.status.as_ref()) else {
            return Ok((properties, None));
        };
        let frontend = format!("a{}", uid.replace('-', ""));
        let shown = status.properties["frontendIPConfigurations"].as_array();
        let shown = shown.into_iter().flatten().find(|f| f["name"] == frontend.as_str());
        let given = shown.map(|f| &f["properties"]).filter(|p| {
            let same_subnet = p["subnet"]["id"]
                .as_str()
                .is_some_and(|s| s.eq_ignore_ascii_case(&subnet_id));
            same_subnet && address.is_none_or(|a| p["privateIPAddress"] == a.to_string())
        });
        let given: Option<IpAddr> = given.and_then(|p| p["privateIPAddress"].as_str()?.parse().ok());
        match (&status.error, given) {
            (Some(e), None) => Err(e.message.clone()),
            (_, given) => Ok((properties, given)),
        }
    }

    /// Writes a load balancer if it differs; deletes it if it has nothing to do.
    async fn load_balancer(&self, internal: bool, fronts: &[&Front], frontends: &[&LbFrontend]) -> Result<(), Error> {
        let id = match internal {
            true => self.ids.internal_load_balancer(),
            false => self.ids.load_balancer(),
        };
        let name = object_name(&id);
        let existing = self.context.home.get_opt::<LoadBalancer>(None, &name).await?;
        if fronts.is_empty() {
            if existing.is_some() {
                self.context.delete::<LoadBalancer>(None, &name).await?;
            }
            return Ok(());
        }
        let body = self.body(&id, fronts, frontends);
        match existing {
            Some(old) if old.spec.body == body => Ok(()),
            Some(mut old) => {
                old.spec.body = body;
                self.context.home.update(None, &old).await.map(drop)
            }
            None => {
                let mut object = LoadBalancer::new(name, ArmSpec { id: id.clone(), body });
                own(&mut object.metadata, self.cluster, &id);
                self.context.create(None, &object).await
            }
        }
    }

    fn body(&self, id: &str, fronts: &[&Front], frontends: &[&LbFrontend]) -> Value {
        let mut configs = Vec::new();
        let mut rules = Vec::new();
        for front in fronts {
            let name = front.name();
            let frontend = format!("{id}/frontendIPConfigurations/{name}");
            configs.push(json!({"name": name, "id": frontend, "properties": front.properties}));
            for p in ports(&front.service) {
                let protocol = p.protocol.as_deref().unwrap_or("TCP");
                let rule = format!("{name}-{protocol}-{}", p.port);
                let distribution = if front.request.client_affinity {
                    "SourceIP"
                } else {
                    "Default"
                };
                rules.push(
                    json!({"name": rule, "id": format!("{id}/loadBalancingRules/{rule}"), "properties": {
                    "frontendIPConfiguration": {"id": frontend}, "loadDistribution": distribution,
                    "idleTimeoutInMinutes": front.request.idle_timeout_s / 60, "enableTcpReset": front.request.tcp_reset,
                    "protocol": protocol, "frontendPort": p.port, "backendPort": p.port}}),
                );
            }
        }
        json!({"location": self.view.location, "sku": {"name": "Standard"},
            "properties": {"frontendIPConfigurations": configs, "loadBalancingRules": rules},
            "oaks": {"frontends": frontends}})
    }

    /// Gives back the addresses of Services that are gone.
    async fn release(&self, wanted: &[String]) -> Result<(), Error> {
        let label = format!("{CLUSTER_LABEL}={},{SERVICE_LABEL}", self.ids.object);
        let all = self
            .context
            .home
            .list::<PublicIPAddress>(None, &ListParams::labels(label))
            .await?;
        for object in &all.items {
            let uid = object
                .metadata
                .labels
                .as_ref()
                .and_then(|l: &BTreeMap<String, String>| l.get(SERVICE_LABEL));
            if uid.is_some_and(|u| !wanted.contains(u)) {
                self.context.delete::<PublicIPAddress>(None, object.name()).await?;
            }
        }
        Ok(())
    }

    async fn tell(&self, service: &Service, address: IpAddr) -> Result<(), Error> {
        let now = ingress(service).first().and_then(|i| i.ip.clone());
        if now.as_deref() == Some(address.to_string().as_str()) {
            return Ok(());
        }
        self.write_ingress(service, json!([{"ip": address.to_string(), "ipMode": "VIP"}]))
            .await?;
        self.event(
            service,
            EventType::Normal,
            "EnsuredLoadBalancer",
            "Ensured load balancer",
        );
        Ok(())
    }

    /// Tells the Service's owner why it has no address.
    fn failed(&self, service: &Service, problem: &str) {
        let message = format!("Error syncing load balancer: failed to ensure load balancer: {problem}");
        self.event(service, EventType::Warning, "SyncLoadBalancerFailed", &message);
    }

    fn event(&self, service: &Service, kind: EventType, reason: &str, message: &str) {
        if let Some(recorder) = &self.recorder {
            recorder.event(service, kind, reason, message);
        }
    }

    /// A Service that is no LoadBalancer (any more) has no address.
    async fn clear(&self, service: &Service) -> Result<(), Error> {
        if ingress(service).is_empty() {
            return Ok(());
        }
        self.write_ingress(service, Value::Null).await
    }

    async fn write_ingress(&self, service: &Service, ingress: Value) -> Result<(), Error> {
        let patch = Patch::Merge(json!({"status": {"loadBalancer": {"ingress": ingress}}}));
        let (ns, name) = (
            service.metadata.namespace.as_deref(),
            service.metadata.name.as_deref().unwrap_or_default(),
        );
        match self.client.patch::<Service>(ns, name, &patch, Some("status")).await {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }
}

fn ingress(service: &Service) -> &[LoadBalancerIngress] {
    let balancer = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    balancer.and_then(|b| b.ingress.as_deref()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_hold_ready_pods_by_port_name() {
        let service: Service = serde_json::from_value(json!({"metadata": {"name": "front", "namespace": "shop"}, "spec": {
            "type": "LoadBalancer", "ports": [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}]}}))
        .unwrap();
        let slice: EndpointSlice = serde_json::from_value(
            json!({"metadata": {"namespace": "shop", "labels": {SLICE_SERVICE: "front"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": [
                {"addresses": ["10.0.0.9"], "conditions": {"ready": true}},
                {"addresses": ["10.0.0.8"], "conditions": {}},
                {"addresses": ["10.0.0.7"], "conditions": {"ready": false}}]}),
        )
        .unwrap();
        assert!(is_slice_of(&slice, &service));
        let front = Front {
            request: request(&service).unwrap().unwrap(),
            service: Arc::new(service),
            uid: "u-1".into(),
            properties: Value::Null,
            address: None,
        };
        let got = frontends_of(&front, "198.19.0.5".parse().unwrap(), "v", &[&slice]);
        assert_eq!((got.len(), got[0].idle_timeout_s, got[0].tcp_reset), (2, 240, true));
        let ips: Vec<String> = got[0]
            .backends
            .iter()
            .map(|b| format!("{}:{}", b.address, b.port))
            .collect();
        assert_eq!(ips, ["10.0.0.8:8080", "10.0.0.9:8080"]);
        assert!(got[1].protocol == "udp" && got[1].backends.is_empty());
    }
}
