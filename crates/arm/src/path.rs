//! Request paths to routes. Literals and type names are matched without regard to case; names keep the casing of the request.

use resources::ArmId;

use crate::{
    error::{Answer, Fault},
    table::{self, ResourceType},
};

/// What a path addresses. Names are percent-decoded.
#[derive(Clone, Debug)]
pub enum Route {
    /// `/metadata/endpoints`
    Endpoints,
    /// Any `.well-known/openid-configuration`; the authority path in front of it (`adfs`, a tenant id).
    OpenId {
        authority: String,
    },
    /// Token endpoint of an authority.
    Token {
        authority: String,
    },
    /// Public keys of an authority.
    Keys,
    Tenants,
    Subscriptions,
    Subscription {
        subscription: String,
    },
    Locations {
        subscription: String,
    },
    Providers {
        subscription: String,
    },
    Provider {
        subscription: String,
        namespace: String,
    },
    Register {
        subscription: String,
        namespace: String,
    },
    Groups {
        subscription: String,
    },
    Group {
        subscription: String,
        group: String,
    },
    /// Every resource of a subscription or group.
    Resources {
        subscription: String,
        group: Option<String>,
    },
    /// A template deployment into a group.
    Deployment {
        /// ARM id of the group.
        group: String,
        name: String,
    },
    /// All resources of a type in a subscription, a group, or a parent resource.
    Collection {
        subscription: String,
        group: Option<String>,
        kind: &'static ResourceType,
        parent: Option<ArmId>,
    },
    Resource {
        id: ArmId,
        kind: &'static ResourceType,
    },
    Action {
        id: ArmId,
        kind: &'static ResourceType,
        action: String,
    },
    RoleAssignments {
        scope: String,
    },
    RoleAssignment {
        scope: String,
        name: String,
    },
    RoleDefinitions {
        scope: String,
    },
    RoleDefinition {
        scope: String,
        name: String,
    },
    /// Status of a long-running operation.
    Operation {
        subscription: String,
        name: String,
    },
    /// `Location` of a long-running operation.
    OperationResult {
        subscription: String,
        name: String,
    },
    /// `upgradeProfiles/default` of a cluster or pool.
    UpgradeProfile {
        id: ArmId,
        kind: &'static ResourceType,
    },
    KubernetesVersions {
        location: String,
    },
    Usages {
        subscription: String,
        location: String,
    },
}

impl Route {
    /// True for the paths that a client needs before it has a token.
    pub fn is_anonymous(&self) -> bool {
        matches!(
            self,
            Self::Endpoints | Self::OpenId { .. } | Self::Token { .. } | Self::Keys
        )
    }
}

fn is(a: &str, b: &str) -> bool {
    a.eq_ignore_ascii_case(b)
}

/// Parses the path of a request (no query).
/// # Errors: 404 with a code that says which part is not served, 400 for bytes that are not UTF-8 after decoding.
pub fn parse(path: &str) -> Answer<Route> {
    let mut parts = Vec::new();
    for raw in path.split('/').filter(|p| !p.is_empty()) {
        let decoded = percent_encoding::percent_decode_str(raw)
            .decode_utf8()
            .ok()
            .filter(|d| !d.contains(['/', '\0']));
        match decoded {
            Some(d) => parts.push(d.into_owned()),
            None => {
                return Err(Fault::bad_request(
                    "InvalidRequestUri",
                    "The request path has a segment that is not plain text.",
                ));
            }
        }
    }
    let p: Vec<&str> = parts.iter().map(String::as_str).collect();
    if let Some(route) = login(&p) {
        return Ok(route);
    }
    if let Some(route) = extension(&p) {
        return route;
    }
    match p.as_slice() {
        [a, b] if is(a, "metadata") && is(b, "endpoints") => Ok(Route::Endpoints),
        [a] if is(a, "tenants") => Ok(Route::Tenants),
        [a] if is(a, "subscriptions") => Ok(Route::Subscriptions),
        [a, sub, rest @ ..] if is(a, "subscriptions") => below_subscription(sub, rest),
        [a, ..] if is(a, "graph") || is(a, "msgraph") => Err(not_served("Microsoft Graph", path)),
        _ => Err(not_served("this path", path)),
    }
}

