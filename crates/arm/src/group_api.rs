//! Resource groups: PUT, GET, HEAD, PATCH, DELETE, list.

use http::{Method, StatusCode};
use resources::{ArmSpec, GROUP_FINALIZER, group_id};
use serde_json::{Value, json};

use crate::{
    app::{App, Settled},
    error::{Answer, Fault},
    home::ArmObject,
    http::{Reply, Request},
    operations::{self, Subject},
    resource, validate,
};

const PLURAL: &str = "resourcegroups";

pub(crate) async fn serve(app: &App, request: &Request, group: &str) -> Answer<Reply> {
    match request.method {
        Method::GET => get(app, group).await,
        Method::HEAD => Ok(match find(app, group).await? {
            Some(_) => Reply::empty(StatusCode::NO_CONTENT),
            None => Reply::empty(StatusCode::NOT_FOUND),
        }),
        Method::PUT => put(app, request, group).await,
        Method::PATCH => patch(app, request, group).await,
        Method::DELETE => delete(app, group).await,
        _ => Err(resource::method_not_allowed(&request.method, "a resource group")),
    }
}

async fn find(app: &App, group: &str) -> Answer<Option<ArmObject>> {
    Ok(app
        .home
        .object(PLURAL, &group_id(&app.identity.subscription, group))
        .await?)
}

fn view(object: &ArmObject) -> Value {
    let mut body = object.spec.body.clone();
    body["id"] = json!(object.spec.id);
    body["name"] = json!(object.spec.id.rsplit('/').next());
    body["type"] = json!("Microsoft.Resources/resourceGroups");
    // A group is done as soon as it is stored; only its deletion takes time.
    body["properties"] = json!({"provisioningState": if object.is_deleting() { "Deleting" } else { "Succeeded" }});
    body
}

pub(crate) async fn get(app: &App, group: &str) -> Answer<Reply> {
    let object = find(app, group).await?.ok_or_else(|| Fault::group_not_found(group))?;
    Ok(Reply::resource(StatusCode::OK, view(&object)))
}

/// All groups, in name order. `$filter` by tag is not served.
pub(crate) async fn list(app: &App, filter: &str) -> Answer<Reply> {
    if !crate::filter::parse(filter)?.is_empty() {
        return Err(Fault::bad_request(
            "InvalidFilterInQueryString",
            "Filters are not served for resource groups.",
        ));
    }
    let all: Vec<ArmObject> = app.home.list(PLURAL).await?;
    Ok(Reply::list(all.iter().map(view).collect()))
}

fn name_ok(name: &str) -> bool {
    let chars = |c: char| c.is_alphanumeric() || "-_().".contains(c);
    !name.is_empty() && name.chars().count() <= 90 && name.chars().all(chars) && !name.ends_with('.')
}

async fn put(app: &App, request: &Request, group: &str) -> Answer<Reply> {
    let mut body = request.json()?;
    if !name_ok(group) {
        let message = format!(
            "The resource group name '{group}' must be 1 to 90 letters, digits, '-', '_', '(', ')' and '.', and not end with '.'."
        );
        return Err(Fault::bad_request("InvalidResourceGroupName", message));
    }
    for f in ["id", "name", "type", "properties"] {
        body.remove(f);
    }
    let body = Value::Object(body);
    let location = body["location"].as_str().unwrap_or_default();
    if location.is_empty() {
        return Err(Fault::bad_request(
            "LocationRequired",
            "The location property is required for this definition.",
        ));
    }
    validate::tags(&body)?;
    for _ in 0..4 {
        let stored = match find(app, group).await? {
            None => {
                let spec = ArmSpec {
                    id: group_id(&app.identity.subscription, group),
                    body: body.clone(),
                };
                let mut object = ArmObject::new(PLURAL, spec);
                object.metadata.finalizers = Some(vec![GROUP_FINALIZER.to_owned()]);
                app.home.create(PLURAL, &object).await.map(|o| (o, StatusCode::CREATED))
            }
            Some(old) if old.is_deleting() => {
                let message =
                    format!("The resource group '{group}' is being deleted. Repeat the request when it is gone.");
                return Err(Fault::conflict("ResourceGroupBeingDeleted", message));
            }
            Some(mut old) => {
                let was = old.spec.body["location"].as_str().unwrap_or_default();
                if !was.replace(' ', "").eq_ignore_ascii_case(&location.replace(' ', "")) {
                    let message = format!(
                        "Invalid resource group location '{location}'. The resource group already exists in location '{was}'."
                    );
                    return Err(Fault::conflict("InvalidResourceGroupLocation", message));
                }
                old.spec.body = body.clone();
                app.home
                    .update(PLURAL, old.name(), &old)
                    .await
                    .map(|o| (o, StatusCode::OK))
            }
        };
        match stored {
            Ok((object, status)) => return Ok(Reply::json(status, view(&object))),
            Err(e) if e.is_conflict() || e.is_already_exists() => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(Fault::conflict(
        "AnotherOperationInProgress",
        "The group is being changed by too many requests at once.",
    ))
}

async fn patch(app: &App, request: &Request, group: &str) -> Answer<Reply> {
    let sent = request.json()?;
    resource::only_tags(&sent)?;
    for _ in 0..4 {
        let mut object = find(app, group).await?.ok_or_else(|| Fault::group_not_found(group))?;
        if let Some(tags) = sent.get("tags") {
            object.spec.body["tags"] = tags.clone();
        }
        validate::tags(&object.spec.body)?;
        match app.home.update::<ArmObject>(PLURAL, object.name(), &object).await {
            Ok(object) => return Ok(Reply::ok(view(&object))),
            Err(e) if e.is_conflict() => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(Fault::conflict(
        "AnotherOperationInProgress",
        "The group is being changed by too many requests at once.",
    ))
}

async fn delete(app: &App, group: &str) -> Answer<Reply> {
    let object = find(app, group).await?.ok_or_else(|| Fault::group_not_found(group))?;
    if let Some(cluster) = object.spec.body["managedBy"].as_str()
        && app.home.object("managedclusters", cluster).await?.is_some()
    {
        let message =
            format!("The group '{group}' holds the nodes of '{cluster}' and goes with it; delete the cluster instead.");
        return Err(Fault::conflict("OperationNotAllowed", message));
    }
    app.home.delete(PLURAL, object.name()).await?;
    match app.settle(PLURAL, object.name(), object.uid(), i64::MAX).await? {
        Settled::Gone => Ok(Reply::empty(StatusCode::OK)),
        Settled::Done(_) | Settled::Running(_) => {
            let subject = Subject {
                resource: &object.spec.id,
                verb: "DELETE",
                plural: PLURAL,
                object: &object,
            };
            let operation = operations::start(app, subject).await?;
            Ok(operations::location(
                app,
                Reply::empty(StatusCode::ACCEPTED),
                &operation,
            ))
        }
    }
}
