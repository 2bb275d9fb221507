//! update and patch, of the object and of its status.

use std::sync::Arc;

use apimachinery::codec;
use apimachinery::field::FieldError;
use apimachinery::status::Status;
use apimachinery::{meta, patch, validate};
use http::{Response, StatusCode};
use serde_json::Value;

use super::write::{self, ATTEMPTS_MAX, Lost};
use super::{Context, manage, warn};
use crate::admission::{self, Operation};
use crate::negotiate;
use crate::object::Object;
use crate::strategy::{self, Part};
use crate::{Body, crds};

/// Replaces an object, or the part of it that a subresource covers.
pub async fn update(cx: &Context, body: Body, part: Part) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    let dry_run = cx.dry_run()?;
    manage::check_options(cx, false)?;
    let bytes = write::body(body).await?;
    let decoded = write::decode(cx, &cx.served.info.gvk, &bytes)?;
    let mut value = decoded.value;
    write::agree_on_namespace(cx, &mut value)?;
    let name = meta::name(&value);
    if name.is_empty() {
        return Err(Status::bad_request("name must be provided"));
    }
    if name != cx.target.name {
        return Err(Status::bad_request(&format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            cx.target.name
        )));
    }
    let given = asked_version(&value)?;
    let object = modify(cx, part, given, dry_run, |_| Ok(value.clone())).await?;
    crds::settle(cx, &object).await;
    let mut response = cx.object(StatusCode::OK, &object, output);
    warn(&mut response, &decoded.warnings);
    Ok(response)
}

/// Who says what is owned after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The writer owns what it changed.
    Update,
    /// The object comes with its managedFields: an applied configuration.
    Applied,
}

/// Kinds of patches by their media type.
enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
}

/// Patches an object, or the part of it that a subresource covers.
pub async fn patch(cx: &Context, body: Body, part: Part) -> Result<Response<Body>, Status> {
    if manage::is_apply(cx) {
        return manage::patch(cx, body, part).await;
    }
    manage::check_options(cx, false)?;
    let output = cx.output(true)?;
    let dry_run = cx.dry_run()?;
    let patch = read_patch(cx, body).await?;
    let mut warnings = Vec::new();
    let object = modify(cx, part, None, dry_run, |current| {
        let (value, new) = apply(cx, &patch, current)?;
        warnings = new;
        Ok(value)
    })
    .await?;
    crds::settle(cx, &object).await;
    let mut response = cx.object(StatusCode::OK, &object, output);
    warn(&mut response, &warnings);
    Ok(response)
}

async fn read_patch(cx: &Context, body: Body) -> Result<Patch, Status> {
    const JSON: &str = "application/json-patch+json";
    const MERGE: &str = "application/merge-patch+json";
    const STRATEGIC: &str = "application/strategic-merge-patch+json";
    let accepted: &[&str] = if cx.served.info.custom {
        &[JSON, MERGE, manage::APPLY]
    } else {
        &[JSON, MERGE, STRATEGIC, manage::APPLY]
    };
    let media = negotiate::content_type(&cx.headers);
    if !accepted.contains(&media.as_str()) || media == manage::APPLY {
        return Err(if cx.served.info.custom {
            Status::unsupported_media_type(accepted)
        } else {
            Status::unrouted_media_type()
        });
    }
    let bytes = write::body(body).await?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Status::bad_request(&format!("error decoding patch: invalid JSON: {e}")))?;
    Ok(match media.as_str() {
        JSON => Patch::Json(value),
        MERGE => Patch::Merge(value),
        _ => Patch::Strategic(value),
    })
}

/// Applies a patch to the present object and checks the result as a body would be.
fn apply(cx: &Context, patch: &Patch, current: &Value) -> Result<(Value, Vec<String>), Status> {
    let mut value = current.clone();
    let info = &cx.served.info;
    let applied = match patch {
        Patch::Json(ops) => patch::json_patch(&mut value, ops),
        Patch::Merge(diff) => patch::merge_patch(&mut value, diff),
        Patch::Strategic(diff) => patch::strategic_merge(&cx.types(), &info.gvk, &mut value, diff),
    };
    applied.map_err(|e| e.to_status())?;
    let validation = write::validation(cx)?;
    let decoded = codec::decode_value(&cx.types(), &info.gvk, value, validation).map_err(|e| e.to_status())?;
    let mut value = decoded.value;
    write::agree_on_namespace(cx, &mut value)?;
    if meta::name(&value) != cx.target.name {
        return Err(Status::bad_request(&format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            meta::name(&value),
            cx.target.name
        )));
    }
    Ok((value, decoded.warnings))
}

