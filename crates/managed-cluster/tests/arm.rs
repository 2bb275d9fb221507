//! The management plane over TLS, as a client sees it: front door, controllers and pretended machines around an API server in memory.

mod support;

use std::{net::Ipv4Addr, time::Duration};

use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use managed_cluster::ControlPlanes;
use reconcile::{Client, DeleteParams, HttpsConfig, Identity, full_body};
use resources::{LoadBalancer, Machine, NetworkInterface, PublicIPAddress, ResourceGroup, VirtualNode};
use serde_json::{Value, json};
use support::{CLIENT, Platform, SECRET, SUBSCRIPTION, TENANT};

/// A reply as a client sees it.
struct Got {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Value,
}

impl Got {
    fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    fn retry_after(&self) -> Option<u32> {
        self.headers.get("retry-after")?.to_str().ok()?.parse().ok()
    }

    fn state(&self) -> &str {
        self.body["properties"]["provisioningState"]
            .as_str()
            .unwrap_or_default()
    }
}

struct World {
    platform: Platform,
    client: Client,
}

impl World {
    async fn start(boot_ms: u64) -> Self {
        let platform = Platform::start((Ipv4Addr::LOCALHOST, 0).into(), Duration::from_millis(boot_ms)).await;
        let config = |identity| HttpsConfig {
            server: platform.base_url.clone(),
            ca_pem: platform.ca_pem.clone(),
            identity,
            connector: None,
        };
        let anonymous = Client::https(config(Identity::Anonymous)).unwrap();
        let form = format!(
            "grant_type=client_credentials&client_id={CLIENT}&client_secret={SECRET}&scope={}%2Farm%2F.default",
            platform.base_url
        );
        let token = send(&anonymous, Method::POST, "/adfs/oauth2/token", form.into_bytes(), &[]).await;
        let token = token.body["access_token"].as_str().unwrap().to_owned();
        let client = Client::https(config(Identity::Token(token))).unwrap();
        Self { platform, client }
    }

    fn url(path: &str) -> String {
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/subscriptions/{SUBSCRIPTION}/{path}")
        };
        let mark = if path.contains('?') { '&' } else { '?' };
        if path.contains("api-version") {
            path
        } else {
            format!("{path}{mark}api-version=2025-01-01")
        }
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Got {
        let bytes = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        send(&self.client, method, &Self::url(path), bytes, &[]).await
    }

    async fn get(&self, path: &str) -> Got {
        self.call(Method::GET, path, Value::Null).await
    }

