//! The network by the unmodified az CLI on a running platform, seen by traffic between machines: rules and application
//! security groups, peering, route tables, private zones, metadata and tokens of machines, one more address for one more
//! pod.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    arm::{AKS_API, Arm, cluster, curl},
    az::Az,
};

/// How long the data plane may take after az says that it is done; the bound is for a busy test machine.
const APPLIED_S: u64 = 20;

/// A machine, as a place to run programs in.
struct Machine<'a> {
    az: &'a Az,
    node: String,
    netns: PathBuf,
    /// ARM id of its interface.
    nic: String,
    address: String,
}

impl<'a> Machine<'a> {
    /// The machine of the node whose name starts with `prefix`.
    fn of(az: &'a Az, prefix: &str) -> Result<Self> {
        let home = |kind: &str| -> Result<Value> {
            let text = az
                .instance
                .kubectl(&["--context", "oaks-home", "get", kind, "-o", "json"])?;
            Ok(serde_json::from_str(&text)?)
        };
        let (machines, nics) = (
            home("machines.oaks.internal")?,
            home("networkinterfaces.oaks.internal")?,
        );
        let items = |list: &Value| list["items"].as_array().cloned().unwrap_or_default();
        for machine in items(&machines) {
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let node = text(&machine["spec"]["nodeName"]);
            if !node.starts_with(prefix) {
                continue;
            }
            let nic = items(&nics)
                .into_iter()
                .find(|n| n["metadata"]["name"] == machine["spec"]["nic"])
                .with_context(|| format!("{node} has no interface"))?;
            let primary = &nic["status"]["properties"]["ipConfigurations"][0]["properties"]["privateIPAddress"];
            return Ok(Self {
                az,
                netns: az
                    .instance
                    .run_dir()
                    .join("netns")
                    .join(format!("m-{}", text(&machine["metadata"]["name"]))),
                nic: text(&nic["spec"]["id"]),
                address: text(primary),
                node,
            });
        }
        anyhow::bail!("there is no machine of a node {prefix}*")
    }

    /// Resource group and name of its interface.
    fn interface(&self) -> (&str, &str) {
        let parts: Vec<&str> = self.nic.split('/').collect();
        (
            parts.get(4).copied().unwrap_or_default(),
            parts.last().copied().unwrap_or_default(),
        )
    }

    /// Runs a program in the machine's network; standard output.
    fn run(&self, program: &[&str]) -> Result<String> {
        let net = format!("--net={}", self.netns.display());
        self.az
            .instance
            .host
            .run("nsenter", &[&[net.as_str()], program].concat())
    }

    /// Serves its node's name at port 8080 from now on.
    fn serve(&self) -> Result<()> {
        let dir = self.az.instance.host.dir().join(format!("www-{}", self.node));
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("index.html"), &self.node)?;
        self.run(&["busybox", "httpd", "-p", "8080", "-h", &dir.to_string_lossy()])
            .map(drop)
    }

    fn asks(&self, other: &Machine<'_>) -> Result<String> {
        let url = format!("http://{}:8080/", other.address);
        self.run(&["curl", "-sS", "--max-time", "3", &url])
    }

    /// Waits until the other machine answers this one.
    fn reaches(&self, other: &Machine<'_>, why: &str) -> Result<()> {
        testkit::eventually(why, APPLIED_S, || {
            let said = self.asks(other)?;
            ensure!(said == other.node, "{said}");
            Ok(())
        })
    }

    /// Waits until it does not.
    fn is_cut_off(&self, other: &Machine<'_>, why: &str) -> Result<()> {
        testkit::eventually(why, APPLIED_S, || {
            ensure!(self.asks(other).is_err(), "{} still answers {}", other.node, self.node);
            Ok(())
        })
    }

    /// What VNet DNS says of a name's address; empty if nothing.
    fn looks_up(&self, name: &str) -> String {
        let said = self
            .run(&["busybox", "nslookup", "-type=a", name, "168.63.129.16"])
            .unwrap_or_default();
        let answer = said.split_once("\n\n").map_or("", |(_, rest)| rest).to_owned();
        answer.lines().filter_map(|l| l.strip_prefix("Address: ")).collect()
    }

    fn finds(&self, name: &str, address: &str) -> Result<()> {
        testkit::eventually(name, APPLIED_S, || {
            let found = self.looks_up(name);
            ensure!(found == address, "{} finds {found:?} for {name}", self.node);
            Ok(())
        })
    }

    fn metadata(&self, path_and_query: &str) -> Result<String> {
        let url = format!("http://169.254.169.254/metadata/{path_and_query}");
        self.run(&["curl", "-sS", "--max-time", "5", "-H", "Metadata: true", &url])
    }
}