/// The resourceVersion an update insists on.
pub fn asked_version(value: &Value) -> Result<Option<u64>, Status> {
    match meta::resource_version(value) {
        "" | "0" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            Status::bad_request(&format!(
                "metadata.resourceVersion: Invalid value: {text:?}: must be a number"
            ))
        }),
    }
}

/// Reads, changes by `change`, checks and stores, again if someone else wrote in between (unless `given` pins the
/// revision, or `change` returns an object with another one).
pub async fn modify(
    cx: &Context,
    part: Part,
    given: Option<u64>,
    dry_run: bool,
    change: impl FnMut(&Value) -> Result<Value, Status>,
) -> Result<Arc<Object>, Status> {
    modify_tracked(cx, part, Tracking::Update, given, dry_run, change).await
}

/// As [`modify`], with the owners of fields as `tracking` says.
pub async fn modify_tracked(
    cx: &Context,
    part: Part,
    tracking: Tracking,
    given: Option<u64>,
    dry_run: bool,
    mut change: impl FnMut(&Value) -> Result<Value, Status>,
) -> Result<Arc<Object>, Status> {
    let resource = cx.target.group_resource();
    let name = &cx.target.name;
    for attempt in 1.. {
        let old = cx.find()?;
        let current = cx.served.value(&old);
        let mut new = change(&current)?;
        if given.is_some_and(|rv| rv != old.rv) || asked_version(&new)?.is_some_and(|rv| rv != old.rv) {
            return Err(Status::modified(&resource, name));
        }
        let sent = manage::take(&mut new);
        strategy::prepare_update(&cx.served, part, &current, &mut new)
            .map_err(|why| Status::conflict(&resource, name, &why))?;
        cx.served.default(&mut new);
        match (part, tracking) {
            // The server's own changes belong to nobody.
            (Part::Internal, _) => manage::put(&mut new, current["metadata"].get("managedFields").cloned()),
            (_, Tracking::Applied) => manage::put(&mut new, sent),
            (_, Tracking::Update) => manage::track(cx, part, Some(&current), &mut new, sent),
        }
        admission::mutate(cx, Operation::Update(part), Some(&current), &mut new)?;
        strategy::bump_generation(&cx.served, &current, &mut new);
        // What the server itself changes (a binding) may touch fields that clients may not.
        let errors = match part {
            Part::Internal => Vec::new(),
            _ => check_update(cx, &new, &current),
        };
        if !errors.is_empty() {
            return Err(Status::invalid(&cx.served.info.gvk, name, &errors));
        }
        admission::validate(cx, Operation::Update(part), Some(&current), &new)?;
        let outcome = if strategy::is_finished(&cx.served, &new) {
            // The last finalizer went: the object goes too.
            if dry_run {
                return Ok(old);
            }
            let claims = admission::claims(cx, Some(&current), None);
            write::remove(&cx.cluster, &cx.served, &old, claims).await?.map(|rv| {
                let encoded = cx.served.encode(&new);
                Object::new(encoded, rv)
            })
        } else {
            let mut claims = admission::claims(cx, Some(&current), Some(&new));
            let mut reserved = match part {
                Part::Main => admission::quota::reserve(cx, Some(&current), &new).await?,
                _ => admission::quota::Reservation::default(),
            };
            claims.beside.append(&mut reserved.beside);
            write::put(&cx.cluster, &cx.served, Some(&old), &new, claims, !dry_run).await?
        };
        match outcome {
            Ok(object) => return Ok(object),
            Err(_) if given.is_none() && attempt < ATTEMPTS_MAX => {}
            Err(Lost::Object) => return Err(Status::modified(&resource, name)),
            Err(Lost::Claim(key)) => return Err(admission::claim_refused(cx, &old, &key)),
        }
    }
    Err(Status::internal("unreachable: attempts are bounded"))
}

fn check_update(cx: &Context, new: &Value, old: &Value) -> Vec<FieldError> {
    let gvk = &cx.served.info.gvk;
    if cx.served.info.custom {
        validate::custom(&cx.types(), gvk, new, Some(old))
    } else {
        validate::update(gvk, new, old)
    }
}