    /// Sends, then polls as a client does; every reply on the way that is not the last must say when to come back.
    async fn finish(&self, method: Method, path: &str, body: Value) -> Got {
        let first = self.call(method, path, body).await;
        let Some(operation) = first
            .headers
            .get("azure-asyncoperation")
            .or(first.headers.get("location"))
        else {
            return first;
        };
        assert_eq!(first.retry_after(), Some(1), "first reply of {path}");
        let operation = operation
            .to_str()
            .unwrap()
            .strip_prefix(&self.platform.base_url)
            .unwrap()
            .to_owned();
        let location = first.headers["location"]
            .to_str()
            .unwrap()
            .strip_prefix(&self.platform.base_url)
            .unwrap()
            .to_owned();
        for _ in 0..1000 {
            let poll = self.get(&operation).await;
            let running = poll.body["status"] == "InProgress" || poll.status == StatusCode::ACCEPTED;
            assert_eq!(
                running,
                poll.retry_after().is_some(),
                "{operation} said {:?}",
                poll.body
            );
            if !running {
                if poll.body["status"] == "Failed" {
                    return poll;
                }
                return self.get(&location).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{path} did not end");
    }

    async fn group(&self, name: &str) {
        let got = self
            .call(
                Method::PUT,
                &format!("resourcegroups/{name}"),
                json!({"location": "westeurope"}),
            )
            .await;
        assert_eq!(got.status, StatusCode::CREATED, "{:?}", got.body);
    }

    async fn vnet(&self, group: &str) {
        let body = json!({"location": "westeurope", "properties": {"addressSpace": {"addressPrefixes": ["10.240.0.0/16"]}, "subnets": [
            {"name": "nodes", "properties": {"addressPrefix": "10.240.0.0/22"}},
            {"name": "groups", "properties": {"addressPrefix": "10.240.4.0/24", "delegations": [
                {"name": "0", "properties": {"serviceName": "Microsoft.ContainerInstance/containerGroups"}}]}}]}});
        let got = self.call(Method::PUT, &vnet(group), body).await;
        assert_eq!(got.status, StatusCode::CREATED, "{:?}", got.body);
    }
}

async fn send(client: &Client, method: Method, path: &str, body: Vec<u8>, headers: &[(&str, &str)]) -> Got {
    let mut request = Request::builder().method(method).uri(path);
    for (k, v) in headers {
        request = request.header(*k, *v);
    }
    let response = client.raw(request.body(full_body(body)).unwrap()).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    Got {
        status: parts.status,
        headers: parts.headers,
        body: serde_json::from_slice(&bytes).unwrap_or_default(),
    }
}

fn vnet(group: &str) -> String {
    format!("resourceGroups/{group}/providers/Microsoft.Network/virtualNetworks/v")
}

fn aks(group: &str, name: &str) -> String {
    format!("resourceGroups/{group}/providers/Microsoft.ContainerService/managedClusters/{name}")
}

fn cluster_body(count: i64) -> Value {
    json!({"location": "westeurope", "identity": {"type": "SystemAssigned"}, "properties": {"kubernetesVersion": "", "dnsPrefix": "c1",
        "agentPoolProfiles": [{"name": "nodepool1", "count": count, "mode": "System", "vmSize": "", "orchestratorVersion": ""}],
        "networkProfile": {"networkPlugin": "azure"}, "addonProfiles": {}}})
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut f: impl FnMut() -> F) -> T {
    for _ in 0..500 {
        if let Some(v) = f().await {
            return v;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what} did not happen");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_lives_and_everything_goes_with_it() {
    let w = World::start(0).await;
    let home = &w.platform.home;
    w.group("rg").await;
    let got = w.finish(Method::PUT, &aks("rg", "c1"), cluster_body(2)).await;
    assert_eq!(
        (got.status.is_success(), got.state()),
        (true, "Succeeded"),
        "{:?}",
        got.body
    );
    let shown = w.get(&aks("RG", "C1")).await;
    let p = &shown.body["properties"];
    assert_eq!(shown.body["name"], "c1", "the first casing comes back");
    assert_eq!(p["kubernetesVersion"], "1.36.4");
    assert_eq!(p["agentPoolProfiles"][0]["vmSize"], "Standard_DS2_v2");
    assert_eq!(p["servicePrincipalProfile"]["clientId"], "msi");
    assert_eq!(p["nodeResourceGroup"], "MC_rg_c1_westeurope");
    assert!(shown.body["identity"]["principalId"].is_string());
    let machines = home.list::<Machine>(None, &Default::default()).await.unwrap().items;
    assert_eq!(machines.len(), 2);
    assert!(
        machines[0].spec.node_name.starts_with("aks-nodepool1-") && machines[0].spec.node_name.ends_with("-vmss000000")
    );
    assert_eq!(machines[0].spec.bootstrap.dns_service_ip, "10.0.0.10");

    // A pool comes, grows, and goes; the first pool stays.
    let pool = format!("{}/agentPools/p2", aks("rg", "c1"));
    let got = w
        .finish(Method::PUT, &pool, json!({"properties": {"count": 1, "mode": "User"}}))
        .await;
    assert_eq!(got.state(), "Succeeded", "{:?}", got.body);
    let got = w.get(&format!("{}/agentPools", aks("rg", "c1"))).await;
    assert_eq!(got.body["value"].as_array().unwrap().len(), 2);
    // The whole cluster written back with another count, as `az aks scale` does.
    let mut whole = w.get(&aks("rg", "c1")).await.body;
    whole["properties"]["agentPoolProfiles"][0]["count"] = json!(1);
    let got = w.finish(Method::PUT, &aks("rg", "c1"), whole).await;
    assert_eq!(got.state(), "Succeeded", "{:?}", got.body);
    let names: Vec<String> = home
        .list::<Machine>(None, &Default::default())
        .await
        .unwrap()
        .items
        .iter()
        .map(|m| m.spec.node_name.clone())
        .collect();
    assert_eq!(names.iter().filter(|n| n.contains("nodepool1")).count(), 1, "{names:?}");
    assert!(
        names
            .iter()
            .any(|n| n.contains("nodepool1") && n.ends_with("vmss000000")),
        "the highest goes first: {names:?}"
    );
    let got = w.finish(Method::DELETE, &pool, Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    assert_eq!(w.get(&pool).await.status, StatusCode::NOT_FOUND);

    // Credentials.
    let got = w
        .call(
            Method::POST,
            &format!("{}/listClusterUserCredential", aks("rg", "c1")),
            Value::Null,
        )
        .await;
    assert_eq!(got.body["kubeconfigs"][0]["name"], "clusterUser");

    // The node group cannot be taken from under the cluster; the whole group can go, in order.
    let got = w
        .call(Method::DELETE, "resourcegroups/MC_rg_c1_westeurope", Value::Null)
        .await;
    assert_eq!((got.status, got.code()), (StatusCode::CONFLICT, "OperationNotAllowed"));
    let got = w.finish(Method::DELETE, "resourcegroups/rg", Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    assert_eq!(w.platform.control_planes.count(), 0);
    assert_eq!(
        home.list::<ResourceGroup>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len(),
        0
    );
    assert_eq!(
        home.list::<Machine>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len(),
        0
    );
    assert_eq!(
        home.list::<PublicIPAddress>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len(),
        0
    );
    w.platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_cluster_keeps_what_it_knows_and_comes_back() {
    let w = World::start(0).await;
    w.group("rg").await;
    let cluster = aks("rg", "c1");
    let got = w.finish(Method::PUT, &cluster, cluster_body(2)).await;
    assert_eq!(got.state(), "Succeeded", "{:?}", got.body);
    let name = hosted_name(&w).await;
    let (hosted, _) = w.platform.control_planes.client(&name).unwrap();
    let kept = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}, "data": {"k": "v"}});
    let path = "/api/v1/namespaces/default/configmaps";
    let _: Value = hosted.request(Method::POST, path, Some(&kept)).await.unwrap();

    let got = w.finish(Method::POST, &format!("{cluster}/stop"), Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    assert_eq!(w.platform.control_planes.count(), 0, "the control plane is unloaded");
    let machines = w
        .platform
        .home
        .list::<Machine>(None, &Default::default())
        .await
        .unwrap()
        .items;
    assert!(machines.len() == 2 && machines.iter().all(|m| !m.spec.running));
    let shown = w.get(&cluster).await.body;
    assert_eq!(shown["properties"]["powerState"]["code"], "Stopped");
    assert_eq!(
        shown["properties"]["agentPoolProfiles"][0]["powerState"]["code"],
        "Stopped"
    );
    assert_eq!(shown["properties"]["provisioningState"], "Succeeded");
    // Stopping twice is no error, and a body written back does not start it.
    let got = w.finish(Method::POST, &format!("{cluster}/stop"), Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    let got = w.finish(Method::PUT, &cluster, shown).await;
    assert_eq!(got.state(), "Succeeded", "{:?}", got.body);
    assert_eq!(w.platform.control_planes.count(), 0);

    let got = w.finish(Method::POST, &format!("{cluster}/start"), Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    let shown = w.get(&cluster).await.body;
    assert_eq!(shown["properties"]["powerState"]["code"], "Running");
    let (hosted, _) = w.platform.control_planes.client(&name).unwrap();
    let again: Value = hosted
        .request::<_, ()>(Method::GET, &format!("{path}/kept"), None)
        .await
        .unwrap();
    assert_eq!(again["data"]["k"], "v");
    let machines = w
        .platform
        .home
        .list::<Machine>(None, &Default::default())
        .await
        .unwrap()
        .items;
    assert!(machines.iter().all(|m| m.spec.running));
    // A stopped cluster can be deleted.
    w.finish(Method::POST, &format!("{cluster}/stop"), Value::Null).await;
    let got = w.finish(Method::DELETE, &cluster, Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    w.platform.stop().await;
}

async fn hosted_name(w: &World) -> String {
    let all = w
        .platform
        .home
        .list::<resources::ManagedCluster>(None, &Default::default())
        .await
        .unwrap()
        .items;
    all[0].metadata.name.clone().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_machines_mean_polls_that_all_say_when_to_come_back() {
    let w = World::start(1600).await;
    w.group("rg").await;
    let first = w.call(Method::PUT, &aks("rg", "c1"), cluster_body(1)).await;
    assert_eq!(
        (first.status, first.state(), first.retry_after()),
        (StatusCode::CREATED, "Creating", Some(1))
    );
    let shown = w.get(&aks("rg", "c1")).await;
    assert_eq!(
        (shown.state(), shown.retry_after()),
        ("Creating", Some(1)),
        "a plain GET of something unfinished"
    );
    // The same again while it runs is another operation on the same cluster, not a refusal.
    let got = w.finish(Method::PUT, &aks("rg", "c1"), cluster_body(1)).await;
    assert_eq!((got.state(), got.retry_after()), ("Succeeded", None), "{:?}", got.body);
    w.platform.stop().await;
}

/// Services of an internal load balancer, and one that cannot be served.
async fn internal_services(hosted: &reconcile::Client, home: &reconcile::Client) {
    let make = |name: &str, annotations: &[(&str, &str)]| -> Service {
        let all: serde_json::Map<String, Value> = annotations
            .iter()
            .map(|(k, v)| (format!("service.beta.kubernetes.io/azure-load-balancer-{k}"), json!(v)))
            .collect();
        serde_json::from_value(json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop", "annotations": all},
            "spec": {"type": "LoadBalancer", "sessionAffinity": "ClientIP", "ports": [{"port": 80}]}}))
        .unwrap()
    };
    let fixed = make("fixed", &[("internal", "true"), ("ipv4", "10.240.0.200")]);
    let dynamic = make("dynamic", &[("internal", "true"), ("internal-subnet", "nodes")]);
    let lost = make("lost", &[("internal", "true"), ("internal-subnet", "nowhere")]);
    for service in [&fixed, &dynamic, &lost] {
        hosted.create(Some("shop"), service).await.unwrap();
    }
    let address = |name: &'static str| async move {
        let s = hosted.get::<Service>(Some("shop"), name).await.unwrap();
        s.status?.load_balancer?.ingress?.first()?.ip.clone()
    };
    assert_eq!(until("the fixed address", || address("fixed")).await, "10.240.0.200");
    let other = until("an address of the subnet", || address("dynamic")).await;
    assert!(other.starts_with("10.240.") && other != "10.240.0.200", "{other}");
    let all = home
        .list::<LoadBalancer>(None, &Default::default())
        .await
        .unwrap()
        .items;
    let internal = all
        .iter()
        .find(|lb| lb.spec.id.ends_with("/kubernetes-internal"))
        .unwrap();
    let frontends = resources::views::lb_frontends(&internal.spec.body).unwrap();
    assert_eq!(frontends.len(), 2);
    assert!(frontends.iter().all(|f| f.client_affinity), "{frontends:?}");
    let told = until("an event about the one that cannot be", || async {
        let events = hosted
            .list::<k8s_openapi::api::core::v1::Event>(Some("shop"), &Default::default())
            .await
            .unwrap()
            .items;
        let of = |e: &&k8s_openapi::api::core::v1::Event| e.involved_object.name.as_deref() == Some("lost");
        events.iter().find(of).cloned()
    })
    .await;
    assert_eq!(told.reason.as_deref(), Some("SyncLoadBalancerFailed"));
    assert!(
        told.message.unwrap().contains("subnet nowhere is not in"),
        "the reason is told"
    );
    assert_eq!(address("lost").await, None);
    for name in ["fixed", "dynamic", "lost"] {
        hosted
            .delete::<Service>(Some("shop"), name, &Default::default())
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_balancer_services_get_addresses_and_the_virtual_node_joins() {
    let w = World::start(0).await;
    let home = &w.platform.home;
    w.group("rg").await;
    w.vnet("rg").await;
    let mut body = cluster_body(1);
    body["properties"]["agentPoolProfiles"][0]["vnetSubnetID"] =
        json!(World::url(&format!("{}/subnets/nodes", vnet("rg"))).split('?').next());
    body["properties"]["addonProfiles"] =
        json!({"aciConnectorLinux": {"enabled": true, "config": {"SubnetName": "groups"}}});
    let got = w.finish(Method::PUT, &aks("rg", "c1"), body).await;
    assert_eq!(got.state(), "Succeeded", "{:?}", got.body);
    assert!(got.body["properties"]["addonProfiles"]["aciConnectorLinux"]["identity"]["objectId"].is_string());
    let name = resources::object_name(World::url(&aks("rg", "c1")).split('?').next().unwrap());
    let hosted = managed_cluster::ControlPlanes::client(&*w.platform.control_planes, &name)
        .unwrap()
        .0;
    assert!(hosted.get::<Node>(None, "virtual-node-aci-linux").await.is_ok());

    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    hosted
        .request::<Value, Value>(Method::POST, "/api/v1/namespaces", Some(&namespace))
        .await
        .unwrap();
    let service: Service = serde_json::from_value(
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front", "namespace": "shop"},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}}),
    )
    .unwrap();
    hosted.create(Some("shop"), &service).await.unwrap();
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "front-x", "namespace": "shop",
        "labels": {"kubernetes.io/service-name": "front"}}, "addressType": "IPv4", "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["10.240.0.9"], "conditions": {"ready": true}}]});
    let slice: k8s_openapi::api::discovery::v1::EndpointSlice = serde_json::from_value(slice).unwrap();
    hosted.create(Some("shop"), &slice).await.unwrap();
    let ip = until("an address at the Service", || async {
        let s = hosted.get::<Service>(Some("shop"), "front").await.unwrap();
        s.status?.load_balancer?.ingress?.first()?.ip.clone()
    })
    .await;
    let frontends = until("a load balancer with the pod", || async {
        let all = home
            .list::<LoadBalancer>(None, &Default::default())
            .await
            .unwrap()
            .items;
        let f = resources::views::lb_frontends(&all.first()?.spec.body).unwrap();
        (!f.first()?.backends.is_empty()).then_some(f)
    })
    .await;
    assert_eq!((frontends[0].address.to_string(), frontends[0].port), (ip, 80));
    assert_eq!(frontends[0].backends[0].address.to_string(), "10.240.0.9");
    assert!(frontends[0].virtual_network.starts_with("v-"));
    assert_eq!((frontends[0].idle_timeout_s, frontends[0].tcp_reset), (240, true));
    internal_services(&hosted, home).await;

    hosted
        .delete::<Service>(Some("shop"), "front", &Default::default())
        .await
        .unwrap();
    until("the balancer and its address to go", || async {
        let balancers = home
            .list::<LoadBalancer>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len();
        let addresses = home
            .list::<PublicIPAddress>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len();
        // The API server's address stays.
        ((balancers, addresses) == (0, 1)).then_some(())
    })
    .await;
    // The add-on off: its node, certificates and interface go; then on again for the rest.
    let mut whole = w.get(&aks("rg", "c1")).await.body;
    for on in [false, true] {
        whole["properties"]["addonProfiles"]["aciConnectorLinux"]["enabled"] = json!(on);
        let got = w.finish(Method::PUT, &aks("rg", "c1"), whole.clone()).await;
        assert_eq!(got.state(), "Succeeded", "{:?}", got.body);
        let nodes = home.list::<VirtualNode>(None, &Default::default()).await.unwrap().items;
        let nics = home
            .list::<NetworkInterface>(None, &Default::default())
            .await
            .unwrap()
            .items;
        assert_eq!((nodes.len(), nics.len()), (usize::from(on), 1 + usize::from(on)));
        assert!(nodes.iter().all(|n| nics.iter().any(|i| i.name() == n.spec.nic)));
        let node = hosted.get_opt::<Node>(None, "virtual-node-aci-linux").await.unwrap();
        assert_eq!(node.is_some(), on);
    }
    // The subnets are in use: nothing takes them away.
    for what in [
        format!("{}/subnets/nodes", vnet("rg")),
        format!("{}/subnets/groups", vnet("rg")),
        vnet("rg"),
    ] {
        let got = w.call(Method::DELETE, &what, Value::Null).await;
        assert_eq!(got.code(), "InUseSubnetCannotBeDeleted", "{what}: {:?}", got.body);
    }
    let got = w.finish(Method::DELETE, &aks("rg", "c1"), Value::Null).await;
    assert!(got.status.is_success(), "{:?}", got.body);
    assert_eq!(
        w.call(Method::DELETE, &vnet("rg"), Value::Null).await.status,
        StatusCode::NO_CONTENT
    );
    w.platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scaling_down_moves_pods_away_first() {
    let w = World::start(0).await;
    w.group("rg").await;
    assert_eq!(
        w.finish(Method::PUT, &aks("rg", "c1"), cluster_body(2)).await.state(),
        "Succeeded"
    );
    let name = resources::object_name(World::url(&aks("rg", "c1")).split('?').next().unwrap());
    let hosted = managed_cluster::ControlPlanes::client(&*w.platform.control_planes, &name)
        .unwrap()
        .0;
    let node = w
        .platform
        .home
        .list::<Machine>(None, &Default::default())
        .await
        .unwrap()
        .items[1]
        .spec
        .node_name
        .clone();
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    let path = "/api/v1/namespaces/default/serviceaccounts";
    hosted
        .request::<Value, Value>(Method::POST, path, Some(&account))
        .await
        .unwrap();
    let pod: Pod = serde_json::from_value(
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}, "spec": {"nodeName": node, "containers": [{"name": "c", "image": "x"}]}}),
    )
    .unwrap();
    hosted.create(Some("default"), &pod).await.unwrap();
    let first = w.call(Method::PUT, &aks("rg", "c1"), cluster_body(1)).await;
    assert_eq!(first.retry_after(), Some(1), "{:?}", first.body);
    assert_eq!(
        hosted
            .get::<Node>(None, &node)
            .await
            .unwrap()
            .spec
            .unwrap()
            .unschedulable,
        Some(true)
    );
    assert!(
        hosted
            .get::<Pod>(Some("default"), "p")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    );
    assert_eq!(
        w.platform
            .home
            .list::<Machine>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len(),
        2,
        "not before the pod is gone"
    );
    // What its kubelet does when the containers have stopped.
    let stopped = DeleteParams {
        grace_period_s: Some(0),
        ..Default::default()
    };
    hosted.delete::<Pod>(Some("default"), "p", &stopped).await.unwrap();
    until("the machine to go", || async {
        let n = w
            .platform
            .home
            .list::<Machine>(None, &Default::default())
            .await
            .unwrap()
            .items
            .len();
        (n == 1 && hosted.get_opt::<Node>(None, &node).await.unwrap().is_none()).then_some(())
    })
    .await;
    w.platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_change_nothing_and_say_why() {
    let w = World::start(0).await;
    w.group("rg").await;
    w.vnet("rg").await;
    // Tokens.
    let url = World::url("resourcegroups");
    let config = |identity| HttpsConfig {
        server: w.platform.base_url.clone(),
        ca_pem: w.platform.ca_pem.clone(),
        identity,
        connector: None,
    };
    for identity in [
        Identity::Anonymous,
        Identity::Token("nonsense".into()),
        Identity::Token("a.b.c".into()),
    ] {
        let stranger = Client::https(config(identity)).unwrap();
        let got = send(&stranger, Method::GET, &url, vec![], &[]).await;
        assert_eq!(got.status, StatusCode::UNAUTHORIZED);
        assert!(got.headers.contains_key("www-authenticate") && !got.code().is_empty());
        let form = b"grant_type=client_credentials&client_id=x&client_secret=y&scope=z".to_vec();
        assert_eq!(
            send(&stranger, Method::POST, "/adfs/oauth2/token", form, &[])
                .await
                .status,
            StatusCode::UNAUTHORIZED
        );
    }
    // Versions.
    let bare = format!("/subscriptions/{SUBSCRIPTION}/resourcegroups");
    assert_eq!(
        send(&w.client, Method::GET, &bare, vec![], &[]).await.code(),
        "MissingApiVersionParameter"
    );
    assert_eq!(
        w.get(&format!("{bare}?api-version=latest")).await.code(),
        "InvalidApiVersionParameter"
    );
    // Bodies.
    let v2 = World::url(&format!("{}2", vnet("rg")));
    for body in [&b"{"[..], b"[]", b"", b"{\"location\": }"] {
        assert_eq!(
            send(&w.client, Method::PUT, &v2, body.to_vec(), &[]).await.code(),
            "InvalidRequestContent"
        );
    }
    let deep = "{\"a\":".repeat(100_000);
    assert_eq!(
        send(&w.client, Method::PUT, &v2, deep.into_bytes(), &[]).await.code(),
        "InvalidRequestContent"
    );
    let big = vec![b' '; (4 << 20) + 1];
    let got = send(&w.client, Method::PUT, &v2, big, &[]).await;
    assert_eq!(
        (got.status, got.code()),
        (StatusCode::PAYLOAD_TOO_LARGE, "RequestContentTooLarge")
    );
    // Networks and clusters.
    let net = |prefixes: Value, subnets: Value| json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": prefixes}, "subnets": subnets}});
    let subnet = |p: &str| json!([{"name": "a", "properties": {"addressPrefix": p}}]);
    let mut small = cluster_body(60);
    small["properties"]["agentPoolProfiles"][0]["vnetSubnetID"] =
        json!(World::url(&format!("{}/subnets/nodes", vnet("rg"))).split('?').next());
    let mut size = cluster_body(1);
    size["properties"]["agentPoolProfiles"][0]["vmSize"] = json!("Standard_Nope");
    let v2 = format!("{}2", vnet("rg"));
    for (path, body, code) in [
        (v2.as_str(), json!({"properties": {}}), "LocationRequired"),
        (
            &v2,
            net(json!(["10.0.0.0/16", "10.0.1.0/24"]), json!([])),
            "NetcfgVirtualNetworkAddressSpaceOverlap",
        ),
        (
            &v2,
            net(json!(["10.0.0.0/16"]), subnet("10.1.0.0/24")),
            "NetcfgInvalidSubnet",
        ),
        (
            &v2,
            net(json!(["10.0.0.0/16"]), subnet("10.0.0.0/30")),
            "NetcfgInvalidSubnet",
        ),
        (&aks("rg", "c9"), small, "SubnetIsFull"),
        (&aks("rg", "c9"), size, "InvalidParameter"),
        (&aks("rg", "-c9"), cluster_body(1), "InvalidResourceName"),
        (&aks("none", "c9"), cluster_body(1), "ResourceGroupNotFound"),
        (
            &format!("{}/agentPools/p", aks("rg", "c9")),
            json!({"properties": {}}),
            "ParentResourceNotFound",
        ),
    ] {
        let got = w.call(Method::PUT, path, body).await;
        assert_eq!(got.code(), code, "{path}: {:?}", got.body);
    }
    assert_eq!(
        w.get("resourceGroups/rg/providers/Microsoft.Network/azureFirewalls/n")
            .await
            .code(),
        "InvalidResourceType"
    );
    assert_eq!(
        w.get("/subscriptions/99999999-9999-4999-8999-999999999999/resourcegroups")
            .await
            .code(),
        "SubscriptionNotFound"
    );
    assert_eq!(
        w.get(&aks("rg", "c9")).await.code(),
        "ResourceNotFound",
        "nothing was half-created"
    );
    assert_eq!(w.get(&v2).await.code(), "ResourceNotFound");
    // Preconditions.
    let now = w.get(&vnet("rg")).await;
    let etag = now.body["etag"].as_str().unwrap().to_owned();
    let url = World::url(&vnet("rg"));
    let bytes = now.body.to_string().into_bytes();
    let stale = send(&w.client, Method::PUT, &url, bytes.clone(), &[("if-match", "\"0000\"")]).await;
    assert_eq!(
        (stale.status, stale.code()),
        (StatusCode::PRECONDITION_FAILED, "PreconditionFailed")
    );
    assert_eq!(
        send(&w.client, Method::PUT, &url, bytes.clone(), &[("if-match", &etag)])
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        send(&w.client, Method::PUT, &url, bytes, &[("if-none-match", "*")])
            .await
            .status,
        StatusCode::PRECONDITION_FAILED
    );
    // And the server is still there.
    let got = send(
        &w.client,
        Method::GET,
        &World::url("/tenants"),
        vec![],
        &[
            ("x-ms-client-request-id", "me"),
            ("x-ms-return-client-request-id", "true"),
        ],
    )
    .await;
    assert_eq!(
        (
            got.body["value"][0]["tenantId"].as_str(),
            got.headers["x-ms-client-request-id"].as_bytes()
        ),
        (Some(TENANT), &b"me"[..])
    );
    w.platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_are_exact_and_assignments_are_kept() {
    let w = World::start(0).await;
    w.group("rg").await;
    let definitions = "providers/Microsoft.Authorization/roleDefinitions";
    let got = w
        .get(&format!(
            "{definitions}?$filter=roleName%20eq%20'network%20contributor'"
        ))
        .await;
    assert_eq!(got.body["value"].as_array().unwrap().len(), 1);
    let role = got.body["value"][0]["id"].clone();
    let scope = "resourcegroups/rg";
    let path =
        format!("{scope}/providers/Microsoft.Authorization/roleAssignments/00000000-0000-4000-8000-000000000001");
    let body = json!({"properties": {"roleDefinitionId": role, "principalId": "p1"}});
    assert_eq!(
        w.call(Method::PUT, &path, body.clone()).await.status,
        StatusCode::CREATED
    );
    assert_eq!(
        w.call(Method::PUT, &path.replace("0001", "0002"), body).await.code(),
        "RoleAssignmentExists"
    );
    let listed = w
        .get(&format!(
            "{scope}/providers/Microsoft.Authorization/roleAssignments?$filter=atScope()"
        ))
        .await;
    assert_eq!(listed.body["value"][0]["properties"]["principalId"], "p1");
    assert_eq!(
        w.get(&format!("{definitions}?$filter=startswith(roleName,'N')"))
            .await
            .code(),
        "InvalidFilterInQueryString"
    );
    assert_eq!(w.call(Method::DELETE, &path, Value::Null).await.status, StatusCode::OK);
    w.platform.stop().await;
}
