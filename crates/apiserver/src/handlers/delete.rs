//! delete and deletecollection: preconditions, grace, finalizers, propagation.

use std::sync::Arc;

use apimachinery::codec::{self, Media};
use apimachinery::field::FieldError;
use apimachinery::gvk::Gvk;
use apimachinery::meta;
use apimachinery::status::Status;
use apimachinery::time;
use bytes::Bytes;
use http::{Response, StatusCode};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::write::{self, ATTEMPTS_MAX};
use super::{Context, list};
use crate::admission::{self, Operation};
use crate::object::Object;
use crate::strategy;
use crate::{Body, crds, respond};

/// Grace of a pod that does not say.
const POD_GRACE_S: i64 = 30;
const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// What the client asks of a deletion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    pub grace_period_s: Option<i64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    /// `Orphan`, `Background`, `Foreground`.
    pub propagation: Option<String>,
    pub dry_run: bool,
}

impl Options {
    /// Reads the body, if any, over the query.
    pub fn read(cx: &Context, body: &Bytes) -> Result<Self, Status> {
        let mut options = Options {
            dry_run: cx.dry_run()?,
            ..Options::default()
        };
        match cx.query.get("gracePeriodSeconds") {
            "" => {}
            text => {
                let seconds = text.parse().map_err(|_| {
                    Status::bad_request(&format!(
                        "gracePeriodSeconds: Invalid value: {text:?}: must be a number"
                    ))
                })?;
                options.grace_period_s = Some(seconds);
            }
        }
        options.propagation = Some(cx.query.get("propagationPolicy").to_owned()).filter(|p| !p.is_empty());
        if cx.query.has("orphanDependents") {
            options.propagation = Some(
                if cx.query.flag("orphanDependents") {
                    "Orphan"
                } else {
                    "Background"
                }
                .into(),
            );
        }
        if !body.is_empty() {
            let media = write::media_of(&cx.headers).ok_or_else(|| {
                Status::unsupported_media_type(&["application/json", "application/yaml", crate::negotiate::PROTOBUF])
            })?;
            let value = match media {
                Media::Protobuf => codec::from_protobuf(&cx.types(), &Gvk::new("", "v1", "DeleteOptions"), body)
                    .map_err(|e| codec::DecodeError::Protobuf(e).to_status())?,
                other => codec::parse_untyped(other, body).map_err(|e| e.to_status())?,
            };
            options.merge(&value)?;
        }
        options.check()?;
        Ok(options)
    }

    /// Takes what a `DeleteOptions` says.
    pub fn merge(&mut self, value: &Value) -> Result<(), Status> {
        let Some(map) = value.as_object() else {
            return Err(Status::bad_request("the body is no DeleteOptions: expected an object"));
        };
        match map.get("kind").and_then(Value::as_str) {
            None | Some("" | "DeleteOptions") => {}
            Some(other) => {
                return Err(Status::bad_request(&format!(
                    "{other} in version {:?} cannot be handled as a DeleteOptions",
                    value["apiVersion"].as_str().unwrap_or_default()
                )));
            }
        }
        if let Some(grace) = map.get("gracePeriodSeconds").filter(|v| !v.is_null()) {
            self.grace_period_s = Some(
                grace
                    .as_i64()
                    .ok_or_else(|| Status::bad_request("gracePeriodSeconds: must be an integer"))?,
            );
        }
        let text = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        self.uid = text(&value["preconditions"]["uid"]).or(self.uid.take());
        self.resource_version = text(&value["preconditions"]["resourceVersion"]).or(self.resource_version.take());
        if let Some(orphan) = value["orphanDependents"].as_bool() {
            self.propagation = Some(if orphan { "Orphan" } else { "Background" }.into());
        }
        self.propagation = text(&value["propagationPolicy"]).or(self.propagation.take());
        if let Some(list) = value["dryRun"].as_array() {
            if list.iter().any(|v| v != "All") {
                return Err(Status::bad_request(
                    "dryRun: Unsupported value: supported values: \"All\"",
                ));
            }
            self.dry_run |= !list.is_empty();
        }
        self.check()
    }

