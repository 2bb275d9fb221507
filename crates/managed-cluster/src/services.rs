//! Services of type LoadBalancer: a public address each, and one load balancer per cluster whose frontends hold the ready pod
//! addresses, so that the data plane needs to know no Services. A pass computes everything from state; what no Service asks
//! for any more goes.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::api::{
    core::v1::{LoadBalancerIngress, Service, ServicePort},
    discovery::v1::EndpointSlice,
};
use reconcile::{Client, Error, ListParams, Patch, Requeue};
use resources::{
    ArmId, ArmSpec, LoadBalancer, ManagedCluster, PublicIPAddress,
    aks::ClusterView,
    object_name,
    views::{LbBackend, LbFrontend, subnet_ref},
};
use serde_json::{Value, json};

use crate::{
    context::{Context, own},
    names::{CLUSTER_LABEL, Ids, SERVICE_LABEL},
    reconcile_cluster::{LOOK_AGAIN, address_of},
    status::Progress,
};

const SLICE_SERVICE: &str = "kubernetes.io/service-name";
const INTERNAL: &str = "service.beta.kubernetes.io/azure-load-balancer-internal";

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
    let vnet = view
        .pools
        .first()
        .and_then(|p| subnet_ref(&view.subnet_of(&id.subscription, p)))
        .map(|s| s.0)
        .unwrap_or_default();
    let pass = Pass {
        context,
        cluster: &cluster,
        view: &view,
        ids: &ids,
        client: &client,
    };
    let mut frontends = Vec::new();
    let mut described = Vec::new();
    let mut wanted = Vec::new();
    let mut waiting = false;
    let all = services.list();
    let slices = slices.list();
    for service in &all {
        if !is_served(service) {
            pass.clear(service).await?;
            continue;
        }
        let uid = service.metadata.uid.clone().unwrap_or_default();
        wanted.push(uid.clone());
        let Some(address) = pass.address(service, &uid).await? else {
            waiting = true;
            continue;
        };
        let own_slices: Vec<&EndpointSlice> = slices
            .iter()
            .map(AsRef::as_ref)
            .filter(|s| is_slice_of(s, service))
            .collect();
        frontends.extend(frontends_of(service, address, &vnet, &own_slices));
        described.push((uid, service.clone()));
    }
    pass.load_balancer(&frontends, &described).await?;
    pass.release(&wanted).await?;
    // The address is told last: who reads it can connect.
    for (service, address) in all
        .iter()
        .filter_map(|s| Some((s, frontends_address(s, &frontends, &pass)?)))
    {
        pass.tell(service, address).await?;
    }
    Ok(if waiting {
        Requeue::After(LOOK_AGAIN)
    } else {
        Requeue::Done
    })
}

/// The address that a Service's frontends stand at, from the public IP itself (a Service without ports that are served has none).
fn frontends_address(service: &Service, frontends: &[LbFrontend], pass: &Pass<'_>) -> Option<IpAddr> {
    if !is_served(service) {
        return None;
    }
    let uid = service.metadata.uid.as_deref()?;
    let object = pass
        .context
        .public_ips
        .get("", &object_name(&pass.ids.service_address(uid)))?;
    let address = address_of(object.status.as_ref()).ok().flatten()?;
    frontends.iter().any(|f| f.address == address).then_some(address)
}

/// Type LoadBalancer, not on its way out, public.
fn is_served(service: &Service) -> bool {
    let is_type = service.spec.as_ref().and_then(|s| s.type_.as_deref()) == Some("LoadBalancer");
    let internal = service
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(INTERNAL))
        .is_some_and(|v| v.eq_ignore_ascii_case("true"));
    if is_type && internal {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        tracing::warn!(
            service = name,
            "internal load balancers are not served yet; the Service stays without an address"
        );
    }
    is_type && !internal && service.metadata.deletion_timestamp.is_none()
}

fn is_slice_of(slice: &EndpointSlice, service: &Service) -> bool {
    let named = slice.metadata.labels.as_ref().and_then(|l| l.get(SLICE_SERVICE));
    slice.metadata.namespace == service.metadata.namespace
        && named.is_some()
        && named == service.metadata.name.as_ref()
        && slice.address_type == "IPv4"
}

