//! Long-running operations: a record in home per operation, whose state is read off the object it is about.
//!
//! Nothing remembers an operation in memory, so a restart loses none: "done" is a property of the object (its status has seen
//! the generation that the operation wrote, or an object of that uid is gone).

use http::StatusCode;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use reconcile::Error;
use resources::{ArmError, Operation, OperationSpec, OperationStatus};
use serde_json::json;

use crate::{
    app::{App, Settled},
    error::{Answer, Fault},
    home::ArmObject,
    http::Reply,
    resource,
};

const PLURAL: &str = "operations";
/// Version in the URLs handed out; any is accepted.
const VERSION: &str = "2024-11-01";

/// What an operation waits for.
#[derive(Clone, Debug)]
pub(crate) struct Subject<'a> {
    /// ARM id that the client asked about (a child's, if the child was written).
    pub resource: &'a str,
    pub verb: &'a str,
    pub plural: &'a str,
    pub object: &'a ArmObject,
}

/// Records an operation; returns its name.
pub(crate) async fn start(app: &App, subject: Subject<'_>) -> Result<String, Error> {
    let name = uuid::Uuid::new_v4().simple().to_string();
    let spec = OperationSpec {
        resource: subject.resource.to_owned(),
        verb: subject.verb.to_owned(),
        plural: subject.plural.to_owned(),
        object: subject.object.name().to_owned(),
        uid: subject.object.uid().to_owned(),
        generation: subject.object.metadata.generation.unwrap_or(0),
        start_time: apimachinery::time::now_rfc3339(&*app.clock),
    };
    let mut op = Operation::new(name.clone(), spec);
    op.metadata = ObjectMeta {
        name: Some(name.clone()),
        ..Default::default()
    };
    app.home.create(PLURAL, &op).await?;
    Ok(name)
}

/// Adds the headers that a client polls by.
pub(crate) fn headers(app: &App, reply: Reply, name: &str) -> Reply {
    let base = format!("{}/subscriptions/{}", app.identity.base_url, app.identity.subscription);
    reply
        .with(
            "Azure-AsyncOperation",
            format!("{base}/operations/{name}?api-version={VERSION}"),
        )
        .with(
            "Location",
            format!("{base}/operationresults/{name}?api-version={VERSION}"),
        )
        .pending()
}

/// Headers for a reply that has only a `Location` (deletions of groups are polled by it alone).
pub(crate) fn location(app: &App, reply: Reply, name: &str) -> Reply {
    let base = format!("{}/subscriptions/{}", app.identity.base_url, app.identity.subscription);
    reply
        .with(
            "Location",
            format!("{base}/operationresults/{name}?api-version={VERSION}"),
        )
        .pending()
}

enum State {
    Running(Option<Box<ArmObject>>),
    Succeeded,
    Failed(ArmError),
}