fn not_served(what: &str, path: &str) -> Fault {
    Fault::not_found(
        "InvalidRequestUri",
        format!("Nothing is served at '{path}': {what} is not part of this platform."),
    )
}

fn login(p: &[&str]) -> Option<Route> {
    if let [authority @ .., a, b] = p
        && is(a, ".well-known")
        && is(b, "openid-configuration")
    {
        let authority = match authority {
            [rest @ .., v] if is(v, "v2.0") => rest,
            all => all,
        };
        return Some(Route::OpenId {
            authority: authority.join("/"),
        });
    }
    let (authority, last) = match p {
        [authority @ .., a, b] if is(a, "oauth2") => (authority, *b),
        [authority @ .., a, v, b] if is(a, "oauth2") && is(v, "v2.0") => (authority, *b),
        [authority @ .., a, v, b] if is(a, "discovery") && is(v, "v2.0") => (authority, *b),
        [authority @ .., a, b] if is(a, "discovery") => (authority, *b),
        _ => return None,
    };
    match last {
        l if is(l, "token") => Some(Route::Token {
            authority: authority.join("/"),
        }),
        l if is(l, "keys") => Some(Route::Keys),
        _ => None,
    }
}

/// `<scope>/providers/Microsoft.Authorization/...`: the scope is everything in front and may be empty.
fn extension(p: &[&str]) -> Option<Answer<Route>> {
    let at = p
        .windows(2)
        .rposition(|w| is(w[0], "providers") && is(w[1], "Microsoft.Authorization"))?;
    // `/subscriptions/{s}/providers/Microsoft.Authorization` itself is the provider's registration.
    let rest = &p[at + 2..];
    let scope = format!("/{}", p[..at].join("/"));
    Some(match rest {
        [] => return None,
        [t] if is(t, "roleAssignments") => Ok(Route::RoleAssignments { scope }),
        [t, name] if is(t, "roleAssignments") => Ok(Route::RoleAssignment {
            scope,
            name: (*name).to_owned(),
        }),
        [t] if is(t, "roleDefinitions") => Ok(Route::RoleDefinitions { scope }),
        [t, name] if is(t, "roleDefinitions") => Ok(Route::RoleDefinition {
            scope,
            name: (*name).to_owned(),
        }),
        [r] if is(r, "register") => return None,
        _ => Err(unknown_type("Microsoft.Authorization", rest)),
    })
}

fn below_subscription(sub: &str, rest: &[&str]) -> Answer<Route> {
    let subscription = sub.to_owned();
    match rest {
        [] => Ok(Route::Subscription { subscription }),
        [a] if is(a, "locations") => Ok(Route::Locations { subscription }),
        [a] if is(a, "resources") => Ok(Route::Resources {
            subscription,
            group: None,
        }),
        [a] if is(a, "providers") => Ok(Route::Providers { subscription }),
        [a, name] if is(a, "operationresults") => Ok(Route::OperationResult {
            subscription,
            name: (*name).to_owned(),
        }),
        [a, name] if is(a, "operations") => Ok(Route::Operation {
            subscription,
            name: (*name).to_owned(),
        }),
        [a] if is(a, "resourceGroups") => Ok(Route::Groups { subscription }),
        [a, g, tail @ ..] if is(a, "resourceGroups") => {
            let group = (*g).to_owned();
            match tail {
                [] => Ok(Route::Group { subscription, group }),
                [r] if is(r, "resources") => Ok(Route::Resources {
                    subscription,
                    group: Some(group),
                }),
                [p, ns, kind, name]
                    if is(p, "providers") && is(ns, "Microsoft.Resources") && is(kind, "deployments") =>
                {
                    Ok(Route::Deployment {
                        group: resources::group_id(sub, g),
                        name: (*name).to_owned(),
                    })
                }
                [p, ns, types @ ..] if is(p, "providers") && !types.is_empty() => {
                    below_provider(sub, Some(g), ns, types)
                }
                _ => Err(not_served("this part of a resource group", &tail.join("/"))),
            }
        }
        [p, ns] if is(p, "providers") => Ok(Route::Provider {
            subscription,
            namespace: (*ns).to_owned(),
        }),
        [p, ns, r] if is(p, "providers") && is(r, "register") => Ok(Route::Register {
            subscription,
            namespace: (*ns).to_owned(),
        }),
        [p, ns, l, location, what] if is(p, "providers") && is(l, "locations") => {
            let location = (*location).to_owned();
            match (*ns, *what) {
                (n, w) if is(n, "Microsoft.ContainerService") && is(w, "kubernetesVersions") => {
                    Ok(Route::KubernetesVersions { location })
                }
                (n, w) if is(n, "Microsoft.Compute") && is(w, "usages") => Ok(Route::Usages { subscription, location }),
                _ => Err(unknown_type(ns, &[l, what])),
            }
        }
        [p, ns, types @ ..] if is(p, "providers") => below_provider(sub, None, ns, types),
        _ => Err(not_served("this part of a subscription", &rest.join("/"))),
    }
}

