//! Template deployments of literal resources into a resource group: what `az network lb create` and its like send.
//!
//! Resources are written in the order of their `dependsOn`, each as its own PUT with its own checks and rights, and each is
//! waited for. The only expression that is evaluated is `[reference('<name>')]` as an output's value; any other one, and
//! parameters, copies, conditions and nested templates, are refused by name. A deployment leaves no record: its reply is its
//! result.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Map, Value, json};

use crate::{
    app::App,
    error::{Answer, Fault},
    home::{is_terminal, is_within},
    http::{Reply, Request},
    path::{self, Route},
    rbac, resource,
    resource::method_not_allowed,
    token::{Claims, guid},
    version,
};

/// Resources of one deployment at most.
const RESOURCES_MAX: usize = 50;
/// How long one resource may take until it is settled.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(120);
const SETTLE_STEP: Duration = Duration::from_millis(200);

/// One resource of a template.
struct Item {
    name: String,
    id: String,
    api_version: String,
    depends_on: Vec<String>,
    body: Map<String, Value>,
}

fn invalid(message: impl Into<String>) -> Fault {
    Fault::bad_request("InvalidTemplate", message)
}

/// Serves a deployment by name. `group` is the ARM id of its resource group.
pub(crate) async fn serve(app: &App, claims: &Claims, request: &Request, group: &str, name: &str) -> Answer<Reply> {
    if request.method != Method::PUT {
        return Err(method_not_allowed(&request.method, "Microsoft.Resources/deployments"));
    }
    let what = "Microsoft.Resources/deployments";
    version::check(request.param("api-version"), what, VERSIONS)?;
    let sent = request.json()?;
    let properties = sent.get("properties").unwrap_or(&Value::Null);
    let items = read(properties, group)?;
    let items = ordered(items)?;
    let outputs = outputs(properties, &items)?;
    let mut done: Vec<(String, Value)> = Vec::new();
    for item in &items {
        done.push((item.name.clone(), put(app, claims, request, item).await?));
    }
    let shown = |name: &str| {
        done.iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v["properties"].clone())
    };
    let outputs: Map<String, Value> = outputs
        .into_iter()
        .map(|(key, kind, name)| (key, json!({"type": kind, "value": shown(&name)})))
        .collect();
    let resources: Vec<Value> = items.iter().map(|i| json!({"id": i.id})).collect();
    let id = format!("{group}/providers/Microsoft.Resources/deployments/{name}");
    let body = json!({"id": id, "name": name, "type": "Microsoft.Resources/deployments", "properties": {
        "provisioningState": "Succeeded", "mode": "Incremental", "correlationId": guid(&id),
        "outputs": outputs, "outputResources": resources}});
    Ok(Reply::json(StatusCode::CREATED, body))
}

/// Versions to publish, newest first.
pub(crate) const VERSIONS: &[&str] = &["2025-04-01", "2024-11-01", "2022-09-01", "2021-04-01"];

fn read(properties: &Value, group: &str) -> Answer<Vec<Item>> {
    let mode = properties["mode"].as_str().unwrap_or("Incremental");
    if !mode.eq_ignore_ascii_case("incremental") {
        return Err(Fault::field(
            "UnsupportedProperty",
            "properties.mode",
            format!("{mode:?} is not served; use Incremental"),
        ));
    }
    let template = &properties["template"];
    if !template.is_object() {
        return Err(Fault::field(
            "InvalidTemplate",
            "properties.template",
            "a template in the request is needed",
        ));
    }
    let empty =
        |v: &Value| v.is_null() || v.as_object().is_some_and(Map::is_empty) || v.as_array().is_some_and(Vec::is_empty);
    for (field, value) in [
        ("properties.parameters", &properties["parameters"]),
        ("properties.template.parameters", &template["parameters"]),
        ("properties.template.variables", &template["variables"]),
        ("properties.template.functions", &template["functions"]),
    ] {
        if !empty(value) {
            return Err(Fault::field(
                "UnsupportedProperty",
                field,
                "expressions in templates are not evaluated; write the values out",
            ));
        }
    }
    let Some(resources) = template["resources"].as_array() else {
        return Err(Fault::field(
            "InvalidTemplate",
            "properties.template.resources",
            "a list of resources is needed",
        ));
    };
    if resources.len() > RESOURCES_MAX {
        return Err(invalid(format!(
            "{} resources, at most {RESOURCES_MAX} are allowed",
            resources.len()
        )));
    }
    resources.iter().enumerate().map(|(n, r)| item(n, r, group)).collect()
}

