//! scale, binding, eviction.

use apimachinery::gvk::Gvk;
use apimachinery::selector::LabelSelector;
use apimachinery::status::Status;
use apimachinery::{field::FieldError, meta, patch, time};
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{Context, delete, manage, update, warn, write};
use crate::negotiate;
use crate::strategy::Part;
use crate::{Body, respond};

fn scale_kind() -> Gvk {
    Gvk::new("autoscaling", "v1", "Scale")
}

/// Text of a path such as `spec.replicas` as a pointer.
fn pointer(path: &str) -> String {
    format!("/{}", path.replace('.', "/"))
}

/// The `Scale` of an object: of a workload, or of a custom kind, which says where it has what.
///
/// # Errors
/// 500 if a custom object has no replicas where its definition says.
fn scale_of(cx: &Context, object: &Value) -> Result<Value, Status> {
    let Some(paths) = &cx.served.info.scale else {
        return Ok(workload_scale(object));
    };
    let number = |path: &str| object.pointer(&pointer(path)).and_then(Value::as_i64);
    let Some(replicas) = number(&paths.spec_replicas) else {
        let why = format!("the spec replicas field \".{}\" does not exist", paths.spec_replicas);
        return Err(Status::internal(&why));
    };
    let mut scale = workload_scale(object);
    scale["spec"] = json!({"replicas": replicas});
    scale["status"] = json!({"replicas": number(&paths.status_replicas).unwrap_or(0)});
    let selector = paths
        .selector
        .as_ref()
        .and_then(|p| object.pointer(&pointer(p))?.as_str());
    if let Some(selector) = selector.filter(|s| !s.is_empty()) {
        scale["status"]["selector"] = selector.into();
    }
    Ok(scale)
}

/// Sets the replicas of an object to what its `Scale` says.
fn scale_to(cx: &Context, object: &mut Value, replicas: i64) {
    let path = cx
        .served
        .info
        .scale
        .as_ref()
        .map_or("spec.replicas", |s| &s.spec_replicas);
    let mut at = object;
    for key in path.split('.') {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[key];
    }
    *at = replicas.into();
}

fn workload_scale(object: &Value) -> Value {
    let metadata: serde_json::Map<String, Value> = ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"]
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), object["metadata"].get(*key)?.clone())))
        .collect();
    let selector = LabelSelector::from_object(&object["spec"]["selector"])
        .map(|s| s.to_string())
        .unwrap_or_default();
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or(1)},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0), "selector": selector},
    })
}

/// Reads or changes the replica count.
pub async fn scale(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(false)?;
    let object = match cx.info.verb {
        "get" => cx.find()?,
        "update" => {
            let bytes = write::body(body).await?;
            let decoded = write::decode(cx, &scale_kind(), &bytes)?;
            let name = meta::name(&decoded.value);
            if !name.is_empty() && name != cx.target.name {
                return Err(Status::bad_request(
                    "the name of the object does not match the name on the URL",
                ));
            }
            let given = update::asked_version(&decoded.value)?;
            set_replicas(cx, given, |_| Ok(decoded.value.clone())).await?
        }
        _ if manage::is_apply(cx) => {
            let (scale, _) = manage::config(cx, &scale_kind(), body).await?;
            manage::apply(cx, Part::Main, &applied_scale(cx, &scale)).await?.1
        }
        _ => {
            let media = negotiate::content_type(&cx.headers);
            let bytes = write::body(body).await?;
            let diff: Value = serde_json::from_slice(&bytes)
                .map_err(|e| Status::bad_request(&format!("error decoding patch: invalid JSON: {e}")))?;
            set_replicas(cx, None, |scale| {
                let mut scale = scale.clone();
                let applied = match media.as_str() {
                    "application/json-patch+json" => patch::json_patch(&mut scale, &diff),
                    "application/merge-patch+json" => patch::merge_patch(&mut scale, &diff),
                    "application/strategic-merge-patch+json" => {
                        patch::strategic_merge(&cx.types(), &scale_kind(), &mut scale, &diff)
                    }
                    _ => {
                        return Err(Status::unsupported_media_type(&[
                            "application/json-patch+json",
                            "application/merge-patch+json",
                            "application/strategic-merge-patch+json",
                            manage::APPLY,
                        ]));
                    }
                };
                applied.map_err(|e| e.to_status())?;
                Ok(scale)
            })
            .await?
        }
    };
    Ok(respond::value(
        &cx.cluster,
        StatusCode::OK,
        &scale_of(cx, &cx.served.value(&object))?,
        output,
    ))
}

/// The configuration of the scaled object that an applied `Scale` amounts to.
fn applied_scale(cx: &Context, scale: &Value) -> Value {
    let mut metadata = serde_json::Map::new();
    for key in ["name", "uid", "resourceVersion"] {
        if let Some(value) = scale["metadata"].get(key) {
            metadata.insert(key.into(), value.clone());
        }
    }
    metadata.insert("namespace".into(), cx.target.namespace.clone().into());
    let mut config =
        json!({"apiVersion": cx.served.info.api_version(), "kind": cx.served.info.kind, "metadata": metadata});
    config["spec"] = json!({});
    if let Some(replicas) = scale["spec"]["replicas"].as_i64() {
        scale_to(cx, &mut config, replicas);
    }
    config
}

