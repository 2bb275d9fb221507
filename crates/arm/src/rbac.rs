//! Role definitions (the built-in ones that clients ask for by name) and role assignments. The platform's own service
//! principal may do everything; a managed identity, whose token the metadata service gives to its machine, may do what the
//! roles that are assigned to it allow.

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

/// Whether whoever holds the token may make the request.
/// # Errors: 403 `AuthorizationFailed` with the principal, the action and the scope.
pub(crate) async fn authorize(app: &App, claims: &token::Claims, request: &Request) -> Answer<()> {
    if claims
        .appid
        .eq_ignore_ascii_case(&app.identity.service_principal.client_id)
    {
        return Ok(());
    }
    let (scope, kind) = target(&request.path);
    let verb = match request.method {
        Method::GET | Method::HEAD => "read",
        Method::DELETE => "delete",
        Method::POST => "action",
        _ => "write",
    };
    let action = format!("{kind}/{verb}");
    for assignment in app.home.list::<ArmObject>(PLURAL).await? {
        let p = &assignment.spec.body["properties"];
        let text = |f: &str| p[f].as_str().unwrap_or_default();
        let at = text("scope");
        let covers = at == "/" || same_id(at, &scope) || is_within(&scope, at);
        let role = text("roleDefinitionId").rsplit('/').next().unwrap_or_default();
        let actions = BUILT_IN
            .iter()
            .find(|r| r.1.eq_ignore_ascii_case(role))
            .map_or(&[][..], |r| r.2);
        let holds = text("principalId").eq_ignore_ascii_case(&claims.oid);
        // Handing out rights is Owner's alone.
        let owner = role.eq_ignore_ascii_case(BUILT_IN[0].1);
        let free = owner || verb == "read" || !action.to_ascii_lowercase().starts_with("microsoft.authorization/");
        if holds && covers && free && actions.iter().any(|a| allows(a, &action)) {
            return Ok(());
        }
    }
    let message = format!(
        "The client '{}' with object id '{}' does not have authorization to perform action '{action}' over scope '{scope}'. Assign it a role there.",
        claims.appid, claims.oid
    );
    Err(Fault::new(StatusCode::FORBIDDEN, "AuthorizationFailed", message))
}

/// What a path is about: its scope, and the type in actions (`Microsoft.Network/virtualNetworks`).
fn target(path: &str) -> (String, String) {
    let scope = path.trim_end_matches('/').to_owned();
    let parts: Vec<&str> = scope.split('/').filter(|p| !p.is_empty()).collect();
    let provider = parts.iter().rposition(|p| p.eq_ignore_ascii_case("providers"));
    let kind = match provider.and_then(|at| parts.get(at + 1..)) {
        Some([provider, types @ ..]) => {
            let types: Vec<&str> = types.iter().step_by(2).copied().collect();
            [&[*provider][..], &types].concat().join("/")
        }
        _ if parts.len() > 2 => "Microsoft.Resources/subscriptions/resourceGroups".to_owned(),
        _ => "Microsoft.Resources/subscriptions".to_owned(),
    };
    (scope, kind)
}

/// Whether an action of a role, with at most one `*` at its start or end, covers `action`.
fn allows(pattern: &str, action: &str) -> bool {
    let (pattern, action) = (pattern.to_ascii_lowercase(), action.to_ascii_lowercase());
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => action.ends_with(end),
        (None, Some(start)) => action.starts_with(start),
        (None, None) => action == pattern,
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_named_and_covered_as_roles_say() {
        let base = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";
        assert_eq!(
            target(base),
            (base.to_owned(), "Microsoft.Network/virtualNetworks".to_owned())
        );
        assert_eq!(
            target(&format!("{base}/subnets/a/")).1,
            "Microsoft.Network/virtualNetworks/subnets"
        );
        assert_eq!(
            target("/subscriptions/s/resourceGroups/g").1,
            "Microsoft.Resources/subscriptions/resourceGroups"
        );
        for (pattern, action, wanted) in [
            ("*", "Microsoft.Network/virtualNetworks/write", true),
            ("*/read", "Microsoft.Network/virtualNetworks/read", true),
            ("*/read", "Microsoft.Network/virtualNetworks/delete", false),
            ("Microsoft.Network/*", "microsoft.network/virtualNetworks/write", true),
            (
                "Microsoft.Network/*",
                "Microsoft.ContainerService/managedClusters/read",
                false,
            ),
            ("Microsoft.X/a/read", "Microsoft.X/a/read", true),
        ] {
            assert_eq!(allows(pattern, action), wanted, "{pattern} {action}");
        }
    }
}
