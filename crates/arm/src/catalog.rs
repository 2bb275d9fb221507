//! What the platform says about itself: subscription, tenant, locations, providers, versions, usages.

use serde_json::{Value, json};

use crate::{
    app::App,
    error::{Answer, Fault},
    http::Reply,
    table,
};

/// Names of locations that are listed. Any other name is accepted as well: a location is a label here.
const LOCATIONS: &[(&str, &str)] = &[
    ("local", "Local"),
    ("eastus", "East US"),
    ("westus2", "West US 2"),
    ("northeurope", "North Europe"),
    ("westeurope", "West Europe"),
    ("germanywestcentral", "Germany West Central"),
    ("southeastasia", "Southeast Asia"),
];

pub(crate) fn subscription(app: &App) -> Value {
    let id = &app.identity.subscription;
    json!({
        "id": format!("/subscriptions/{id}"),
        "subscriptionId": id,
        "tenantId": app.identity.service_principal.tenant,
        "displayName": app.identity.subscription_name,
        "state": "Enabled",
        "subscriptionPolicies": {"locationPlacementId": "Internal_2014-09-01", "quotaId": "Internal_2014-09-01", "spendingLimit": "Off"},
        "authorizationSource": "RoleBased",
        "managedByTenants": [],
    })
}

pub(crate) fn tenants(app: &App) -> Reply {
    let tenant = &app.identity.service_principal.tenant;
    Reply::list(vec![
        json!({"id": format!("/tenants/{tenant}"), "tenantId": tenant, "tenantCategory": "Home",
        "displayName": app.identity.subscription_name, "countryCode": "", "domains": []}),
    ])
}

pub(crate) fn locations(app: &App) -> Reply {
    let row = |(name, display): &(&str, &str)| {
        json!({"id": format!("/subscriptions/{}/locations/{name}", app.identity.subscription), "name": name,
            "type": "Region", "displayName": display, "regionalDisplayName": display,
            "metadata": {"regionType": "Physical", "regionCategory": "Recommended"}})
    };
    Reply::list(LOCATIONS.iter().map(row).collect())
}

fn provider_value(app: &App, ns: &str) -> Value {
    let names: Vec<&str> = LOCATIONS.iter().map(|l| l.1).collect();
    let row = |name: String, versions: &[&str]| {
        json!({"resourceType": name, "locations": names, "apiVersions": versions,
            "defaultApiVersion": versions.first(), "capabilities": "None"})
    };
    let mut types: Vec<Value> = table::TYPES
        .iter()
        .filter(|t| t.provider == ns)
        .map(|t| row(t.path.join("/"), t.versions))
        .collect();
    types.extend(
        table::OTHER_TYPES
            .iter()
            .filter(|t| t.0 == ns)
            .map(|t| row(t.1.to_owned(), t.2)),
    );
    json!({"id": format!("/subscriptions/{}/providers/{ns}", app.identity.subscription), "namespace": ns,
        "registrationState": "Registered", "registrationPolicy": "RegistrationFree", "resourceTypes": types})
}

pub(crate) fn providers(app: &App) -> Reply {
    Reply::list(
        table::providers()
            .into_iter()
            .map(|ns| provider_value(app, ns))
            .collect(),
    )
}

pub(crate) fn provider(app: &App, ns: &str) -> Answer<Reply> {
    match table::provider(ns) {
        Some(ns) => Ok(Reply::ok(provider_value(app, ns))),
        None => {
            let served = table::providers().join(", ");
            let message = format!("The provider namespace '{ns}' is not served. Served are: {served}.");
            Err(Fault::not_found("InvalidResourceNamespace", message))
        }
    }
}

/// `az aks get-versions`.
pub(crate) fn kubernetes_versions() -> Reply {
    let mut minors: Vec<Value> = Vec::new();
    for (i, v) in resources::aks::KUBERNETES_VERSIONS.iter().enumerate() {
        let minor = v.rsplit_once('.').map_or(*v, |(m, _)| m);
        minors.push(json!({"version": minor, "isDefault": i == 0, "isPreview": false,
            "capabilities": {"supportPlan": ["KubernetesOfficial"]}, "patchVersions": {*v: {"upgrades": []}}}));
    }
    Reply::ok(json!({"values": minors}))
}

/// vCPUs and machines in use, counted from the pools of all clusters. There is no quota: the limit is what a 32-bit field holds.
pub(crate) async fn usages(app: &App) -> Answer<Reply> {
    let machines: Vec<resources::Machine> = app.home.list("machines").await?;
    let cores: i64 = machines.iter().map(|m| m.spec.cpu_milli / 1000).sum();
    let row = |value: &str, text: &str, current: i64| json!({"name": {"value": value, "localizedValue": text}, "unit": "Count", "currentValue": current, "limit": i32::MAX});
    let count = i64::try_from(machines.len()).unwrap_or(i64::MAX);
    Ok(Reply::list(vec![
        row("cores", "Total Regional vCPUs", cores),
        row("virtualMachines", "Virtual Machines", count),
    ]))
}