async fn set_replicas(
    cx: &Context,
    given: Option<u64>,
    mut change: impl FnMut(&Value) -> Result<Value, Status>,
) -> Result<std::sync::Arc<crate::object::Object>, Status> {
    let dry_run = cx.dry_run()?;
    update::modify(cx, Part::Main, given, dry_run, |current| {
        // Where there are none yet, a change makes them.
        let mut counted = current.clone();
        if let Some(paths) = &cx.served.info.scale
            && counted.pointer(&pointer(&paths.spec_replicas)).is_none()
        {
            scale_to(cx, &mut counted, 0);
        }
        let scale = change(&scale_of(cx, &counted)?)?;
        let replicas = scale["spec"]["replicas"].as_i64().unwrap_or(0);
        if replicas < 0 {
            let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
            return Err(Status::invalid(&scale_kind(), &cx.target.name, &[error]));
        }
        let mut new = current.clone();
        scale_to(cx, &mut new, replicas);
        Ok(new)
    })
    .await
}

/// Binds a pod to a node, once.
pub async fn binding(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(false)?;
    let dry_run = cx.dry_run()?;
    let bytes = write::body(body).await?;
    let decoded = write::decode(cx, &Gvk::new("", "v1", "Binding"), &bytes)?;
    let binding = decoded.value;
    let node = binding["target"]["name"].as_str().unwrap_or_default();
    let kind = binding["target"]["kind"].as_str().unwrap_or_default();
    if node.is_empty() || !matches!(kind, "" | "Node") {
        let error = FieldError::required("target.name", "the node to bind to; target.kind must be Node or empty");
        return Err(Status::invalid(
            &Gvk::new("", "v1", "Binding"),
            meta::name(&binding),
            &[error],
        ));
    }
    let pods = cx.on(
        "",
        "v1",
        "pods",
        if cx.target.name.is_empty() {
            meta::name(&binding)
        } else {
            &cx.target.name
        },
    )?;
    let uid = meta::uid(&binding).to_owned();
    let given = update::asked_version(&binding)?;
    let resource = pods.target.group_resource();
    let name = pods.target.name.clone();
    update::modify(&pods, Part::Internal, given, dry_run, |pod| {
        let conflict = |why: String| Err(Status::conflict("pods/binding", &name, &why));
        if !uid.is_empty() && uid != meta::uid(pod) {
            return conflict(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                meta::uid(pod)
            ));
        }
        if meta::deletion_timestamp(pod).is_some() {
            return conflict(format!("pod {name} is being deleted, cannot be assigned to a host"));
        }
        match pod["spec"]["nodeName"].as_str() {
            None | Some("") => {}
            Some(bound) => return conflict(format!("pod {name} is already assigned to node {bound:?}")),
        }
        if pod["spec"]["schedulingGates"].as_array().is_some_and(|g| !g.is_empty()) {
            return conflict(format!("pod {name} has non-empty .spec.schedulingGates"));
        }
        let mut new = pod.clone();
        new["spec"]["nodeName"] = node.into();
        for field in ["annotations", "labels"] {
            for (key, value) in binding["metadata"][field].as_object().into_iter().flatten() {
                new["metadata"][field][key] = value.clone();
            }
        }
        set_scheduled(&mut new, &time::now_rfc3339(&*cx.cluster.clock));
        Ok(new)
    })
    .await?;
    let mut status = Status::success(&resource, "", "");
    status.details = None;
    status.code = 201;
    let mut response = respond::status(&cx.cluster, &status, output);
    warn(&mut response, &decoded.warnings);
    Ok(response)
}

fn set_scheduled(pod: &mut Value, now: &str) {
    let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now});
    if !pod["status"]["conditions"].is_array() {
        pod["status"]["conditions"] = json!([]);
    }
    let Some(conditions) = pod["status"]["conditions"].as_array_mut() else {
        return;
    };
    match conditions.iter_mut().find(|c| c["type"] == "PodScheduled") {
        Some(old) if old["status"] == "True" => {}
        Some(old) => *old = condition,
        None => conditions.push(condition),
    }
}

/// Deletes a pod on behalf of someone who respects disruption budgets.
pub async fn eviction(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(false)?;
    let bytes = write::body(body).await?;
    let decoded = write::decode(cx, &Gvk::new("policy", "v1", "Eviction"), &bytes)?;
    let name = meta::name(&decoded.value);
    if !name.is_empty() && name != cx.target.name {
        return Err(Status::bad_request(
            "name in URL does not match name in Eviction object",
        ));
    }
    super::eviction::take(cx).await?;
    delete::evict(cx, &decoded.value["deleteOptions"]).await?;
    let mut status = Status::success("", "", "");
    status.details = None;
    status.code = 201;
    Ok(respond::status(&cx.cluster, &status, output))
}

impl Context {
    /// The same request seen as one on another resource of the namespace.
    fn on(&self, group: &str, version: &str, plural: &str, name: &str) -> Result<Context, Status> {
        let served = self
            .cluster
            .resource(group, version, plural)
            .ok_or_else(Status::path_not_found)?;
        let mut target = self.target.clone();
        target.group = group.to_owned();
        target.version = version.to_owned();
        target.resource = plural.to_owned();
        target.name = name.to_owned();
        Ok(Context {
            cluster: self.cluster.clone(),
            served,
            user: self.user.clone(),
            info: self.info.clone(),
            target,
            query: self.query.clone(),
            headers: self.headers.clone(),
        })
    }
}
