//! GET, PUT, PATCH, DELETE and list of every served type, generic over the table. A child (subnet, agent pool) is an element of
//! its parent's body: writing it writes the parent, with the same checks.

use http::{Method, StatusCode};
use resources::{ArmId, ArmSpec};
use serde_json::{Map, Value, json};

use crate::{
    app::{App, Settled},
    error::{Answer, Fault},
    home::{ArmObject, is_within},
    http::{Reply, Request},
    operations::{self, Subject},
    path::Route,
    private_dns, render,
    table::{ResourceType, Storage},
    validate,
};

/// Attempts at a write that loses to another one; each attempt checks everything anew.
const WRITE_ATTEMPTS: usize = 8;

/// Serves one resource.
pub(crate) async fn serve(app: &App, request: &Request, id: ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    if !kind.writable && request.method != Method::GET && request.method != Method::HEAD {
        let message = format!(
            "{} is written by the platform itself; {} is not served for it.",
            kind.full(),
            request.method
        );
        return Err(Fault::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "OperationNotAllowed",
            message,
        ));
    }
    match request.method {
        Method::GET | Method::HEAD => get(app, &id, kind).await,
        Method::PUT => put(app, request, &id, kind).await,
        Method::PATCH => patch(app, request, &id, kind).await,
        Method::DELETE => delete(app, request, &id, kind).await,
        _ => Err(method_not_allowed(&request.method, &kind.full())),
    }
}

pub(crate) fn method_not_allowed(method: &Method, what: &str) -> Fault {
    Fault::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "MethodNotAllowed",
        format!("{method} is not served for {what}."),
    )
}

/// GET of the resource with this id, for an operation's result.
pub(crate) async fn by_id(app: &App, id: &str) -> Answer<Reply> {
    match crate::path::parse(id)? {
        Route::Resource { id, kind } => get(app, &id, kind).await,
        Route::Group { group, .. } => crate::group_api::get(app, &group).await,
        _ => Err(Fault::internal("reading the result")),
    }
}

/// Id of the object that carries the intent: the parent for an embedded type.
fn carrier(id: &ArmId, kind: &ResourceType) -> ArmId {
    match kind.storage {
        Storage::Embedded { .. } => id.parent().unwrap_or_else(|| id.clone()),
        Storage::Object { .. } => id.clone(),
    }
}

fn parent_kind(kind: &ResourceType) -> Answer<&'static ResourceType> {
    crate::table::by_plural(kind.storage.plural()).ok_or_else(|| Fault::internal("the request"))
}

fn not_found(id: &ArmId, kind: &ResourceType) -> Fault {
    let names: Vec<String> = id.segments.iter().map(|(t, n)| format!("{t}/{n}")).collect();
    Fault::resource_not_found(
        &format!("{}/{}", kind.provider, names.join("/")),
        id.resource_group.as_deref().unwrap_or_default(),
    )
}

/// Versions that a cluster or pool can move to: none, while one version is served.
pub(crate) async fn upgrade_profile(app: &App, id: &ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    let shown = get(app, id, kind).await?.body.unwrap_or_default();
    let p = &shown["properties"];
    let profile = |p: &Value, version: &str| json!({"kubernetesVersion": p[version], "name": p["name"], "osType": "Linux", "upgrades": []});
    let properties = match kind.storage {
        Storage::Embedded { .. } => profile(p, "currentOrchestratorVersion"),
        Storage::Object { .. } => {
            let pools = p["agentPoolProfiles"].as_array().cloned().unwrap_or_default();
            let pools: Vec<Value> = pools.iter().map(|q| profile(q, "currentOrchestratorVersion")).collect();
            json!({"controlPlaneProfile": profile(p, "currentKubernetesVersion"), "agentPoolProfiles": pools})
        }
    };
    let id = shown["id"].as_str().unwrap_or_default();
    let full = format!("{}/upgradeprofiles", kind.full());
    Ok(Reply::ok(
        json!({"id": format!("{id}/upgradeprofiles/default"), "name": "default", "type": full, "properties": properties}),
    ))
}

