//! Namespace lifecycle: nothing new in a namespace that is missing or ends, and some namespaces never end.

use apimachinery::meta;
use apimachinery::status::{Cause, Status};
use serde_json::Value;

use super::Operation;
use crate::handlers::Context;

/// Namespaces that cannot be deleted.
pub const PROTECTED: [&str; 3] = ["default", "kube-system", "kube-public"];

/// Some namespaces stay.
pub fn check_deletion(cx: &Context, operation: Operation) -> Result<(), Status> {
    let name = cx.target.name.as_str();
    if operation == Operation::Delete && cx.served.is("", "namespaces") && PROTECTED.contains(&name) {
        return Err(Status::forbidden(
            "namespaces",
            name,
            "this namespace may not be deleted",
        ));
    }
    Ok(())
}

/// The namespace of something new exists and does not end.
pub fn check_creation(cx: &Context, operation: Operation, new: &Value) -> Result<(), Status> {
    if operation != Operation::Create || !cx.served.info.namespaced {
        return Ok(());
    }
    let namespace = cx.target.namespace.as_str();
    let Some(found) = cx.cluster.namespaces.get("", namespace) else {
        return Err(Status::not_found("namespaces", namespace));
    };
    if found.header().deleting {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut status = Status::forbidden(&cx.target.group_resource(), meta::name(new), &why);
        if let Some(details) = &mut status.details {
            details.causes.push(Cause {
                reason: "NamespaceTerminating".into(),
                message: format!("namespace {namespace} is being terminated"),
                field: "metadata.namespace".into(),
            });
        }
        return Err(status);
    }
    Ok(())
}
