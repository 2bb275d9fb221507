//! Load balancers: private addresses of internal frontends, and what of theirs refers to what.

use std::net::Ipv4Addr;

use resources::{ArmError, views::subnet_ref};
use serde_json::{Value, json};
use vnet_model::ipam::Pool;

use super::plan::{Inputs, Pools, Write, push};
use crate::{
    home::{ArmObject, same_id},
    token::guid,
    validate::balancer::frontend_addresses,
};

fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

/// Who holds a frontend's address.
fn owner(lb: &ArmObject, frontend: &str) -> String {
    format!("{}/{}", lb.name(), frontend.to_lowercase())
}

fn pool_of<'a>(pools: &'a mut Pools, subnet: &str) -> Option<&'a mut Pool> {
    let (vnet, name) = subnet_ref(subnet)?;
    pools.get_mut(&(vnet, name.to_lowercase()))
}

/// The address that a frontend's body fixes.
fn fixed(frontend: &Value) -> Option<Ipv4Addr> {
    let p = &frontend["properties"];
    let is_static = p["privateIPAllocationMethod"].as_str()?.eq_ignore_ascii_case("static");
    p["privateIPAddress"].as_str().filter(|_| is_static)?.parse().ok()
}

/// Claims what frontends have already and what they ask for by number, before anything is chosen for anybody.
pub fn claim(inputs: &Inputs, pools: &mut Pools) {
    for lb in &inputs.load_balancers {
        for f in frontend_addresses(lb) {
            let pool = pool_of(pools, f.subnet);
            if let Some(Err(e)) = pool.map(|p| p.claim(&owner(lb, f.frontend), f.address)) {
                tracing::error!(balancer = lb.name(), error = %e, "an address that was given cannot be held");
            }
        }
    }
    for lb in &inputs.load_balancers {
        for f in list(&lb.spec.body["properties"]["frontendIPConfigurations"]) {
            let subnet = f["properties"]["subnet"]["id"].as_str();
            if let (Some(address), Some(pool)) = (fixed(f), subnet.and_then(|s| pool_of(pools, s))) {
                // Why not is told with the frontend's own status.
                let _ = pool.claim(&owner(lb, f["name"].as_str().unwrap_or_default()), address);
            }
        }
    }
}

/// Statuses of every load balancer.
pub fn balancers(inputs: &Inputs, pools: &mut Pools, out: &mut Vec<Write>) {
    for lb in inputs.load_balancers.iter().filter(|o| !o.is_deleting()) {
        push(out, "loadbalancers", lb, properties(lb, inputs, pools));
    }
}

fn properties(lb: &ArmObject, inputs: &Inputs, pools: &mut Pools) -> Result<Value, ArmError> {
    let p = &lb.spec.body["properties"];
    let mut frontends = Vec::new();
    for frontend in list(&p["frontendIPConfigurations"]) {
        let q = &frontend["properties"];
        let mut shown = json!({"privateIPAllocationMethod": "Dynamic"});
        if let Some(subnet) = q["subnet"]["id"].as_str() {
            let (address, method) = private_address(lb, frontend, subnet, pools)?;
            shown = json!({"privateIPAddress": address, "privateIPAllocationMethod": method,
                "privateIPAddressVersion": "IPv4", "subnet": {"id": subnet}});
        }
        for (field, place) in [
            ("loadBalancingRules", "frontendIPConfiguration"),
            ("inboundNatRules", "frontendIPConfiguration"),
            ("outboundRules", "frontendIPConfigurations"),
        ] {
            shown[field] = users(lb, field, place, "frontendIPConfigurations", &frontend["name"]);
        }
        frontends.push(json!({"name": frontend["name"], "properties": shown}));
    }
    let pools: Vec<Value> = list(&p["backendAddressPools"])
        .iter()
        .map(|pool| {
            let rules = users(
                lb,
                "loadBalancingRules",
                "backendAddressPool",
                "backendAddressPools",
                &pool["name"],
            );
            let outbound = users(
                lb,
                "outboundRules",
                "backendAddressPool",
                "backendAddressPools",
                &pool["name"],
            );
            json!({"name": pool["name"], "properties": {"loadBalancingRules": rules, "outboundRules": outbound,
                "backendIPConfigurations": members(lb, pool, inputs)}})
        })
        .collect();
    let probes: Vec<Value> = list(&p["probes"])
        .iter()
        .map(|probe| {
            let rules = users(lb, "loadBalancingRules", "probe", "probes", &probe["name"]);
            json!({"name": probe["name"], "properties": {"loadBalancingRules": rules}})
        })
        .collect();
    Ok(
        json!({"resourceGuid": guid(&lb.spec.id), "frontendIPConfigurations": frontends,
        "backendAddressPools": pools, "probes": probes}),
    )
}