    fn check(&self) -> Result<(), Status> {
        match self.propagation.as_deref() {
            None | Some("Orphan" | "Background" | "Foreground") => {}
            Some(other) => {
                let error = FieldError::not_supported(
                    "propagationPolicy",
                    other,
                    &["Foreground", "Background", "Orphan", "nil"],
                );
                return Err(Status::invalid_options("DeleteOptions", error));
            }
        }
        match self.grace_period_s {
            Some(s) if s < 0 => Err(Status::bad_request(
                "gracePeriodSeconds: Invalid value: must be greater than or equal to 0",
            )),
            _ => Ok(()),
        }
    }
}

/// What became of an object.
pub enum Outcome {
    /// Gone; the last content.
    Deleted(Arc<Object>),
    /// Marked; finalizers or a grace period keep it.
    Pending(Arc<Object>),
}

/// Core kinds whose deletion answers with what was deleted instead of a status.
/// # Source
/// `ReturnDeletedObject` of the registries of Kubernetes 1.36.
const RETURNED: [&str; 7] = [
    "persistentvolumeclaims",
    "persistentvolumes",
    "pods",
    "podtemplates",
    "resourcequotas",
    "serviceaccounts",
    "services",
];

/// Deletes one object.
pub async fn delete(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    let bytes = write::body(body).await?;
    let options = Options::read(cx, &bytes)?;
    let outcome = remove(cx, &cx.target.name, &options).await?;
    Ok(match outcome {
        Outcome::Pending(object) => cx.object(StatusCode::OK, &object, output),
        Outcome::Deleted(object) if RETURNED.iter().any(|plural| cx.served.is("", plural)) => {
            cx.object(StatusCode::OK, &object, output)
        }
        Outcome::Deleted(object) => {
            let status = Status::success(&cx.target.group_resource(), &object.header().name, &object.header().uid);
            respond::status(&cx.cluster, &status, output)
        }
    })
}

/// Deletes what a list would show and answers with that list.
pub async fn delete_collection(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    let bytes = write::body(body).await?;
    let options = Options::read(cx, &bytes)?;
    let page = list::page(cx)?;
    for object in &page.objects {
        let header = object.header();
        let within = cx.within(&header.namespace, &header.name);
        let options = Options {
            uid: Some(header.uid.to_string()),
            ..options.clone()
        };
        match remove(&within, &header.name, &options).await {
            Ok(_) => {}
            Err(status) if matches!(status.code(), 404 | 409) => {}
            Err(status) => return Err(status),
        }
    }
    Ok(list::answer(cx, page, output))
}

/// Deletes `name` in the request's namespace.
pub async fn remove(cx: &Context, name: &str, options: &Options) -> Result<Outcome, Status> {
    let resource = cx.target.group_resource();
    for attempt in 1.. {
        let old = cx
            .served
            .resource
            .get(cx.namespace(), name)
            .ok_or_else(|| Status::not_found(&resource, name))?;
        let current = cx.served.value(&old);
        check_preconditions(cx, name, &old, options)?;
        admission::validate(cx, Operation::Delete, Some(&current), &Value::Null)?;

        let marked = mark(cx, &current, options);
        if options.dry_run {
            return Ok(match marked {
                Some(_) => Outcome::Pending(old),
                None => Outcome::Deleted(old),
            });
        }
        match marked {
            Some(new) if new == current => return Ok(Outcome::Pending(old)),
            Some(new) => {
                let claims = admission::Claims::default();
                if let Ok(object) = write::put(&cx.cluster, &cx.served, Some(&old), &new, claims, true).await? {
                    return Ok(Outcome::Pending(object));
                }
            }
            None => {
                let claims = admission::claims(cx, Some(&current), None);
                if let Ok(rv) = write::remove(&cx.cluster, &cx.served, &old, claims).await? {
                    return Ok(Outcome::Deleted(old.at(rv)));
                }
            }
        }
        if attempt >= ATTEMPTS_MAX || options.resource_version.is_some() {
            return Err(Status::modified(&resource, name));
        }
    }
    Err(Status::internal("unreachable: attempts are bounded"))
}

fn check_preconditions(cx: &Context, name: &str, old: &Object, options: &Options) -> Result<(), Status> {
    let header = old.header();
    // Upstream names the kind here, not the resource.
    let gvk = &cx.served.info.gvk;
    let kind = match &*gvk.group {
        "" => gvk.kind.to_string(),
        group => format!("{}.{group}", gvk.kind),
    };
    if let Some(uid) = &options.uid
        && **uid != *header.uid
    {
        let why = format!(
            "the UID in the precondition ({uid}) does not match the UID in record ({}). The object might have been deleted and then recreated",
            header.uid
        );
        return Err(Status::conflict(&kind, name, &why));
    }
    if let Some(rv) = &options.resource_version
        && *rv != old.rv.to_string()
    {
        let why = format!(
            "the ResourceVersion in the precondition ({rv}) does not match the ResourceVersion in record ({}). The object might have been modified",
            old.rv
        );
        return Err(Status::conflict(&kind, name, &why));
    }
    Ok(())
}

