//! Load balancers, public addresses and NAT gateways by the unmodified az CLI on a running platform, seen by traffic to a
//! node and by what the kernel holds.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::az::Az;

/// Whether the host gets a connection to the address.
fn connects(az: &Az, address: &str, port: u16) -> Result<bool> {
    let probe = format!("exec 3<>/dev/tcp/{address}/{port}");
    Ok(az
        .instance
        .command("timeout")
        .args(["2", "bash", "-c", &probe])
        .output()?
        .status
        .success())
}

fn wait_for(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(
            start.elapsed() < Duration::from_secs(60),
            "timed out waiting for: {what}"
        );
        std::thread::yield_now();
    }
    Ok(())
}

/// What az says on failure.
fn refusal(az: &Az, line: &str) -> Result<String> {
    match az.run(line) {
        Ok(out) => anyhow::bail!("az {line} was not refused: {out}"),
        Err(e) => Ok(format!("{e:#}")),
    }
}

#[test]
fn load_balancers_public_addresses_and_nat_gateways_by_the_unmodified_az() -> Result<()> {
    let az = Az::new()?;
    az.run("group create -n rg -l local")?;
    az.run("network vnet create -g rg -n v --address-prefixes 10.1.0.0/16 --subnet-name nodes --subnet-prefixes 10.1.0.0/22")?;
    let subnet = az.json("network vnet subnet show -g rg --vnet-name v -n nodes")?;
    let subnet = subnet["id"].as_str().context("the subnet has no id")?;
    az.run(&format!(
        "aks create -g rg -n c1 --node-count 1 --network-plugin azure --vnet-subnet-id {subnet} --generate-ssh-keys"
    ))?;

    // A load balancer in front of the node's kubelet.
    az.run("network lb create -g rg -n lb --sku Standard --public-ip-address pip --frontend-ip-name fe --backend-pool-name be")?;
    az.run("network lb probe create -g rg --lb-name lb -n p --protocol Tcp --port 10250 --interval 5")?;
    az.run("network lb rule create -g rg --lb-name lb -n kubelet --protocol Tcp --frontend-port 8443 --backend-port 10250 --frontend-ip-name fe --backend-pool-name be --probe-name p --disable-outbound-snat true")?;
    az.run("network lb address-pool create -g rg --lb-name lb -n more")?;
    let refused = refusal(
        &az,
        "network lb rule create -g rg --lb-name lb -n twice --protocol Tcp --frontend-port 8443 --backend-port 1 --frontend-ip-name fe --backend-pool-name more",
    )?;
    ensure!(
        refused.contains("RulesUseSameFrontendPortProtocolAndIPConfig"),
        "{refused}"
    );
    let address = az.json("network public-ip show -g rg -n pip")?;
    let public = address["ipAddress"]
        .as_str()
        .context("the public IP has no address")?
        .to_owned();
    ensure!(
        address["ipConfiguration"]["id"]
            .as_str()
            .is_some_and(|id| id.ends_with("frontendIPConfigurations/fe")),
        "its user is not shown: {address}"
    );
    ensure!(!connects(&az, &public, 8443)?, "nobody is in the pool yet");
    let nodes = az.json("network nic list -g MC_rg_c1_local")?;
    let nic = &nodes[0];
    let (name, config) = (nic["name"].as_str(), nic["ipConfigurations"][0]["name"].as_str());
    let (name, config) = (name.context("no node NIC")?, config.context("no configuration")?);
    let pool = az.json("network lb address-pool show -g rg --lb-name lb -n be")?;
    let pool = pool["id"].as_str().context("the pool has no id")?;
    az.run(&format!(
        "network nic ip-config address-pool add -g MC_rg_c1_local --nic-name {name} --ip-config-name {config} --address-pool {pool}"
    ))?;
    wait_for("the kubelet behind the load balancer", || connects(&az, &public, 8443))?;
    let refused = refusal(&az, "network public-ip delete -g rg -n pip")?;
    ensure!(refused.contains("PublicIPAddressCannotBeDeleted"), "{refused}");

    // An internal one, whose address is taken from the subnet.
    az.run("network lb create -g rg -n ilb --sku Standard --vnet-name v --subnet nodes --private-ip-address 10.1.3.200 --backend-pool-name be")?;
    let internal = az.json("network lb show -g rg -n ilb")?;
    let frontend = &internal["frontendIPConfigurations"][0];
    ensure!(
        frontend["privateIPAddress"] == "10.1.3.200",
        "az network lb show: {internal}"
    );

    az.run("network public-ip create -g rg -n natip --sku Standard")?;
    az.run("network nat gateway create -g rg -n ng --public-ip-addresses natip --idle-timeout 10")?;
    az.run("network vnet subnet update -g rg --vnet-name v -n nodes --nat-gateway ng")?;
    let refused = refusal(&az, "network nat gateway delete -g rg -n ng")?;
    ensure!(refused.contains("InUseNatGatewayCannotBeDeleted"), "{refused}");
    let natip = az.json("network public-ip show -g rg -n natip")?;
    let natip = natip["ipAddress"]
        .as_str()
        .context("the public IP has no address")?
        .to_owned();
    let script = "for n in $1/netns/v-*; do nsenter --net=$n nft list table ip oaks-out; done";
    wait_for("the gateway's address in the network's rules", || {
        let run = az.instance.run_dir();
        let out = az
            .instance
            .command("bash")
            .args(["-c", script, "bash"])
            .arg(run)
            .output()?;
        Ok(String::from_utf8_lossy(&out.stdout).contains(&natip))
    })?;
    wait_for("the kubelet still behind the load balancer", || {
        connects(&az, &public, 8443)
    })?;
    Ok(())
}
