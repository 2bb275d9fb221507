//! Access tokens: ES256 JWTs that this server issues to service principals and checks on every ARM call.
//!
//! One key signs; its PKCS#8 form is kept by the caller (a Secret in home), so that tokens survive a restart. Clients never
//! look inside the token.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as B64};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// Life of a token. Clients ask for a new one by themselves.
pub const LIFETIME_S: u64 = 3600;
/// Longest token that is looked at.
const TOKEN_BYTES_MAX: usize = 8 << 10;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum TokenError {
    #[error("the token key cannot be used")]
    Key,
    #[error("the token is not a JWT of this server")]
    Malformed,
    #[error("the token's signature does not match")]
    Signature,
    #[error("the token has expired")]
    Expired,
    #[error("the token was issued for another audience ({0})")]
    Audience(String),
}

/// Claims of an access token, named as Entra ID names them.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Claims {
    pub aud: String,
    pub iss: String,
    pub tid: String,
    /// Object id of the service principal.
    pub oid: String,
    pub sub: String,
    pub appid: String,
    pub idtyp: String,
    pub iat: u64,
    pub nbf: u64,
    pub exp: u64,
    pub ver: String,
    /// ARM id of a managed identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xms_mirid: Option<String>,
}

/// Signs and checks tokens.
pub struct TokenKey {
    pair: EcdsaKeyPair,
    kid: String,
}

impl TokenKey {
    /// A new key as PKCS#8.
    pub fn generate() -> Result<Vec<u8>, TokenError> {
        let doc = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new());
        Ok(doc.map_err(|_| TokenError::Key)?.as_ref().to_vec())
    }

    pub fn from_pkcs8(der: &[u8]) -> Result<Self, TokenError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &SystemRandom::new())
            .map_err(|_| TokenError::Key)?;
        let kid = B64.encode(&Sha256::digest(pair.public_key().as_ref())[..12]);
        Ok(Self { pair, kid })
    }

    pub fn issue(&self, claims: &Claims) -> Result<String, TokenError> {
        let header = json!({"typ": "JWT", "alg": "ES256", "kid": self.kid});
        let payload = serde_json::to_vec(claims).map_err(|_| TokenError::Malformed)?;
        let signed = format!("{}.{}", B64.encode(header.to_string()), B64.encode(payload));
        let signature = self
            .pair
            .sign(&SystemRandom::new(), signed.as_bytes())
            .map_err(|_| TokenError::Key)?;
        Ok(format!("{signed}.{}", B64.encode(signature.as_ref())))
    }

    /// Checks signature, lifetime and audience; `audience_prefix` is this server's base URL.
    pub fn verify(&self, token: &str, audience_prefix: &str, now: SystemTime) -> Result<Claims, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let decode = |part: &str| B64.decode(part).map_err(|_| TokenError::Malformed);
        let header: Value = serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Malformed)?;
        if header["alg"] != "ES256" {
            return Err(TokenError::Malformed);
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.pair.public_key().as_ref())
            .verify(signed.as_bytes(), &decode(signature)?)
            .map_err(|_| TokenError::Signature)?;
        let claims: Claims = serde_json::from_slice(&decode(payload)?).map_err(|_| TokenError::Malformed)?;
        let now_s = unix_s(now);
        if claims.exp <= now_s || claims.nbf > now_s + 300 {
            return Err(TokenError::Expired);
        }
        let rest = claims.aud.strip_prefix(audience_prefix);
        if !rest.is_some_and(|r| r.is_empty() || r == "/" || r == "/arm" || r == "/arm/") {
            return Err(TokenError::Audience(claims.aud));
        }
        Ok(claims)
    }

    /// The public key as a JWK set.
    pub fn jwks(&self) -> Value {
        // Uncompressed point: 0x04, x, y.
        let point = self.pair.public_key().as_ref();
        json!({"keys": [{"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.kid,
            "x": B64.encode(&point[1..33]), "y": B64.encode(&point[33..65])}]})
    }
}