/// The address that the frontend has, is to have, or gets now.
fn private_address(
    lb: &ArmObject,
    frontend: &Value,
    subnet: &str,
    pools: &mut Pools,
) -> Result<(Ipv4Addr, &'static str), ArmError> {
    let fail = |code: &str, message: String| ArmError {
        code: code.to_owned(),
        message,
    };
    let Some(pool) = pool_of(pools, subnet) else {
        let message = format!("the subnet '{subnet}' does not exist");
        return Err(fail("InvalidResourceReference", message));
    };
    let name = frontend["name"].as_str().unwrap_or_default();
    let owner = owner(lb, name);
    if let Some(wanted) = fixed(frontend) {
        pool.claim(&owner, wanted).map_err(|e| fail(e.code(), e.to_string()))?;
        return Ok((wanted, "Static"));
    }
    let kept = frontend_addresses(lb).find(|f| f.frontend.eq_ignore_ascii_case(name) && same_id(f.subnet, subnet));
    match kept {
        Some(f) => Ok((f.address, "Dynamic")),
        None => match pool.allocate(&owner) {
            Ok(address) => Ok((address, "Dynamic")),
            Err(e) => Err(fail(e.code(), e.to_string())),
        },
    }
}

/// Ids of the rules of a list that name a part of the load balancer at `place`.
fn users(lb: &ArmObject, rules: &str, place: &str, parts: &str, name: &Value) -> Value {
    let id = &lb.spec.id;
    let part = format!("{id}/{parts}/{}", name.as_str().unwrap_or_default());
    let names = |rule: &&Value| {
        let at = &rule["properties"][place];
        let one = std::slice::from_ref(at);
        let references = at.as_array().map_or(one, Vec::as_slice);
        references
            .iter()
            .any(|r| r["id"].as_str().is_some_and(|i| same_id(i, &part)))
    };
    let found = list(&lb.spec.body["properties"][rules]).iter().filter(names);
    found
        .map(|r| json!({"id": format!("{id}/{rules}/{}", r["name"].as_str().unwrap_or_default())}))
        .collect()
}

/// Ids of the interfaces' configurations that are in a pool.
fn members(lb: &ArmObject, pool: &Value, inputs: &Inputs) -> Vec<Value> {
    let own = format!(
        "{}/backendAddressPools/{}",
        lb.spec.id,
        pool["name"].as_str().unwrap_or_default()
    );
    let mut out = Vec::new();
    for nic in inputs.nics.iter().filter(|n| !n.is_deleting()) {
        for (n, config) in list(&nic.spec.body["properties"]["ipConfigurations"])
            .iter()
            .enumerate()
        {
            let pools = list(&config["properties"]["loadBalancerBackendAddressPools"]);
            if pools.iter().any(|r| r["id"].as_str().is_some_and(|i| same_id(i, &own))) {
                let name = config["name"]
                    .as_str()
                    .map_or_else(|| format!("ipconfig{}", n + 1), str::to_owned);
                out.push(json!({"id": format!("{}/ipConfigurations/{name}", nic.spec.id)}));
            }
        }
    }
    out
}
