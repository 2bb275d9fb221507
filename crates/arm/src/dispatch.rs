//! One request to one reply: route, token, version, handler.

use http::{Method, StatusCode};
use serde_json::json;

use crate::{
    app::App,
    catalog, deployment,
    error::{Answer, Fault},
    group_api,
    http::{Reply, Request},
    metadata, network_actions, operations,
    path::{self, Route},
    private_dns, rbac, resource,
    resource::method_not_allowed,
    table, token, version,
};

/// Answers a request; a fault becomes its reply.
pub(crate) async fn handle(app: &App, request: &Request) -> Reply {
    match answer(app, request).await {
        Ok(reply) => reply,
        Err(fault) => {
            tracing::info!(method = %request.method, path = %request.path, status = fault.status.as_u16(), code = %fault.code, "refused");
            fault.into()
        }
    }
}

async fn answer(app: &App, request: &Request) -> Answer<Reply> {
    let route = match path::parse(&request.path) {
        Ok(route) => route,
        Err(fault) => {
            // Who has no token learns nothing about what exists.
            authenticate(app, request)?;
            return Err(fault);
        }
    };
    if route.is_anonymous() {
        return login(app, request, &route);
    }
    let claims = authenticate(app, request)?;
    rbac::authorize(app, &claims, request).await?;
    arm(app, &claims, request, route).await
}

fn login(app: &App, request: &Request, route: &Route) -> Answer<Reply> {
    let base = &app.identity.base_url;
    match (route, &request.method) {
        (Route::Endpoints, &Method::GET) => {
            let v = request.param("api-version");
            version::check(v, "metadata/endpoints", &["2022-09-01", "2019-05-01", "2015-01-01"])?;
            let tenant = &app.identity.service_principal.tenant;
            Ok(Reply::ok(metadata::endpoints(base, tenant, v.unwrap_or_default())))
        }
        (Route::OpenId { authority }, &Method::GET) => Ok(Reply::ok(metadata::openid(base, authority))),
        (Route::Keys, &Method::GET) => Ok(Reply::ok(app.key.jwks())),
        (Route::Token { authority }, &Method::POST) => {
            let principal = &app.identity.service_principal;
            let granted = token::grant(&app.key, principal, base, authority, &request.form(), app.clock.now());
            Ok(match granted {
                Ok(body) => Reply::ok(body).with("Cache-Control", "no-store"),
                Err(refusal) => {
                    let wrong_client = refusal.error == "invalid_client";
                    let status = if wrong_client {
                        StatusCode::UNAUTHORIZED
                    } else {
                        StatusCode::BAD_REQUEST
                    };
                    Reply::json(status, refusal.to_value())
                }
            })
        }
        _ => Err(method_not_allowed(&request.method, &request.path)),
    }
}

fn authenticate(app: &App, request: &Request) -> Answer<token::Claims> {
    let refuse = |code: &str, message: String| Err(Fault::new(StatusCode::UNAUTHORIZED, code, message));
    let Some(header) = &request.authorization else {
        return refuse(
            "AuthenticationFailed",
            "Authentication failed. The 'Authorization' header is missing.".into(),
        );
    };
    let Some(bearer) = header
        .split_once(' ')
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, t)| t.trim())
    else {
        return refuse(
            "AuthenticationFailedInvalidHeader",
            "The 'Authorization' header must be 'Bearer <token>'.".into(),
        );
    };
    match app.key.verify(bearer, &app.identity.base_url, app.clock.now()) {
        Ok(claims) => Ok(claims),
        Err(token::TokenError::Expired) => refuse(
            "ExpiredAuthenticationToken",
            "The access token has expired. Log in again.".into(),
        ),
        Err(e) => refuse(
            "InvalidAuthenticationToken",
            format!("The access token is invalid: {e}. Log in again."),
        ),
    }
}