fn below_provider(sub: &str, group: Option<&str>, ns: &str, rest: &[&str]) -> Answer<Route> {
    let pairs: Vec<&[&str]> = rest.chunks_exact(2).collect();
    let types: Vec<&str> = rest.iter().step_by(2).copied().collect();
    let id = |n: usize, kind: &ResourceType| ArmId {
        subscription: sub.to_owned(),
        resource_group: group.map(str::to_owned),
        provider: kind.provider.to_owned(),
        segments: kind
            .path
            .iter()
            .zip(&pairs[..n])
            .map(|(t, pair)| ((*t).to_owned(), pair[1].to_owned()))
            .collect(),
    };
    if let [front @ .., profile, default] = rest
        && is(profile, "upgradeProfiles")
        && is(default, "default")
        && let Some(kind) = table::find(ns, &front.iter().step_by(2).copied().collect::<Vec<_>>())
        && kind.provider == "Microsoft.ContainerService"
        && group.is_some()
    {
        return Ok(Route::UpgradeProfile {
            id: id(pairs.len() - 1, kind),
            kind,
        });
    }
    if rest.len().is_multiple_of(2) {
        return match (table::find(ns, &types), group) {
            (Some(kind), Some(_)) => Ok(Route::Resource {
                id: id(pairs.len(), kind),
                kind,
            }),
            (Some(_), None) => Err(not_served("a resource outside a resource group", &rest.join("/"))),
            (None, _) => Err(unknown_type(ns, rest)),
        };
    }
    // An odd number of segments is a collection, or an action on the resource in front of the last one.
    let parents = &types[..types.len() - 1];
    if let Some(kind) = table::find(ns, &types) {
        let parent = match (parents, group) {
            ([], _) => None,
            (_, Some(_)) => table::find(ns, parents).map(|p| id(pairs.len(), p)),
            (_, None) => return Err(not_served("a resource outside a resource group", &rest.join("/"))),
        };
        return Ok(Route::Collection {
            subscription: sub.to_owned(),
            group: group.map(str::to_owned),
            kind,
            parent,
        });
    }
    match (table::find(ns, parents), group) {
        (Some(kind), Some(_)) => {
            let action = (*types.last().expect("an odd number of segments has a last one")).to_owned();
            Ok(Route::Action {
                id: id(pairs.len(), kind),
                kind,
                action,
            })
        }
        _ => Err(unknown_type(ns, rest)),
    }
}