fn item(n: usize, resource: &Value, group: &str) -> Answer<Item> {
    let at = format!("properties.template.resources[{n}]");
    if let Some(expression) = expression(resource) {
        return Err(Fault::field(
            "UnsupportedProperty",
            at,
            format!("the expression {expression:?} is not evaluated; write the value out"),
        ));
    }
    for field in ["copy", "condition", "resources", "scope"] {
        if !resource[field].is_null() {
            return Err(Fault::field(
                "UnsupportedProperty",
                format!("{at}.{field}"),
                "is not served in templates",
            ));
        }
    }
    let text = |field: &str| match resource[field].as_str() {
        Some(v) if !v.is_empty() => Ok(v.to_owned()),
        _ => Err(Fault::field("InvalidTemplate", format!("{at}.{field}"), "is missing")),
    };
    let (kind, name, api_version) = (text("type")?, text("name")?, text("apiVersion")?);
    let (provider, types) = kind.split_once('/').ok_or_else(|| {
        Fault::field(
            "InvalidTemplate",
            format!("{at}.type"),
            format!("{kind:?} is no resource type"),
        )
    })?;
    let (types, names): (Vec<&str>, Vec<&str>) = (types.split('/').collect(), name.split('/').collect());
    if types.len() != names.len() {
        let problem = format!(
            "{name:?} has {} parts, and the type {kind} has {}",
            names.len(),
            types.len()
        );
        return Err(Fault::field("InvalidTemplate", format!("{at}.name"), problem));
    }
    let pairs: Vec<String> = types.iter().zip(&names).map(|(t, n)| format!("{t}/{n}")).collect();
    let mut body = resource.as_object().cloned().unwrap_or_default();
    for field in ["type", "name", "apiVersion", "dependsOn", "comments"] {
        body.remove(field);
    }
    let depends_on = resource["dependsOn"].as_array().into_iter().flatten();
    Ok(Item {
        id: format!("{group}/providers/{provider}/{}", pairs.join("/")),
        name,
        api_version,
        depends_on: depends_on.filter_map(|d| d.as_str().map(str::to_owned)).collect(),
        body,
    })
}

/// The first expression in a value; a text that starts with `[[` is a bracket.
fn expression(value: &Value) -> Option<&str> {
    match value {
        Value::String(s) if s.starts_with('[') && s.ends_with(']') && !s.starts_with("[[") => Some(s),
        Value::Array(list) => list.iter().find_map(expression),
        Value::Object(map) => map.values().find_map(expression),
        _ => None,
    }
}

/// Whether a `dependsOn` entry names the resource: by id, by `type/name`, or by name.
fn names(entry: &str, item: &Item) -> bool {
    let entry = entry.trim_start_matches('/');
    item.name.eq_ignore_ascii_case(entry) || {
        let id = item.id.to_lowercase();
        id.trim_start_matches('/') == entry.to_lowercase()
            || id.ends_with(&format!("/providers/{}", entry.to_lowercase()))
    }
}

/// Dependencies first; otherwise in the order of the template.
fn ordered(mut items: Vec<Item>) -> Answer<Vec<Item>> {
    let mut out: Vec<Item> = Vec::new();
    while !items.is_empty() {
        let ready = |i: &Item| i.depends_on.iter().all(|d| !items.iter().any(|o| names(d, o)));
        let Some(at) = items.iter().position(ready) else {
            let left: Vec<&str> = items.iter().map(|i| i.name.as_str()).collect();
            return Err(invalid(format!(
                "the resources {} depend on each other",
                left.join(", ")
            )));
        };
        let next = items.remove(at);
        if let Some(lost) = next.depends_on.iter().find(|d| !out.iter().any(|o| names(d, o))) {
            return Err(invalid(format!(
                "'{}' depends on '{lost}', which is not in the template",
                next.name
            )));
        }
        out.push(next);
    }
    Ok(out)
}

/// Each output's key, type, and the resource whose properties it is.
fn outputs(properties: &Value, items: &[Item]) -> Answer<Vec<(String, Value, String)>> {
    let mut out = Vec::new();
    for (key, output) in properties["template"]["outputs"].as_object().into_iter().flatten() {
        let value = output["value"].as_str().unwrap_or_default();
        let name = value.strip_prefix("[reference('").and_then(|v| v.strip_suffix("')]"));
        let found = name.and_then(|n| items.iter().find(|i| i.name.eq_ignore_ascii_case(n)));
        let Some(found) = found else {
            let path = format!("properties.template.outputs.{key}.value");
            let problem = format!(
                "{value:?} is not served; an output can be [reference('<name of a resource of the template>')]"
            );
            return Err(Fault::field("UnsupportedProperty", path, problem));
        };
        out.push((key.clone(), output["type"].clone(), found.name.clone()));
    }
    Ok(out)
}