/// The object as it is while something still holds it; `None` if it goes at once.
fn mark(cx: &Context, current: &Value, options: &Options) -> Option<Value> {
    let mut new = current.clone();
    apply_propagation(&mut new, options.propagation.as_deref());
    let deleting = meta::deletion_timestamp(current).is_some();
    let grace = grace(cx, current, options);
    let held = meta::finalizers(&new).next().is_some()
        || (cx.served.is("", "namespaces") && new["spec"]["finalizers"].as_array().is_some_and(|f| !f.is_empty()));
    let definition = cx.served.is(crds::GROUP, crds::PLURAL);
    if !held && grace == 0 && (!definition || deleting) {
        return None;
    }
    let before = current["metadata"]["deletionGracePeriodSeconds"].as_i64();
    let stamp = |seconds: i64| {
        let now = time::now(&*cx.cluster.clock);
        let at = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
        time::rfc3339(at)
    };
    if !deleting {
        let generation = meta::generation(current);
        if let Some(metadata) = meta::metadata_mut(&mut new) {
            metadata.insert("deletionTimestamp".into(), stamp(grace).into());
            metadata.insert("deletionGracePeriodSeconds".into(), grace.into());
            if strategy::has_generation(&cx.served.info) && generation > 0 {
                metadata.insert("generation".into(), (generation + 1).into());
            }
        }
        if definition {
            crds::mark_deleted(&mut new, &stamp(0));
        }
        if cx.served.is("", "namespaces") {
            new["status"] = json!({"phase": "Terminating"});
        }
    } else if before.is_some_and(|b| grace < b) {
        // A later deletion may only shorten the grace period.
        if let Some(metadata) = meta::metadata_mut(&mut new) {
            metadata.insert("deletionTimestamp".into(), stamp(grace).into());
            metadata.insert("deletionGracePeriodSeconds".into(), grace.into());
        }
    }
    Some(new)
}

/// Seconds the object stays for its own sake: pods that a node runs, else 0.
fn grace(cx: &Context, pod: &Value, options: &Options) -> i64 {
    if !cx.served.is("", "pods") {
        return 0;
    }
    let unscheduled = pod["spec"]["nodeName"].as_str().unwrap_or_default().is_empty();
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if unscheduled || ended {
        return 0;
    }
    let asked = options
        .grace_period_s
        .or_else(|| pod["spec"]["terminationGracePeriodSeconds"].as_i64());
    asked.unwrap_or(POD_GRACE_S).max(0)
}

fn apply_propagation(object: &mut Value, propagation: Option<&str>) {
    let Some(policy) = propagation else { return };
    let Some(metadata) = meta::metadata_mut(object) else {
        return;
    };
    let mut finalizers: Vec<Value> = metadata
        .get("finalizers")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    finalizers.retain(|f| f != FOREGROUND && f != ORPHAN);
    match policy {
        "Orphan" => finalizers.push(ORPHAN.into()),
        "Foreground" => finalizers.push(FOREGROUND.into()),
        _ => {}
    }
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".into(), finalizers.into());
    }
}

impl Context {
    /// The same request on one object of a collection.
    fn within(&self, namespace: &str, name: &str) -> Context {
        let mut target = self.target.clone();
        target.namespace = namespace.to_owned();
        target.name = name.to_owned();
        Context {
            cluster: self.cluster.clone(),
            served: self.served.clone(),
            user: self.user.clone(),
            info: self.info.clone(),
            target,
            query: self.query.clone(),
            headers: self.headers.clone(),
        }
    }
}

/// Deletes as another resource's subresource asks (eviction).
pub async fn evict(cx: &Context, options: &Value) -> Result<(), Status> {
    let mut parsed = Options {
        dry_run: cx.dry_run()?,
        ..Options::default()
    };
    if !options.is_null() {
        parsed.merge(options)?;
    }
    remove(cx, &cx.target.name, &parsed).await.map(|_| ())
}