fn unknown_type(ns: &str, rest: &[&str]) -> Fault {
    let asked = rest.iter().step_by(2).copied().collect::<Vec<_>>().join("/");
    let Some(provider) = table::provider(ns) else {
        let message = format!(
            "The provider namespace '{ns}' is not served. Served are: {}.",
            table::providers().join(", ")
        );
        return Fault::not_found("InvalidResourceNamespace", message);
    };
    let served: Vec<String> = table::TYPES
        .iter()
        .filter(|t| t.provider == provider)
        .map(|t| t.path.join("/"))
        .chain(
            table::OTHER_TYPES
                .iter()
                .filter(|t| t.0 == provider)
                .map(|t| t.1.to_owned()),
        )
        .collect();
    let message = format!(
        "The resource type '{asked}' is not served in namespace '{provider}'. Served are: {}.",
        served.join(", ")
    );
    Fault::not_found("InvalidResourceType", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: &str = "/subscriptions/S/resourcegroups/Rg";

    #[test]
    fn case_folds_literals_and_keeps_names() {
        let spellings = [
            "/subscriptions/S/resourceGroups/Rg/providers/Microsoft.Network/virtualNetworks/Net/subnets/One",
            "/SUBSCRIPTIONS/S/RESOURCEGROUPS/Rg/PROVIDERS/MICROSOFT.NETWORK/VIRTUALNETWORKS/Net/SUBNETS/One",
            "/subscriptions/S/resourcegroups/Rg/providers/microsoft.network/virtualnetworks/Net/subnets/One/",
        ];
        for s in spellings {
            let Route::Resource { id, kind } = parse(s).unwrap() else {
                panic!("{s}")
            };
            assert_eq!(id.to_string(), spellings[0]);
            assert_eq!(kind.full(), "Microsoft.Network/virtualNetworks/subnets");
        }
    }

    #[test]
    fn collections_actions_and_extensions() {
        let aks = format!("{G}/providers/Microsoft.ContainerService/managedClusters");
        assert!(matches!(
            parse(&aks).unwrap(),
            Route::Collection {
                parent: None,
                group: Some(_),
                ..
            }
        ));
        let Route::Collection { parent: Some(p), .. } = parse(&format!("{aks}/c/agentPools")).unwrap() else {
            panic!()
        };
        assert_eq!(p.name(), "c");
        let Route::Action { action, id, .. } = parse(&format!("{aks}/c/listClusterUserCredential")).unwrap() else {
            panic!()
        };
        assert_eq!((action.as_str(), id.name()), ("listClusterUserCredential", "c"));
        let Route::UpgradeProfile { id, kind } =
            parse(&format!("{aks}/c/agentPools/p/upgradeProfiles/default")).unwrap()
        else {
            panic!()
        };
        assert_eq!((id.name(), kind.path.len()), ("p", 2));
        let Route::RoleAssignments { scope } =
            parse(&format!("{aks}/c/providers/Microsoft.Authorization/roleAssignments")).unwrap()
        else {
            panic!()
        };
        assert!(scope.ends_with("/managedClusters/c"));
        assert!(matches!(
            parse("/subscriptions/S/providers/Microsoft.Authorization/register").unwrap(),
            Route::Register { .. }
        ));
    }

    #[test]
    fn login_paths_of_both_authorities() {
        for (path, authority) in [
            ("/adfs/.well-known/openid-configuration", "adfs"),
            ("/adfs/adfs/v2.0/.well-known/openid-configuration", "adfs/adfs"),
            ("/0-1/v2.0/.well-known/openid-configuration", "0-1"),
        ] {
            let Route::OpenId { authority: got } = parse(path).unwrap() else {
                panic!("{path}")
            };
            assert_eq!(got, authority);
        }
        assert!(matches!(parse("/adfs/oauth2/token").unwrap(), Route::Token { .. }));
        assert!(matches!(parse("/t/oauth2/v2.0/token").unwrap(), Route::Token { .. }));
    }

    #[test]
    fn what_is_not_served_is_named() {
        let e = parse(&format!("{G}/providers/Microsoft.Storage/storageAccounts/a")).unwrap_err();
        assert_eq!(e.code, "InvalidResourceNamespace");
        let e = parse(&format!("{G}/providers/Microsoft.Network/azureFirewalls/a")).unwrap_err();
        assert_eq!(e.code, "InvalidResourceType");
        assert!(e.message.contains("virtualNetworks/subnets"), "{e}");
        assert_eq!(parse("/nothing/here").unwrap_err().status, 404);
        assert_eq!(parse("/subscriptions/%ff").unwrap_err().status, 400);
    }
}
