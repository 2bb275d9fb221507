//! Server-side apply, and who owns which field after every other write.

use std::sync::Arc;

use apimachinery::codec::{self, Media, Validation};
use apimachinery::field::FieldError;
use apimachinery::gvk::Gvk;
use apimachinery::ssa::{self, Writer};
use apimachinery::status::Status;
use apimachinery::{meta, time};
use http::{Response, StatusCode};
use serde_json::{Map, Value};

use super::update::{self, Tracking};
use super::write::{self, ATTEMPTS_MAX};
use super::{Context, create, warn};
use crate::auth::{self, Attributes, Decision};
use crate::object::Object;
use crate::strategy::{self, Part};
use crate::{Body, crds, negotiate};

/// Content type of an applied configuration.
pub const APPLY: &str = "application/apply-patch+yaml";
/// Longest name of a field manager.
const MANAGER_BYTES_MAX: usize = 128;

/// Whether a request applies a configuration, in any of its encodings.
pub fn is_apply(cx: &Context) -> bool {
    negotiate::content_type(&cx.headers).starts_with("application/apply-patch")
}

/// The name that owns what this request sets: `fieldManager`, else the user agent's first word, else the user's.
fn manager(cx: &Context) -> String {
    let asked = cx.query.get("fieldManager");
    if !asked.is_empty() {
        return asked.to_owned();
    }
    let agent = cx.headers.get(http::header::USER_AGENT).and_then(|v| v.to_str().ok());
    let agent = agent.and_then(|a| a.split('/').next());
    // The platform's own components share one agent; their user says which one it is.
    let own = || match cx.user.node() {
        Some(_) => "kubelet",
        None => cx.user.name.rsplit(':').next().unwrap_or_default(),
    };
    let name = agent.filter(|a| !matches!(*a, "" | "oaks")).unwrap_or_else(own);
    let mut name: String = name.chars().filter(|c| !c.is_control()).collect();
    while name.len() > MANAGER_BYTES_MAX {
        name.pop();
    }
    name
}

/// Checks `fieldManager` and `force` of a write.
///
/// # Errors
/// 422 as upstream's options validation.
pub fn check_options(cx: &Context, apply: bool) -> Result<(), Status> {
    let manager = cx.query.get("fieldManager");
    let mut errors = Vec::new();
    if apply && manager.is_empty() {
        errors.push(FieldError::required("fieldManager", "is required for apply patch"));
    }
    if !apply && cx.info.verb == "patch" && cx.query.has("force") {
        errors.push(FieldError::forbidden(
            "force",
            "may not be specified for non-apply patch",
        ));
    }
    if manager.len() > MANAGER_BYTES_MAX {
        errors.push(FieldError::too_long("fieldManager", MANAGER_BYTES_MAX));
    }
    if manager.chars().any(char::is_control) {
        errors.push(FieldError::invalid(
            "fieldManager",
            manager,
            "should only contain printable characters",
        ));
    }
    if errors.is_empty() {
        return Ok(());
    }
    let kind = match cx.info.verb {
        "create" => "CreateOptions",
        "update" => "UpdateOptions",
        _ => "PatchOptions",
    };
    Err(Status::invalid(&Gvk::new("meta.k8s.io", "v1", kind), "", &errors))
}

/// Top-level fields that a write of this part cannot set, so that it owns nothing there.
fn ignored(cx: &Context, part: Part) -> &'static [&'static str] {
    match part {
        // A namespace's only spec is its finalizers, which the server sets.
        Part::Main if cx.served.is("", "namespaces") => &["spec", "status"],
        Part::Main if strategy::has_status(&cx.served) => &["status"],
        _ => &[],
    }
}

/// Records who owns what after an ordinary write. `sent` are the managedFields that came with it.
pub fn track(cx: &Context, part: Part, live: Option<&Value>, new: &mut Value, sent: Option<Value>) {
    let now = time::now_rfc3339(&*cx.cluster.clock);
    let writer = Writer {
        manager: &manager(cx),
        subresource: &cx.target.subresource,
        now: &now,
        ignored: ignored(cx, part),
    };
    ssa::track(&cx.types(), &cx.served.info.gvk, live, new, sent, &writer);
}

/// Takes the managedFields out of an object.
pub fn take(value: &mut Value) -> Option<Value> {
    value.get_mut("metadata")?.as_object_mut()?.remove("managedFields")
}

/// Puts managedFields into an object, or removes them.
pub fn put(value: &mut Value, fields: Option<Value>) {
    if let Some(metadata) = meta::metadata_mut(value) {
        match fields {
            Some(fields) => metadata.insert("managedFields".into(), fields),
            None => metadata.remove("managedFields"),
        };
    }
}