async fn arm(app: &App, claims: &token::Claims, request: &Request, route: Route) -> Answer<Reply> {
    let m = &request.method;
    let v = request.param("api-version");
    let resources_version = |what: &str| version::check(v, what, &["2024-11-01", "2022-12-01", "2021-04-01"]);
    let filter = request.param("$filter").unwrap_or_default();
    match route {
        Route::Resource { id, kind } => {
            version::check(v, &kind.full(), kind.versions)?;
            app.check_subscription(&id.subscription)?;
            resource::serve(app, request, id, kind).await
        }
        Route::Collection {
            subscription,
            group,
            kind,
            parent,
        } => {
            version::check(v, &kind.full(), kind.versions)?;
            app.check_subscription(&subscription)?;
            get_only(m, &kind.full())?;
            resource::list(app, &subscription, group.as_deref(), kind, parent.as_ref()).await
        }
        Route::Action { id, kind, action } => {
            version::check(v, &kind.full(), kind.versions)?;
            app.check_subscription(&id.subscription)?;
            if *m == Method::GET && kind.path == ["privateDnsZones"] && action.eq_ignore_ascii_case("ALL") {
                return private_dns::list_all(app, &id, kind).await;
            }
            if let Some(answer) = network_actions::serve(app, request, &id, kind, &action).await {
                return answer;
            }
            post_action(app, request, &id, kind, &action).await
        }
        Route::Group { subscription, group } => {
            resources_version("resourceGroups")?;
            app.check_subscription(&subscription)?;
            group_api::serve(app, request, &group).await
        }
        Route::Groups { subscription } => {
            resources_version("resourceGroups")?;
            app.check_subscription(&subscription)?;
            get_only(m, "resource groups")?;
            group_api::list(app, filter).await
        }
        Route::Resources { subscription, group } => {
            resources_version("resources")?;
            app.check_subscription(&subscription)?;
            get_only(m, "resources")?;
            let scope = match &group {
                Some(g) => resources::group_id(&subscription, g),
                None => format!("/subscriptions/{subscription}"),
            };
            resource::list_all(app, &scope, filter).await
        }
        Route::Tenants => {
            resources_version("tenants")?;
            get_only(m, "tenants")?;
            Ok(catalog::tenants(app))
        }
        Route::Subscriptions => {
            resources_version("subscriptions")?;
            get_only(m, "subscriptions")?;
            Ok(Reply::list(vec![catalog::subscription(app)]))
        }
        Route::Subscription { subscription } => {
            resources_version("subscriptions")?;
            app.check_subscription(&subscription)?;
            get_only(m, "a subscription")?;
            Ok(Reply::ok(catalog::subscription(app)))
        }
        Route::Locations { subscription } => {
            resources_version("locations")?;
            app.check_subscription(&subscription)?;
            Ok(catalog::locations(app))
        }
        Route::Providers { subscription } => {
            resources_version("providers")?;
            app.check_subscription(&subscription)?;
            get_only(m, "providers")?;
            Ok(catalog::providers(app))
        }
        Route::Provider {
            subscription,
            namespace,
        }
        | Route::Register {
            subscription,
            namespace,
        } => {
            resources_version("providers")?;
            app.check_subscription(&subscription)?;
            catalog::provider(app, &namespace)
        }
        Route::RoleDefinitions { scope: _ } => {
            version::check(v, "roleDefinitions", table::OTHER_TYPES[3].2)?;
            get_only(m, "role definitions")?;
            rbac::definitions(app, filter)
        }
        Route::RoleDefinition { scope: _, name } => {
            version::check(v, "roleDefinitions", table::OTHER_TYPES[3].2)?;
            get_only(m, "built-in role definitions")?;
            rbac::get_definition(app, &name)
        }
        Route::RoleAssignments { scope } => {
            version::check(v, "roleAssignments", table::OTHER_TYPES[2].2)?;
            get_only(m, "role assignments")?;
            rbac::list(app, &scope, filter).await
        }
        Route::RoleAssignment { scope, name } => {
            version::check(v, "roleAssignments", table::OTHER_TYPES[2].2)?;
            rbac::serve(app, request, &scope, &name).await
        }
        Route::Operation { subscription, name } => {
            app.check_subscription(&subscription)?;
            operations::status(app, &name).await
        }
        Route::OperationResult { subscription, name } => {
            app.check_subscription(&subscription)?;
            operations::result(app, &name).await
        }
        Route::UpgradeProfile { id, kind } => {
            version::check(v, &kind.full(), kind.versions)?;
            app.check_subscription(&id.subscription)?;
            get_only(m, "an upgrade profile")?;
            resource::upgrade_profile(app, &id, kind).await
        }
        Route::KubernetesVersions { .. } => {
            resources_version("kubernetesVersions")?;
            Ok(catalog::kubernetes_versions())
        }
        Route::Deployment { group, name } => deployment::serve(app, claims, request, &group, &name).await,
        Route::Usages { subscription, .. } => {
            resources_version("usages")?;
            app.check_subscription(&subscription)?;
            catalog::usages(app).await
        }
        Route::Endpoints | Route::OpenId { .. } | Route::Token { .. } | Route::Keys => {
            Err(Fault::internal("the request"))
        }
    }
}

fn get_only(method: &Method, what: &str) -> Answer<()> {
    if matches!(*method, Method::GET | Method::HEAD) {
        Ok(())
    } else {
        Err(method_not_allowed(method, what))
    }
}

async fn post_action(
    app: &App,
    request: &Request,
    id: &resources::ArmId,
    kind: &'static table::ResourceType,
    action: &str,
) -> Answer<Reply> {
    let known = kind.actions.iter().find(|a| a.eq_ignore_ascii_case(action)).copied();
    // `GET .../upgradeProfiles/default` never comes here: it has an even number of segments.
    let (Some(known), &Method::POST) = (known, &request.method) else {
        let served = if kind.actions.is_empty() {
            "none".to_owned()
        } else {
            kind.actions.join(", ")
        };
        let message = format!(
            "The action '{action}' is not served for {}. Served (by POST) are: {served}.",
            kind.full()
        );
        return Err(Fault::not_found("InvalidResourceAction", message));
    };
    let object = app.home.object(kind.storage.plural(), &id.to_string()).await?;
    let Some(object) = object else {
        app.group_of(id, false).await?;
        return Err(Fault::resource_not_found(
            &format!("{}/{}", kind.full(), id.name()),
            id.resource_group.as_deref().unwrap_or_default(),
        ));
    };
    if let "start" | "stop" = known {
        let code = if known == "stop" { "Stopped" } else { "Running" };
        return resource::power(app, id, kind, code).await;
    }
    let admin = known == "listClusterAdminCredential";
    let kubeconfig = app.actions.cluster_credentials(&object.spec.id, admin).await;
    let kubeconfig = kubeconfig.map_err(|e| Fault::conflict(&e.code, e.message))?;
    let value = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, kubeconfig);
    let name = if admin { "clusterAdmin" } else { "clusterUser" };
    Ok(Reply::ok(json!({"kubeconfigs": [{"name": name, "value": value}]})))
}