pub fn unix_s(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Who may log in: one service principal.
#[derive(Clone, Debug)]
pub struct ServicePrincipal {
    pub client_id: String,
    pub client_secret: String,
    pub tenant: String,
}

/// A refused token request: `error` and `error_description` of RFC 6749, section 5.2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub error: &'static str,
    pub description: String,
}

impl Refusal {
    fn new(error: &'static str, description: impl Into<String>) -> Self {
        Self {
            error,
            description: description.into(),
        }
    }

    pub fn to_value(&self) -> Value {
        json!({"error": self.error, "error_description": self.description})
    }
}

/// Answers a token request given as a decoded form. `authority` is the path in front of the token endpoint.
pub fn grant(
    key: &TokenKey,
    sp: &ServicePrincipal,
    base_url: &str,
    authority: &str,
    form: &[(String, String)],
    now: SystemTime,
) -> Result<Value, Refusal> {
    let get = |name: &str| form.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
    let tenant = authority.rsplit('/').next().unwrap_or_default();
    if !tenant.eq_ignore_ascii_case("adfs") && !tenant.eq_ignore_ascii_case(&sp.tenant) {
        let text = format!(
            "tenant '{tenant}' is not known here; the tenant of this platform is {}",
            sp.tenant
        );
        return Err(Refusal::new("invalid_request", text));
    }
    match get("grant_type") {
        Some("client_credentials") => {}
        Some(other) => {
            let text = format!(
                "grant_type '{other}' is not served; log in with: az login --service-principal -u <client id> -p <secret> --tenant {}",
                sp.tenant
            );
            return Err(Refusal::new("unsupported_grant_type", text));
        }
        None => return Err(Refusal::new("invalid_request", "grant_type is missing")),
    }
    if get("client_assertion").is_some() {
        return Err(Refusal::new(
            "invalid_client",
            "client assertions are not served; use a client secret",
        ));
    }
    let id_ok = get("client_id").is_some_and(|id| id.eq_ignore_ascii_case(&sp.client_id));
    let secret_ok = same(get("client_secret").unwrap_or_default(), &sp.client_secret);
    if !(id_ok && secret_ok) {
        return Err(Refusal::new(
            "invalid_client",
            "the client id or the client secret is wrong",
        ));
    }
    let aud = match (get("scope"), get("resource")) {
        (Some(scope), _) => scope
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .trim_end_matches("/.default"),
        (None, Some(resource)) => resource,
        (None, None) => return Err(Refusal::new("invalid_scope", "scope is missing")),
    };
    let iat = unix_s(now);
    let claims = Claims {
        aud: aud.to_owned(),
        iss: format!("{base_url}/{authority}"),
        tid: sp.tenant.clone(),
        oid: object_id(&sp.client_id),
        sub: object_id(&sp.client_id),
        appid: sp.client_id.clone(),
        idtyp: "app".to_owned(),
        iat,
        nbf: iat,
        exp: iat + LIFETIME_S,
        ver: "1.0".to_owned(),
        xms_mirid: None,
    };
    let access_token = key
        .issue(&claims)
        .map_err(|_| Refusal::new("server_error", "the token could not be signed"))?;
    Ok(
        json!({"token_type": "Bearer", "expires_in": LIFETIME_S, "ext_expires_in": LIFETIME_S, "access_token": access_token}),
    )
}

/// A managed identity, as tokens name it.
#[derive(Clone, Copy, Debug)]
pub struct ManagedIdentity<'a> {
    pub client_id: &'a str,
    pub object_id: &'a str,
    /// ARM id.
    pub resource_id: &'a str,
}

