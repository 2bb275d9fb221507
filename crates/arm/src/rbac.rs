//! Role definitions (the built-in ones that clients ask for by name) and role assignments (stored). The one principal that can
//! log in may do everything, so assignments are records, not checks.

use http::{Method, StatusCode};
use resources::{ArmSpec, object_name};
use serde_json::{Value, json};

use crate::{
    app::App,
    error::{Answer, Fault},
    filter::{self, Term},
    home::{ArmObject, is_within, same_id},
    http::{Reply, Request},
    resource::method_not_allowed,
    token,
};

const PLURAL: &str = "roleassignments";

/// Name, GUID and actions of the built-in roles that are listed.
const BUILT_IN: &[(&str, &str, &[&str])] = &[
    ("Owner", "8e3af657-a8ff-443c-a75c-2fe8c4bcb635", &["*"]),
    ("Contributor", "b24988ac-6180-42a0-ab88-20f7382dd24c", &["*"]),
    ("Reader", "acdd72a7-3385-48ef-bd42-f606fba81ae7", &["*/read"]),
    (
        "Network Contributor",
        "4d97b98b-1d4f-4787-a291-c67834d212e7",
        &["Microsoft.Network/*"],
    ),
    (
        "AcrPull",
        "7f951dda-4ed3-4680-a7ca-43fe172d538d",
        &["Microsoft.ContainerRegistry/registries/pull/read"],
    ),
    (
        "Azure Kubernetes Service Cluster Admin Role",
        "0ab0b1a8-8aac-4efd-b8c2-3ee1fb270be8",
        &["Microsoft.ContainerService/managedClusters/listClusterAdminCredential/action"],
    ),
    (
        "Azure Kubernetes Service Cluster User Role",
        "4abbcc35-e782-43d8-92c5-2d3f1bd2253f",
        &["Microsoft.ContainerService/managedClusters/listClusterUserCredential/action"],
    ),
];

fn definition(app: &App, (name, guid, actions): &(&str, &str, &[&str])) -> Value {
    let scope = format!("/subscriptions/{}", app.identity.subscription);
    json!({
        "id": format!("{scope}/providers/Microsoft.Authorization/roleDefinitions/{guid}"),
        "type": "Microsoft.Authorization/roleDefinitions",
        "name": guid,
        "properties": {"roleName": name, "type": "BuiltInRole", "description": name, "assignableScopes": ["/"],
            "permissions": [{"actions": actions, "notActions": [], "dataActions": [], "notDataActions": []}]},
    })
}

/// Definitions that match the filter exactly: a client that gets more than the one it asked for gives up.
pub(crate) fn definitions(app: &App, filter: &str) -> Answer<Reply> {
    let terms = filter::parse(filter)?;
    let mut out = Vec::new();
    'rows: for row in BUILT_IN {
        for term in &terms {
            let keep = match term {
                Term::Eq { field, value } if field.eq_ignore_ascii_case("roleName") => {
                    row.0.eq_ignore_ascii_case(value)
                }
                Term::Eq { field, value } if field.eq_ignore_ascii_case("type") => {
                    "BuiltInRole".eq_ignore_ascii_case(value)
                }
                Term::Call { name } if name.starts_with("atScope") => true,
                other => return Err(not_served(other)),
            };
            if !keep {
                continue 'rows;
            }
        }
        out.push(definition(app, row));
    }
    Ok(Reply::list(out))
}

pub(crate) fn get_definition(app: &App, name: &str) -> Answer<Reply> {
    let row = BUILT_IN.iter().find(|r| r.1.eq_ignore_ascii_case(name));
    let missing = || {
        Fault::not_found(
            "RoleDefinitionDoesNotExist",
            format!("The role definition '{name}' does not exist."),
        )
    };
    Ok(Reply::ok(definition(app, row.ok_or_else(missing)?)))
}

fn not_served(term: &Term) -> Fault {
    let what = match term {
        Term::Eq { field, .. } => format!("field '{field}'"),
        Term::Call { name } => format!("function '{name}()'"),
    };
    Fault::bad_request(
        "InvalidFilterInQueryString",
        format!("The filter {what} is not served here."),
    )
}

fn view(o: &ArmObject) -> Value {
    let mut body = o.spec.body.clone();
    body["id"] = json!(o.spec.id);
    body["name"] = json!(o.spec.id.rsplit('/').next());
    body["type"] = json!("Microsoft.Authorization/roleAssignments");
    body
}