/// Networks `v1` (subnets `front`, `middle` and `back`) and `v2`; cluster `c1` with a machine in each of the three, cluster
/// `c2` with one in `v2`.
fn set_up(az: &Az) -> Result<()> {
    az.run("group create -n rg -l local")?;
    az.run("network vnet create -g rg -n v1 --address-prefixes 10.1.0.0/16 --subnet-name front --subnet-prefixes 10.1.0.0/24")?;
    az.run("network vnet subnet create -g rg --vnet-name v1 -n back --address-prefixes 10.1.1.0/24")?;
    az.run("network vnet subnet create -g rg --vnet-name v1 -n middle --address-prefixes 10.1.2.0/24")?;
    az.run("network vnet create -g rg -n v2 --address-prefixes 10.2.0.0/16 --subnet-name nodes --subnet-prefixes 10.2.0.0/24")?;
    let arm = Arm::login(&az.instance)?;
    let pool = |name: &str, subnet: String| {
        json!({"name": name, "count": 1, "mode": "System", "vmSize": "Standard_DS2_v2", "osType": "Linux", "maxPods": 10,
            "type": "VirtualMachineScaleSets", "vnetSubnetID": subnet})
    };
    for (name, network, pools) in [
        (
            "c1",
            "v1",
            &[("front", "front"), ("middle", "middle"), ("back", "back")][..],
        ),
        ("c2", "v2", &[("far", "nodes")]),
    ] {
        let network = arm.network_id(network);
        let mut body = cluster(&network, 1, false);
        let pools = pools.iter().map(|(n, s)| pool(n, format!("{network}/subnets/{s}")));
        body["properties"]["agentPoolProfiles"] = pools.collect();
        body["properties"]["dnsPrefix"] = json!(name);
        arm.put(&arm.cluster_id(name), AKS_API, &body)?;
    }
    az.instance.run(&["kubeconfig", "save", "oaks-home"]).map(drop)
}

#[test]
fn the_network_by_the_unmodified_az() -> Result<()> {
    let az = Az::new()?;
    set_up(&az)?;
    let machine = |pool: &str| Machine::of(&az, &format!("aks-{pool}-"));
    let (front, other, back, far) = (
        &machine("front")?,
        &machine("middle")?,
        &machine("back")?,
        &machine("far")?,
    );
    [back, far].into_iter().try_for_each(Machine::serve)?;
    security(&az, front, other, back)?;
    peering(&az, front, far)?;
    routes(&az, front, other, back)?;
    zones(&az, front, back, far)?;
    metadata(&az, front, far)?;
    addresses(&az, front)
}

fn security(az: &Az, front: &Machine<'_>, other: &Machine<'_>, back: &Machine<'_>) -> Result<()> {
    front.reaches(back, "no group: everything is allowed")?;
    az.run("network nsg create -g rg -n back")?;
    az.run("network vnet subnet update -g rg --vnet-name v1 -n back --nsg back")?;
    az.run("network nsg rule create -g rg --nsg-name back -n web --priority 200 --access Deny --protocol Tcp --destination-port-ranges 8080 --source-address-prefixes VirtualNetwork 192.0.2.0/24")?;
    front.is_cut_off(back, "a rule denies")?;
    az.run("network nsg rule update -g rg --nsg-name back -n web --access Allow")?;
    front.reaches(back, "the rule allows now")?;
    // Members of an application security group are denied by a rule before it.
    let asg = az.json("network asg create -g rg -n clients")?;
    let asg = asg["id"].as_str().context("az network asg create gives no id")?;
    let (group, nic) = front.interface();
    az.run(&format!(
        "network nic ip-config update -g {group} --nic-name {nic} -n ipconfig1 --application-security-groups {asg}"
    ))?;
    az.run(&format!("network nsg rule create -g rg --nsg-name back -n clients --priority 100 --access Deny --source-asgs {asg} --destination-port-ranges *"))?;
    front.is_cut_off(back, "members of the application security group are denied")?;
    other.reaches(back, "others are not")?;
    for (line, code) in [
        (
            "network asg delete -g rg -n clients",
            "InUseApplicationSecurityGroupCannotBeDeleted",
        ),
        (
            "network nsg delete -g rg -n back",
            "InUseNetworkSecurityGroupCannotBeDeleted",
        ),
        (
            "network nsg rule update -g rg --nsg-name back -n web --source-address-prefixes Storage",
            "SecurityRuleInvalidAddressPrefix",
        ),
    ] {
        let said = az.fails(line)?;
        ensure!(said.contains(code), "az {line}: {said}");
    }
    az.run("network nsg rule delete -g rg --nsg-name back -n clients")?;
    front.reaches(back, "the rule is gone")?;
    let rules = az.json("network nsg rule list -g rg --nsg-name back --include-default")?;
    ensure!(
        rules.as_array().is_some_and(|r| r.len() == 7),
        "one rule and the default ones: {rules}"
    );
    Ok(())
}