/// Writes one resource as its caller would, and waits until it is settled.
async fn put(app: &App, claims: &Claims, deployment: &Request, item: &Item) -> Answer<Value> {
    let body = serde_json::to_vec(&item.body)
        .map(Bytes::from)
        .map_err(|_| Fault::internal("reading the template"))?;
    let request = Request {
        method: Method::PUT,
        path: item.id.clone(),
        query: [("api-version".to_owned(), item.api_version.clone())].into(),
        if_match: None,
        if_none_match: None,
        authorization: deployment.authorization.clone(),
        body,
    };
    let fail = |f: Fault| Fault {
        message: format!("Resource '{}': {}", item.name, f.message),
        ..f
    };
    let Route::Resource { id, kind } = path::parse(&item.id).map_err(fail)? else {
        return Err(invalid(format!("'{}' cannot be deployed", item.id)));
    };
    rbac::authorize(app, claims, &request).await.map_err(fail)?;
    version::check(Some(&item.api_version), &kind.full(), kind.versions).map_err(fail)?;
    debug_assert!(is_within(
        &item.id,
        &resources::group_id(&id.subscription, id.resource_group.as_deref().unwrap_or_default())
    ));
    let mut shown = resource::serve(app, &request, id, kind)
        .await
        .map_err(fail)?
        .body
        .unwrap_or_default();
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let state = shown["properties"]["provisioningState"]
            .as_str()
            .unwrap_or("Succeeded")
            .to_owned();
        if state == "Succeeded" {
            return Ok(shown);
        }
        if is_terminal(&state) || Instant::now() >= deadline {
            let message = format!(
                "Resource '{}' is {state}. 'az resource show --ids {}' tells more.",
                item.name, item.id
            );
            return Err(Fault::conflict("DeploymentFailed", message));
        }
        tokio::time::sleep(SETTLE_STEP).await;
        shown = resource::by_id(app, &item.id)
            .await
            .map_err(fail)?
            .body
            .unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: &str = "/subscriptions/s/resourceGroups/g";

    fn properties(resources: Value) -> Value {
        json!({"mode": "incremental", "parameters": {}, "template": {"parameters": {}, "variables": {}, "resources": resources,
            "outputs": {"loadBalancer": {"type": "object", "value": "[reference('lb')]"}}}})
    }

    fn resources() -> Value {
        json!([{"type": "Microsoft.Network/loadBalancers", "name": "lb", "apiVersion": "2022-01-01", "location": "x",
                "dependsOn": ["Microsoft.Network/publicIpAddresses/pip"], "properties": {"note": "[[not an expression]"}},
            {"type": "Microsoft.Network/publicIPAddresses", "name": "pip", "apiVersion": "2022-01-01", "dependsOn": []}])
    }

    #[test]
    fn what_is_depended_on_comes_first() {
        let p = properties(resources());
        let items = ordered(read(&p, GROUP).unwrap()).unwrap();
        let ids: Vec<&str> = items.iter().map(|i| i.id.as_str()).collect();
        assert_eq!(
            ids,
            [
                "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/publicIPAddresses/pip",
                "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/loadBalancers/lb"
            ]
        );
        assert_eq!(
            Value::Object(items[1].body.clone()),
            json!({"location": "x", "properties": {"note": "[[not an expression]"}})
        );
        assert_eq!(outputs(&p, &items).unwrap()[0].2, "lb");
    }

    #[test]
    fn what_is_not_served_is_named() {
        let check = |change: &dyn Fn(&mut Value), wanted: &str| {
            let mut p = properties(resources());
            change(&mut p);
            let refused = read(&p, GROUP)
                .and_then(ordered)
                .and_then(|items| outputs(&p, &items))
                .unwrap_err();
            assert!(refused.to_string().contains(wanted), "{refused}");
        };
        check(&|p| p["mode"] = json!("Complete"), "properties.mode");
        check(
            &|p| p["parameters"] = json!({"a": {"value": 1}}),
            "properties.parameters",
        );
        check(
            &|p| p["template"]["resources"][0]["location"] = json!("[resourceGroup().location]"),
            "resourceGroup().location",
        );
        check(&|p| p["template"]["resources"][0]["copy"] = json!({"count": 2}), "copy");
        check(&|p| p["template"]["resources"][0]["name"] = json!("a/b"), "has 2 parts");
        check(
            &|p| p["template"]["resources"][0]["apiVersion"] = Value::Null,
            "apiVersion: is missing",
        );
        check(
            &|p| p["template"]["resources"][0]["dependsOn"] = json!(["gone"]),
            "'gone', which is not in the template",
        );
        check(
            &|p| p["template"]["resources"][1]["dependsOn"] = json!(["lb"]),
            "depend on each other",
        );
        check(
            &|p| p["template"]["outputs"]["loadBalancer"]["value"] = json!("[concat('a')]"),
            "outputs.loadBalancer",
        );
        check(&|p| p["template"] = Value::Null, "properties.template");
    }
}