/// The element of an embedded array whose name matches.
fn element<'a>(body: &'a Value, array: &str, name: &str) -> Option<&'a Value> {
    body["properties"][array]
        .as_array()?
        .iter()
        .find(|e| e["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)))
}

/// What a client sees of a resource whose carrier is `object`; `None` if there is no such child.
fn view(kind: &ResourceType, id: &ArmId, object: &ArmObject) -> Answer<Option<Value>> {
    match kind.storage {
        Storage::Object { .. } => Ok(Some(private_dns::alone(kind, render::resource(kind, object)))),
        Storage::Embedded { array, .. } => {
            let parent = render::resource(parent_kind(kind)?, object);
            Ok(element(&parent, array, id.name()).map(|e| render::child(kind, &parent, e)))
        }
    }
}

async fn get(app: &App, id: &ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    let object = app
        .home
        .object(kind.storage.plural(), &carrier(id, kind).to_string())
        .await?;
    let Some(object) = object else {
        app.group_of(id, false).await?;
        return Err(not_found(id, kind));
    };
    let body = view(kind, id, &object)?.ok_or_else(|| not_found(id, kind))?;
    Ok(Reply::resource(StatusCode::OK, body))
}

/// `If-Match` and `If-None-Match` against what a GET would show now.
fn preconditions(request: &Request, kind: &ResourceType, current: Option<&Value>) -> Answer<()> {
    let strip = |s: &str| s.trim().trim_start_matches("W/").trim_matches('"').to_owned();
    if let Some(wanted) = &request.if_match {
        let tag = current.and_then(|c| c[kind.etag].as_str());
        let holds = match tag {
            None => false,
            Some(tag) => wanted.trim() == "*" || strip(wanted) == strip(tag),
        };
        if !holds {
            let now = tag.unwrap_or("none");
            return Err(Fault::precondition(format!(
                "The condition 'If-Match: {wanted}' is not satisfied; the current etag is {now}."
            )));
        }
    }
    if request.if_none_match.as_deref().map(str::trim) == Some("*") && current.is_some() {
        return Err(Fault::precondition(
            "The condition 'If-None-Match: *' is not satisfied: the resource exists.",
        ));
    }
    Ok(())
}

fn being_deleted(id: &ArmId) -> Fault {
    let message = format!("'{}' is being deleted. Repeat the request when it is gone.", id.name());
    Fault::conflict("ResourceBeingDeleted", message)
}

async fn put(app: &App, request: &Request, id: &ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    let sent = request.json()?;
    for _ in 0..WRITE_ATTEMPTS {
        app.group_of(id, true).await?;
        let carrier_id = carrier(id, kind);
        let plural = kind.storage.plural();
        let old = app.home.object(plural, &carrier_id.to_string()).await?;
        let current = match &old {
            Some(o) => view(kind, id, o)?,
            None => None,
        };
        preconditions(request, kind, current.as_ref())?;
        if old.as_ref().is_some_and(ArmObject::is_deleting) {
            return Err(being_deleted(&carrier_id));
        }
        let body = match kind.storage {
            Storage::Object { .. } => {
                let kept = keep_pools(kind, render::clean(kind, sent.clone()), old.as_ref());
                let mut kept = private_dns::keep_children(kind, kept, old.as_ref());
                // What the platform itself noted is no client's to lose.
                if let Some(own) = old.as_ref().and_then(|o| o.spec.body.get("oaks")) {
                    kept.insert("oaks".into(), own.clone());
                }
                Value::Object(kept)
            }
            Storage::Embedded { array, flat, .. } => {
                let parent = old.as_ref().ok_or_else(|| parent_not_found(&carrier_id))?;
                with_element(kind, array, flat, parent.spec.body.clone(), id.name(), sent.clone())
            }
        };
        let check_kind = parent_kind(kind)?;
        let world = app.world().await?;
        validate::resource(check_kind, &carrier_id, &body, old.as_ref(), &world)?;
        let is_new = current.is_none();
        let written = match old {
            Some(mut o) => {
                o.spec.body = body;
                app.home.update(plural, o.name(), &o).await
            }
            None => {
                let spec = ArmSpec {
                    id: carrier_id.to_string(),
                    body,
                };
                app.home.create(plural, &ArmObject::new(plural, spec)).await
            }
        };
        let written: ArmObject = match written {
            Ok(w) => w,
            Err(e) if e.is_conflict() || e.is_already_exists() || e.is_not_found() => continue,
            Err(e) => return Err(e.into()),
        };
        let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
        return changed(app, id, kind, written, status, "PUT").await;
    }
    Err(too_busy(id))
}

fn too_busy(id: &ArmId) -> Fault {
    let message = format!(
        "'{}' is being changed by too many requests at once. Repeat the request.",
        id.name()
    );
    Fault::conflict("AnotherOperationInProgress", message)
}

fn parent_not_found(id: &ArmId) -> Fault {
    let message = format!("The parent resource '{id}' was not found. Create it first.");
    Fault::not_found("ParentResourceNotFound", message)
}

/// Waits a moment for the platform, then answers with the result or with where to ask for it.
async fn changed(
    app: &App,
    id: &ArmId,
    kind: &'static ResourceType,
    written: ArmObject,
    status: StatusCode,
    verb: &str,
) -> Answer<Reply> {
    let generation = written.metadata.generation.unwrap_or(0);
    let plural = kind.storage.plural();
    let object = match app.settle(plural, written.name(), written.uid(), generation).await? {
        Settled::Done(o) if o.state() == "Succeeded" => {
            let body = view(kind, id, &o)?.unwrap_or_else(|| json!({}));
            return Ok(Reply::json(status, body));
        }
        // A failure is told by the operation, whose error clients print.
        Settled::Done(o) | Settled::Running(o) => o,
        Settled::Gone => {
            return Err(Fault::conflict(
                "OperationPreempted",
                "The resource was deleted at the same time.",
            ));
        }
    };
    let resource = id.to_string();
    let subject = Subject {
        resource: &resource,
        verb,
        plural,
        object: &written,
    };
    let operation = operations::start(app, subject).await?;
    let mut body = view(kind, id, &object)?.unwrap_or_else(|| json!({}));
    if crate::home::is_terminal(body["properties"]["provisioningState"].as_str().unwrap_or_default()) {
        body["properties"]["provisioningState"] = json!(if status == StatusCode::CREATED {
            "Creating"
        } else {
            "Updating"
        });
    }
    Ok(operations::headers(app, Reply::json(status, body), &operation))
}

/// A cluster's PUT may leave pools out that were added one by one; they stay as they are (deleting a pool is a DELETE).
fn keep_pools(kind: &ResourceType, mut body: Map<String, Value>, old: Option<&ArmObject>) -> Map<String, Value> {
    let was = old.and_then(|o| o.spec.body["properties"]["agentPoolProfiles"].as_array());
    let (["managedClusters"], Some(was)) = (kind.path, was) else {
        return body;
    };
    // Whether a cluster runs is changed by `start` and `stop` only.
    let power = old
        .map(|o| o.spec.body["properties"]["powerState"].clone())
        .filter(|p| !p.is_null());
    if let (Some(power), Some(properties)) = (power, body.get_mut("properties").and_then(Value::as_object_mut)) {
        properties.insert("powerState".into(), power);
    }
    let properties = body.entry("properties").or_insert_with(|| json!({}));
    let Some(properties) = properties.as_object_mut() else {
        return body;
    };
    let now = properties.entry("agentPoolProfiles").or_insert_with(|| json!([]));
    if let Some(now) = now.as_array_mut() {
        for pool in was {
            if !now.iter().any(|p| p["name"] == pool["name"]) {
                now.push(pool.clone());
            }
        }
    }
    body
}

/// The parent's body with one element added or replaced.
fn with_element(
    kind: &ResourceType,
    array: &str,
    flat: bool,
    mut parent: Value,
    name: &str,
    sent: Map<String, Value>,
) -> Value {
    let mut element = if flat {
        sent.get("properties")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default()
    } else {
        sent
    };
    render::clean_element(kind, flat, &mut element);
    let slot = &mut parent["properties"][array];
    if !slot.is_array() {
        *slot = json!([]);
    }
    let list = slot.as_array_mut().expect("made an array above");
    let at = list
        .iter()
        .position(|e| e["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)));
    // The casing of the first creation stays.
    let name = at.map_or_else(|| json!(name), |i| list[i]["name"].clone());
    element.insert("name".into(), name);
    match at {
        Some(i) => list[i] = Value::Object(element),
        None => list.push(Value::Object(element)),
    }
    parent
}

async fn patch(app: &App, request: &Request, id: &ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    let sent = request.json()?;
    if matches!(kind.storage, Storage::Embedded { .. }) {
        return Err(method_not_allowed(&request.method, &kind.full()));
    }
    only_tags(&sent)?;
    for _ in 0..WRITE_ATTEMPTS {
        app.group_of(id, false).await?;
        let plural = kind.storage.plural();
        let Some(mut object) = app.home.object(plural, &id.to_string()).await? else {
            return Err(not_found(id, kind));
        };
        preconditions(request, kind, view(kind, id, &object)?.as_ref())?;
        if object.is_deleting() {
            return Err(being_deleted(id));
        }
        if let Some(tags) = sent.get("tags") {
            object.spec.body["tags"] = tags.clone();
        }
        validate::tags(&object.spec.body)?;
        match app.home.update(plural, object.name(), &object).await {
            Ok(written) => return changed(app, id, kind, written, StatusCode::OK, "PATCH").await,
            Err(e) if e.is_conflict() => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(too_busy(id))
}

/// PATCH changes tags and nothing else; anything more is refused by name.
pub(crate) fn only_tags(sent: &Map<String, Value>) -> Answer<()> {
    match sent.keys().find(|k| *k != "tags") {
        Some(k) => Err(Fault::field(
            "InvalidRequestContent",
            k.clone(),
            "PATCH changes tags only; use PUT with the whole resource",
        )),
        None => Ok(()),
    }
}

async fn delete(app: &App, request: &Request, id: &ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    let plural = kind.storage.plural();
    for _ in 0..WRITE_ATTEMPTS {
        app.group_of(id, false).await?;
        let Some(mut object) = app.home.object(plural, &carrier(id, kind).to_string()).await? else {
            return Ok(Reply::empty(StatusCode::NO_CONTENT));
        };
        let Some(current) = view(kind, id, &object)? else {
            return Ok(Reply::empty(StatusCode::NO_CONTENT));
        };
        preconditions(request, kind, Some(&current))?;
        private_dns::check_delete_child(kind, &current)?;
        match kind.storage {
            Storage::Object { .. } => {
                check_delete(app, &object).await?;
                app.home.delete(plural, object.name()).await?;
                return deleted(app, id, plural, object).await;
            }
            Storage::Embedded { array, .. } => {
                if object.is_deleting() {
                    return Err(being_deleted(&carrier(id, kind)));
                }
                let old = object.clone();
                if let Some(list) = object.spec.body["properties"][array].as_array_mut() {
                    list.retain(|e| !e["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(id.name())));
                }
                let world = app.world().await?;
                validate::resource(
                    parent_kind(kind)?,
                    &carrier(id, kind),
                    &object.spec.body,
                    Some(&old),
                    &world,
                )?;
                match app.home.update(plural, object.name(), &object).await {
                    Ok(written) => return child_deleted(app, id, kind, written).await,
                    Err(e) if e.is_conflict() => {}
                    Err(e) if e.is_not_found() => return Ok(Reply::empty(StatusCode::NO_CONTENT)),
                    Err(e) => return Err(e.into()),
                }
            }
        }
    }
    Err(too_busy(id))
}

/// Asks for a cluster to run or to be stopped; 202, and the operation ends when it does.
pub(crate) async fn power(app: &App, id: &ArmId, kind: &'static ResourceType, code: &str) -> Answer<Reply> {
    let plural = kind.storage.plural();
    for _ in 0..WRITE_ATTEMPTS {
        let Some(mut object) = app.home.object(plural, &id.to_string()).await? else {
            return Err(Fault::resource_not_found(
                &format!("{}/{}", kind.full(), id.name()),
                id.resource_group.as_deref().unwrap_or_default(),
            ));
        };
        if object.is_deleting() {
            return Err(being_deleted(id));
        }
        object.spec.body["properties"]["powerState"] = json!({"code": code});
        match app.home.update(plural, object.name(), &object).await {
            Ok(written) => {
                let resource = id.to_string();
                let subject = Subject {
                    resource: &resource,
                    verb: "POST",
                    plural,
                    object: &written,
                };
                let operation = operations::start(app, subject).await?;
                return Ok(operations::headers(app, Reply::empty(StatusCode::ACCEPTED), &operation));
            }
            Err(e) if e.is_conflict() => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(too_busy(id))
}

/// Refuses to delete what others stand on, or what belongs to a cluster.
async fn check_delete(app: &App, object: &ArmObject) -> Answer<()> {
    if let Some(owner) = object.metadata.owner_references.iter().flatten().next() {
        let name = object.spec.id.rsplit('/').next().unwrap_or_default();
        let message = format!(
            "'{name}' belongs to the {} '{}' and goes with it; delete that instead.",
            owner.kind, owner.name
        );
        return Err(Fault::conflict("OperationNotAllowed", message));
    }
    if object.kind == "RouteTable" {
        validate::routes::delete_table(object, &app.world().await?)?;
    }
    match object.kind.as_str() {
        "PublicIPAddress" => validate::public::delete_address(object, &app.world().await?)?,
        "PublicIPPrefix" => validate::public::delete_prefix(object, &app.world().await?)?,
        "NatGateway" => validate::public::delete_gateway(object, &app.world().await?)?,
        "LoadBalancer" => validate::balancer::delete_balancer(object, &app.world().await?)?,
        _ => {}
    }
    if object.kind == "PrivateDnsZone" {
        private_dns::check_delete(object)?;
    }
    if object.kind == "ApplicationSecurityGroup" {
        validate::application_groups::delete_group(object, &app.world().await?)?;
    }
    if object.kind == "NetworkSecurityGroup" {
        validate::security::delete_group(object, &app.world().await?)?;
    }
    if object.kind == "VirtualNetwork" {
        validate::network::delete_vnet(object, &app.world().await?)?;
    }
    Ok(())
}

async fn deleted(app: &App, id: &ArmId, plural: &str, object: ArmObject) -> Answer<Reply> {
    match app.settle(plural, object.name(), object.uid(), i64::MAX).await? {
        Settled::Gone => Ok(Reply::empty(StatusCode::NO_CONTENT)),
        Settled::Done(_) | Settled::Running(_) => {
            let resource = id.to_string();
            let subject = Subject {
                resource: &resource,
                verb: "DELETE",
                plural,
                object: &object,
            };
            let operation = operations::start(app, subject).await?;
            Ok(operations::headers(app, Reply::empty(StatusCode::ACCEPTED), &operation))
        }
    }
}

/// A deleted child is done when its parent has settled without it.
async fn child_deleted(app: &App, id: &ArmId, kind: &'static ResourceType, written: ArmObject) -> Answer<Reply> {
    let plural = kind.storage.plural();
    let generation = written.metadata.generation.unwrap_or(0);
    match app.settle(plural, written.name(), written.uid(), generation).await? {
        Settled::Done(o) if o.state() == "Succeeded" => Ok(Reply::empty(StatusCode::NO_CONTENT)),
        Settled::Gone => Ok(Reply::empty(StatusCode::NO_CONTENT)),
        _ => {
            // The parent carries the work, so the operation ends with the parent's state.
            let parent = id.parent().unwrap_or_else(|| id.clone()).to_string();
            let subject = Subject {
                resource: &parent,
                verb: "DELETE-CHILD",
                plural,
                object: &written,
            };
            let operation = operations::start(app, subject).await?;
            Ok(operations::headers(app, Reply::empty(StatusCode::ACCEPTED), &operation))
        }
    }
}

/// All resources of a type, in name order.
pub(crate) async fn list(
    app: &App,
    subscription: &str,
    group: Option<&str>,
    kind: &'static ResourceType,
    parent: Option<&ArmId>,
) -> Answer<Reply> {
    let plural = kind.storage.plural();
    let scope = group.map(|g| resources::group_id(subscription, g));
    if let (Some(g), Some(scope)) = (group, &scope)
        && app.home.object("resourcegroups", scope).await?.is_none()
    {
        return Err(Fault::group_not_found(g));
    }
    let Storage::Embedded { array, .. } = kind.storage else {
        let objects = app.home.objects(plural, scope.as_deref()).await?;
        let shown = objects
            .iter()
            .map(|o| private_dns::alone(kind, render::resource(kind, o)));
        return Ok(Reply::list(shown.collect()));
    };
    let parent = parent.ok_or_else(|| Fault::internal("the list"))?;
    let object = app
        .home
        .object(plural, &parent.to_string())
        .await?
        .ok_or_else(|| parent_not_found(parent))?;
    let body = render::resource(parent_kind(kind)?, &object);
    let elements = body["properties"][array].as_array().cloned().unwrap_or_default();
    Ok(Reply::list(
        elements.iter().map(|e| render::child(kind, &body, e)).collect(),
    ))
}

/// Every top-level resource of a subscription or group, in the short form of `/resources`.
pub(crate) async fn list_all(app: &App, scope: &str, filter: &str) -> Answer<Reply> {
    use crate::filter::Term;
    let terms = crate::filter::parse(filter)?;
    let mut out = Vec::new();
    for plural in crate::table::plurals() {
        let Some(kind) = crate::table::by_plural(plural) else {
            continue;
        };
        for object in app.home.list::<ArmObject>(plural).await? {
            if !is_within(&object.spec.id, scope) {
                continue;
            }
            let full = render::resource(kind, &object);
            let group = ArmId::parse(&object.spec.id)
                .ok()
                .and_then(|i| i.resource_group)
                .unwrap_or_default();
            let mut keep = true;
            for term in &terms {
                let Term::Eq { field, value } = term else {
                    return Err(Fault::bad_request(
                        "InvalidFilterInQueryString",
                        "Functions are not served in this filter.",
                    ));
                };
                let actual = match field.to_ascii_lowercase().as_str() {
                    "resourcetype" => kind.full(),
                    "resourcegroup" => group.clone(),
                    "name" => full["name"].as_str().unwrap_or_default().to_owned(),
                    "location" => full["location"].as_str().unwrap_or_default().to_owned(),
                    other => {
                        let message = format!(
                            "The filter field '{other}' is not served; served are resourceType, resourceGroup, name, location."
                        );
                        return Err(Fault::bad_request("InvalidFilterInQueryString", message));
                    }
                };
                keep &= actual.eq_ignore_ascii_case(value);
            }
            if keep {
                let mut short = Map::new();
                for f in ["id", "name", "type", "location", "tags", "sku", "identity", "kind"] {
                    if let Some(v) = full.get(f) {
                        short.insert(f.to_owned(), v.clone());
                    }
                }
                out.push(Value::Object(short));
            }
        }
    }
    Ok(Reply::list(out))
}