fn peering(az: &Az, front: &Machine<'_>, far: &Machine<'_>) -> Result<()> {
    ensure!(front.asks(far).is_err(), "another network answers without a peering");
    let half =
        az.json("network vnet peering create -g rg -n out --vnet-name v1 --remote-vnet v2 --allow-vnet-access")?;
    ensure!(half["peeringState"] == "Initiated", "one half: {half}");
    ensure!(front.asks(far).is_err(), "one half is no peering");
    let half =
        az.json("network vnet peering create -g rg -n back --vnet-name v2 --remote-vnet v1 --allow-vnet-access")?;
    ensure!(half["peeringState"] == "Connected", "both halves: {half}");
    front.reaches(far, "the networks are peered")?;
    az.run("network vnet peering delete -g rg -n back --vnet-name v2")?;
    front.is_cut_off(far, "a half is gone")?;
    let half = az.json("network vnet peering show -g rg -n out --vnet-name v1")?;
    ensure!(half["peeringState"] == "Disconnected", "the other half went: {half}");
    Ok(())
}

fn routes(az: &Az, front: &Machine<'_>, appliance: &Machine<'_>, back: &Machine<'_>) -> Result<()> {
    az.run("network route-table create -g rg -n rt")?;
    az.run("network route-table route create -g rg --route-table-name rt -n back --address-prefix 10.1.1.0/24 --next-hop-type None")?;
    az.run("network vnet subnet update -g rg --vnet-name v1 -n front --route-table rt")?;
    front.is_cut_off(back, "the next hop is None")?;
    az.run(&format!(
        "network route-table route update -g rg --route-table-name rt -n back --next-hop-type VirtualAppliance --next-hop-ip-address {}",
        appliance.address
    ))?;
    appliance.run(&["sysctl", "-qw", "net.ipv4.ip_forward=0"])?;
    front.is_cut_off(back, "an appliance that does not forward")?;
    appliance.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    front.reaches(back, "by the appliance")?;
    let (group, nic) = front.interface();
    let routes = az.json(&format!("network nic show-effective-route-table -g {group} -n {nic}"))?;
    let led = |r: &Value| r["nextHopType"] == "VirtualAppliance" && r["addressPrefix"][0] == "10.1.1.0/24";
    ensure!(
        routes["value"].as_array().is_some_and(|l| l.iter().any(led)),
        "effective routes: {routes}"
    );
    let free = az.json(&format!(
        "network vnet check-ip-address -g rg -n v1 --ip-address {}",
        front.address
    ))?;
    ensure!(free["available"] == false, "an address in use: {free}");
    let said = az.fails("network route-table delete -g rg -n rt")?;
    ensure!(
        said.contains("InUseRouteTableCannotBeDeleted"),
        "az network route-table delete: {said}"
    );
    az.run("network vnet subnet update -g rg --vnet-name v1 -n front --remove routeTable")?;
    az.run("network route-table delete -g rg -n rt")?;
    front.reaches(back, "without a table")
}

fn zones(az: &Az, front: &Machine<'_>, back: &Machine<'_>, far: &Machine<'_>) -> Result<()> {
    let zone = az.json("network private-dns zone create -g rg -n example.org")?;
    ensure!(
        zone["numberOfRecordSets"] == 1 && zone["location"] == "global",
        "a new zone: {zone}"
    );
    let dns = |line: &str| az.json(&format!("network private-dns {line}"));
    dns("link vnet create -g rg -z example.org -n l1 -v v1 -e true")?;
    dns("record-set a add-record -g rg -z example.org -n www -a 10.1.1.77")?;
    dns("record-set cname set-record -g rg -z example.org -n alias -c www.example.org")?;
    front.finds("www.example.org", "10.1.1.77")?;
    front.finds(&format!("{}.example.org", back.node), &back.address)?;
    ensure!(front.looks_up("alias.example.org").contains("10.1.1.77"), "an alias");
    ensure!(
        far.looks_up("www.example.org").is_empty(),
        "a network that is not linked finds the zone's names"
    );
    let sets = dns("record-set list -g rg -z example.org")?;
    let registered = |s: &Value| s["isAutoRegistered"] == true && s["name"] == back.node.as_str();
    ensure!(
        sets.as_array()
            .is_some_and(|s| s.len() == 6 && s.iter().any(registered)),
        "record sets: {sets}"
    );
    for (line, code) in [
        ("zone delete -g rg -n example.org --yes", "CannotDeleteResource"),
        (
            "record-set cname set-record -g rg -z example.org -n www -c example.net",
            "Conflict",
        ),
        (
            "record-set a delete -g rg -z example.org -n www --if-match wrong --yes",
            "PreconditionFailed",
        ),
    ] {
        let said = az.fails(&format!("network private-dns {line}"))?;
        ensure!(said.contains(code), "az network private-dns {line}: {said}");
    }
    az.run("network private-dns link vnet delete -g rg -z example.org -n l1 --yes")?;
    front.finds("www.example.org", "")?;
    az.run("network private-dns zone delete -g rg -n example.org --yes")
        .map(drop)
}