/// Claims of a managed identity's token for the audience `resource`. `base_url` and `tenant` are the platform's own.
pub fn identity_claims(
    identity: &ManagedIdentity<'_>,
    base_url: &str,
    tenant: &str,
    resource: &str,
    now: SystemTime,
) -> Claims {
    let iat = unix_s(now);
    Claims {
        aud: resource.to_owned(),
        iss: format!("{base_url}/adfs"),
        tid: tenant.to_owned(),
        oid: identity.object_id.to_owned(),
        sub: identity.object_id.to_owned(),
        appid: identity.client_id.to_owned(),
        idtyp: "app".to_owned(),
        iat,
        nbf: iat,
        exp: iat + LIFETIME_S,
        ver: "1.0".to_owned(),
        xms_mirid: Some(identity.resource_id.to_owned()),
    }
}

/// Object id of a principal: a name-based GUID, the same on every run.
pub fn object_id(name: &str) -> String {
    guid(&format!("principal {}", name.to_lowercase()))
}

/// A GUID that depends only on `seed` (random-looking, marked as version 8).
pub fn guid(seed: &str) -> String {
    let hash = Sha256::digest(seed.as_bytes());
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

/// Equality whose time does not depend on where the strings differ.
fn same(a: &str, b: &str) -> bool {
    let (a, b) = (Sha256::digest(a.as_bytes()), Sha256::digest(b.as_bytes()));
    a.iter().zip(b.iter()).fold(0u8, |acc, (x, y)| acc | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BASE: &str = "https://localhost:1";

    fn sp() -> ServicePrincipal {
        ServicePrincipal {
            client_id: "app".into(),
            client_secret: "s3".into(),
            tenant: "t-1".into(),
        }
    }

    fn form(secret: &str, scope: &str) -> Vec<(String, String)> {
        [
            ("grant_type", "client_credentials"),
            ("client_id", "APP"),
            ("client_secret", secret),
            ("scope", scope),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .to_vec()
    }

    #[test]
    fn a_granted_token_verifies_until_it_expires_and_only_here() {
        let key = TokenKey::from_pkcs8(&TokenKey::generate().unwrap()).unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let reply = grant(
            &key,
            &sp(),
            BASE,
            "adfs",
            &form("s3", &format!("{BASE}/arm/.default")),
            now,
        )
        .unwrap();
        let token = reply["access_token"].as_str().unwrap();
        assert_eq!(key.verify(token, BASE, now).unwrap().appid, "app");
        assert_eq!(
            key.verify(token, BASE, now + Duration::from_secs(LIFETIME_S)),
            Err(TokenError::Expired)
        );
        assert!(matches!(
            key.verify(token, "https://other", now),
            Err(TokenError::Audience(_))
        ));
        let other = TokenKey::from_pkcs8(&TokenKey::generate().unwrap()).unwrap();
        assert_eq!(other.verify(token, BASE, now), Err(TokenError::Signature));
        for broken in ["", "a.b", "a.b.c", &token[1..], &token[..token.len() - 4]] {
            assert!(key.verify(broken, BASE, now).is_err(), "{broken}");
        }
        // A foreign audience gets a token (registries ask for one), which opens nothing here.
        let acr = grant(
            &key,
            &sp(),
            BASE,
            "adfs",
            &form("s3", "https://containerregistry.azure.net/.default"),
            now,
        )
        .unwrap();
        assert!(matches!(
            key.verify(acr["access_token"].as_str().unwrap(), BASE, now),
            Err(TokenError::Audience(_))
        ));
    }

    #[test]
    fn refusals_say_why() {
        let key = TokenKey::from_pkcs8(&TokenKey::generate().unwrap()).unwrap();
        let now = SystemTime::now();
        let error = |authority: &str, form: &[(String, String)]| {
            grant(&key, &sp(), BASE, authority, form, now).unwrap_err().error
        };
        assert_eq!(error("adfs", &form("wrong", "x")), "invalid_client");
        assert_eq!(error("other-tenant", &form("s3", "x")), "invalid_request");
        assert_eq!(
            error("t-1", &[("grant_type".into(), "password".into())]),
            "unsupported_grant_type"
        );
        assert_eq!(error("adfs/adfs", &[]), "invalid_request");
    }
}