async fn load(app: &App, name: &str) -> Answer<(Operation, State)> {
    let op: Option<Operation> = app.home.get(PLURAL, &name.to_lowercase()).await?;
    let op = op.ok_or_else(|| {
        Fault::not_found(
            "OperationNotFound",
            format!("There is no operation '{name}' (any more)."),
        )
    })?;
    if let Some(s) = &op.status {
        match s.status.as_str() {
            "Succeeded" => return Ok((op, State::Succeeded)),
            "Failed" | "Canceled" => {
                let error = s.error.clone().unwrap_or_default();
                return Ok((op, State::Failed(error)));
            }
            _ => {}
        }
    }
    let spec = &op.spec;
    let deletes = spec.verb == "DELETE";
    let state = match (
        app.look(&spec.plural, &spec.object, &spec.uid, spec.generation).await?,
        deletes,
    ) {
        (Settled::Gone, true) => State::Succeeded,
        (Settled::Gone, false) => State::Failed(ArmError {
            code: "OperationPreempted".into(),
            message: "The resource was deleted before the operation was done.".into(),
        }),
        (Settled::Running(o), _) | (Settled::Done(o), true) => State::Running(Some(Box::new(o))),
        (Settled::Done(o), false) => match o.state() {
            "Succeeded" => State::Succeeded,
            _ => State::Failed(o.status.and_then(|s| s.error).unwrap_or_else(|| ArmError {
                code: "OperationFailed".into(),
                message: "The operation failed without a reason.".into(),
            })),
        },
    };
    let (status, error) = match &state {
        State::Running(_) => return Ok((op, state)),
        State::Succeeded => ("Succeeded", None),
        State::Failed(e) => ("Failed", Some(e.clone())),
    };
    // The outcome is written down once: the object may change again or go.
    let mut ended = op.clone();
    let end_time = Some(apimachinery::time::now_rfc3339(&*app.clock));
    ended.status = Some(OperationStatus {
        status: status.into(),
        end_time,
        error,
    });
    let stored = app.home.update_status(PLURAL, op.name(), &ended).await;
    match stored {
        Ok(stored) => Ok((stored, state)),
        // Another poll wrote the same.
        Err(e) if e.is_conflict() || e.is_not_found() => Ok((ended, state)),
        Err(e) => Err(e.into()),
    }
}

/// `Azure-AsyncOperation`: the status body.
pub(crate) async fn status(app: &App, name: &str) -> Answer<Reply> {
    let (op, state) = load(app, name).await?;
    let mut body = json!({"id": format!("/subscriptions/{}/operations/{}", app.identity.subscription, op.name()),
        "name": op.name(), "startTime": op.spec.start_time});
    if let Some(end) = op.status.as_ref().and_then(|s| s.end_time.as_ref()) {
        body["endTime"] = json!(end);
    }
    Ok(match state {
        State::Running(object) => {
            body["status"] = json!("InProgress");
            let steps = object.and_then(|o| o.status).map(|s| s.steps).unwrap_or_default();
            body["properties"] = json!({"steps": steps});
            Reply::ok(body).pending()
        }
        State::Succeeded => {
            body["status"] = json!("Succeeded");
            Reply::ok(body)
        }
        State::Failed(e) => {
            body["status"] = json!("Failed");
            body["error"] = json!({"code": e.code, "message": e.message});
            Reply::ok(body)
        }
    })
}

/// `Location`: 202 while it runs, then what the operation's verb would have answered.
pub(crate) async fn result(app: &App, name: &str) -> Answer<Reply> {
    let (op, state) = load(app, name).await?;
    match state {
        State::Running(_) => Ok(location(app, Reply::empty(StatusCode::ACCEPTED), op.name())),
        State::Failed(e) => Err(Fault::conflict(&e.code, e.message)),
        State::Succeeded if op.spec.verb == "DELETE" && op.spec.plural == "resourcegroups" => {
            Ok(Reply::empty(StatusCode::OK))
        }
        State::Succeeded if op.spec.verb.starts_with("DELETE") => Ok(Reply::empty(StatusCode::NO_CONTENT)),
        State::Succeeded => resource::by_id(app, &op.spec.resource).await,
    }
}

/// Deletes operations that ended more than an hour ago. `now` in RFC 3339, compared as text (both are UTC).
pub(crate) async fn collect(app: &App, hour_ago: &str) -> Result<usize, Error> {
    let all: Vec<Operation> = app.home.list(PLURAL).await?;
    let mut gone = 0;
    for op in all {
        let ended = op.status.as_ref().and_then(|s| s.end_time.as_deref());
        // One that nobody polled to its end is judged by its start, a day later.
        let old = match ended {
            Some(end) => end < hour_ago,
            None => op.spec.start_time.get(..10) < hour_ago.get(..10) && op.spec.start_time.as_str() < hour_ago,
        };
        if old {
            app.home.delete(PLURAL, op.name()).await?;
            gone += 1;
        }
    }
    Ok(gone)
}