/// The machine's own metadata, and a token of its identity, which ARM takes for what its roles allow.
fn metadata(az: &Az, front: &Machine<'_>, far: &Machine<'_>) -> Result<()> {
    for machine in [front, far] {
        let said = machine.metadata("instance?api-version=2021-02-01")?;
        let said: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let address = &said["network"]["interface"][0]["ipv4"]["ipAddress"][0]["privateIpAddress"];
        ensure!(
            said["compute"]["name"] == machine.node.as_str() && *address == machine.address.as_str(),
            "metadata of {}: {said}",
            machine.node
        );
    }
    let arm = Arm::login(&az.instance)?;
    let token = front.metadata(&format!(
        "identity/oauth2/token?api-version=2018-02-01&resource={}",
        arm.base
    ))?;
    let token: Value = serde_json::from_str(&token).with_context(|| token.clone())?;
    let bearer = format!(
        "Authorization: Bearer {}",
        token["access_token"].as_str().context("no token")?
    );
    let group = format!("{}{}?api-version=2024-11-01", arm.base, arm.group);
    let ask = || curl(&az.instance, &["--cacert", &arm.ca, "-H", &bearer, &group]);
    let (status, body) = ask()?;
    ensure!(
        status == 403 && body["error"]["code"] == "AuthorizationFailed",
        "without a role: {status} {body}"
    );
    let cluster = az.json("aks show -g rg -n c1")?;
    let identity = &cluster["identityProfile"]["kubeletidentity"];
    ensure!(
        identity["clientId"] == token["client_id"],
        "the cluster's kubelet identity: {identity} {}",
        token["client_id"]
    );
    let object = identity["objectId"].as_str().unwrap_or_default();
    az.run(&format!("role assignment create --assignee-object-id {object} --assignee-principal-type ServicePrincipal --role Reader --scope {}", arm.group))?;
    let (status, body) = ask()?;
    ensure!(status == 200, "a reader reads: {status} {body}");
    let (status, _) = curl(
        &az.instance,
        &["--cacert", &arm.ca, "-H", &bearer, "-X", "DELETE", &group],
    )?;
    ensure!(status == 403, "a reader does not delete: {status}");
    Ok(())
}

/// A machine whose pods have all its addresses takes one more when its interface gets one more.
fn addresses(az: &Az, front: &Machine<'_>) -> Result<()> {
    az.instance.build_box()?;
    az.instance.run(&["kubeconfig", "save", "c1"])?;
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "full"}, "spec": {
        "replicas": 11, "selector": {"matchLabels": {"app": "full"}}, "template": {"metadata": {"labels": {"app": "full"}},
            "spec": {"nodeSelector": {"kubernetes.io/hostname": front.node}, "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "box", "image": "box:1"}]}}}});
    let file = az.instance.file("full.json", &deployment.to_string())?;
    az.instance.kubectl(&["apply", "-f", &file])?;
    let pods = |wanted: usize| {
        testkit::eventually("pods", 60, || {
            let running = az.instance.kubectl(&[
                "get",
                "pods",
                "-l",
                "app=full",
                "--field-selector",
                "status.phase=Running",
                "-o",
                "name",
            ])?;
            ensure!(
                running.lines().count() == wanted,
                "{} pods run, not {wanted}",
                running.lines().count()
            );
            Ok(())
        })
    };
    pods(10)?;
    let (group, nic) = front.interface();
    az.run(&format!(
        "network nic ip-config create -g {group} --nic-name {nic} -n one-more"
    ))?;
    pods(11)?;
    let node = az
        .instance
        .kubectl(&["get", "node", &front.node, "-o", "jsonpath={.status.allocatable.pods}"])?;
    ensure!(node == "11", "the node takes {node} pods");
    let said = az.fails(&format!(
        "network nic ip-config delete -g {group} --nic-name {nic} -n ipconfig1"
    ))?;
    ensure!(
        said.contains("PrimaryIpConfiguration"),
        "deleting the primary configuration: {said}"
    );
    Ok(())
}
