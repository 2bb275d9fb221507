//! ARM by curl inside the host, as any program would call it, and the clusters that tests share.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::instance::Instance;

pub const NETWORK_API: &str = "2024-07-01";
pub const AKS_API: &str = "2025-10-01";
const GROUP_API: &str = "2024-11-01";
/// How long a cluster may take; machines are namespaces, the bound is for a busy test machine.
const OPERATION_S: u64 = 120;

/// A logged-in caller.
pub struct Arm<'a> {
    i: &'a Instance,
    pub base: String,
    pub ca: String,
    pub token: String,
    /// `/subscriptions/ID/resourceGroups/rg`.
    pub group: String,
}

/// Status code and body; a body that is no JSON comes as a string.
pub type Answer = (u16, Value);

impl<'a> Arm<'a> {
    /// Logs in and makes the resource group `rg`.
    pub fn login(i: &'a Instance) -> Result<Self> {
        let access: Value = serde_json::from_slice(&std::fs::read(i.data().join("arm.json"))?)?;
        let text = |key: &str| {
            access[key]
                .as_str()
                .map(str::to_owned)
                .with_context(|| format!("arm.json: {key}"))
        };
        let base = text("baseUrl")?;
        let mut arm = Self {
            i,
            ca: i.file("ca.pem", &text("caPem")?)?,
            token: String::new(),
            group: format!("/subscriptions/{}/resourceGroups/rg", text("subscription")?),
            base: base.clone(),
        };
        let form = format!(
            "grant_type=client_credentials&client_id={}&client_secret={}&scope={base}%2Farm%2F.default",
            text("clientId")?,
            text("clientSecret")?
        );
        let url = format!("{base}/adfs/oauth2/token");
        let (status, body) = curl(i, &["--cacert", &arm.ca, "--data", &form, &url])?;
        arm.token = body["access_token"]
            .as_str()
            .with_context(|| format!("login: {status} {body}"))?
            .to_owned();
        let (status, body) = arm.call("PUT", &arm.group, GROUP_API, r#"{"location":"local"}"#)?;
        ensure!(status < 300, "resource group: {status} {body}");
        Ok(arm)
    }

    /// One call with a body as given (empty: none).
    pub fn call(&self, method: &str, id: &str, api_version: &str, body: &str) -> Result<Answer> {
        let url = format!("{}{id}?api-version={api_version}", self.base);
        let authorization = format!("Authorization: Bearer {}", self.token);
        let mut args = vec!["--cacert", &self.ca, "-X", method, "-H", &authorization];
        let content;
        if !body.is_empty() {
            content = format!("@{}", self.i.file("body", body)?);
            args.extend(["-H", "Content-Type: application/json", "--data-binary", &content]);
        }
        args.push(&url);
        curl(self.i, &args).with_context(|| format!("{method} {id}"))
    }

    pub fn get(&self, id: &str, api_version: &str) -> Result<Answer> {
        self.call("GET", id, api_version, "")
    }

    /// PUT, then waits for the end of the operation.
    pub fn put(&self, id: &str, api_version: &str, body: &Value) -> Result<Value> {
        let (status, answer) = self.call("PUT", id, api_version, &body.to_string())?;
        ensure!(status < 300, "PUT {id}: {status} {answer}");
        testkit::eventually(id, OPERATION_S, || {
            let (_, now) = self.get(id, api_version)?;
            match now["properties"]["provisioningState"].as_str() {
                Some("Succeeded") => Ok(now),
                _ => Err(anyhow::anyhow!("{now}")),
            }
        })
    }

    pub fn network_id(&self, name: &str) -> String {
        format!("{}/providers/Microsoft.Network/virtualNetworks/{name}", self.group)
    }

    pub fn cluster_id(&self, name: &str) -> String {
        format!(
            "{}/providers/Microsoft.ContainerService/managedClusters/{name}",
            self.group
        )
    }

    /// A network `v` with subnets `nodes` and `groups` (delegated), and in it cluster `c` with machines and the virtual node;
    /// its context is saved.
    pub fn cluster(&self, nodes: u32) -> Result<()> {
        self.put(
            &self.network_id("v"),
            NETWORK_API,
            &network("10.240.0.0/16", "10.240.0.0/22", "10.240.4.0/22"),
        )?;
        self.put(
            &self.cluster_id("c"),
            AKS_API,
            &cluster(&self.network_id("v"), nodes, true),
        )?;
        self.i.run(&["kubeconfig", "save", "c"])?;
        Ok(())
    }
}

/// A network's body.
pub fn network(space: &str, nodes: &str, groups: &str) -> Value {
    let delegation =
        json!([{"name": "aci", "properties": {"serviceName": "Microsoft.ContainerInstance/containerGroups"}}]);
    json!({"location": "local", "properties": {
        "addressSpace": {"addressPrefixes": [space]},
        "subnets": [
            {"name": "nodes", "properties": {"addressPrefix": nodes}},
            {"name": "groups", "properties": {"addressPrefix": groups, "delegations": delegation}},
        ],
    }})
}

/// A cluster's body.
pub fn cluster(network: &str, nodes: u32, virtual_node: bool) -> Value {
    let mut body = json!({"location": "local", "identity": {"type": "SystemAssigned"}, "properties": {
        "dnsPrefix": "c",
        "agentPoolProfiles": [{
            "name": "np", "count": nodes, "mode": "System", "vmSize": "Standard_DS2_v2", "osType": "Linux",
            "type": "VirtualMachineScaleSets", "vnetSubnetID": format!("{network}/subnets/nodes"),
        }],
        "networkProfile": {"networkPlugin": "azure", "serviceCidr": "10.0.0.0/16", "dnsServiceIP": "10.0.0.10"},
    }});
    if virtual_node {
        body["properties"]["addonProfiles"] =
            json!({"aciConnectorLinux": {"enabled": true, "config": {"SubnetName": "groups"}}});
    }
    body
}

/// `curl ARGS` in the host.
pub fn curl(i: &Instance, args: &[&str]) -> Result<Answer> {
    let mut all = vec!["-sS", "--max-time", "30", "-w", "\n%{http_code}"];
    all.extend(args);
    let said = i.host.run("curl", &all)?;
    let (body, status) = said.rsplit_once('\n').context("curl printed no status")?;
    let body = serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()));
    Ok((status.parse()?, body))
}