/// One frontend per TCP or UDP port. An endpoint counts unless it says that it is not ready.
fn frontends_of(service: &Service, address: IpAddr, vnet: &str, slices: &[&EndpointSlice]) -> Vec<LbFrontend> {
    let ports = service
        .spec
        .as_ref()
        .and_then(|s| s.ports.as_deref())
        .unwrap_or_default();
    let mut out = Vec::new();
    for port in ports {
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
        });
    }
    out
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
}

impl Pass<'_> {
    /// The Service's public address, made if need be; `None` until the allocator has given one.
    async fn address(&self, service: &Service, uid: &str) -> Result<Option<IpAddr>, Error> {
        let id = self.ids.service_address(uid);
        let name = object_name(&id);
        let Some(object) = self.context.public_ips.get("", &name) else {
            let (ns, svc) = (service.metadata.namespace.as_deref(), service.metadata.name.as_deref());
            let tag = format!("{}/{}", ns.unwrap_or_default(), svc.unwrap_or_default());
            let body = json!({"location": self.view.location, "sku": {"name": "Standard"}, "tags": {"k8s-azure-service": tag},
                "properties": {"publicIPAllocationMethod": "Static", "publicIPAddressVersion": "IPv4"}});
            let mut object = PublicIPAddress::new(name, ArmSpec { id: id.clone(), body });
            own(&mut object.metadata, self.cluster, &id);
            object
                .metadata
                .labels
                .get_or_insert_default()
                .insert(SERVICE_LABEL.to_owned(), uid.to_owned());
            self.context.create(None, &object).await?;
            return Ok(None);
        };
        match address_of(object.status.as_ref()) {
            Ok(address) => Ok(address),
            Err(Progress::Failed(e)) => {
                tracing::warn!(service = service.metadata.name, error = e.message, "no public address");
                Ok(None)
            }
            Err(_) => Ok(None),
        }
    }

    /// Writes the load balancer if it differs; deletes it if it has nothing to do.
    async fn load_balancer(
        &self,
        frontends: &[LbFrontend],
        services: &[(String, std::sync::Arc<Service>)],
    ) -> Result<(), Error> {
        let id = self.ids.load_balancer();
        let name = object_name(&id);
        let existing = self.context.home.get_opt::<LoadBalancer>(None, &name).await?;
        if frontends.is_empty() {
            if existing.is_some() {
                self.context.delete::<LoadBalancer>(None, &name).await?;
            }
            return Ok(());
        }
        let body = self.body(&id, frontends, services);
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

    fn body(&self, id: &str, frontends: &[LbFrontend], services: &[(String, std::sync::Arc<Service>)]) -> Value {
        let mut configs = Vec::new();
        let mut rules = Vec::new();
        for (uid, service) in services {
            let front = format!("a{}", uid.replace('-', ""));
            configs.push(
                json!({"name": front, "id": format!("{id}/frontendIPConfigurations/{front}"),
                "properties": {"publicIPAddress": {"id": self.ids.service_address(uid)}}}),
            );
            for p in service
                .spec
                .as_ref()
                .and_then(|s| s.ports.as_deref())
                .unwrap_or_default()
            {
                let protocol = p.protocol.as_deref().unwrap_or("TCP");
                let name = format!("{front}-{protocol}-{}", p.port);
                rules.push(
                    json!({"name": name, "id": format!("{id}/loadBalancingRules/{name}"), "properties": {
                    "frontendIPConfiguration": {"id": format!("{id}/frontendIPConfigurations/{front}")},
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
            .await
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
        assert!(is_slice_of(&slice, &service) && is_served(&service));
        let got = frontends_of(&service, "198.19.0.5".parse().unwrap(), "v", &[&slice]);
        assert_eq!(got.len(), 2);
        let ips: Vec<String> = got[0]
            .backends
            .iter()
            .map(|b| format!("{}:{}", b.address, b.port))
            .collect();
        assert_eq!(ips, ["10.0.0.8:8080", "10.0.0.9:8080"]);
        assert!(got[1].protocol == "udp" && got[1].backends.is_empty());
    }
}
