//! create.

use std::sync::Arc;

use apimachinery::status::Status;
use apimachinery::{meta, validate};
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::update::Tracking;
use super::write::{self, ATTEMPTS_MAX, Lost};
use super::{Context, manage, warn};
use crate::admission::{self, Operation};
use crate::object::Object;
use crate::strategy::{self, Part};
use crate::{Body, crds};

/// Longest generated name; the five random characters come after the shortened prefix.
const GENERATED_NAME_MAX: usize = 63;
const SUFFIX: usize = 5;

/// Creates one object.
pub async fn create(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    let dry_run = cx.dry_run()?;
    manage::check_options(cx, false)?;
    let bytes = write::body(body).await?;
    let decoded = write::decode(cx, &cx.served.info.gvk, &bytes)?;
    let object = insert(cx, decoded.value, Tracking::Update, dry_run).await?;
    crds::settle(cx, &object).await;
    let mut response = cx.object(StatusCode::CREATED, &object, output);
    warn(&mut response, &decoded.warnings);
    Ok(response)
}

/// Completes, admits, validates and stores a new object.
pub async fn insert(cx: &Context, mut value: Value, tracking: Tracking, dry_run: bool) -> Result<Arc<Object>, Status> {
    write::agree_on_namespace(cx, &mut value)?;
    if !meta::resource_version(&value).is_empty() && meta::resource_version(&value) != "0" {
        return Err(Status::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    let generate = meta::generate_name(&value).to_owned();
    let generated = meta::name(&value).is_empty() && !generate.is_empty();
    for attempt in 1.. {
        let mut value = value.clone();
        if generated {
            let metadata = write::metadata_mut(&mut value)?;
            metadata.insert(
                "name".into(),
                generated_name(&generate, &cx.cluster.random_suffix(SUFFIX)).into(),
            );
        }
        let (object, lost) = once(cx, value, tracking, dry_run).await?;
        match lost {
            None => return Ok(object),
            Some(Lost::Object) if generated && attempt < ATTEMPTS_MAX => {}
            Some(Lost::Claim(_)) if attempt < ATTEMPTS_MAX => {}
            Some(Lost::Object) => {
                return Err(Status::already_exists(
                    &cx.target.group_resource(),
                    &object.header().name,
                ));
            }
            Some(Lost::Claim(key)) => return Err(admission::claim_refused(cx, &object, &key)),
        }
    }
    Err(Status::internal("unreachable: attempts are bounded"))
}

async fn once(
    cx: &Context,
    mut value: Value,
    tracking: Tracking,
    dry_run: bool,
) -> Result<(Arc<Object>, Option<Lost>), Status> {
    let info = &cx.served.info;
    let sent = manage::take(&mut value);
    {
        let uid = cx.cluster.new_uid();
        let now = write::now(&cx.cluster);
        let metadata = write::metadata_mut(&mut value)?;
        for key in [
            "resourceVersion",
            "selfLink",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
        ] {
            metadata.remove(key);
        }
        metadata.insert("uid".into(), uid.into());
        metadata.insert("creationTimestamp".into(), now.into());
        if strategy::has_generation(info) {
            metadata.insert("generation".into(), json!(1));
        }
    }
    strategy::prepare_create(&cx.served, &mut value);
    cx.served.default(&mut value);
    // What admission adds belongs to nobody.
    match tracking {
        Tracking::Applied => manage::put(&mut value, sent),
        Tracking::Update => manage::track(cx, Part::Main, None, &mut value, sent),
    }
    admission::mutate(cx, Operation::Create, None, &mut value)?;
    cx.served.default(&mut value);
    strategy::finish_create(&cx.served, &mut value);
    let errors = if info.custom {
        validate::custom(&cx.types(), &info.gvk, &value, None)
    } else {
        validate::create(&info.gvk, &value)
    };
    if !errors.is_empty() {
        return Err(Status::invalid(&info.gvk, meta::name(&value), &errors));
    }
    admission::validate(cx, Operation::Create, None, &value)?;
    // Existing objects are reported before claims are made, so that a second create is AlreadyExists and no IP conflict.
    if cx.served.resource.get(cx.namespace(), meta::name(&value)).is_some() {
        let encoded = cx.served.encode(&value);
        return Ok((Object::new(encoded, 0), Some(Lost::Object)));
    }
    let mut claims = admission::claims(cx, None, Some(&value));
    let mut reserved = admission::quota::reserve(cx, None, &value).await?;
    claims.beside.append(&mut reserved.beside);
    match write::put(&cx.cluster, &cx.served, None, &value, claims, !dry_run).await? {
        Ok(object) => Ok((object, None)),
        Err(lost) => {
            let encoded = cx.served.encode(&value);
            Ok((Object::new(encoded, 0), Some(lost)))
        }
    }
}

fn generated_name(prefix: &str, suffix: &str) -> String {
    let mut end = prefix.len().min(GENERATED_NAME_MAX - SUFFIX);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &prefix[..end])
}

#[cfg(test)]
mod tests {
    #[test]
    fn generated_names_fit() {
        assert_eq!(super::generated_name("web-", "abcde"), "web-abcde");
        assert_eq!(super::generated_name(&"x".repeat(100), "abcde").len(), 63);
    }
}