/// Decodes an applied configuration of `gvk`.
///
/// # Errors
/// 400 for what does not parse, 500 (as upstream) for fields that the kind does not have.
pub async fn config(cx: &Context, gvk: &Gvk, body: Body) -> Result<(Value, Vec<String>), Status> {
    let media = negotiate::content_type(&cx.headers);
    if media != APPLY {
        return Err(Status::unsupported_media_type(&[APPLY]));
    }
    check_options(cx, true)?;
    let bytes = write::body(body).await?;
    let validation = write::validation(cx)?;
    let decoded = codec::decode(&cx.types(), gvk, Media::Yaml, &bytes, Validation::Warn).map_err(|e| e.to_status())?;
    let (unknown, duplicate): (Vec<String>, Vec<String>) = decoded
        .warnings
        .into_iter()
        .partition(|w| w.starts_with("unknown field"));
    if let Some(first) = unknown.first() {
        let path = first.trim_start_matches("unknown field ").trim_matches('"');
        let error = ssa::ApplyError::Malformed {
            object: ssa::object_name(gvk, &decoded.value),
            detail: format!(".{path}: field not declared in schema"),
        };
        return Err(error.to_status());
    }
    if validation == Validation::Strict && !duplicate.is_empty() {
        let why = format!("error decoding YAML: {}", duplicate.join(", "));
        return Err(Status::bad_request(&why));
    }
    let mut value = decoded.value;
    let fields = take(&mut value);
    if fields.is_some_and(|f| f.as_array().is_none_or(|f| !f.is_empty())) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let name = meta::name(&value).to_owned();
    if name.is_empty() {
        write::metadata_mut(&mut value)?.insert("name".into(), cx.target.name.clone().into());
    } else if name != cx.target.name {
        return Err(Status::bad_request(&format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            cx.target.name
        )));
    }
    let warnings = if validation == Validation::Warn {
        duplicate
    } else {
        Vec::new()
    };
    Ok((value, warnings))
}

/// Applies a configuration to an object or its status, which an object that is absent then begins with.
pub async fn patch(cx: &Context, body: Body, part: Part) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    let (mut config, warnings) = config(cx, &cx.served.info.gvk, body).await?;
    write::agree_on_namespace(cx, &mut config)?;
    if matches!(part, Part::Status | Part::Approval) {
        config = status_only(&config);
    }
    let (code, object) = apply(cx, part, &config).await?;
    crds::settle(cx, &object).await;
    let mut response = cx.object(code, &object, output);
    warn(&mut response, &warnings);
    Ok(response)
}

/// What of a configuration a write to the status subresource can set.
fn status_only(config: &Value) -> Value {
    let mut out = Map::new();
    for key in ["apiVersion", "kind", "metadata", "status"] {
        if let Some(value) = config.get(key) {
            out.insert(key.into(), value.clone());
        }
    }
    Value::Object(out)
}

/// Applies a decoded configuration of the object's kind. 201 if that made the object.
pub async fn apply(cx: &Context, part: Part, config: &Value) -> Result<(StatusCode, Arc<Object>), Status> {
    let dry_run = cx.dry_run()?;
    let force = cx.query.flag("force");
    let manager = manager(cx);
    let merged = |live: Option<&Value>| {
        let now = time::now_rfc3339(&*cx.cluster.clock);
        let writer = Writer {
            manager: &manager,
            subresource: &cx.target.subresource,
            now: &now,
            ignored: ignored(cx, part),
        };
        ssa::apply(&cx.types(), &cx.served.info.gvk, live, config, &writer, force).map_err(|e| e.to_status())
    };
    for attempt in 1.. {
        let missing = match cx.find() {
            Ok(_) => None,
            Err(missing) => Some(missing),
        };
        let Some(missing) = missing else {
            match update::modify_tracked(cx, part, Tracking::Applied, None, dry_run, |live| merged(Some(live))).await {
                // Deleted in between: then it is made.
                Err(status) if status.code() == 404 && part == Part::Main && attempt < ATTEMPTS_MAX => continue,
                done => return done.map(|object| (StatusCode::OK, object)),
            }
        };
        if part != Part::Main || !cx.target.subresource.is_empty() {
            return Err(missing);
        }
        if !meta::uid(config).is_empty() {
            let why = format!(
                "uid mismatch: the provided object specified uid {}, and no existing object was found",
                meta::uid(config)
            );
            return Err(Status::conflict(&cx.target.group_resource(), &cx.target.name, &why));
        }
        may_create(cx)?;
        match create::insert(cx, merged(None)?, Tracking::Applied, dry_run).await {
            // Made in between: then it is changed.
            Err(status) if status.reason == "AlreadyExists" && attempt < ATTEMPTS_MAX => {}
            done => return done.map(|object| (StatusCode::CREATED, object)),
        }
    }
    Err(Status::internal("unreachable: attempts are bounded"))
}

/// The request was authorized as a patch; making an object needs `create` too.
fn may_create(cx: &Context) -> Result<(), Status> {
    let attributes = Attributes {
        verb: "create".into(),
        ..Attributes::of(&cx.info, &cx.query)
    };
    match auth::authorize(&cx.cluster, &cx.user, &attributes) {
        Decision::Deny(reason) => Err(auth::forbidden(&cx.user, &attributes, &reason)),
        _ => Ok(()),
    }
}