/// Assignments at a scope, above it, and (without `atScope()`) below it.
pub(crate) async fn list(app: &App, scope: &str, filter: &str) -> Answer<Reply> {
    let terms = filter::parse(filter)?;
    let mut out = Vec::new();
    'objects: for o in app.home.list::<ArmObject>(PLURAL).await? {
        let p = &o.spec.body["properties"];
        let at = p["scope"].as_str().unwrap_or("/");
        let above = same_id(at, scope) || at == "/" || is_within(scope, at);
        let below = scope == "/" || is_within(at, scope);
        let mut keep = above || below;
        for term in &terms {
            keep &= match term {
                Term::Call { name } if name.eq_ignore_ascii_case("atScope") => above,
                Term::Eq { field, value } if field.eq_ignore_ascii_case("principalId") => {
                    p["principalId"].as_str().is_some_and(|x| x.eq_ignore_ascii_case(value))
                }
                other => return Err(not_served(other)),
            };
        }
        if keep {
            out.push(view(&o));
            continue 'objects;
        }
    }
    Ok(Reply::list(out))
}

/// One assignment.
pub(crate) async fn serve(app: &App, request: &Request, scope: &str, name: &str) -> Answer<Reply> {
    let scope = scope.trim_end_matches('/');
    let id = format!("{scope}/providers/Microsoft.Authorization/roleAssignments/{name}");
    let stored = app.home.object(PLURAL, &id).await?;
    match request.method {
        Method::GET => match stored {
            Some(o) => Ok(Reply::ok(view(&o))),
            None => Err(Fault::not_found(
                "RoleAssignmentNotFound",
                format!("The role assignment '{name}' is not found."),
            )),
        },
        Method::DELETE => match stored {
            Some(o) => {
                app.home.delete(PLURAL, &object_name(&id)).await?;
                Ok(Reply::ok(view(&o)))
            }
            None => Ok(Reply::empty(StatusCode::NO_CONTENT)),
        },
        Method::PUT => put(app, request, scope, id, stored).await,
        _ => Err(method_not_allowed(&request.method, "a role assignment")),
    }
}

async fn put(app: &App, request: &Request, scope: &str, id: String, stored: Option<ArmObject>) -> Answer<Reply> {
    let sent = request.json()?;
    // Old versions send the properties at the top as well.
    let given = sent
        .get("properties")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_else(|| sent.clone());
    let text = |f: &str| given.get(f).and_then(Value::as_str).unwrap_or_default().to_owned();
    let role = text("roleDefinitionId");
    let guid = role.rsplit('/').next().unwrap_or_default().to_owned();
    if !BUILT_IN.iter().any(|r| r.1.eq_ignore_ascii_case(&guid)) {
        let message = format!("The specified role definition with ID '{guid}' does not exist.");
        return Err(Fault::bad_request("RoleDefinitionDoesNotExist", message));
    }
    let principal = text("principalId");
    if principal.is_empty() {
        return Err(Fault::field(
            "InvalidPrincipalId",
            "properties.principalId",
            "a role assignment needs a principal",
        ));
    }
    if let Some(o) = stored {
        let same = o.spec.body["properties"]["principalId"]
            .as_str()
            .is_some_and(|p| p.eq_ignore_ascii_case(&principal));
        return if same {
            Ok(Reply::ok(view(&o)))
        } else {
            Err(Fault::conflict(
                "RoleAssignmentUpdateNotPermitted",
                "The principal of a role assignment cannot change.",
            ))
        };
    }
    for o in app.home.list::<ArmObject>(PLURAL).await? {
        let p = &o.spec.body["properties"];
        let text = |f: &str| p[f].as_str().unwrap_or_default().to_owned();
        let same_role = text("roleDefinitionId")
            .rsplit('/')
            .next()
            .is_some_and(|g| g.eq_ignore_ascii_case(&guid));
        if same_id(&text("scope"), scope) && text("principalId").eq_ignore_ascii_case(&principal) && same_role {
            return Err(Fault::conflict(
                "RoleAssignmentExists",
                "The role assignment already exists.",
            ));
        }
    }
    let mut properties = given;
    properties.insert("scope".into(), json!(if scope.is_empty() { "/" } else { scope }));
    properties
        .entry("principalType")
        .or_insert_with(|| json!("ServicePrincipal"));
    let at = apimachinery::time::now_rfc3339(&*app.clock);
    let by = token::object_id(&app.identity.service_principal.client_id);
    for (f, v) in [
        ("createdOn", &at),
        ("updatedOn", &at),
        ("createdBy", &by),
        ("updatedBy", &by),
    ] {
        properties.insert(f.to_owned(), json!(v));
    }
    let spec = ArmSpec {
        id,
        body: json!({"properties": properties}),
    };
    let stored: ArmObject = app.home.create(PLURAL, &ArmObject::new(PLURAL, spec)).await?;
    Ok(Reply::json(StatusCode::CREATED, view(&stored)))
}
