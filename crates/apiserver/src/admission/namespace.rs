//! Namespace lifecycle: nothing new in a namespace that is missing or ends, and some namespaces never end.

use apimachinery::status::{Cause, Status};

use super::Operation;
use crate::handlers::Context;

/// Namespaces that cannot be deleted.
pub const PROTECTED: [&str; 3] = ["default", "kube-system", "kube-public"];

pub fn check(cx: &Context, operation: Operation) -> Result<(), Status> {
    let name = cx.target.name.as_str();
    if operation == Operation::Delete && cx.served.is("", "namespaces") && PROTECTED.contains(&name) {
        return Err(Status::forbidden(
            "namespaces",
            name,
            "this namespace may not be deleted",
        ));
    }
    if operation != Operation::Create || !cx.served.info.namespaced {
        return Ok(());
    }
    let namespace = cx.target.namespace.as_str();
    let Some(found) = cx.cluster.namespaces.get("", namespace) else {
        return Err(Status::not_found("namespaces", namespace));
    };
    if found.header().deleting {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut status = Status::forbidden(&cx.target.group_resource(), name, &why);
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
