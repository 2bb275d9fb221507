//! What a client reads before it logs in: cloud metadata in its three shapes, and OpenID configurations.

use serde_json::{Value, json};

/// Suffixes of names that belong to services of a cloud. Az wants them to exist.
fn suffixes() -> Value {
    json!({
        "acrLoginServer": "azurecr.oaks.internal",
        "storage": "storage.oaks.internal",
        "keyVaultDns": "vault.oaks.internal",
        "sqlServerHostname": "db.oaks.internal",
    })
}

/// `/metadata/endpoints` for an `api-version`: an old object (2015), an array (2019), one object (2022 and later).
pub fn endpoints(base: &str, tenant: &str, api_version: &str) -> Value {
    if api_version < "2018" {
        return json!({
            "galleryEndpoint": base,
            "graphEndpoint": format!("{base}/graph"),
            "portalEndpoint": base,
            "authentication": {"loginEndpoint": format!("{base}/adfs"), "audiences": [format!("{base}/arm")]},
        });
    }
    let one = json!({
        "name": "oaks",
        "portal": base,
        "authentication": {
            "loginEndpoint": base,
            "audiences": [format!("{base}/arm"), base],
            "tenant": tenant,
            "identityProvider": "AAD",
        },
        "resourceManager": base,
        "graph": format!("{base}/graph"),
        "graphAudience": format!("{base}/graph"),
        "microsoftGraphResourceId": format!("{base}/msgraph/"),
        "gallery": base,
        "suffixes": suffixes(),
    });
    if api_version < "2022" { json!([one]) } else { one }
}

/// An OpenID configuration for an authority path. The ADFS-style one has version 1 endpoints, tenants have `v2.0` ones.
pub fn openid(base: &str, authority: &str) -> Value {
    let root = format!("{base}/{authority}");
    let adfs = authority
        .rsplit('/')
        .next()
        .is_some_and(|a| a.eq_ignore_ascii_case("adfs"));
    let v = if adfs { "" } else { "/v2.0" };
    json!({
        "issuer": root,
        "token_endpoint": format!("{root}/oauth2{v}/token"),
        "authorization_endpoint": format!("{root}/oauth2{v}/authorize"),
        "device_authorization_endpoint": format!("{root}/oauth2{v}/devicecode"),
        "jwks_uri": format!("{root}/discovery{v}/keys"),
        "response_types_supported": ["code", "token"],
        "response_modes_supported": ["query", "form_post"],
        "grant_types_supported": ["client_credentials"],
        "subject_types_supported": ["pairwise"],
        "id_token_signing_alg_values_supported": ["ES256"],
        "token_endpoint_auth_methods_supported": ["client_secret_post"],
        "scopes_supported": ["openid"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_shapes() {
        assert!(endpoints("https://h", "t", "2015-01-01")["galleryEndpoint"].is_string());
        assert_eq!(endpoints("https://h", "t", "2019-05-01").as_array().unwrap().len(), 1);
        let one = endpoints("https://h", "t", "2022-09-01");
        for field in [
            "/name",
            "/authentication/loginEndpoint",
            "/authentication/audiences/0",
            "/suffixes/keyVaultDns",
        ] {
            assert!(one.pointer(field).is_some_and(Value::is_string), "{field}");
        }
    }

    #[test]
    fn endpoints_follow_the_authority() {
        assert_eq!(
            openid("https://h", "adfs")["token_endpoint"],
            "https://h/adfs/oauth2/token"
        );
        assert_eq!(
            openid("https://h", "t-1")["token_endpoint"],
            "https://h/t-1/oauth2/v2.0/token"
        );
    }
}
